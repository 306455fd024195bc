"""The Hopper kernel on unsigned operands: fewer instructions a dot, for many tokens.

At many tokens the tensor cores and the instructions around them take turns: the time is that of the dots plus about a
clock for each instruction. With unsigned operands a dot needs nothing but two multiply-adds an output. Activations are
a' = a + 128, codes enter as they are stored (q, 0..15; 8-bit ones as w + 128), so that d' = sum q a' is not negative
and less than 2**23: the accumulator starts at zero, and its bits *are* the denormal float d' * 2**-149. Wanted is

    sum (q - z) a = d' - 128 sum q - z sum a

- 128 sum q is known for each channel and group, and part of the first multiply-add.
- z sum a, times both scales, has one factor a channel and one a token: for 32 groups at once it is a small bfloat16
  product, which the tensor cores subtract from the totals. Its factors are split in two bfloat16 terms each, so that
  it is exact to about 2**-16; the integer dots stay exact.

Ring and loading warp are those of mosaic_gpu/signed/kernel.py; finished tiles are handed over to warps that store them
(mosaic_gpu/unsigned/hand_over.py, mosaic_gpu/unsigned/store.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.mosaic_gpu.calls import ACCUMULATOR, SCALAR, Emitted, Index, Ref, swizzled
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, halved_tiles
from pallas_kernels.mixed_matmul.mosaic_gpu.registers import load_codes, wait_dot
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import registers as unsigned
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.hand_over import HandingOverKernel
from pallas_kernels.mixed_matmul.unsigned_operands import GROUPS_OF_CORRECTION, corrections_of
from pallas_kernels.packing import PackedWeight

SUMS_BYTES = 128
"""Of a token: two bfloat16 terms of its activation sums in 32 groups."""


@dataclasses.dataclass(frozen=True)
class UnsignedKernel(HandingOverKernel):
    """The kernel of one problem, on unsigned operands; a tile's tokens are one part."""

    @property
    def unroll(self) -> int:
        """Groups of a block: whole blocks make up 32 groups."""
        sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= self.config.unroll and self.num_groups % size == 0]
        return max(sizes)

    @property
    def stages(self) -> int:
        """Ring slots: whole blocks, or a block goes round the ring several times."""
        if self.unroll % self.config.stages == 0:
            return self.config.stages
        return max(1, self.config.stages // self.unroll) * self.unroll

    def slots(self, block: Index) -> list[Index]:
        """Ring slots of the groups of a block, counted over all tiles of the multiprocessor."""
        blocks = max(1, self.stages // self.unroll)
        first = 0 if blocks == 1 else lax.rem(block, blocks) * self.unroll
        return [first + offset % self.stages for offset in range(self.unroll)]

    def halved(self, multiprocessors: int) -> int:
        """Tiles at the end that are visited as two halves each."""
        return halved_tiles(self.num_tiles, self.config.tile_tokens, multiprocessors)

    @property
    def corrections(self) -> int:
        """Times that zero points are taken off a tile, each time those of the next 32 groups."""
        return corrections_of(self.num_groups)

    def blocks_of(self, correction: Index) -> tuple[Index, Index]:
        """The first block whose zero points a correction takes off, and the one behind the last."""
        if self.corrections == 1:
            return 0, self.num_blocks
        blocks = GROUPS_OF_CORRECTION // self.unroll
        return correction * blocks, jnp.minimum((correction + 1) * blocks, self.num_blocks)

    def operands(self, activations: QuantizedActivations, weight: PackedWeight) -> dict[str, jax.Array]:
        """As in the base class, for activations in the unsigned layout, and the sums of the codes."""
        arrays = super().operands(activations, weight)
        for bits, sums, scales in (
            ("4", weight.code_sums4, weight.scales4),
            ("8", weight.code_sums8, weight.scales8),
        ):
            if sums is not None and sums.size:
                arrays |= {"code_sums" + bits: sums.reshape(-1), "scale_rows" + bits: scales}
        if weight.n4:
            arrays["zero_point_rows4"] = weight.zero_points4
        return arrays

    def scratch(self) -> dict[str, Any]:
        """Shared memory: as in the base class, with sums of codes instead of zero points, and activation sums."""
        c = self.config
        rings = super().scratch()
        rings.pop("zero_point_ring", None)
        sums = max(self.channel_scales(is8).copied for is8 in (False, True))
        return rings | {
            "activation_ring": plgpu.SMEM(
                (self.stages, c.tile_tokens, self.group_size), jnp.uint8, transforms=swizzled(self.group_size)
            ),
            "code_sum_ring": plgpu.SMEM((self.stages, sums), jnp.uint16),
            "full": plgpu.Barrier(num_arrivals=5, num_barriers=self.stages),
            "activation_sums": plgpu.SMEM((c.tile_tokens, SUMS_BYTES), jnp.uint8, transforms=swizzled(SUMS_BYTES)),
            "correction_scales": plgpu.SMEM(
                (GROUPS_OF_CORRECTION, c.tile_channels + unsigned.SCALE_PADDING), jnp.float16
            ),
            "correction_zero_points": plgpu.SMEM(
                (GROUPS_OF_CORRECTION, c.tile_channels + unsigned.ZERO_POINT_PADDING), jnp.uint8
            ),
            "sums_full": plgpu.Barrier(num_arrivals=3),
            "sums_empty": plgpu.Barrier(num_arrivals=c.compute_warpgroups),
        }

    def load_tile(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile) -> None:
        """Copy the groups of a tile into the ring, and before each 32 of them their activation sums."""
        c, size, bits = self.config, self.group_size, "8" if tile.is8 else "4"
        scales, tokens = self.channel_scales(tile.is8), pl.ds(tile.first_token, tile.tokens)
        own = pl.ds(0, tile.tokens)
        channels = pl.ds(0, scales.copied)

        def load_group(group: Index, slot: Index) -> None:
            rows = pl.ds(tile.first_row, c.tile_channels)
            of_channels = [
                scales.window(inputs[name + bits], group, tile.first_row) for name in ("scales", "code_sums")
            ]
            of_tokens = self.token_scales.window(inputs["token_scales"], group, tile.first_token)
            for source, destination in (
                (inputs["codes" + bits].at[group, rows], self.code_slot(scratch, tile.is8, slot)),
                (inputs["codes"].at[tokens, pl.ds(group * size, size)], scratch["activation_ring"].at[slot, own]),
                (of_channels[0], scratch["channel_scale_ring"].at[slot, channels]),
                (of_channels[1], scratch["code_sum_ring"].at[slot, channels]),
                (of_tokens, scratch["token_scale_ring"].at[slot]),
            ):
                plgpu.copy_gmem_to_smem(source, destination, scratch["full"].at[slot])

        def load_block(index: Index, _: None) -> None:
            block = tile.first_block + index
            for offset, slot in enumerate(self.slots(block)):

                @pl.when(block * self.unroll + offset >= self.stages)
                def _wait(slot: Index = slot) -> None:
                    plgpu.barrier_wait(scratch["empty"].at[slot])

                load_group(index * self.unroll + offset, slot)

        def load_corrected(correction: Index, _: None) -> None:
            @pl.when(tile.first_block + correction > 0)
            def _wait() -> None:
                plgpu.barrier_wait(scratch["sums_empty"])

            full = scratch["sums_full"]
            groups = pl.ds(correction * GROUPS_OF_CORRECTION, GROUPS_OF_CORRECTION)
            sums = pl.ds(self.num_groups * size + correction * SUMS_BYTES, SUMS_BYTES)
            plgpu.copy_gmem_to_smem(inputs["codes"].at[tokens, sums], scratch["activation_sums"].at[own], full)
            rows = pl.ds(tile.first_row, c.tile_channels + unsigned.SCALE_PADDING)
            plgpu.copy_gmem_to_smem(inputs["scale_rows" + bits].at[groups, rows], scratch["correction_scales"], full)
            if tile.is8:
                plgpu.barrier_arrive(full)
            else:
                rows = pl.ds(tile.first_row, c.tile_channels + unsigned.ZERO_POINT_PADDING)
                plgpu.copy_gmem_to_smem(
                    inputs["zero_point_rows4"].at[groups, rows], scratch["correction_zero_points"], full
                )
            lax.fori_loop(*self.blocks_of(correction), load_block, None)

        lax.fori_loop(0, self.corrections, load_corrected, None)

    def compute_tile(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], first_channel: Index, tile: Tile
    ) -> None:
        """Compute 64 channels of a tile, from `first_channel` on, and store them."""
        is8, own = tile.is8, pl.ds(0, tile.tokens)
        emit = _UnsignedEmitted(self.group_size, tile.tokens, even_tokens=self.tokens % 2 == 0, is8=is8)
        first_row, rows = tile.first_row + first_channel, self.n8 if is8 else self.n4
        if "bias" in inputs:
            emit.fetch_columns(inputs["order"], scratch["columns"], first_row, rows, self.n4 if is8 else 0)

        def wait_and_load(slot: Index) -> Any:
            """Wait for a stage and read its codes, ready for the dot."""
            plgpu.barrier_wait(scratch["full"].at[slot])
            codes = self.code_slot(scratch, is8, slot).at[pl.ds(first_channel, CHANNELS_PER_WARPGROUP)]
            return emit.load_codes(codes)

        def add_block(index: Index, carry: tuple[Any, Any], *, is_last: bool) -> tuple[Any, Any]:
            """Add the groups of a block, and read the codes of the next block's first one.

            In the program a dot starts when the former one has been scaled. The assembler starts it earlier, where its
            codes are loaded, and spreads its instructions among those that scale. All dots are done at the end: the
            assembler follows none around a loop.
            """
            total, codes = carry
            slots = self.slots(tile.first_block + index)
            dot = emit.start(codes, scratch["activation_ring"].at[slots[0], own])
            for offset, slot in enumerate(slots):
                group, ends = index * self.unroll + offset, offset == self.unroll - 1
                if not ends:
                    next_codes = wait_and_load(slots[offset + 1])
                else:
                    next_codes = codes if is_last else wait_and_load(self.slots(tile.first_block + index + 1)[0])
                total = emit.finish(
                    dot,
                    codes,
                    total,
                    [scratch[name].at[slot] for name in ("channel_scale_ring", "code_sum_ring", "token_scale_ring")],
                    self.channel_scales(is8).lead(group) + first_channel,
                    self.token_scales.lead(group),
                )
                plgpu.barrier_arrive(scratch["empty"].at[slot])
                codes = next_codes
                if not ends:
                    dot = emit.start(codes, scratch["activation_ring"].at[slots[offset + 1], own])
            return total, codes

        def add_corrected(correction: Index, total: Any) -> Any:
            plgpu.barrier_wait(scratch["sums_full"])
            channels = [scratch["correction_scales"]]
            if not is8:
                channels.append(scratch["correction_zero_points"])
            total = emit.subtract_zero_points(total, scratch["activation_sums"].at[own], channels, first_channel)
            plgpu.barrier_arrive(scratch["sums_empty"])
            first, end = self.blocks_of(correction)
            codes = wait_and_load(self.slots(tile.first_block + first)[0])
            carry = lax.fori_loop(first, end - 1, functools.partial(add_block, is_last=False), (total, codes))
            return add_block(end - 1, carry, is_last=True)[0]

        total = emit.unscaled(lax.fori_loop(0, self.corrections, add_corrected, emit.zero_total()))
        self.stage_tile(total, inputs, out, scratch, first_channel, tile)


@dataclasses.dataclass(frozen=True)
class _UnsignedEmitted(Emitted):
    """The register-level pieces of one tile, as calls from Pallas.

    Attributes:
        is8: 8-bit channels, not 4-bit ones.
    """

    is8: bool

    def load_codes(self, codes: Ref) -> Any:
        """Codes of a stage, ready for the dot."""
        row_bytes = self.group_size if self.is8 else self.group_size // 2

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(row_bytes)),), return_type=self.codes_type)
        def emit(ctx: Any, codes: Any) -> Any:
            if self.is8:
                return unsigned.offset_codes8(load_codes(codes, row_bytes, is_signed=True))
            return unsigned.unpack_codes4(load_codes(codes, row_bytes, is_signed=False))

        return emit(codes)

    def start(self, codes: Any, activations: Ref) -> Any:
        """Start the dot of a group."""
        arg_types = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzled(self.group_size)))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.accumulator_type)
        def emit(ctx: Any, codes: Any, activations: Any) -> Any:
            return unsigned.issue_dot(codes, activations, self.tokens)

        return emit(codes, activations)

    def finish(
        self, dot: Any, codes: Any, total: Any, scales: list[Ref], first_channel: Index, first_token: Index
    ) -> Any:
        """Wait for a dot and add it; `scales` are those of the channels, the sums of their codes, and the tokens'."""
        arg_types = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, ACCUMULATOR, *[plgpu.RefType()] * 3, SCALAR, SCALAR)

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.total_type)
        def emit(ctx: Any, dot: Any, codes: Any, total: Any, *rest: Any) -> Any:
            channel_scales, code_sums, token_scales, first_channel, first_token = rest
            of_channels = unsigned.load_channel_scales(channel_scales, code_sums, first_channel.registers.item())
            dot = wait_dot(dot, codes, in_flight=0)
            first = first_token.registers.item()
            return unsigned.add_scaled(total, dot, of_channels, token_scales, first, pairs=self.even_tokens)

        return emit(dot, codes, total, *scales, first_channel, first_token)

    def subtract_zero_points(self, total: Any, activation_sums: Ref, channels: list[Ref], first: Index) -> Any:
        """Take the zero points of 32 groups off.

        `channels` are scales, and zero points where they differ; the warpgroup's start at channel `first`.
        """
        types = (ACCUMULATOR, plgpu.RefType(swizzled(SUMS_BYTES)), SCALAR)

        @plgpu.inline_mgpu(arg_types=(*types, *[plgpu.RefType()] * len(channels)), return_type=self.total_type)
        def emit(ctx: Any, total: Any, sums: Any, first: Any, *channels: Any) -> Any:
            return unsigned.subtract_zero_points(total, sums, first.registers.item(), *channels)

        return emit(total, activation_sums, first, *channels)

    def unscaled(self, total: Any) -> Any:
        """The finished totals."""
        emit = plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=self.total_type)
        return emit(lambda ctx, total: unsigned.unscaled(total))(total)
