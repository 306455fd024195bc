"""Packed weights of all layers in a few shapes, so that they share their kernels.

The global allocation gives every layer a number of 8-bit channels of its own. Kernels are compiled for that number, and
so a model of 32 layers would need some 120 of them for every program, minutes at every start. A 4-bit code less its
zero point is a legal 8-bit code with the same scale: channels that are stored with 8 bits although 4 would do give the
same products to the bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from pallas_kernels.mixed_matmul import unsigned_operands
from pallas_kernels.packing import PackedWeight, unpack_nibbles

SMALLEST = 64
"""Channels of a tile of the matmul: fewer cost as much."""


def common_number(n8: int, out_features: int) -> int:
    """The next of 64 * 2^i and 96 * 2^i from `n8` on, at most `out_features`; 0 stays."""
    if n8 == 0:
        return 0
    size = SMALLEST
    while size < n8:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, out_features)


def shape_on_gpu(weight: PackedWeight) -> PackedWeight:
    """The shapes that a weight has once it is loaded for a GPU, with the sums of codes that a Hopper GPU wants."""
    n8 = common_number(weight.n8, weight.out_features)
    groups, n4, size = weight.num_groups, weight.out_features - n8, weight.group_size

    def array(like: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, like.dtype)

    summed = size == unsigned_operands.GROUP_SIZE
    return PackedWeight(
        codes4=array(weight.codes4, groups, n4, size // 2),
        scales4=array(weight.scales4, groups, n4),
        zero_points4=array(weight.zero_points4, groups, n4),
        codes8=array(weight.codes8, groups, n8, size),
        scales8=array(weight.scales8, groups, n8),
        channel_order=weight.channel_order,
        group_size=size,
        code_sums4=jax.ShapeDtypeStruct((groups, n4), np.uint16) if summed else None,
        code_sums8=jax.ShapeDtypeStruct((groups, n8), np.uint16) if summed else None,
    )


def with_common_shape(weight: PackedWeight) -> PackedWeight:
    """The same weight with its number of 8-bit channels rounded up; arrays are NumPy."""
    missing = common_number(weight.n8, weight.out_features) - weight.n8
    if missing == 0:
        return weight
    order4, order8 = np.split(np.asarray(weight.channel_order), [weight.n4])
    moved, kept = np.arange(missing), np.arange(missing, weight.n4)
    codes = unpack_nibbles(np.asarray(weight.codes4)[:, moved]).astype(np.int8)
    codes -= np.asarray(weight.zero_points4)[:, moved, None].astype(np.int8)
    order = np.concatenate([order8, order4[moved]])
    ascending = np.argsort(order)
    return dataclasses.replace(
        weight,
        codes4=np.ascontiguousarray(np.asarray(weight.codes4)[:, kept]),
        scales4=np.ascontiguousarray(np.asarray(weight.scales4)[:, kept]),
        zero_points4=np.ascontiguousarray(np.asarray(weight.zero_points4)[:, kept]),
        codes8=np.concatenate([np.asarray(weight.codes8), codes], axis=1)[:, ascending],
        scales8=np.concatenate([np.asarray(weight.scales8), np.asarray(weight.scales4)[:, moved]], axis=1)[
            :, ascending
        ],
        channel_order=np.concatenate([order4[kept], order[ascending]]),
    )
