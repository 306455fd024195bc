"""What one warpgroup of the kernel that splits the input channels does with a tile: its runs of groups."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import lax

from pallas_kernels.mixed_matmul.mosaic_gpu.calls import GroupArithmetic
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.split.ring import SplitRing, SplitTile


@dataclasses.dataclass(frozen=True)
class TileLoop:
    """The loop over the runs of a tile.

    Attributes:
        kernel: Of the problem.
        scratch: Its shared memory and barriers.
        split: Which block of the cluster this is.
        tile: The tile.
        arithmetic: Of its dots.
        first_run: Runs that the block has before the tile.
        first: The warpgroup's first run of the tile. The others are each `warpgroups` further on.
    """

    kernel: SplitRing
    scratch: dict[str, Any]
    split: Index
    tile: SplitTile
    arithmetic: GroupArithmetic
    first_run: Index
    first: Index

    @property
    def num_runs(self) -> Index:
        """How many runs are the warpgroup's."""
        warpgroups = self.kernel.config.warpgroups
        return lax.div(self.kernel.runs - self.first + warpgroups - 1, warpgroups)

    def add_run(self, index: Index, total: Any) -> Any:
        """Add one of the warpgroup's runs."""
        c, barriers = self.kernel.config, self.kernel.barriers_of(self.scratch)
        run = self.first + index * c.warpgroups
        first_slot = self.kernel.first_slot(self.first_run + run)
        first_group = (self.split * self.kernel.runs + run) * c.run
        uses = self.kernel.uses(self.first_run + run)
        codes = self.wait_and_load(first_group, first_slot, uses)
        accumulator = self.start(codes, first_group, first_slot)
        for offset in range(c.run):
            group, slot = first_group + offset, first_slot + offset
            is_last = offset == c.run - 1
            next_codes = codes if is_last else self.wait_and_load(group + 1, slot + 1, uses)
            total = self.finish(accumulator, codes, total, group, slot)
            barriers.arrive(barriers.empty(slot))
            if not is_last:
                accumulator = self.start(next_codes, group + 1, slot + 1)
            codes = next_codes
        return total

    def wait_and_load(self, group: Index, slot: Index, uses: Index) -> Any:
        """Wait for a stage, whose slot was used `uses` times before, and read its codes, ready for the dot."""
        self.kernel.barriers_of(self.scratch).wait(slot, uses)
        codes = self.kernel.code_slot(self.scratch, self.tile.is8, slot)
        if self.tile.is8:
            return self.arithmetic.load_codes8(codes)
        lead = self.kernel.zero_points.lead(group)
        return self.arithmetic.load_codes4(codes, self.scratch["zero_point_ring"].at[slot], lead)

    def place(self, group: Index, slot: Index) -> Index:
        """Where the activations of a group are: in its slot, or among all those that the block has quantised."""
        kernel = self.kernel
        return group - self.split * (kernel.num_groups // kernel.config.cluster) if kernel.quantizes else slot

    def start(self, codes: Any, group: Index, slot: Index) -> Any:
        """Start the dot of a group."""
        magic = self.arithmetic.magic_accumulator()
        return self.arithmetic.start_dot(magic, codes, self.scratch["activation_ring"].at[self.place(group, slot)])

    def finish(self, accumulator: Any, codes: Any, total: Any, group: Index, slot: Index) -> Any:
        """Wait for the dot of a group and add it."""
        return self.arithmetic.finish_dot(
            0,
            accumulator,
            codes,
            total,
            self.scratch["channel_scale_ring"].at[slot],
            self.kernel.channel_scales(self.tile.is8).lead(group),
            *self.token_scales(group, slot),
        )

    def token_scales(self, group: Index, slot: Index) -> tuple[Ref, Index]:
        """The scales of the activations of a group, and where the tile's start there."""
        if self.kernel.quantizes:
            return self.scratch["token_scale_ring"], self.place(group, slot) * self.kernel.tile_tokens
        return self.scratch["token_scale_ring"].at[slot], self.kernel.token_scales.lead(group)
