"""The same weight in another form: fused with others, with aligned rows, or with the sums of its codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels.packing.format import Array, PackedWeight, array_namespace, unpack_nibbles

MAX_SUMMED_GROUP_SIZE = 257
"""Codes of 8 bits, 0..255, whose sum fits 16 bits for certain."""

ALIGNED_ROWS = 16
"""Channels for which a row of scales, zero points or sums is whole pieces of 16 bytes."""


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Fuse layers that share their input: the output channels of the first layer, then of the second, and so on.

    The result has sums of codes where all weights have them.

    Raises:
        ValueError: No weights, or weights that differ in `in_features` or `group_size`.
    """
    if not weights:
        raise ValueError("concatenate needs at least one packed weight")
    first = weights[0]
    for index, weight in enumerate(weights):
        if (weight.in_features, weight.group_size) != (first.in_features, first.group_size):
            raise ValueError(
                f"weights to concatenate must share in_features and group_size: weight 0 has {first.in_features} and "
                f"{first.group_size}, weight {index} has {weight.in_features} and {weight.group_size}"
            )
    xp = array_namespace(first.codes4)
    offsets = np.cumsum([0] + [weight.out_features for weight in weights])
    orders = [weight.channel_order + np.int32(offset) for weight, offset in zip(weights, offsets[:-1], strict=True)]
    orders4 = [order[: weight.n4] for order, weight in zip(orders, weights, strict=True)]
    orders8 = [order[weight.n4 :] for order, weight in zip(orders, weights, strict=True)]

    summed = all(weight.code_sums4 is not None for weight in weights)

    def along_channels(name: str) -> Array:
        return xp.concatenate([getattr(weight, name) for weight in weights], axis=1)

    return PackedWeight(
        codes4=along_channels("codes4"),
        scales4=along_channels("scales4"),
        zero_points4=along_channels("zero_points4"),
        codes8=along_channels("codes8"),
        scales8=along_channels("scales8"),
        channel_order=xp.concatenate(orders4 + orders8),
        group_size=first.group_size,
        code_sums4=along_channels("code_sums4") if summed else None,
        code_sums8=along_channels("code_sums8") if summed else None,
    )


def has_aligned_rows(packed: PackedWeight) -> bool:
    """Whether the channels of both widths are multiples of `ALIGNED_ROWS`, as bulk copies of several rows want."""
    return packed.n4 % ALIGNED_ROWS == packed.n8 % ALIGNED_ROWS == 0


def with_aligned_rows(packed: PackedWeight) -> PackedWeight:
    """The same weight with aligned rows where its output channels allow it: up to 15 channels more have 8 bits."""
    return packed if packed.out_features % ALIGNED_ROWS else with_8bit_channels(packed, packed.n4 % ALIGNED_ROWS)


def with_8bit_channels(packed: PackedWeight, number: int) -> PackedWeight:
    """The same weight with the first `number` of its 4-bit channels stored with 8 bits; without sums of codes.

    A 4-bit code less its zero point is a legal 8-bit code with the same scale: products stay the same to the bit.

    Raises:
        ValueError: More channels than there are.
    """
    if not 0 <= number <= packed.n4:
        raise ValueError(f"there are {packed.n4} 4-bit channels, not {number}")
    if number == 0:
        return packed
    xp = array_namespace(packed.codes4)
    n4 = packed.n4
    moved = unpack_nibbles(packed.codes4[:, :number]).astype(np.int8)
    moved = moved - packed.zero_points4[:, :number, None].astype(np.int8)
    order = xp.concatenate([packed.channel_order[n4:], packed.channel_order[:number]])
    ascending = xp.argsort(order)

    def merged(eight: Array, four: Array) -> Array:
        return xp.concatenate([eight, four], axis=1)[:, ascending]

    return dataclasses.replace(
        packed,
        codes4=packed.codes4[:, number:],
        scales4=packed.scales4[:, number:],
        zero_points4=packed.zero_points4[:, number:],
        codes8=merged(packed.codes8, moved),
        scales8=merged(packed.scales8, packed.scales4[:, :number]),
        channel_order=xp.concatenate([packed.channel_order[number:n4], order[ascending]]),
        code_sums4=None,
        code_sums8=None,
    )


def with_code_sums(packed: PackedWeight) -> PackedWeight:
    """The weight with `code_sums4` and `code_sums8`, which it takes to multiply by its codes as unsigned bytes.

    With the bytes q' = code, z' = zero point of a 4-bit channel, q' = code + 128, z' = 128 of an 8-bit one, and those
    of the activations a' = a + 128, the dot of one group is

        sum (q' - z') a  =  sum q' a'  -  128 SQ  -  z' S,        SQ = sum q',  S = sum a

    SQ, of each group and channel, is what is added here: at most 128 * 15 and 128 * 255 in groups of 128.

    Raises:
        ValueError: Groups so large that a sum may exceed 16 bits.
    """
    if packed.group_size > MAX_SUMMED_GROUP_SIZE:
        raise ValueError(f"code sums fit 16 bits in groups of up to {MAX_SUMMED_GROUP_SIZE}, not {packed.group_size}")
    # In NumPy for NumPy: the numbers of channels differ from layer to layer, and compiling takes longer than adding.
    code_sums = _code_sums if isinstance(packed.codes4, np.ndarray) else jax.jit(_code_sums)
    sums4, sums8 = code_sums(packed.codes4, packed.codes8)
    return dataclasses.replace(packed, code_sums4=sums4, code_sums8=sums8)


def _code_sums(codes4: Array, codes8: Array) -> tuple[Array, Array]:
    xp = array_namespace(codes4)
    pairs = (codes4 & np.uint8(15)) + (codes4 >> np.uint8(4))
    sums8 = xp.sum(codes8, axis=-1, dtype=np.int32) + np.int32(128 * codes8.shape[-1])
    return xp.sum(pairs, axis=-1, dtype=np.uint16), sums8.astype(np.uint16)
