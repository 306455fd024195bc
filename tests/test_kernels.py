"""Every implementation of every operation against float64 NumPy: one suite for the CPU and the GPU.

Interpret mode runs the Triton kernels on the CPU, slowly, so that it gets only a few small cases; on a GPU the whole
lists run, compiled.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Case, assemble, make_case, relative_error

from pallas_kernels import (
    PackedWeight,
    QuantizedActivations,
    mixed_matmul,
    quantize_activations,
    quantized_linear,
    registry,
    rms_norm_quantize,
    swiglu_quantize,
)
from pallas_kernels.mixed_matmul import api as matmul_api
from pallas_kernels.mixed_matmul import pallas_triton, xla
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.mixed_matmul.tuned_table import H100

gpu = pytest.mark.gpu
INTERPRETED = pytest.param(
    "triton_interpret",
    marks=pytest.mark.skipif(registry.default_platform() != "cpu", reason="interpret mode is for a CPU"),
)
IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=gpu)]
MATMULS = [*IMPLEMENTATIONS, pytest.param("mosaic_gpu", marks=gpu)]
OUT_ERROR = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 1e-6}
"""Largest relative error of an output: its rounding, and float32 accumulation."""

SMALL = [  # tokens, out_features, in_features, group_size, share of 8-bit channels
    (1, 37, 256, 64, 0.1),
    (5, 19, 96, 32, 0.3),
    (17, 33, 256, 128, 0.5),
]
WIDE = [
    (m, n, k, group_size, share)
    for m in (1, 3, 8, 16, 17, 31, 33, 64, 100, 129, 300)
    for n, k in ((1, 128), (37, 384), (257, 1152), (515, 640))
    for group_size in (32, 64, 128)
    for share in (0.0, 0.1, 1.0)
    if (m + n + k // 32 + group_size) % 3 == 0 or (m <= 17 and n == 257)  # a third of all combinations
]


def on_device(case: Case) -> tuple[QuantizedActivations, object, jax.Array | None]:
    return jax.tree.map(jnp.asarray, (case.activations, case.weight, case.bias))


def poison(shape: tuple[int, ...], dtype: str) -> None:
    """Leave freed memory full of NaN where the next output is likely to be allocated."""
    for buffer in [jnp.full(shape, jnp.nan, dtype) for _ in range(3)]:
        buffer.block_until_ready()
        buffer.delete()


def check_matmul(case: Case, implementation: str, dtype: str = "float32", **settings: object) -> None:
    activations, weight, bias = on_device(case)
    poison(case.expected.shape, dtype)
    run = jax.jit(lambda *args: mixed_matmul(*args, out_dtype=dtype, implementation=implementation, **settings))
    out = run(activations, weight, bias)
    assert out.shape == case.expected.shape
    assert out.dtype == dtype
    assert relative_error(out, case.expected) < OUT_ERROR[dtype]


@pytest.mark.parametrize("implementation", [*MATMULS, INTERPRETED])
@pytest.mark.parametrize("sizes", SMALL)
def test_matmul_small(implementation: str, sizes: tuple[int, int, int, int, float]):
    check_matmul(make_case(*sizes, bias=True), implementation)


@pytest.mark.parametrize("implementation", MATMULS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_matmul_output_dtypes(implementation: str, dtype: str):
    check_matmul(make_case(9, 100, 512, 128, 0.1), implementation, dtype)


@gpu
@pytest.mark.parametrize("implementation", [name for name in ("triton", "mosaic_gpu") if name in str(MATMULS)])
@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_matmul_wide(implementation: str, sizes: tuple[int, int, int, int, float]):
    check_matmul(make_case(*sizes, bias=sizes[0] % 2 == 0), implementation, "bfloat16")


@pytest.mark.parametrize("implementation", MATMULS)
@pytest.mark.parametrize("order", ["reversed", "identity", "interleaved", "shuffled"])
def test_matmul_channel_orders(implementation: str, order: str):
    check_matmul(make_case(4, 131, 256, 64, 0.1, order=order, bias=True), implementation)


@pytest.mark.parametrize("implementation", [*MATMULS, INTERPRETED])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("sign", [1, -1])
def test_matmul_at_the_extremes_of_the_conversion(implementation: str, group_size: int, sign: int):
    """Codes at their limits: |dot| = 127 * 128 * group_size, 2**21 for groups of 128, close to the limit of 2**22."""
    n4, n8, k = 5, 6, 2 * group_size
    codes4 = np.full((n4, k), 15 if sign > 0 else 0)
    case = assemble(
        activation_codes=np.full((3, k), 127),
        activation_scales=np.full((2, 3), 0.5, np.float32),
        codes4=codes4,
        zero_points4=15 - codes4[:, ::group_size],
        codes8=np.full((n8, k), 127 if sign > 0 else -128),
        scales=np.full((n4 + n8, 2), 1 + 2**-10, np.float16),  # all 11 bits of the significand in use
        order=np.arange(n4 + n8),
        bias=None,
        group_size=group_size,
    )
    activations, weight, _ = on_device(case)
    out = mixed_matmul(activations, weight, out_dtype="float32", implementation=implementation)
    np.testing.assert_allclose(out, case.expected, rtol=2e-7)


@pytest.mark.parametrize("implementation", MATMULS)
def test_integer_part_is_exact(implementation: str):
    """With all scales 1 and a single group, every output is an integer below 2**22: no rounding anywhere."""
    rng = np.random.default_rng(0)
    case = assemble(
        activation_codes=rng.integers(-127, 128, (19, 128)),
        activation_scales=np.ones((1, 19), np.float32),
        codes4=rng.integers(0, 16, (70, 128)),
        zero_points4=rng.integers(0, 16, (70, 1)),
        codes8=rng.integers(-128, 128, (31, 128)),
        scales=np.ones((101, 1), np.float16),
        order=rng.permutation(101),
        bias=None,
        group_size=128,
    )
    activations, weight, _ = on_device(case)
    out = mixed_matmul(activations, weight, out_dtype="float32", implementation=implementation)
    np.testing.assert_array_equal(out, case.expected)


@pytest.mark.skipif(registry.default_platform() != "cpu", reason="a GPU takes the float32 dots of the reference alone")
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 37, 256, 64, 0.2),
        (1, 20, 96, 32, 0.0),
        (2, 33, 384, 128, 1.0),
        (4, 300, 192, 64, 1.0),
        (1, 37, 32 * 70, 32, 0.2),  # more groups than are added up in one step, and no multiple of them
    ],
    ids=str,
)
def test_the_integer_products_of_a_cpu_are_the_float_ones_to_the_bit(
    sizes: tuple[int, int, int, int, float], monkeypatch: pytest.MonkeyPatch
):
    """So a token's result does not depend on how many others there are."""
    case = make_case(*sizes, bias=True)
    asked = []

    def run(few_tokens: int) -> np.ndarray:
        monkeypatch.setattr(xla, "FEW_TOKENS", few_tokens)
        monkeypatch.setattr(xla, "STRIP", 16 if few_tokens else 10**6)
        matmul = jax.jit(lambda *arguments: xla.mixed_matmul(*arguments, out_dtype="float32"))
        return np.asarray(matmul(*on_device(case)))

    integer_products = xla._integer_products
    monkeypatch.setattr(xla, "_integer_products", lambda *args: asked.append(None) or integer_products(*args))
    floats = run(0)
    assert not asked
    np.testing.assert_array_equal(run(4), floats)
    assert asked


