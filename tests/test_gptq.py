"""GPTQ, the Hessian and the clip search, against float64 NumPy and by the direction of each claim."""

import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.quantization.gptq import gptq, layer_error
from mixllm_jax.quantization.hessian import DAMPING, HessianSum, factor_hessian, processing_order
from mixllm_jax.quantization.rounding import dequantize, round_to_nearest

N, K, GROUP, TOKENS = 24, 128, 32, 512


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """A weight with heavy tails [N, K] and correlated inputs of very different size [TOKENS, K]."""
    rng = np.random.default_rng(0)
    weight = rng.standard_t(4, (N, K)).astype(np.float32) * 0.02
    sizes = np.exp(rng.normal(0, 1.0, K))
    inputs = (rng.normal(size=(TOKENS, 40)) @ rng.normal(size=(40, K)) + 0.3 * rng.normal(size=(TOKENS, K))) * sizes
    return weight, inputs.astype(np.float32)


def hessian_of(inputs: np.ndarray):
    total = HessianSum(inputs.shape[-1])
    total.add(jnp.asarray(inputs))
    return total.mean()


def half(mask_share: float) -> np.ndarray:
    return np.arange(N) < mask_share * N


def numpy_gptq(weight: np.ndarray, hessian: np.ndarray, eight_bit: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Column-by-column GPTQ in float64 by its definition: invert the remaining Hessian anew for every column."""
    weight = weight.astype(np.float64)[:, order].copy()
    hessian = hessian[np.ix_(order, order)].copy()
    hessian += DAMPING * np.mean(np.diag(hessian)) * np.eye(len(order))
    result = np.zeros_like(weight)
    for start in range(0, len(order), GROUP):
        group = weight[:, start : start + GROUP].astype(np.float32)
        low = np.minimum(group.min(1), 0)
        high = np.maximum(group.max(1), 0)
        scale4 = (np.maximum(high - low, 1e-5) / 15).astype(np.float16).astype(np.float64)
        zero = np.round(-low / scale4)
        scale8 = (np.abs(group).max(1) / 127).astype(np.float16).astype(np.float64)
        for j in range(start, start + GROUP):
            inverse = np.linalg.inv(hessian[j:, j:])
            four = np.clip(np.round(weight[:, j] / scale4), -zero, 15 - zero) * scale4
            eight = np.clip(np.round(weight[:, j] / scale8), -127, 127) * scale8
            result[:, j] = np.where(eight_bit, eight, four)
            weight[:, j:] -= np.outer((weight[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    return result[:, np.argsort(order)]


def test_hessian_is_the_mean_outer_product_in_float64(layer) -> None:
    _, inputs = layer
    total = HessianSum(K)
    for piece in np.split(inputs, 4):
        total.add(jnp.asarray(piece.reshape(2, -1, K)))
    exact = 2 / TOKENS * inputs.astype(np.float64).T @ inputs.astype(np.float64)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert total.mean().dtype == jnp.float64
    assert np.abs((np.asarray(total.mean()) - exact) / scale).max() < 1e-6


def test_factor_is_the_cholesky_factor_of_the_inverse(layer) -> None:
    hessian = np.asarray(hessian_of(layer[1]))
    factored = factor_hessian(jnp.asarray(hessian), GROUP)
    damped = hessian[np.ix_(factored.order, factored.order)] + DAMPING * np.mean(np.diag(hessian)) * np.eye(K)
    factor = np.asarray(factored.factor, np.float64)
    assert np.allclose(np.tril(factor, -1), 0)
    assert np.abs(factor @ damped @ factor.T - np.eye(K)).max() < 1e-4  # R H R^T = 1 where R^T R = H^-1


def test_groups_are_ordered_by_importance_and_stay_whole() -> None:
    diagonal = np.array([1.0, 1.0, 4.0, 6.0, 3.0, 3.0, 6.0, 4.0])
    assert processing_order(diagonal, 2).tolist() == [3, 2, 6, 7, 4, 5, 0, 1]
    assert processing_order(diagonal, 2, reorder=False).tolist() == list(range(8))


@pytest.mark.parametrize("reorder", [False, True])
def test_gptq_matches_its_definition_in_float64(layer, reorder: bool) -> None:
    weight, inputs = layer
    hessian = np.asarray(hessian_of(inputs))
    eight_bit = half(0.5)
    factored = factor_hessian(jnp.asarray(hessian), GROUP, reorder=reorder)
    result = gptq(jnp.asarray(weight), factored, eight_bit, clip_search=False)
    expected = numpy_gptq(weight, hessian, eight_bit, factored.order)
    found = np.asarray(dequantize(result.weight), np.float64)
    # float32 and float64 may round a weight at a tie to different codes, and the later columns then differ as well.
    assert (np.abs(found - expected).max(axis=1) < 1e-5).mean() > 0.9
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(K)
    error = np.einsum("nk,kj,nj->n", found - weight, damped, found - weight)
    assert np.allclose(result.error, error, rtol=1e-3)


def test_each_width_is_quantised_as_if_alone(layer) -> None:
    weight, inputs = layer
    factored = factor_hessian(hessian_of(inputs), GROUP)
    mixed = gptq(jnp.asarray(weight), factored, half(0.5)).weight
    rows = np.flatnonzero(half(0.5))
    alone = gptq(jnp.asarray(weight[rows]), factored, np.ones(len(rows), bool)).weight
    assert np.array_equal(mixed.codes[rows], alone.codes)
    assert np.array_equal(mixed.scales[rows], alone.scales)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gptq_wins_on_the_output_and_loses_on_the_weight(layer, share: float) -> None:
    weight, inputs = layer
    hessian = hessian_of(inputs)
    rounded = dequantize(round_to_nearest(jnp.asarray(weight), half(share), GROUP))
    swept = dequantize(gptq(jnp.asarray(weight), factor_hessian(hessian, GROUP), half(share)).weight)
    output = [float(layer_error(weight, q, jnp.asarray(hessian, jnp.float32)).sum()) for q in (rounded, swept)]
    assert output[1] < 0.7 * output[0]
    assert np.sum((swept - weight) ** 2) > np.sum((rounded - weight) ** 2)


def test_clip_search_lowers_the_output_error_and_reordering_too(layer) -> None:
    weight, inputs = layer
    hessian = hessian_of(inputs)
    errors = {}
    for clip_search in (False, True):
        for reorder in (False, True):
            factored = factor_hessian(hessian, GROUP, reorder=reorder)
            errors[clip_search, reorder] = float(gptq(weight, factored, half(0), clip_search=clip_search).error.sum())
    assert errors[True, True] < errors[False, True]
    assert errors[True, False] < errors[False, False]
    assert errors[True, True] < errors[True, False]


def test_clip_search_falls_back_where_it_does_not_help(layer) -> None:
    _, inputs = layer
    rng = np.random.default_rng(1)
    # Weights on the 4-bit grid: plain minimum and maximum represent them exactly, no shrunken range can.
    codes = rng.integers(0, 16, (N, K // GROUP, GROUP))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = ((codes - 7) * 2.0**-7).reshape(N, K).astype(np.float32)
    result = gptq(jnp.asarray(weight), factor_hessian(hessian_of(inputs), GROUP), half(0))
    assert not result.clipped[0]
    assert np.array_equal(dequantize(result.weight), weight)


def test_dead_inputs_get_zero_weights(layer) -> None:
    weight, inputs = layer
    inputs = inputs.copy()
    inputs[:, [3, 70]] = 0
    inputs[:, 96:] = 0  # a whole group
    result = gptq(jnp.asarray(weight), factor_hessian(hessian_of(inputs), GROUP), half(0.5))
    restored = np.asarray(dequantize(result.weight))
    assert np.isfinite(restored).all()
    assert (restored[:, [3, 70, 100]] == 0).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    total = HessianSum(4)
    total.add(jnp.array([[1.0, jnp.nan, 0.0, 0.0]]))
    with pytest.raises(FloatingPointError, match="not finite"):
        total.mean()
