"""The two weight formats as grids of representable values, and rounding to them.

Both formats are written the same way: a value is ``code * scale`` with an integer code between ``low`` and ``high``.
For 4-bit channels ``low = -zero_point`` and ``high = 15 - zero_point``, so the stored code is ``code - low``; for 8-bit
channels ``low = -127`` and ``high = 127``. One formula then serves channels of both widths in one array operation, and
the codes of either fit into int8.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FOUR_BIT_LEVELS = 15
"""Steps between the lowest and the highest 4-bit code."""
EIGHT_BIT_LIMIT = 127
"""Largest 8-bit code; -128 is legal in the format, but never produced, so that codes are symmetric."""
MINIMUM_RANGE = 1e-5
"""Least max - min of a 4-bit group: a constant group would have no scale otherwise."""
SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16: a group of zeros would have scale 0 otherwise."""


class Grid(NamedTuple):
    """Representable values ``code * scale``, ``low <= code <= high``, one grid per channel and group.

    Attributes:
        scale: float32 [...], every value exactly representable in float16.
        low: float32 [...], integer, the lowest code.
        high: float32 [...], integer, the highest code.
    """

    scale: jax.Array
    low: jax.Array
    high: jax.Array


def _float16_scale(scale: jax.Array) -> jax.Array:
    """Rounds scales to what the checkpoint stores, so that codes are computed with the scale they are read with."""
    return jnp.maximum(scale, SMALLEST_SCALE).astype(jnp.float16).astype(jnp.float32)


def range_grid(minimum: jax.Array, maximum: jax.Array, eight_bit: jax.Array) -> Grid:
    """The grid that spans a range of weights.

    Args:
        minimum: float32 [...], least weight of the group.
        maximum: float32 [...], largest weight of the group.
        eight_bit: bool, broadcastable to ``minimum``: 8-bit symmetric (scale = absmax / 127) where true, 4-bit
            asymmetric (scale = max(max - min, 1e-5) / 15, zero point 0..15) where false.

    Returns:
        The grid. Zero is always representable, so a 4-bit range is first widened to contain it.
    """
    low_end = jnp.minimum(minimum, 0.0)
    high_end = jnp.maximum(maximum, 0.0)
    scale4 = _float16_scale(jnp.maximum(high_end - low_end, MINIMUM_RANGE) / FOUR_BIT_LEVELS)
    zero_point = jnp.clip(jnp.round(-low_end / scale4), 0, FOUR_BIT_LEVELS)
    scale8 = _float16_scale(jnp.maximum(-low_end, high_end) / EIGHT_BIT_LIMIT)
    return Grid(
        scale=jnp.where(eight_bit, scale8, scale4),
        low=jnp.where(eight_bit, -float(EIGHT_BIT_LIMIT), -zero_point),
        high=jnp.where(eight_bit, float(EIGHT_BIT_LIMIT), FOUR_BIT_LEVELS - zero_point),
    )


def encode(values: jax.Array, grid: Grid) -> jax.Array:
    """Nearest code (float32 holding integers) of each value; ``grid`` broadcasts against ``values``."""
    return jnp.clip(jnp.round(values / grid.scale), grid.low, grid.high)


class QuantizedWeight(NamedTuple):
    """A quantised linear weight before packing, channels in their natural order.

    Attributes:
        codes: int8 [out_features, in_features], centred: the weight is ``codes * scales`` (4-bit: stored code minus
            zero point, -15..15; 8-bit: -127..127).
        scales: float16 [out_features, num_groups].
        zero_points: uint8 [out_features, num_groups], 0..15; 0 for 8-bit channels.
        eight_bit: bool [out_features].
    """

    codes: jax.Array
    scales: jax.Array
    zero_points: jax.Array
    eight_bit: jax.Array


def zero_points_of(grid_low: jax.Array, eight_bit: jax.Array) -> jax.Array:
    """uint8 zero points of grids ``low [out_features, num_groups]`` with ``eight_bit [out_features]``."""
    return jnp.where(eight_bit[:, None], 0.0, -grid_low).astype(jnp.uint8)


def round_to_nearest(weight: jax.Array, eight_bit: jax.Array, group_size: int) -> QuantizedWeight:
    """Quantises a weight by rounding, each group spanning its minimum to its maximum (RTN, no clipping).

    Args:
        weight: float [out_features, in_features]; in_features a multiple of ``group_size``.
        eight_bit: bool [out_features], which channels get 8 bits.
        group_size: consecutive input channels that share a scale.
    """
    out_features, in_features = weight.shape
    grouped = weight.astype(jnp.float32).reshape(out_features, in_features // group_size, group_size)
    grid = range_grid(grouped.min(axis=-1), grouped.max(axis=-1), eight_bit[:, None])
    codes = encode(grouped, Grid(*(part[..., None] for part in grid)))
    return QuantizedWeight(
        codes=codes.reshape(out_features, in_features).astype(jnp.int8),
        scales=grid.scale.astype(jnp.float16),
        zero_points=zero_points_of(grid.low, eight_bit),
        eight_bit=eight_bit,
    )


def dequantize(weight: QuantizedWeight) -> jax.Array:
    """The represented weight, float32 [out_features, in_features]."""
    out_features, in_features = weight.codes.shape
    num_groups = weight.scales.shape[1]
    grouped = weight.codes.reshape(out_features, num_groups, in_features // num_groups).astype(jnp.float32)
    return (grouped * weight.scales.astype(jnp.float32)[..., None]).reshape(out_features, in_features)