@pytest.mark.parametrize(("tokens", "n"), [(0, 32), (3, 0)])
def test_nothing_to_compute_is_left_to_the_reference(tokens: int, n: int, monkeypatch: pytest.MonkeyPatch):
    """On a GPU too: no kernel is launched for no outputs."""
    for name, value in (("default_platform", "gpu"), ("device_kind", H100), ("compute_capability", (9, 0))):
        monkeypatch.setattr(registry, name, lambda value=value: value)
    weight = make_case(1, 32, 256, 128, 0.5).weight
    weight = weight if n else jax.tree.map(lambda x: x[:, :0] if x.ndim > 1 else x[:0], weight)
    activations = QuantizedActivations(np.zeros((tokens, 256), np.int8), np.zeros((2, tokens), np.float32), 128)
    assert matmul_api.OPERATION.choose("auto", activations, weight, None, out_dtype=jnp.float32) == "xla"
    assert mixed_matmul(activations, weight, out_dtype="float32").shape == (tokens, n)
    if tokens == 0:
        with pytest.warns(UserWarning, match="quantize_activations: no kernel can run .*nothing to compute"):
            assert quantized_linear(jnp.ones((0, 256)), weight, out_dtype="float32").shape == (0, n)


@pytest.mark.parametrize("implementation", MATMULS)
def test_matmul_is_deterministic(implementation: str):
    activations, weight, _ = on_device(make_case(16, 300, 1024, 128, 0.1))
    run = jax.jit(lambda a, w: mixed_matmul(a, w, out_dtype="bfloat16", implementation=implementation))
    first = np.asarray(run(activations, weight))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run(activations, weight)), first)


