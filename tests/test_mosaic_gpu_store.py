"""The output path of the Hopper kernel: where it stages tiles and how it lowers anywhere, what it stores on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Case, make_case, require_hopper

from pallas_kernels import packing
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu
from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have on a Hopper GPU."""

CONFIGS = [
    MosaicGpuConfig(),
    MosaicGpuConfig(64, 2, 8, 4, parts=1),
    MosaicGpuConfig(48, 2, 4, 2, parts=1),
    MosaicGpuConfig(16, 1, 8, 2, parts=1),
    MosaicGpuConfig(8, 2, 8, 4, parts=1),
    MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True),
    MosaicGpuConfig(96, 1, 4, 4, parts=1, unsigned=True),
]

ORDERS = {
    "in order": lambda n: np.arange(n),
    "from 16 on": lambda n: np.roll(np.arange(n), 16),
    "from an odd column on": lambda n: np.roll(np.arange(n), 3),
    "halves swapped": lambda n: np.roll(np.arange(n), n // 2),
    "reversed": lambda n: np.arange(n)[::-1],
    "blocks of 64 reversed": lambda n: np.concatenate(np.split(np.arange(n), range(64, n, 64))[::-1]),
    "one pair swapped in each 64": lambda n: np.arange(n) ^ (np.arange(n) % 64 < 2) * (np.arange(n) < n // 2 * 2),
    "at random": lambda n: np.random.default_rng(n).permutation(n),
}


def bits_apart(n: int, n4: int) -> np.ndarray:
    """The order of the format: 8-bit channels drawn at random, those of each width ascending."""
    drawn = np.random.default_rng(n).permutation(n)
    return np.concatenate([np.sort(drawn[:n4]), np.sort(drawn[n4:])])


def reordered(case: Case, order: np.ndarray) -> Case:
    """The case with its rows of output elsewhere."""
    expected = np.empty_like(case.expected)
    expected[:, order] = case.expected[:, np.asarray(case.weight.channel_order)]
    weight = dataclasses.replace(case.weight, channel_order=order.astype(np.int32))
    return dataclasses.replace(case, weight=weight, expected=expected)


def prepared(case: Case, config: MosaicGpuConfig) -> Case:
    """The case with what the weight needs for the settings."""
    if not config.unsigned or case.weight.group_size != 128:
        return case
    return dataclasses.replace(case, weight=packing.with_code_sums(packing.with_aligned_rows(case.weight)))


def check(case: Case, config: MosaicGpuConfig, out_dtype: str, bias: bool) -> None:
    """Every element of the output is there and right, though the memory it lands in was full of NaN."""
    require_hopper()
    case = prepared(case, config)
    added = np.random.default_rng(1).standard_normal(case.weight.out_features).astype(np.float32) if bias else None
    arguments = jax.tree.map(jnp.asarray, (case.activations, case.weight, added))
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype=out_dtype, config=config))
    compiled = run.lower(*arguments).compile()
    poison = [jnp.full(case.expected.shape, jnp.nan, out_dtype) for _ in range(3)]
    jax.block_until_ready(poison)
    del poison
    out = np.asarray(compiled(*arguments)).astype(np.float64)
    expected = case.expected + (0 if added is None else added.astype(np.float64))
    rounding = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}[out_dtype]
    limit = 2e-4 if config.unsigned else 1e-6  # zero points are taken off with 16 bits
    wrong = ~(np.abs(out - expected) <= rounding * np.abs(expected) + limit * np.abs(expected).max())
    assert not wrong.any(), f"{wrong.sum()} elements, the first at {np.argwhere(wrong)[:4].tolist()}"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("n8", [0, 1, 2867, 28672])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_shared_memory_suffices(n8: int, itemsize: int):
    from pallas_kernels.mixed_matmul.pallas_mosaic_gpu import kernel_type

    for tokens in (1, 16, 33, 64, 65, 128, 512, 4095):
        problem = Problem(tokens, 4096, 128, 28672 - n8, n8)
        for config in (mosaic_gpu_config.default(problem), *mosaic_gpu_config.candidates(tokens)):
            kernel = kernel_type(config)(tokens, 28672 - n8, n8, 32, 128, itemsize, config.fitted(tokens))
            arrays = [ref.inner_aval for ref in kernel.scratch().values() if hasattr(ref, "inner_aval")]
            used = sum(-(-array.size * array.dtype.itemsize // 1024) * 1024 for array in arrays)
            assert used <= SHARED_MEMORY, (config, used)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "out_dtype", "bias"),
    [((130, 208, 256, 128, 0.3), "float32", True), ((65, 201, 128, 64, 0.0), "float16", False)],
    ids=str,
)
def test_lowers_without_a_gpu(
    config: MosaicGpuConfig, sizes: tuple[int, int, int, int, float], out_dtype: str, bias: bool
):
    case = prepared(make_case(*sizes, bias=bias), config)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.activations, case.weight, case.bias)
    )
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype=out_dtype, config=config))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (300, 1008, 0.0, "bfloat16"),
        (257, 333, 0.1, "bfloat16"),
        (192, 1024, 0.5, "float32"),
        (65, 2064, 1.0, "float16"),
        (5, 48, 0.1, "bfloat16"),
        (129, 130, 0.0, "float32"),
    ],
    ids=str,
)
def test_all_of_the_output_is_stored(config: MosaicGpuConfig, sizes: tuple[int, int, float, str]):
    m, n, share, out_dtype = sizes
    case = make_case(m, n, 256, 128, share)
    check(reordered(case, bits_apart(n, case.weight.n4)), config, out_dtype, bias=m % 2 == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-2]], ids=str)
@pytest.mark.parametrize(("n", "out_dtype"), [(1000, "bfloat16"), (528, "float32")])
def test_any_order_of_the_columns(order: str, n: int, out_dtype: str, config: MosaicGpuConfig):
    columns = ORDERS[order](n)
    assert sorted(columns) == list(range(n))
    check(reordered(make_case(200, n, 256, 128, 0.25), columns), config, out_dtype, bias=True)
