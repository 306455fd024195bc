"""Clip search: which shrunken range quantises a group of weights with the least output error.

No activations are needed: an error ``delta`` in one group of one channel changes the layer's output by
``delta^T H_gg delta`` with the group's diagonal block of the Hessian.
"""

import jax
import jax.numpy as jnp

from mixllm_jax.quantization.rounding import Grid, encode, range_grid

CLIP_RATIOS = tuple(round(0.80 + 0.02 * step, 2) for step in range(11))
"""Factors on the minimum and maximum of a group that the search tries."""


def search_range(weight: jax.Array, block: jax.Array, eight_bit: jax.Array, ratios: jax.Array) -> Grid:
    """The grid of each channel of one group with the least output error among shrunken ranges.

    Args:
        weight: float32 [group_size, channels], the group's weights (input channels first).
        block: float32 [group_size, group_size], the group's block of the Hessian, in the order of ``weight``.
        eight_bit: bool [channels].
        ratios: float32 [ratios], factors to try; on a tie the first wins. ``[1.0]`` is plain min/max.

    Returns:
        Grid of arrays [channels].
    """
    minimum, maximum = weight.min(axis=0), weight.max(axis=0)

    def output_error(ratio: jax.Array) -> jax.Array:
        grid = range_grid(ratio * minimum, ratio * maximum, eight_bit)
        delta = encode(weight, grid) * grid.scale - weight
        return jnp.sum(delta * jnp.matmul(block, delta, precision=jax.lax.Precision.HIGHEST), axis=0)

    best = ratios[jnp.argmin(jax.lax.map(output_error, ratios), axis=0)]
    return range_grid(best * minimum, best * maximum, eight_bit)