INTERPRETED_CONFIGS = [
    FewTokensConfig(16, 8, 2, 1, 2, "none"),
    FewTokensConfig(32, 16, 2, 1, 3, "all"),
    ManyTokensConfig(16, 32, 4, 2),
]
COMPILED_CONFIGS = [
    FewTokensConfig(16, 8, 16, 1, 1, "weights"),
    FewTokensConfig(32, 16, 8, 2, 1, "none"),
    FewTokensConfig(64, 16, 4, 1, 2, "all"),
    FewTokensConfig(32, 32, 4, 1, 4, "weights"),
    ManyTokensConfig(64, 32, 4, 4),
    ManyTokensConfig(64, 128, 4, 3),
    ManyTokensConfig(128, 64, 8, 2),
]


@pytest.mark.parametrize(
    ("config", "interpret"),
    [pytest.param(config, True, marks=INTERPRETED.marks) for config in INTERPRETED_CONFIGS]
    + [pytest.param(config, False, marks=gpu) for config in COMPILED_CONFIGS],
    ids=str,
)
def test_triton_configurations(config: object, interpret: bool):
    for sizes in [(11, 70, 640, 128, 0.2), (40, 33, 320, 64, 0.2)][: 1 if interpret else 2]:
        case = make_case(*sizes, bias=True)
        out = pallas_triton.mixed_matmul(*on_device(case), out_dtype="float32", config=config, interpret=interpret)
        assert relative_error(out, case.expected) < 1e-6


@gpu
def test_counters_of_a_split_product_can_be_used_twice():
    """Products that split K count in a buffer of the activations: a second product must still find zeros there."""
    case, other = make_case(9, 70, 640, 128, 0.2), make_case(9, 40, 640, 128, 0.5, seed=1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 640)), "bfloat16")
    config = FewTokensConfig(16, 16, 4, 1, 3, "weights")

    @jax.jit
    def both(x: jax.Array, first: PackedWeight, second: PackedWeight) -> tuple[jax.Array, ...]:
        activations = quantize_activations(x, 128, implementation="triton")
        assert activations.counters is not None
        return tuple(
            pallas_triton.mixed_matmul(activations, weight, None, out_dtype="float32", config=config)
            for weight in (first, second, first)
        )

    weights = [jax.tree.map(jnp.asarray, each.weight) for each in (case, other)]
    activations = quantize_activations(x, 128, implementation="triton")
    expected = [mixed_matmul(activations, weight, out_dtype="float32", implementation="xla") for weight in weights]
    for _ in range(3):
        actual = both(x, *weights)
        for out, reference in zip(actual, [*expected, expected[0]], strict=True):
            assert relative_error(out, np.asarray(reference, np.float64)) < 1e-6


