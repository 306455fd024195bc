"""The Hopper kernel that splits the input channels: its settings and lowering anywhere, its results on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import make_case, relative_error, require_hopper

from pallas_kernels.mixed_matmul import pallas_mosaic_gpu, pallas_mosaic_gpu_split_config
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_split_config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

CONFIGS = [
    MosaicGpuSplitConfig(8, 4, 1, 16, 2),
    MosaicGpuSplitConfig(16, 1, 1, 8, 4),
    MosaicGpuSplitConfig(16, 2, 2, 8, 2),
    MosaicGpuSplitConfig(16, 4, 4, 8, 1),
    MosaicGpuSplitConfig(48, 3, 1, 6, 2),
    MosaicGpuSplitConfig(64, 2, 1, 8, 4),
    MosaicGpuSplitConfig(32, 1, 2, 16, 4),
]

ALL_CANDIDATES = sorted(
    {config for tokens in (1, 9, 17, 33, 129) for config in pallas_mosaic_gpu_split_config.candidates(tokens)}, key=str
)


def test_settings_that_the_kernel_cannot_take_are_refused():
    with pytest.raises(ValueError, match="tile_tokens must be one of"):
        MosaicGpuSplitConfig(40, 1, 1, 8, 1)
    with pytest.raises(ValueError, match="warpgroups must be 1 to 4"):
        MosaicGpuSplitConfig(16, 5, 1, 10, 1)
    with pytest.raises(ValueError, match="stages must be a multiple"):
        MosaicGpuSplitConfig(16, 4, 1, 6, 2)


@pytest.mark.parametrize("config", CONFIGS + ALL_CANDIDATES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 7, 28, 32, 112])
def test_shares_divide_the_groups_and_fit_the_shared_memory(config: MosaicGpuSplitConfig, groups: int):
    problem = Problem(config.tile_tokens, 128 * groups, 128, 300, 100)
    fitted = config.fitted(problem)
    assert groups % (fitted.cluster * fitted.run) == 0
    assert fitted.fitted(problem) == fitted
    sums = 2 * (fitted.splits - 1) * 64 * fitted.tile_tokens * 4
    assert sums + fitted.stages * (64 * 128 + fitted.tile_tokens * 128) < 227 * 1024
    if groups == 32 or groups == 112:
        assert (fitted.warpgroups, fitted.cluster) == (config.warpgroups, config.cluster)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("config", CONFIGS[2:5], ids=str)
@pytest.mark.parametrize("sizes", [(33, 201, 512, 128, 0.3), (5, 70, 192, 64, 0.0), (1, 70, 96, 32, 1.0)], ids=str)
def test_lowers_without_a_gpu(config: MosaicGpuSplitConfig, sizes: tuple[int, int, int, int, float]):
    """The whole lowering is Python and runs anywhere; what it gives is a call of the Mosaic GPU compiler."""
    case = make_case(*sizes, bias=True)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.activations, case.weight, case.bias)
    )
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype=jnp.bfloat16, config=config))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    # The last has several tiles for each cluster, of both kinds, so that slots and sums are used again.
    [(11, 70, 640, 128, 0.2), (33, 333, 1024, 64, 0.2), (65, 130, 2048, 128, 0.0), (16, 25001, 1024, 128, 0.5)],
    ids=str,
)
def test_configurations(config: MosaicGpuSplitConfig, sizes: tuple[int, int, int, int, float]):
    require_hopper()
    case = make_case(*sizes, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, case.weight, case.bias))
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=config))
    first = run(*arguments)
    assert relative_error(first, case.expected) < 1e-6
    for _ in range(5):
        assert (run(*arguments) == first).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
def test_a_block_asks_for_no_more_registers_than_it_was_launched_with(warpgroups: int):
    """Otherwise it waits for them forever."""
    from pallas_kernels.mixed_matmul import pallas_mosaic_gpu_split as split

    threads = 128 * (warpgroups + 1)
    launched = threads * min(248, 65536 // threads // 8 * 8)  # as the PTX assembler allots them
    asked = 128 * (split.LOADER_REGISTERS + warpgroups * split.registers_of_a_computing_thread(warpgroups))
    assert asked <= launched
    assert split.registers_of_a_computing_thread(warpgroups) >= 112
