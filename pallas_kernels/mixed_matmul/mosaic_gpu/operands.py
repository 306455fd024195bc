"""What the kernels copy and pass around: references and indices, scales in shared memory, swizzled operands.

And how Pallas is to compile all this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Index = Any
"""An int, or a traced int32 scalar."""

Ref = Any
"""A Pallas reference."""

ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT
"""Of a dot's result, as an argument of `plgpu.inline_mgpu`."""

SCALAR = plgpu.Layout.WG_SPLAT(())
"""Of an index, likewise."""

COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,  # values are registers of a thread, in layouts that are ours
    unsafe_no_auto_barriers=True,  # ring, sums and stores have barriers of their own
)
"""Of all kernels."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where the scales (or zero points) of a tile lie in shared memory.

    The copy engine starts at multiples of 16 bytes, and a row of scales of an odd number of channels starts anywhere:
    the copy starts at the 16 bytes before, and `lead` elements come too many. It also moves a multiple of 128 bytes.

    Attributes:
        row: Elements in a row of the array, one row for each group.
        tile: Elements wanted.
        itemsize: Bytes of an element.
    """

    row: int
    tile: int
    itemsize: int

    @property
    def align(self) -> int:
        """Elements in 16 bytes, or 1 where every row starts at a multiple of them."""
        elements = 16 // self.itemsize
        return 1 if self.row % elements == 0 else elements

    @property
    def copied(self) -> int:
        """Elements copied."""
        unit = 128 // self.itemsize
        return pl.cdiv(self.tile + self.align - 1, unit) * unit

    def lead(self, group: Index) -> Index:
        """Elements before the wanted ones of `group`, for a tile that starts at a multiple of `align`."""
        return lax.rem(group * self.row, self.align) if self.align > 1 else jnp.int32(0)

    def start(self, group: Index, first: Index) -> Index:
        """Where in the flat array the copy starts for the tile that starts at `first`: a multiple of `align`."""
        return group * self.row + first - self.lead(group)

    def window(self, ref: Ref, group: Index, first: Index) -> Ref:
        """What to copy of the flat array for the tile that starts at `first`."""
        return ref.at[pl.ds(self.start(group, first), self.copied)]


def swizzled(row_bytes: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory operand of `wgmma` with rows of `row_bytes` bytes.

    Rows are exactly one swizzle wide, so the tiles that `wgmma` wants, 8 rows each, already lie one after another;
    without a tiling transform the copy engine clips at any number of rows.
    """
    return (plgpu.SwizzleTransform(row_bytes),) if row_bytes > 16 else ()
