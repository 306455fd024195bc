"""Clip search: which shrunken range quantises a group of weights with the least output error."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixllm_jax.quantization.rounding import Grid, range_grid

CLIP_RATIOS = tuple(round(0.80 + 0.02 * step, 2) for step in range(11))
"""Factors on the minimum and maximum of a group that the search tries."""


def search_range(
    weight: jax.Array, eight_bit: jax.Array, ratios: jax.Array, output_error: Callable[[Grid], jax.Array]
) -> Grid:
    """The grid of each channel of one group with the least output error among shrunken ranges.

    Args:
        weight: float32 [group_size, channels], the group's weights (input channels first).
        eight_bit: bool [channels].
        ratios: float32 [ratios], factors to try; on a tie the first wins. ``[1.0]`` is plain min/max.
        output_error: gives the error of each channel, float32 [channels], if the group is quantised to a grid.

    Returns:
        Grid of arrays [channels].
    """
    minimum, maximum = weight.min(axis=0), weight.max(axis=0)

    def grid_of(ratio: jax.Array) -> Grid:
        return range_grid(ratio * minimum, ratio * maximum, eight_bit)

    if ratios.shape[0] == 1:
        return grid_of(ratios[0])
    # One candidate at a time: together they would not fit the caches of a CPU, nor the memory for the widest layers.
    errors = jax.lax.map(lambda ratio: output_error(grid_of(ratio)), ratios)
    return grid_of(ratios[jnp.argmin(errors, axis=0)])
