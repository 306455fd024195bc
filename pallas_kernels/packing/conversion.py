"""Packing of channel-major codes, and the ways back: to codes of one byte each, and to float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.packing.format import Array, PackedWeight, array_namespace, unpack_nibbles, validate


class UnpackedWeight(NamedTuple):
    """The codes of a `PackedWeight`, one byte a code, channel-major, in packed row order.

    Attributes:
        codes4: uint8 `[n4, in_features]`, 0..15.
        scales4: float16 `[n4, num_groups]`.
        zero_points4: uint8 `[n4, num_groups]`, 0..15.
        codes8: int8 `[n8, in_features]`.
        scales8: float16 `[n8, num_groups]`.
        channel_order: int32 `[n4 + n8]`.
    """

    codes4: Array
    scales4: Array
    zero_points4: Array
    codes8: Array
    scales8: Array
    channel_order: Array


def pack(
    codes4: Array,
    scales4: Array,
    zero_points4: Array,
    codes8: Array,
    scales8: Array,
    channel_order: Array,
    *,
    group_size: int,
) -> PackedWeight:
    """Pack channel-major codes; the inverse of `unpack`.

    NumPy arrays give a packed weight of NumPy arrays, JAX arrays one of JAX arrays.

    Args:
        codes4: Integer `[n4, in_features]`, values 0..15 (not checked under a trace).
        scales4: `[n4, num_groups]`; must already be representable in float16, since codes are computed with the
            rounded scale.
        zero_points4: Integer `[n4, num_groups]`, 0..15.
        codes8: Integer `[n8, in_features]`, -128..127.
        scales8: `[n8, num_groups]`.
        channel_order: Integer `[n4 + n8]`, a permutation of the output channels.
        group_size: Input channels that share a scale; divides `in_features`.

    Raises:
        ValueError: Shapes that do not fit together, or (for NumPy arrays) values outside their ranges.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be a positive even number, found {group_size}")
    for name, codes in (("codes4", codes4), ("codes8", codes8)):
        if codes.ndim != 2 or codes.shape[1] % group_size:
            raise ValueError(
                f"{name} must be [channels, in_features] with in_features a multiple of group_size {group_size}, "
                f"found shape {tuple(codes.shape)}"
            )
    for name, values, lowest, highest in (
        ("codes4", codes4, 0, 15),
        ("zero_points4", zero_points4, 0, 15),
        ("codes8", codes8, -128, 127),
    ):
        _check_integers(name, values, lowest, highest)
    num_groups = codes4.shape[1] // group_size
    half = group_size // 2
    grouped4 = codes4.astype(np.uint8).reshape(codes4.shape[0], num_groups, group_size)
    grouped8 = codes8.astype(np.int8).reshape(codes8.shape[0], codes8.shape[1] // group_size, group_size)
    packed = PackedWeight(
        codes4=(grouped4[..., :half] | (grouped4[..., half:] << np.uint8(4))).transpose(1, 0, 2),
        scales4=scales4.astype(np.float16).T,
        zero_points4=zero_points4.astype(np.uint8).T,
        codes8=grouped8.transpose(1, 0, 2),
        scales8=scales8.astype(np.float16).T,
        channel_order=channel_order.astype(np.int32),
        group_size=group_size,
    )
    if isinstance(codes4, np.ndarray):
        packed = jax.tree_util.tree_map(np.ascontiguousarray, packed)
    validate(packed, values=isinstance(codes4, np.ndarray))
    return packed


def _check_integers(name: str, values: Array, lowest: int, highest: int) -> None:
    """Check NumPy arrays before a conversion to bytes would hide what is wrong with them; JAX arrays may be traced.

    Raises:
        ValueError: Fractions, or values outside the range.
    """
    if not isinstance(values, np.ndarray) or not values.size:
        return
    if not np.issubdtype(values.dtype, np.integer) and not np.array_equal(values, np.rint(values)):
        raise ValueError(f"{name} must be integers, found fractions in {values.dtype}: round them first")
    if values.min() < lowest or values.max() > highest:
        raise ValueError(f"{name} must lie in {lowest}..{highest}, found {values.min()}..{values.max()}")


def unpack(packed: PackedWeight) -> UnpackedWeight:
    """The codes one byte each, channel-major; the inverse of `pack`."""
    codes4 = unpack_nibbles(packed.codes4)
    return UnpackedWeight(
        codes4=codes4.transpose(1, 0, 2).reshape(packed.n4, packed.in_features),
        scales4=packed.scales4.T,
        zero_points4=packed.zero_points4.T,
        codes8=packed.codes8.transpose(1, 0, 2).reshape(packed.n8, packed.in_features),
        scales8=packed.scales8.T,
        channel_order=packed.channel_order,
    )


def dequantize(packed: PackedWeight) -> Array:
    """The weight in float32, `[out_features, in_features]`, rows in output-channel order."""
    xp = array_namespace(packed.codes4)
    codes4 = unpack_nibbles(packed.codes4).astype(np.float32)
    zero_points4 = packed.zero_points4.astype(np.float32)[..., None]
    rows4 = (codes4 - zero_points4) * packed.scales4.astype(np.float32)[..., None]
    rows8 = packed.codes8.astype(np.float32) * packed.scales8.astype(np.float32)[..., None]
    rows = xp.concatenate([rows4, rows8], axis=1).transpose(1, 0, 2).reshape(packed.shape)
    return rows[xp.argsort(packed.channel_order)]
