"""The kernel on signed operands: the codes of the weight less their zero points, times int8 activations.

A stage of the ring is one group of a tile: packed codes, scales, zero points, activations and their scales. Each
computing warpgroup owns 64 channels of the tile: it reads its packed codes into registers, unpacks them there (they are
the left operand of the dot), starts the integer dot, and adds the scaled result to a float32 total (see arithmetic.py).
The tokens of a tile are divided into parts, each with a dot of its own in flight; while the dot of one runs, that of
another is scaled. Of two parts and a block of two groups, in the order of the program:

    read codes 0 | start 0a, 0b | read codes 1 | finish 0a | start 1a | finish 0b | start 1b | finish 1a | finish 1b

Groups come in blocks of `unroll`, whose slots follow each other, so that addresses and barriers are constants. No dot
is in flight from block to block: the assembler follows none around a loop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu.calls import GroupArithmetic
from pallas_kernels.mixed_matmul.mosaic_gpu.columns import fetch_columns
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, THREADS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Destination
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.persistent import PersistentKernel
from pallas_kernels.mixed_matmul.mosaic_gpu.signed import store
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Staging
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile


@dataclasses.dataclass(frozen=True)
class SignedKernel(PersistentKernel):
    """The kernel of one problem, on signed operands."""

    @property
    def stages(self) -> int:
        """Ring slots: whole blocks, so that a block's slots follow each other."""
        return max(1, self.config.stages // self.unroll) * self.unroll

    def first_slot(self, block: Index) -> Index:
        """First ring slot of a block, counted over all tiles of the multiprocessor."""
        blocks = self.stages // self.unroll
        return 0 if blocks == 1 else lax.rem(block, blocks) * self.unroll

    @property
    def part_tokens(self) -> int:
        """Tokens of a part of a tile: of a dot."""
        return self.config.tile_tokens // self.config.parts

    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring's stages and their barriers, and room for finished tiles."""
        warpgroups = self.config.compute_warpgroups
        of_output = {
            "staging": plgpu.SMEM((warpgroups * Staging(self.part_tokens, self.out_itemsize).words,), jnp.int32),
            "columns": plgpu.SMEM((warpgroups * 2 * THREADS_PER_WARPGROUP,), jnp.int32),  # two for each thread
        }
        # Every copy of a stage arrives once; an 8-bit stage has no zero points and arrives without a copy.
        rings = self.rings() | self.barriers(copies=5 if self.n4 else 4, readers=warpgroups)
        return rings | of_output | self.zero_point_ring() | self.code_rings()

    def load_group(
        self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile, group: Index, slot: Index
    ) -> None:
        """Start to copy a group of a tile into a slot."""
        size, bits, scales = self.group_size, "8" if tile.is8 else "4", self.channel_scales(tile.is8)
        tokens = pl.ds(tile.first_token, self.tile_tokens)
        copies = [
            (
                inputs["codes" + bits].at[group, pl.ds(tile.first_row, self.tile_channels)],
                self.code_slot(scratch, tile.is8, slot),
            ),
            (inputs["codes"].at[tokens, pl.ds(group * size, size)], scratch["activation_ring"].at[slot]),
            (
                scales.window(inputs["scales" + bits], group, tile.first_row),
                scratch["channel_scale_ring"].at[slot, pl.ds(0, scales.copied)],
            ),
            (
                self.token_scales.window(inputs["token_scales"], group, tile.first_token),
                scratch["token_scale_ring"].at[slot],
            ),
        ]
        if not tile.is8:
            window = self.zero_points.window(inputs["zero_points4"], group, tile.first_row)
            copies.append((window, scratch["zero_point_ring"].at[slot]))
        for source, destination in copies:
            plgpu.copy_gmem_to_smem(source, destination, scratch["full"].at[slot])
        if tile.is8 and self.n4:
            plgpu.barrier_arrive(scratch["full"].at[slot])

    def load_tile(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: Tile) -> None:
        """Copy the groups of a tile into the ring, each as soon as its slot is empty."""

        def load_block(index: Index, _: None) -> None:
            block = tile.first_block + index
            first_slot = self.first_slot(block)
            for offset in range(self.unroll):

                @pl.when(block * self.unroll + offset >= self.stages)
                def _wait(offset: int = offset) -> None:
                    plgpu.barrier_wait(scratch["empty"].at[first_slot + offset])

                self.load_group(inputs, scratch, tile, index * self.unroll + offset, first_slot + offset)

        lax.fori_loop(0, self.num_blocks, load_block, None)

    def compute_tile(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], first_channel: Index, tile: Tile
    ) -> None:
        """Compute 64 channels of a tile, from `first_channel` on, and store them."""
        parts = self.config.parts
        arithmetic = GroupArithmetic(self.group_size, self.part_tokens, even_tokens=self.tokens % 2 == 0)
        first_row, rows = tile.first_row + first_channel, self.n8 if tile.is8 else self.n4
        fetch_columns(inputs["order"], scratch["columns"], first_row, rows, self.n4 if tile.is8 else 0)
        loop = _TileLoop(self, scratch, tile, first_channel, arithmetic)
        zeros = tuple(arithmetic.zero_total() for _ in range(parts))
        totals = lax.fori_loop(0, self.num_blocks, loop.add_block, zeros)
        refs = [scratch["staging"], scratch["columns"], out, *([inputs["bias"]] if "bias" in inputs else [])]
        for part, total in enumerate(totals):
            _store(total, first_row, tile.first_token + part * self.part_tokens, rows, refs)


