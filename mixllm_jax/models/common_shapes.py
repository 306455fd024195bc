"""Packed weights of all layers in a few shapes, so that they share their kernels.

The global allocation gives every layer a number of 8-bit channels of its own. Kernels are compiled for that number, and
so a model of 32 layers would need some 120 of them for every program, minutes at every start. A 4-bit code less its
zero point is a legal 8-bit code with the same scale: channels that are stored with 8 bits although 4 would do give the
same products to the bit.
"""

from __future__ import annotations

import jax

from pallas_kernels import packing, unsigned_operands
from pallas_kernels.packing import PackedWeight

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


def with_common_shape(weight: PackedWeight) -> PackedWeight:
    """The same weight with its number of 8-bit channels rounded up."""
    return packing.with_8bit_channels(weight, common_number(weight.n8, weight.out_features) - weight.n8)


def for_default_device(weight: PackedWeight) -> PackedWeight:
    """The weight as the default device is to have it: in a common shape, but on a CPU, where XLA compiles quickly."""
    return weight if jax.default_backend() == "cpu" else with_common_shape(weight)


def shape_on_gpu(weight: PackedWeight) -> PackedWeight:
    """The shapes that a weight has once it is loaded for a GPU, with the sums of codes that a Hopper GPU wants.

    Args:
        weight: Of arrays, or of their shapes alone.
    """

    def load(weight: PackedWeight) -> PackedWeight:
        common = with_common_shape(weight)
        return packing.with_code_sums(common) if weight.group_size == unsigned_operands.GROUP_SIZE else common

    return jax.eval_shape(load, weight)