def quantize_oracle(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quotients before rounding, and scales, in float64."""
    groups = x.reshape(x.shape[0], -1, group_size)
    scales = np.abs(groups).max(-1) / 127
    return (groups / np.where(scales > 0, scales, 1)[..., None]).reshape(x.shape), scales.T


def check_quantized(actual: QuantizedActivations, x: np.ndarray, group_size: int, slack: float) -> None:
    """Scales within `slack`, codes the rounded quotients, either neighbour where one is within `slack` of a tie."""
    quotients, scales = quantize_oracle(x, group_size)
    np.testing.assert_allclose(actual.scales, scales, rtol=slack, atol=1e-30)
    assert actual.codes.dtype == jnp.int8
    assert np.abs(np.asarray(actual.codes, np.float64) - quotients).max() <= 0.5 + 128 * slack


QUANTIZE_SIZES = [(1, 256, 128), (7, 192, 64), (33, 96, 32)]
QUANTIZERS = [*IMPLEMENTATIONS, INTERPRETED]


@pytest.mark.parametrize("implementation", QUANTIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "features", "group_size"), QUANTIZE_SIZES)
def test_quantize_activations(implementation: str, dtype: str, tokens: int, features: int, group_size: int):
    x = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, features)) * 3, dtype)
    x = x.at[0, :group_size].set(0).at[-1, -1].set(1000)
    actual = quantize_activations(x, group_size, implementation=implementation)
    check_quantized(actual, np.asarray(x, np.float64), group_size, 2e-7)
    assert not np.asarray(actual.codes)[0, :group_size].any()


@pytest.mark.parametrize("implementation", QUANTIZERS)
def test_quantize_rounds_half_to_even(implementation: str):
    values = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5] * 4, np.float32)[None]
    codes = quantize_activations(jnp.asarray(values), 32, implementation=implementation).codes
    np.testing.assert_array_equal(codes[0, :8], [127, 0, 2, 2, 0, -2, -2, -126])


@pytest.mark.parametrize("implementation", QUANTIZERS)
def test_quantize_extreme_magnitudes(implementation: str):
    x = jnp.asarray(np.array([1e-30, 3e38, 1e-44, 0.0], np.float32)[:, None] * np.linspace(-1, 1, 32, dtype=np.float32))
    actual = quantize_activations(x, 32, implementation=implementation)
    assert np.isfinite(np.asarray(actual.scales)).all()
    np.testing.assert_array_equal(actual.codes[0], actual.codes[1])
    assert not np.asarray(actual.codes)[2:].any()


@pytest.mark.parametrize("implementation", QUANTIZERS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("tokens", "features", "group_size"), QUANTIZE_SIZES)
def test_rms_norm_quantize(implementation: str, with_residual: bool, tokens: int, features: int, group_size: int):
    rng = np.random.default_rng(tokens)
    x, residual = (jnp.asarray(rng.standard_normal((tokens, features)), "bfloat16") for _ in range(2))
    norm_weight = jnp.asarray(rng.uniform(0.5, 1.5, features), "bfloat16")
    actual, total = rms_norm_quantize(
        x,
        norm_weight,
        1e-5,
        group_size,
        residual=residual if with_residual else None,
        implementation=implementation,
    )
    expected = np.asarray(x, np.float64) + (np.asarray(residual, np.float64) if with_residual else 0)
    np.testing.assert_array_equal(np.asarray(total), expected.astype(np.float32).astype(jnp.bfloat16))
    normalized = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(norm_weight, np.float64)
    check_quantized(actual, normalized, group_size, 3e-6)


@pytest.mark.parametrize("implementation", QUANTIZERS)
@pytest.mark.parametrize(("tokens", "features", "group_size"), QUANTIZE_SIZES)
def test_swiglu_quantize(implementation: str, tokens: int, features: int, group_size: int):
    gate_up = jnp.asarray(np.random.default_rng(tokens).standard_normal((tokens, 2 * features)) * 4, "bfloat16")
    actual = swiglu_quantize(gate_up, group_size, implementation=implementation)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    check_quantized(actual, gate / (1 + np.exp(-gate)) * up, group_size, 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantized_linear_is_the_composition(implementation: str):
    case = make_case(5, 70, 256, 128, 0.1, bias=True)
    _, weight, bias = on_device(case)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 256)), "float32")
    activations = quantize_activations(x, 128, implementation=implementation)
    expected = mixed_matmul(activations, weight, bias, out_dtype="float32", implementation=implementation)
    actual = quantized_linear(x, weight, bias, out_dtype="float32", implementation=implementation)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_refused():
    _, weight, _ = on_device(make_case(1, 6, 64, 32, 0.5))
    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.grad(lambda x: quantized_linear(x, weight, out_dtype="float32").sum())(jnp.ones((1, 64)))


def test_implementation_that_cannot_run_says_why():
    case = make_case(1, 6, 64, 32, 0.5)
    activations, weight, _ = on_device(case)
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; choose one of auto, xla, triton"):
        mixed_matmul(activations, weight, out_dtype="float32", implementation="cuda")
    if registry.default_platform() != "gpu":
        with pytest.raises(NotImplementedError, match="'triton' cannot run: it needs an NVIDIA GPU"):
            mixed_matmul(activations, weight, out_dtype="float32", implementation="triton")
        with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run: it needs an NVIDIA GPU"):
            quantize_activations(jnp.ones((1, 64)), 32, implementation="mosaic_gpu")
        assert matmul_api.OPERATION.choose("auto", activations, weight, None, out_dtype="float32") == "xla"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_dtype": "int8"}, "out_dtype must be one of"),
        ({"bias": jnp.zeros(5)}, r"bias must be \[6\]"),
        ({"activations": QuantizedActivations(jnp.zeros((1, 32), jnp.int8), jnp.zeros((1, 1)), 32)}, "32 features"),
        ({"activations": QuantizedActivations(jnp.zeros((1, 64)), jnp.zeros((2, 1)), 32)}, "codes must be int8"),
        (
            {"activations": QuantizedActivations(jnp.zeros((1, 64), jnp.int8), jnp.zeros((1, 2)), 32)},
            r"scales .* must be float32 \[2, 1\]",
        ),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str):
    activations, weight, _ = on_device(make_case(1, 6, 64, 32, 0.5))
    arguments = {"activations": activations, "weight": weight, "bias": None, "out_dtype": "float32", **change}
    with pytest.raises(ValueError, match=message):
        mixed_matmul(**arguments)


def test_quantizers_refuse_bad_input():
    with pytest.raises(ValueError, match="not a multiple of the group size 64"):
        quantize_activations(jnp.zeros((2, 96)), 64)
    with pytest.raises(ValueError, match="must be a float"):
        swiglu_quantize(jnp.zeros((2, 128), jnp.int32), 64)
    with pytest.raises(ValueError, match="residual must be like x"):
        rms_norm_quantize(jnp.zeros((2, 64)), jnp.ones(64), 1e-5, 64, residual=jnp.zeros((1, 64)))


def test_auto_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch):
    operation = registry.Operation(
        name="negate",
        implementations={
            "triton": registry.Implementation(lambda x: -x, lambda x: "the chip is too old"),
            "xla": registry.Implementation(lambda x: -x, registry.never_refuses),
        },
        prefer=lambda x: ("triton",),
    )
    monkeypatch.setattr(registry, "default_platform", lambda: "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on a CPU the reference is what auto means
        assert operation.choose("auto", 1) == "xla"
    monkeypatch.setattr(registry, "default_platform", lambda: "gpu")
    with pytest.warns(UserWarning, match="negate: no kernel can run .triton: the chip is too old"):
        assert operation.choose("auto", 1) == "xla"


def test_auto_with_a_slower_kernel_says_so(monkeypatch: pytest.MonkeyPatch):
    operation = registry.Operation(
        name="negate",
        implementations={
            "fast": registry.Implementation(lambda x: -x, lambda x: "the array is too large" if x > 1 else None),
            "slow": registry.Implementation(lambda x: -x, registry.never_refuses),
        },
        prefer=lambda x: ("fast", "slow"),
    )
    monkeypatch.setattr(registry, "default_platform", lambda: "gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operation.choose("auto", 1) == "fast"
    with pytest.warns(UserWarning, match="negate: the slow kernel runs, .* cannot .fast: the array is too large"):
        assert operation.choose("auto", 2) == "slow"
