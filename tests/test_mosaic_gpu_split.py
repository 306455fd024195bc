"""The Hopper kernel that splits the input channels: its settings and lowering anywhere, its results on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import make_case, relative_error, require_hopper

import pallas_kernels
from pallas_kernels.benchmark_data import bfloat16_array
from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu, xla
from pallas_kernels.mixed_matmul.mosaic_gpu.split import config as mosaic_gpu_split_config
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig, MosaicGpuSplitConfig
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

QUANTIZING_CONFIGS = [
    MosaicGpuQuantizeConfig(8, 2, 1, 16, 4),
    MosaicGpuQuantizeConfig(8, 4, 2, 16, 2),
    MosaicGpuQuantizeConfig(16, 3, 1, 12, 2),
]

ALL_CANDIDATES = sorted(
    {config for tokens in (1, 9, 17, 33, 129) for config in mosaic_gpu_split_config.candidates(tokens)}, key=str
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
    sums = fitted.sets_of_sums(problem, 132) * (fitted.splits - 1) * 64 * fitted.tile_tokens * 4
    assert sums + fitted.stages * (64 * 128 + fitted.tile_tokens * 128) < 227 * 1024
    if groups == 32 or groups == 112:
        assert (fitted.warpgroups, fitted.cluster) == (config.warpgroups, config.cluster)


@pytest.mark.parametrize("config", QUANTIZING_CONFIGS, ids=str)
def test_quantised_activations_take_shared_memory_from_the_ring(config: MosaicGpuQuantizeConfig):
    problem = Problem(config.tile_tokens, 128 * 48 * config.cluster, 128, 300, 100)
    fitted = config.fitted(problem, quantizes=True)
    sums = fitted.sets_of_sums(problem, 132) * (fitted.splits - 1) * 64 * fitted.tile_tokens * 4
    activations = 48 * fitted.tile_tokens * 132
    assert sums + activations + fitted.stages * 64 * 128 < 227 * 1024
    assert config.fits(problem, 132)
    assert not config.fits(Problem(config.tile_tokens + 1, 512, 128, 300, 100), 132)  # two tiles of tokens
    assert not config.fits(Problem(config.tile_tokens, 128 * 1024, 128, 300, 100), 132)


def test_sums_of_two_tiles_have_room_only_where_a_cluster_computes_several():
    config = MosaicGpuSplitConfig(16, 2, 2, 16, 4)
    assert config.sets_of_sums(Problem(16, 4096, 128, 64 * 66, 0), 132) == 1
    assert config.sets_of_sums(Problem(16, 4096, 128, 64 * 67, 0), 132) == 2
    assert config.sets_of_sums(Problem(16, 4096, 128, 64 * 66, 0), 114) == 2


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


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize(("config", "group_size"), list(zip(QUANTIZING_CONFIGS, (128, 64, 32), strict=True)), ids=str)
def test_quantising_kernel_lowers_without_a_gpu(config: MosaicGpuQuantizeConfig, group_size: int):
    case = make_case(5, 70, 1536, group_size, 0.3)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.weight, None))
    run = jax.jit(
        lambda x, *arguments: pallas_mosaic_gpu.quantized_linear(x, *arguments, out_dtype="float32", config=config)
    )
    x = jax.ShapeDtypeStruct((5, 1536), jnp.bfloat16)
    assert "mosaic_gpu" in run.trace(x, *arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("config", QUANTIZING_CONFIGS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    # In the last a thread takes pieces again and again, and the last time nothing is left for some lanes of a warp.
    [
        (1, 70, 4096, 128, "bfloat16"),
        (8, 9000, 1024, 64, "float32"),
        (5, 77, 640, 32, "float16"),
        (7, 300, 3200, 128, "bfloat16"),
    ],
    ids=str,
)
def test_quantising_in_the_kernel_gives_the_codes_of_the_quantising_one(
    config: MosaicGpuQuantizeConfig, sizes: tuple[int, int, int, int, str]
):
    require_hopper()
    tokens, out_features, in_features, group_size, dtype = sizes
    case = make_case(tokens, out_features, in_features, group_size, 0.2, bias=True)
    weight, bias = jax.tree.map(jnp.asarray, (case.weight, case.bias))
    x = bfloat16_array((tokens, in_features), 1).astype(dtype).at[0, :group_size].set(0)
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.quantized_linear(*arguments, out_dtype="float32", config=config))
    first = run(x, weight, bias)
    activations = pallas_kernels.quantize_activations(x, group_size)
    assert relative_error(first, xla.mixed_matmul(activations, weight, bias, out_dtype=jnp.dtype("float32"))) < 1e-6
    for _ in range(5):
        assert (run(x, weight, bias) == first).all()


@pytest.mark.gpu
def test_quantized_linear_takes_the_quantising_kernel_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch):
    require_hopper()
    case = make_case(2, 4096, 1024, 128, 0.1)
    weight = jax.tree.map(jnp.asarray, case.weight)
    x = bfloat16_array((2, 1024), 1)
    activations = pallas_kernels.quantize_activations(x, 128)
    expected = pallas_kernels.mixed_matmul(activations, weight, out_dtype="float32")
    monkeypatch.setattr(pallas_mosaic_gpu, "QUANTIZES_ITSELF", True)
    monkeypatch.setattr(configs, "quantizing", lambda *_: QUANTIZING_CONFIGS[0])
    text = jax.jit(lambda *a: pallas_kernels.quantized_linear(*a, out_dtype="float32")).lower(x, weight).as_text()
    assert "mosaic_gpu" in text
    assert "triton" not in text  # which is what quantises in a launch of its own
    assert relative_error(pallas_kernels.quantized_linear(x, weight, out_dtype="float32"), expected) < 1e-6


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
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import kernel as split

    threads = 128 * (warpgroups + 1)
    launched = threads * min(248, 65536 // threads // 8 * 8)  # as the PTX assembler allots them
    asked = 128 * (split.LOADER_REGISTERS + warpgroups * split.registers_of_a_computing_thread(warpgroups))
    assert asked <= launched
    assert split.registers_of_a_computing_thread(warpgroups) >= 112
