"""GPTQ: rounds the input channels of a layer one after another, the later ones making up for the errors of the earlier.

Frantar et al., arXiv 2210.17323, with the blocks of lazy updates equal to the quantisation groups, the groups processed
in order of importance, and the range of each group fixed by a clip search when its turn comes, on the weights as
updated by then (paper section 3.2). The rows of a layer share nothing but the Hessian, so the 4-bit and the 8-bit
channels go through one sweep, each on its own grid; this is the same as quantising each width's channels separately.

The clip search tries the sweep itself: each candidate range quantises the group, and the one whose errors raise the
layer's output error least, after the later groups have made up for them, is kept. Measured by rounding alone
(``delta^T H_gg delta``) the error is that of another quantiser: SmolLM2-135M's layers came out 5 % worse on inputs that
were not calibrated on.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.quantization.clipping import CLIP_RATIOS, search_range
from mixllm_jax.quantization.hessian import FactoredHessian
from mixllm_jax.quantization.rounding import Grid, QuantizedWeight, encode, zero_points_of


class _Sweep(NamedTuple):
    """Result of one sweep, in processing order: codes [K, N], scale and low [G, N], error [N]."""

    codes: jax.Array
    scale: jax.Array
    low: jax.Array
    error: jax.Array


def _sweep_group(weight: jax.Array, triangle: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Rounds the inputs of one group in turn, each error made up for by the inputs after it.

    Args:
        weight: float32 [group_size, channels].
        triangle: float32 [group_size, group_size], the group's diagonal block of the factor.
        grid: of arrays [channels].

    Returns:
        Codes, float32 [group_size, channels], and the scaled errors of the same shape, whose squares add up to the
        increase of ``delta^T H delta`` when the inputs of all later groups make up for the group as well as they can.
    """

    def round_input(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        weight, codes, errors = state
        code = encode(weight[j], grid)
        error = (weight[j] - code * grid.scale) / triangle[j, j]
        # Row j of the triangle is zero before j: inputs that are done stay as they are.
        return weight - triangle[j][:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

    _, codes, errors = jax.lax.fori_loop(
        0, weight.shape[0], round_input, (weight, jnp.zeros_like(weight), jnp.zeros_like(weight))
    )
    return codes, errors


@partial(jax.jit, static_argnames="group_size")
def _sweep(weight: jax.Array, factor: jax.Array, eight_bit: jax.Array, ratios: jax.Array, group_size: int) -> _Sweep:
    """One pass over all groups; ``weight`` is [in_features, channels] in processing order, float32."""

    def quantize_group(weight: jax.Array, start: jax.Array) -> tuple[jax.Array, _Sweep]:
        rows = jax.lax.dynamic_slice_in_dim(factor, start, group_size)
        triangle = jax.lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        current = jax.lax.dynamic_slice_in_dim(weight, start, group_size)
        grid = search_range(
            current, eight_bit, ratios, lambda grid: jnp.sum(_sweep_group(current, triangle, grid)[1] ** 2, axis=0)
        )
        codes, errors = _sweep_group(current, triangle, grid)
        # Groups before this one have zeros in these rows of the factor, so they are not touched.
        weight = weight - jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return weight, _Sweep(codes.astype(jnp.int8), grid.scale, grid.low, jnp.sum(errors**2, axis=0))

    _, result = jax.lax.scan(quantize_group, weight, jnp.arange(0, weight.shape[0], group_size))
    return _Sweep(result.codes.reshape(weight.shape), result.scale, result.low, result.error.sum(axis=0))


class GptqResult(NamedTuple):
    """A quantised weight with the output error that it causes.

    Attributes:
        weight: the quantised weight, channels and inputs in natural order.
        error: float32 [out_features], ``delta^T H delta`` of each channel with the damped Hessian.
        clipped: bool [2], whether the clip search was kept for the 4-bit and for the 8-bit channels.
    """

    weight: QuantizedWeight
    error: jax.Array
    clipped: jax.Array


def gptq(
    weight: jax.Array, hessian: FactoredHessian, eight_bit: jax.Array | np.ndarray, *, clip_search: bool = True
) -> GptqResult:
    """Quantises a linear weight.

    Args:
        weight: float [out_features, in_features].
        hessian: factored Hessian of the layer's inputs.
        eight_bit: bool [out_features], channels that get 8 bits; the others get 4.
        clip_search: search a shrunken range per channel and group. Kept for each bit width only if it lowers the
            summed output error of that width's channels, else plain minimum and maximum are used.
    """
    eight_bit = jnp.asarray(eight_bit)
    permuted = jnp.where(hessian.dead[:, None], 0.0, weight.astype(jnp.float32).T[hessian.order])
    arguments = (permuted, hessian.factor, eight_bit)
    result = _sweep(*arguments, jnp.ones((1,), jnp.float32), hessian.group_size)
    clipped = jnp.zeros((2,), bool)
    if clip_search:
        searched = _sweep(*arguments, jnp.asarray(CLIP_RATIOS, jnp.float32), hessian.group_size)
        widths = jnp.stack([~eight_bit, eight_bit])
        clipped = (widths * searched.error).sum(axis=1) < (widths * result.error).sum(axis=1)
        keep = jnp.where(eight_bit, clipped[1], clipped[0])
        result = _Sweep(*(jnp.where(keep, new, old) for new, old in zip(searched, result, strict=True)))
    return GptqResult(_natural_order(result, hessian, eight_bit), result.error, clipped)


def _natural_order(result: _Sweep, hessian: FactoredHessian, eight_bit: jax.Array) -> QuantizedWeight:
    inverse = np.argsort(hessian.order)
    group_inverse = np.argsort(hessian.order[:: hessian.group_size] // hessian.group_size)
    return QuantizedWeight(
        codes=result.codes[inverse].T,
        scales=result.scale[group_inverse].T.astype(jnp.float16),
        zero_points=zero_points_of(result.low[group_inverse].T, eight_bit),
        eight_bit=eight_bit,
    )


def layer_error(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> jax.Array:
    """Output error ``delta^T H delta`` of each channel, float [out_features], for comparing methods.

    Args:
        weight: float [out_features, in_features], the original.
        quantized: float [out_features, in_features], the represented weight after quantising.
        hessian: float [in_features, in_features].
    """
    delta = (quantized - weight).astype(hessian.dtype)
    return jnp.sum(delta * jnp.matmul(delta, hessian, precision=jax.lax.Precision.HIGHEST), axis=1)
