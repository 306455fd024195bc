"""The Hopper kernel: its settings and its lowering anywhere, its results (beyond tests/test_kernels.py) on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import make_case, relative_error

from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu, pallas_mosaic_gpu_config
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

CONFIGS = [
    MosaicGpuConfig(),
    MosaicGpuConfig(stages=4, unroll=4, band=4),
    MosaicGpuConfig(stages=5, unroll=1),
    MosaicGpuConfig(64, 2, 8, 4, parts=2),
    MosaicGpuConfig(64, 1, 12, 4, parts=1),
    MosaicGpuConfig(16, 1, 16, 4, parts=1),
    MosaicGpuConfig(8, 2, 8, 2, parts=1),
]


def test_settings_that_the_kernel_cannot_take_are_refused():
    with pytest.raises(ValueError, match="tile_tokens must be parts times one of"):
        MosaicGpuConfig(tile_tokens=40, parts=1)
    with pytest.raises(ValueError, match="compute_warpgroups must be 1 or 2"):
        MosaicGpuConfig(compute_warpgroups=3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_part_of_a_tile_has_a_token(config: MosaicGpuConfig):
    for tokens in range(1, 2 * config.tile_tokens):
        fitted = config.fitted(tokens)
        assert fitted.tile_tokens // fitted.parts in pallas_mosaic_gpu_config.DOT_TOKENS
        assert fitted.tile_tokens * (fitted.parts - 1) // fitted.parts < tokens
        assert -(-tokens // fitted.tile_tokens) == -(-tokens // config.tile_tokens)


def test_rule_and_candidates_are_settings_that_fit_the_kernel():
    for tokens in (1, 8, 9, 33, 64, 65, 300, 4096):
        for n in (64, 4096, 28672):
            config = pallas_mosaic_gpu_config.default(Problem(tokens, 4096, 128, n // 2, n - n // 2))
            assert config.tile_tokens >= min(tokens, 64)
        assert pallas_mosaic_gpu_config.candidates(tokens)


def test_the_faster_implementation_of_the_nearest_case_comes_first(monkeypatch: pytest.MonkeyPatch):
    triton = FewTokensConfig(16, 16, 8, 1, splits=1, prefetch="none")
    entries = (
        configs.Entry(16, 4096, 4096, 128, 0.1, triton, 7.0),
        configs.Entry(16, 4096, 4096, 128, 0.1, MosaicGpuConfig(16, parts=1), 8.0),
        configs.Entry(64, 4096, 4096, 128, 0.1, triton, 20.0),
        configs.Entry(64, 4096, 4096, 128, 0.1, MosaicGpuConfig(64, parts=1), 11.0),
    )
    monkeypatch.setattr(configs, "read_table", lambda device_kind: entries)
    few, many = (Problem(tokens, 4096, 128, 3686, 410) for tokens in (15, 60))
    assert configs.by_speed(few, "any") == ("triton", "mosaic_gpu")
    assert configs.by_speed(many, "any") == ("mosaic_gpu", "triton")
    assert configs.choose(few, "any", "triton") is triton
    assert configs.choose(many, "any", "mosaic_gpu") == MosaicGpuConfig(64, parts=1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("config", CONFIGS[:1] + CONFIGS[-2:], ids=str)
@pytest.mark.parametrize("sizes", [(130, 201, 256, 128, 0.3), (33, 70, 192, 64, 0.0), (1, 70, 96, 32, 1.0)], ids=str)
def test_lowers_without_a_gpu(config: MosaicGpuConfig, sizes: tuple[int, int, int, int, float]):
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
    [(11, 70, 640, 128, 0.2), (300, 333, 1024, 64, 0.2), (65, 130, 2048, 128, 0.0), (33, 70, 576, 64, 0.5)],
    ids=str,
)
def test_configurations(config: MosaicGpuConfig, sizes: tuple[int, int, int, int, float]):
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("the kernel is for Hopper GPUs")
    case = make_case(*sizes, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, case.weight, case.bias))
    out = pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=config)
    assert relative_error(out, case.expected) < 1e-6


@pytest.mark.gpu
def test_tiles_of_both_kinds_follow_each_other():
    """More tiles than multiprocessors, so that slots of the ring pass from 4-bit to 8-bit channels and back."""
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("the kernel is for Hopper GPUs")
    case = make_case(1500, 3001, 512, 128, 0.3, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, case.weight, case.bias))
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32"))
    first = run(*arguments)
    assert relative_error(first, case.expected) < 1e-6
    for _ in range(5):
        assert (run(*arguments) == first).all()
