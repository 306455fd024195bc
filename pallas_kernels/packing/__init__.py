"""The packed mixed-precision weight: 4-bit and 8-bit output channels of one linear layer, stored group by group.

A weight of the format is  w[n, k] ~ (code[n, k] - zero_point[n, g]) * scale[n, g],  g = k // group_size,  with codes
0..15 and zero points 0..15 for 4-bit channels, and codes -128..127 and no zero point for 8-bit channels.

The arrays are group-major: one group of a tile of neighbouring channels is one contiguous block of memory, so that a
kernel which walks along the groups reads long runs, and one that splits the groups among programs reads disjoint ones.
"""

from pallas_kernels.packing.conversion import UnpackedWeight, dequantize, pack, unpack
from pallas_kernels.packing.format import GROUP_SIZES, PackedWeight, unpack_nibbles, validate
from pallas_kernels.packing.variants import (
    ALIGNED_ROWS,
    concatenate,
    has_aligned_rows,
    with_8bit_channels,
    with_aligned_rows,
    with_code_sums,
)

__all__ = [
    "ALIGNED_ROWS",
    "GROUP_SIZES",
    "PackedWeight",
    "UnpackedWeight",
    "concatenate",
    "dequantize",
    "has_aligned_rows",
    "pack",
    "unpack",
    "unpack_nibbles",
    "validate",
    "with_8bit_channels",
    "with_aligned_rows",
    "with_code_sums",
]
