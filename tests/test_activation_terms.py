"""Activations as a sum of two int8 terms, in every implementation, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import make_case, relative_error

from mixllm_jax.models.linear import Linear
from pallas_kernels import quantize_activations, quantized_linear, registry
from pallas_kernels.packing import dequantize

gpu = pytest.mark.gpu
INTERPRETED = pytest.param(
    "triton_interpret",
    marks=pytest.mark.skipif(registry.default_platform() != "cpu", reason="interpret mode is for a CPU"),
)
QUANTIZERS = ["xla", pytest.param("triton", marks=gpu)]
LINEARS = [*QUANTIZERS, INTERPRETED, *(pytest.param(name, marks=gpu) for name in ("mosaic_gpu", "auto"))]
TWO_TERMS = 1e-4
"""Largest relative error of a product with the activations below: 200 times less than with one term."""


def activations(tokens: int, features: int) -> np.ndarray:
    """Normal values, with a few channels a hundred times as large as the others."""
    rng = np.random.default_rng([tokens, features])
    x = rng.standard_normal((tokens, features))
    x[:, rng.choice(features, 3, replace=False)] *= 100
    return x.astype(np.float32)


@pytest.mark.parametrize("implementation", [*QUANTIZERS, INTERPRETED])
@pytest.mark.parametrize("magnitude", [1.0, 1e-20, 1e30])
def test_two_terms_hold_some_16_bits(implementation: str, magnitude: float):
    x = activations(5, 256) * np.float32(magnitude)
    x[2] = 0
    found = quantize_activations(jnp.asarray(x), 64, terms=2, implementation=implementation)
    assert found.codes.shape == (10, 256)
    scales = np.repeat(np.asarray(found.scales, np.float64).T, 64, axis=1)
    values = (np.asarray(found.codes, np.float64) * scales).reshape(2, 5, 256).sum(axis=0)
    largest = np.repeat(np.abs(x.reshape(5, 4, 64)).max(axis=2).astype(np.float64), 64, axis=1)
    assert np.all(np.abs(values - x) <= largest / 64516 * 1.02)  # 1.02: the remainder is rounded to float32


@pytest.mark.parametrize("implementation", [*QUANTIZERS, INTERPRETED])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_two_terms_in_the_unsigned_layout_are_those_in_the_signed_one(implementation: str, tokens: int):
    x = jnp.asarray(activations(tokens, 33 * 128))
    quantize = functools.partial(quantize_activations, x, 128, terms=2, implementation=implementation)
    expected, found = quantize().in_layout("unsigned"), quantize(layout="unsigned")
    assert (found.layout, found.tokens) == ("unsigned", 2 * tokens)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("implementation", LINEARS)
@pytest.mark.parametrize("sizes", [(1, 33, 256, 128, 1.0), (3, 70, 192, 64, 0.1)])
def test_a_product_of_two_terms_is_that_of_float_activations(implementation: str, sizes: tuple[int, ...]):
    tokens, _, features, _, _ = sizes
    case = make_case(*sizes, bias=True)
    weight, bias = jax.tree.map(jnp.asarray, (case.weight, case.bias))
    x = activations(tokens, features)
    expected = x.astype(np.float64) @ dequantize(case.weight).astype(np.float64).T + case.bias

    def error(activation_terms: int) -> float:
        y = quantized_linear(
            jnp.asarray(x),
            weight,
            bias,
            out_dtype="float32",
            activation_terms=activation_terms,
            implementation=implementation,
        )
        assert y.dtype == jnp.float32
        return relative_error(y, expected)

    assert error(1) > 2e-3
    assert error(2) < error(1) / 200


@gpu
@pytest.mark.parametrize("tokens", [1, 16, 33, 129])
def test_the_output_head_of_a_gpu_is_exact(tokens: int):
    case = make_case(tokens, 2056, 4096, 128, 1.0)
    weight = jax.tree.map(jnp.asarray, case.weight)
    layer = Linear(weight, dtype=jnp.bfloat16, activation_terms=2)
    x = jnp.asarray(activations(tokens, 4096), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ dequantize(case.weight).astype(np.float64).T
    assert relative_error(jax.jit(lambda x: layer(x, out_dtype=jnp.float32))(x), expected) < TWO_TERMS


def test_a_layer_of_two_terms_takes_float_activations_alone():
    case = make_case(4, 20, 128, 64, 0.5, bias=True)
    layer = Linear(case.weight, case.bias, dtype=jnp.float32, activation_terms=2)
    assert layer.group_size is None
    x = activations(4, 128)
    expected = x.astype(np.float64) @ dequantize(case.weight).astype(np.float64).T + case.bias
    y = layer(jnp.asarray(x).reshape(2, 2, 128))
    assert y.shape == (2, 2, 20)
    assert relative_error(y.reshape(4, 20), expected) < TWO_TERMS
    with pytest.raises(ValueError, match="takes no QuantizedActivations"):
        layer(quantize_activations(jnp.asarray(x), 64))
    with pytest.raises(ValueError, match="activation_terms must be 1 or 2, found 3"):
        Linear(case.weight, dtype=jnp.float32, activation_terms=3)


def test_no_tokens_and_no_terms():
    case = make_case(4, 20, 128, 64, 1.0)
    weight = jax.tree.map(jnp.asarray, case.weight)
    y = quantized_linear(jnp.zeros((0, 128)), weight, out_dtype=jnp.float32, activation_terms=2)
    assert y.shape == (0, 20)
    with pytest.raises(ValueError, match="terms must be 1 or 2, found 0"):
        quantize_activations(jnp.zeros((4, 128)), 64, terms=0)