@dataclasses.dataclass(frozen=True)
class _TileLoop:
    """The loop of one warpgroup over the groups of a tile.

    Attributes:
        kernel: Of the problem.
        scratch: Its shared memory and barriers.
        tile: The tile.
        first_channel: The warpgroup's first channel in it.
        arithmetic: Of dots of a part.
    """

    kernel: SignedKernel
    scratch: dict[str, Any]
    tile: Tile
    first_channel: Index
    arithmetic: GroupArithmetic

    def wait_and_load(self, group: Index, slot: Index) -> Any:
        """Wait for a stage and read its codes, ready for the dot."""
        plgpu.barrier_wait(self.scratch["full"].at[slot])
        channels = pl.ds(self.first_channel, CHANNELS_PER_WARPGROUP)
        codes = self.kernel.code_slot(self.scratch, self.tile.is8, slot).at[channels]
        if self.tile.is8:
            return self.arithmetic.load_codes8(codes)
        lead = self.kernel.zero_points.lead(group)
        return self.arithmetic.load_codes4(codes, self.scratch["zero_point_ring"].at[slot], lead + self.first_channel)

    def start(self, accumulator: Any, codes: Any, slot: Index, part: int) -> Any:
        """Start the dot of a part."""
        tokens = pl.ds(part * self.arithmetic.tokens, self.arithmetic.tokens)
        return self.arithmetic.start_dot(accumulator, codes, self.scratch["activation_ring"].at[slot, tokens])

    def finish(
        self, in_flight: int, accumulator: Any, codes: Any, total: Any, group: Index, slot: Index, part: int
    ) -> Any:
        """Wait for the dot of a part, `in_flight` others having started since, and add it."""
        return self.arithmetic.finish_dot(
            in_flight,
            accumulator,
            codes,
            total,
            self.scratch["channel_scale_ring"].at[slot],
            self.kernel.channel_scales(self.tile.is8).lead(group) + self.first_channel,
            self.scratch["token_scale_ring"].at[slot],
            self.kernel.token_scales.lead(group) + part * self.arithmetic.tokens,
        )

    def add_block(self, index: Index, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add the groups of a block to the totals of the parts."""
        unroll, parts = self.kernel.unroll, len(carry)
        totals = list(carry)
        first_slot = self.kernel.first_slot(self.tile.first_block + index)
        codes = self.wait_and_load(index * unroll, first_slot)
        # All accumulators first, so that nothing stands between the dots.
        accumulators = [self.arithmetic.magic_accumulator() for _ in range(parts)]
        accumulators = [self.start(accumulators[part], codes, first_slot, part) for part in range(parts)]
        for offset in range(unroll):
            group, slot = index * unroll + offset, first_slot + offset
            is_last = offset == unroll - 1
            next_codes = codes if is_last else self.wait_and_load(group + 1, slot + 1)
            for part in range(parts):
                in_flight = parts - 1 - (part if is_last else 0)
                totals[part] = self.finish(in_flight, accumulators[part], codes, totals[part], group, slot, part)
                if part == parts - 1:
                    plgpu.barrier_arrive(self.scratch["empty"].at[slot])
                if not is_last:
                    accumulators[part] = self.start(self.arithmetic.magic_accumulator(), next_codes, slot + 1, part)
            codes = next_codes
        return tuple(totals)


def _store(total: Any, first_row: Index, first_token: Index, rows: int, refs: list[Ref]) -> None:
    """Store a finished part; `refs` are shared memory for it, that of its columns, the output, and bias if any."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, SCALAR, SCALAR, *[plgpu.RefType()] * len(refs)))
    def emit(ctx: Any, total: Any, first_row: Any, first_token: Any, *refs: Any) -> None:
        shared, columns, out, *bias = refs
        to = Destination(
            out,
            first_row=first_row.registers.item(),
            first_token=first_token.registers.item(),
            rows=rows,
            tokens=total.shape[1],
        )
        store.store_tile(total, to, columns, bias[0] if bias else None, shared)

    emit(total, first_row, first_token, *refs)
