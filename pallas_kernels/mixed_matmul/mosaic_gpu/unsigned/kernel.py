"""The kernel on unsigned operands: fewer instructions a dot, for many tokens.

At many tokens the tensor cores and the instructions around them take turns: the time is that of the dots plus about a
clock for each instruction. With unsigned operands a dot needs nothing but two multiply-adds an output. Activations are
a' = a + 128, codes enter as they are stored (q, 0..15; 8-bit ones as w + 128), so that d' = sum q a' is not negative
and less than 2**23: the accumulator starts at zero, and its bits *are* the denormal float d' * 2**-149. Wanted is

    sum (q - z) a = d' - 128 sum q - z sum a

- 128 sum q is known for each channel and group, and part of the first multiply-add.
- z sum a, times both scales, has one factor a channel and one a token: for 32 groups at once it is a small bfloat16
  product, which the tensor cores subtract from the totals. Its factors are split in two bfloat16 terms each, so that
  it is exact to about 2**-16; the integer dots stay exact.

A tile therefore goes in corrections of up to 32 groups, these in blocks of `unroll` groups, whose slots follow each
other. Beside the ring there is one slot for what a correction needs (`sums_full`, `sums_empty`):

    wait for sums_full | subtract | arrive at sums_empty | block | block | ... | wait for sums_full | subtract | ...

The tokens of a tile are one part. Finished tiles are handed over to warps that store them (hand_over.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.mosaic_gpu.columns import fetch_columns
from pallas_kernels.mixed_matmul.mosaic_gpu.config import (
    CHANNELS_PER_WARPGROUP,
    extra_of_8_bits,
    halved_tiles,
    has_room_to_halve,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Index, Ref, Slice, swizzled
from pallas_kernels.mixed_matmul.mosaic_gpu.persistent import PersistentKernel
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile, balancing_turn
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.arithmetic import SCALE_PADDING, ZERO_POINT_PADDING
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.calls import SUMS_BYTES, UnsignedArithmetic
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.hand_over import HandOver
from pallas_kernels.packing import PackedWeight
from pallas_kernels.unsigned_operands import GROUPS_OF_CORRECTION, corrections_of, scale_width


@dataclasses.dataclass(frozen=True)
class UnsignedKernel(PersistentKernel):
    """The kernel of one problem, on unsigned operands."""

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

    def splits8(self, multiprocessors: int) -> bool:
        """Whether 8-bit tiles are visited as two halves each, all tiles at the same time."""
        tiles = self.tiles4 * self.token_tiles, self.tiles8 * self.token_tiles
        return has_room_to_halve(*tiles, self.tile_tokens, multiprocessors)

    def turn(self, multiprocessors: int) -> int:
        """Places by which a multiprocessor moves on from wave to wave."""
        tiles, halved = (self.tiles4, self.tiles8, self.token_tiles), self.halved(multiprocessors)
        extra = extra_of_8_bits(self.num_groups, self.tile_tokens)
        return balancing_turn(*tiles, self.config.band, halved, multiprocessors, extra)

    @property
    def token_scales(self) -> Slice:
        """Where a tile's scales of tokens lie: in rows of whole sixteens."""
        return Slice(scale_width(self.tokens), self.config.tile_tokens, 4)

    @property
    def hand_over(self) -> HandOver:
        """How finished tiles get to the warps that store them."""
        return HandOver(self.config.compute_warpgroups, self.config.tile_tokens, self.out_itemsize)

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

    def operands(self, activations: QuantizedActivations | jax.Array, weight: PackedWeight) -> dict[str, jax.Array]:
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
        """Shared memory: the ring, with sums of codes instead of zero points; a correction; finished tiles."""
        c = self.config
        rings = self.rings(jnp.uint8) | self.barriers(copies=5, readers=c.compute_warpgroups)
        sums = max(self.channel_scales(is8).copied for is8 in (False, True))
        return {
            **rings,
            **self.hand_over.memory(),
            **self.code_rings(),
            "code_sum_ring": plgpu.SMEM((self.stages, sums), jnp.uint16),
            "activation_sums": plgpu.SMEM((c.tile_tokens, SUMS_BYTES), jnp.uint8, transforms=swizzled(SUMS_BYTES)),
            "correction_scales": plgpu.SMEM((GROUPS_OF_CORRECTION, c.tile_channels + SCALE_PADDING), jnp.float16),
            "correction_zero_points": plgpu.SMEM(
                (GROUPS_OF_CORRECTION, c.tile_channels + ZERO_POINT_PADDING), jnp.uint8
            ),
            "sums_full": plgpu.Barrier(num_arrivals=3),
            "sums_empty": plgpu.Barrier(num_arrivals=c.compute_warpgroups),
        }

    def load_group(
        self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile, group: Index, slot: Index
    ) -> None:
        """Start to copy a group of a tile into a slot."""
        size, bits, scales = self.group_size, "8" if tile.is8 else "4", self.channel_scales(tile.is8)
        own, channels = pl.ds(0, tile.tokens), pl.ds(0, scales.copied)
        tokens, rows = pl.ds(tile.first_token, tile.tokens), pl.ds(tile.first_row, self.config.tile_channels)
        of_channels = [scales.window(inputs[name + bits], group, tile.first_row) for name in ("scales", "code_sums")]
        of_tokens = self.token_scales.window(inputs["token_scales"], group, tile.first_token)
        for source, destination in (
            (inputs["codes" + bits].at[group, rows], self.code_slot(scratch, tile.is8, slot)),
            (inputs["codes"].at[tokens, pl.ds(group * size, size)], scratch["activation_ring"].at[slot, own]),
            (of_channels[0], scratch["channel_scale_ring"].at[slot, channels]),
            (of_channels[1], scratch["code_sum_ring"].at[slot, channels]),
            (of_tokens, scratch["token_scale_ring"].at[slot]),
        ):
            plgpu.copy_gmem_to_smem(source, destination, scratch["full"].at[slot])

    def load_correction(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile, correction: Index) -> None:
        """Start to copy what takes the zero points of 32 groups off; 8-bit channels have the same one everywhere."""
        full, bits, channels = scratch["sums_full"], "8" if tile.is8 else "4", self.config.tile_channels
        tokens = pl.ds(tile.first_token, tile.tokens)
        groups = pl.ds(correction * GROUPS_OF_CORRECTION, GROUPS_OF_CORRECTION)
        sums = pl.ds(self.num_groups * self.group_size + correction * SUMS_BYTES, SUMS_BYTES)
        own = scratch["activation_sums"].at[pl.ds(0, tile.tokens)]
        plgpu.copy_gmem_to_smem(inputs["codes"].at[tokens, sums], own, full)
        rows = pl.ds(tile.first_row, channels + SCALE_PADDING)
        plgpu.copy_gmem_to_smem(inputs["scale_rows" + bits].at[groups, rows], scratch["correction_scales"], full)
        if tile.is8:
            plgpu.barrier_arrive(full)
            return
        rows = pl.ds(tile.first_row, channels + ZERO_POINT_PADDING)
        plgpu.copy_gmem_to_smem(inputs["zero_point_rows4"].at[groups, rows], scratch["correction_zero_points"], full)

    def load_tile(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile) -> None:
        """Copy the groups of a tile into the ring, and before each 32 of them their activation sums."""

        def load_block(index: Index, _: None) -> None:
            block = tile.first_block + index
            for offset, slot in enumerate(self.slots(block)):

                @pl.when(block * self.unroll + offset >= self.stages)
                def _wait(slot: Index = slot) -> None:
                    plgpu.barrier_wait(scratch["empty"].at[slot])

                self.load_group(inputs, scratch, tile, index * self.unroll + offset, slot)

        def load_corrected(correction: Index, _: None) -> None:
            @pl.when(tile.first_block + correction > 0)
            def _wait() -> None:
                plgpu.barrier_wait(scratch["sums_empty"])

            self.load_correction(inputs, scratch, tile, correction)
            lax.fori_loop(*self.blocks_of(correction), load_block, None)

        lax.fori_loop(0, self.corrections, load_corrected, None)

    def compute_tile(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], first_channel: Index, tile: Tile
    ) -> None:
        """Compute 64 channels of a tile, from `first_channel` on, and hand them over."""
        is8, bias = tile.is8, inputs.get("bias")
        arithmetic = UnsignedArithmetic(self.group_size, tile.tokens, is8=is8)
        first_row, rows = tile.first_row + first_channel, self.n8 if is8 else self.n4
        if bias is not None:
            fetch_columns(inputs["order"], scratch["columns"], first_row, rows, self.n4 if is8 else 0)
        loop = _TileLoop(self, scratch, tile, first_channel, arithmetic)
        total = lax.fori_loop(0, self.corrections, loop.add_corrected, arithmetic.zero_total())
        self.hand_over.stage(arithmetic.unscaled(total), bias, out.dtype, scratch, first_channel, tile)

    def visitor_that_stores(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any]
    ) -> Callable[[Tile], None] | None:
        """Stores the tiles that are handed over."""

        def store(tile: Tile) -> None:
            rows, order_start = (self.n8, self.n4) if tile.is8 else (self.n4, 0)
            self.hand_over.store(inputs["order"], order_start, rows, out, scratch, tile)

        return store


