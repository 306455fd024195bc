"""What the Hopper kernels share: slices of scales, swizzled operands, register-level pieces as calls from Pallas."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu import registers
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.signed import store
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Destination

Index = Any
"""An int, or a traced int32 scalar."""

Ref = Any
"""A Pallas reference."""

ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())


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

    def window(self, ref: Ref, group: Index, first: Index) -> Ref:
        """The part of the flat array to copy for the tile that starts at `first`."""
        return ref.at[pl.ds(group * self.row + first - self.lead(group), self.copied)]


def swizzled(row_bytes: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory operand of `wgmma` with rows of `row_bytes` bytes.

    Rows are exactly one swizzle wide, so the tiles that `wgmma` wants, 8 rows each, already lie one after another;
    without a tiling transform the copy engine clips at any number of rows.
    """
    return (plgpu.SwizzleTransform(row_bytes),) if row_bytes > 16 else ()


@dataclasses.dataclass(frozen=True)
class Emitted:
    """The register-level pieces of one tile, as calls from Pallas.

    Attributes:
        group_size: Input channels of a dot.
        tokens: Tokens of a dot.
        even_tokens: The number of tokens of the whole problem is even, so that pairs of scales are aligned.
    """

    group_size: int
    tokens: int
    even_tokens: bool

    @property
    def total_type(self) -> Any:
        """What a part's totals are."""
        return plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, self.tokens), jnp.float32, ACCUMULATOR)

    @property
    def accumulator_type(self) -> Any:
        """What a dot gives."""
        return dataclasses.replace(self.total_type, dtype=jnp.int32)

    @property
    def codes_type(self) -> Any:
        """The left operand of a dot."""
        return plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, self.group_size), jnp.int8, plgpu.Layout.WGMMA_8BIT)

    def zero_total(self) -> Any:
        """Totals of nothing."""
        return plgpu.inline_mgpu(return_type=self.total_type)(lambda ctx: registers.zero_total(self.tokens))()

    def magic_accumulator(self) -> Any:
        """What a dot starts from."""
        emit = plgpu.inline_mgpu(return_type=self.accumulator_type)
        return emit(lambda ctx: registers.magic_accumulator(self.tokens))()

    def load_codes8(self, codes: Ref) -> Any:
        """8-bit codes of a stage, ready for the dot."""
        ref_type = plgpu.RefType(swizzled(self.group_size))
        emit = plgpu.inline_mgpu(arg_types=(ref_type,), return_type=self.codes_type)
        return emit(lambda ctx, ref: registers.load_codes(ref, self.group_size, is_signed=True))(codes)

    def load_codes4(self, codes: Ref, zero_points: Ref, first: Index) -> Any:
        """4-bit codes of a stage less their zero points, those at `first` on, ready for the dot."""
        row_bytes = self.group_size // 2
        ref_types = (plgpu.RefType(swizzled(row_bytes)), plgpu.RefType(), SCALAR)

        @plgpu.inline_mgpu(arg_types=ref_types, return_type=self.codes_type)
        def emit(ctx: Any, codes: Any, zero_points: Any, first: Any) -> Any:
            packed = registers.load_codes(codes, row_bytes, is_signed=False)
            return registers.unpack_codes4(packed, registers.load_zero_points(zero_points, first.registers.item()))

        return emit(codes, zero_points, first)

    def start_dot(self, accumulator: Any, codes: Any, activations: Ref) -> Any:
        """Start the dot of a group."""
        arg_types = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzled(self.group_size)))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.accumulator_type)
        def emit(ctx: Any, accumulator: Any, codes: Any, activations: Any) -> Any:
            return registers.issue_dot(accumulator, codes, activations, self.group_size)

        return emit(accumulator, codes, activations)

    def finish_dot(
        self,
        in_flight: int,
        accumulator: Any,
        codes: Any,
        total: Any,
        channel_scales: Ref,
        first_channel: Index,
        token_scales: Ref,
        first_token: Index,
    ) -> Any:
        """Wait for a dot, `in_flight` others having started since, and add it, scaled, to the total."""
        layouts = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, ACCUMULATOR)

        @plgpu.inline_mgpu(
            arg_types=(*layouts, plgpu.RefType(), SCALAR, plgpu.RefType(), SCALAR), return_type=self.total_type
        )
        def emit(ctx: Any, accumulator: Any, codes: Any, total: Any, *scales: Any) -> Any:
            channel_ref, first_channel, token_ref, first_token = scales
            of_channels = registers.load_channel_scales(channel_ref, first_channel.registers.item())
            of_tokens = registers.load_token_scales(
                token_ref, first_token.registers.item(), self.tokens, pairs=self.even_tokens
            )
            accumulator = registers.wait_dot(accumulator, codes, in_flight)
            return registers.add_scaled(total, accumulator, of_channels, of_tokens)

        return emit(accumulator, codes, total, channel_scales, first_channel, token_scales, first_token)

    def fetch_columns(self, order: Ref, columns: Ref, first_row: Index, rows: int, order_start: int) -> None:
        """Fetch where the tile's channels go, for the time when it is stored."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
        def emit(ctx: Any, order: Any, columns: Any, first_row: Any) -> None:
            first = first_row.registers.item()
            store.fetch_columns(order, columns, first_row=first, rows=rows, order_start=order_start)

        emit(order, columns, first_row)

    def store(self, total: Any, first_row: Index, first_token: Index, rows: int, refs: list[Ref]) -> None:
        """Store a finished part; `refs` are shared memory for it, that of its columns, the output, and bias if any."""
        ref_types = [plgpu.RefType()] * len(refs)

        @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, SCALAR, SCALAR, *ref_types))
        def emit(ctx: Any, total: Any, first_row: Any, first_token: Any, *refs: Any) -> None:
            shared, columns, out, *bias = refs
            to = Destination(
                out,
                first_row=first_row.registers.item(),
                first_token=first_token.registers.item(),
                rows=rows,
                tokens=self.tokens,
            )
            store.store_tile(total, to, columns, bias[0] if bias else None, shared)

        emit(total, first_row, first_token, *refs)