@dataclasses.dataclass(frozen=True)
class _TileLoop:
    """The loop of one warpgroup over the groups of a tile.

    Attributes:
        kernel: Of the problem.
        scratch: Its shared memory and barriers.
        tile: The tile.
        first_channel: The warpgroup's first channel in it.
        arithmetic: Of its dots.
    """

    kernel: UnsignedKernel
    scratch: dict[str, Any]
    tile: Tile
    first_channel: Index
    arithmetic: UnsignedArithmetic

    @property
    def reads_ahead(self) -> bool:
        """Whether a block reads the first codes of the next one.

        With one group a block the assembler would run such dots one instruction at a time.
        """
        return self.kernel.unroll > 1

    def activations(self, slot: Index) -> Ref:
        """Activations of a stage: those of the tile's own tokens."""
        return self.scratch["activation_ring"].at[slot, pl.ds(0, self.tile.tokens)]

    def load(self, slot: Index) -> Any:
        """Read the codes of a stage, ready for the dot."""
        channels = pl.ds(self.first_channel, CHANNELS_PER_WARPGROUP)
        return self.arithmetic.load_codes(self.kernel.code_slot(self.scratch, self.tile.is8, slot).at[channels])

    def wait_and_load(self, slot: Index) -> Any:
        """Wait for a stage and read its codes."""
        plgpu.barrier_wait(self.scratch["full"].at[slot])
        return self.load(slot)

    def read_ahead(self, slot: Index, exists: Any) -> Any:
        """As `wait_and_load`; without such a stage it waits for nothing, and what it reads is not used.

        The read is under no condition: the assembler does not guard the registers of a running dot from one that is.
        """
        pl.when(exists)(lambda: plgpu.barrier_wait(self.scratch["full"].at[slot]))
        return self.load(slot)

    def finish(self, dot: Any, codes: Any, total: Any, group: Index, slot: Index) -> Any:
        """Wait for the dot of a group and add it."""
        names = ("channel_scale_ring", "code_sum_ring", "token_scale_ring")
        return self.arithmetic.finish(
            dot,
            codes,
            total,
            [self.scratch[name].at[slot] for name in names],
            self.kernel.channel_scales(self.tile.is8).lead(group) + self.first_channel,
        )

    def add_block(self, index: Index, carry: tuple[Any, Any], *, end: Index) -> tuple[Any, Any]:
        """Add the groups of a block, and read the codes of the next block's first one, where `end` is not next.

        In the program a dot starts when the former one has been scaled. The assembler starts it earlier, where its
        codes are loaded, and spreads its instructions among those that scale. All dots are done at the end: the
        assembler follows none around a loop.
        """
        total, codes = carry
        unroll, first_block = self.kernel.unroll, self.tile.first_block
        slots = self.kernel.slots(first_block + index)
        if codes is None:
            codes = self.wait_and_load(slots[0])
        dot = self.arithmetic.start(codes, self.activations(slots[0]))
        for offset, slot in enumerate(slots):
            group, ends, next_codes = index * unroll + offset, offset == unroll - 1, None
            if not ends:
                next_codes = self.wait_and_load(slots[offset + 1])
            elif self.reads_ahead:
                next_codes = self.read_ahead(self.kernel.slots(first_block + index + 1)[0], index + 1 < end)
            total = self.finish(dot, codes, total, group, slot)
            plgpu.barrier_arrive(self.scratch["empty"].at[slot])
            codes = next_codes
            if not ends:
                dot = self.arithmetic.start(codes, self.activations(slots[offset + 1]))
        return total, codes

    def add_corrected(self, correction: Index, total: Any) -> Any:
        """Take the zero points of 32 groups off, and add the groups."""
        plgpu.barrier_wait(self.scratch["sums_full"])
        channels = [self.scratch["correction_scales"]]
        if not self.tile.is8:
            channels.append(self.scratch["correction_zero_points"])
        sums = self.scratch["activation_sums"].at[pl.ds(0, self.tile.tokens)]
        total = self.arithmetic.subtract_zero_points(total, sums, channels, self.first_channel)
        plgpu.barrier_arrive(self.scratch["sums_empty"])
        first, end = self.kernel.blocks_of(correction)
        first_slot = self.kernel.slots(self.tile.first_block + first)[0]
        codes = self.wait_and_load(first_slot) if self.reads_ahead else None
        return lax.fori_loop(first, end, functools.partial(self.add_block, end=end), (total, codes))[0]
