"""The tiles, the shared memory and the loading warps of the kernel that splits the input channels.

The groups of a tile are shared out in runs of `run` groups. Of 32 groups, a cluster of two blocks with two warpgroups
each, and runs of four:

    block 0   groups  0 ..  3  4 ..  7  8 .. 11  12 .. 15        block 1   groups 16 .. 19  20 .. 23  24 .. 27  28 .. 31
    warpgroup         0        1        0         1                                0         1         0         1

Each block has a ring of its own. Over all tiles of the block, stages go to the slots in turn, runs to the warpgroups in
turn, and stages to the loading warps in turn; since the slots are whole runs of every warpgroup, and a multiple of the
loading warps, a slot is always filled by the same warp and read by the same warpgroup. So one parity tells its uses
apart (see barriers.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu import ring
from pallas_kernels.mixed_matmul.mosaic_gpu.config import (
    CHANNELS_PER_WARPGROUP,
    THREADS_PER_WARPGROUP,
    WARPS_PER_WARPGROUP,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Index, Ref, Slice, swizzled
from pallas_kernels.mixed_matmul.mosaic_gpu.split import barriers
from pallas_kernels.mixed_matmul.mosaic_gpu.split.barriers import Barriers
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.copies import Copy, start_copies


@dataclasses.dataclass(frozen=True)
class SplitTile(ring.Tile):
    """A tile as the loops see it.

    Attributes:
        index: Tiles that the cluster has before it.
    """

    index: Index


@dataclasses.dataclass(frozen=True)
class SplitRing(ring.RingKernel):
    """The kernel of one problem, but for what computes: its tiles, its shared memory, and the warps that load.

    Attributes:
        config: Settings that were fitted to the problem.
        sets_of_sums: Tiles whose sums have room at the same time.
        quantizes: The activations are float, and quantised by each block.
    """

    config: MosaicGpuSplitConfig
    sets_of_sums: int
    quantizes: bool

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.config.tile_tokens

    @property
    def tile_channels(self) -> int:
        """Output channels of a tile."""
        return CHANNELS_PER_WARPGROUP

    @property
    def stages(self) -> int:
        """Ring slots."""
        return self.config.stages

    @property
    def runs(self) -> int:
        """Runs of groups of a tile in one block."""
        return self.num_groups // (self.config.cluster * self.config.run)

    @property
    def loaders(self) -> int:
        """Warps that load stages in turn. A slot is always the same one's, or it could not tell a slot's uses apart."""
        return math.gcd(WARPS_PER_WARPGROUP, self.config.stages)

    def first_slot(self, run: Index) -> Index:
        """First ring slot of a run, counted over all tiles of the block."""
        runs = self.config.stages // self.config.run
        return 0 if runs == 1 else lax.rem(run, runs) * self.config.run

    def uses(self, run: Index) -> Index:
        """Times that the slots of a run were used before."""
        return lax.div(run, self.config.stages // self.config.run)

    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring's stages and their barriers, and room for the sums of the other warpgroups."""
        c = self.config
        rings = self.rings() | self.zero_point_ring() | self.code_rings()
        if self.quantizes:
            groups, size = self.num_groups // c.cluster, self.group_size
            shape = (groups, c.tile_tokens, size)
            rings["activation_ring"] = plgpu.SMEM(shape, jnp.int8, transforms=swizzled(size))
            rings["token_scale_ring"] = plgpu.SMEM((groups * c.tile_tokens,), jnp.float32)
        rings["barriers"] = barriers.memory(c.stages)
        rings["columns"] = plgpu.SMEM((2 * THREADS_PER_WARPGROUP,), jnp.int32)
        if c.splits > 1:
            sums = self.sets_of_sums * (c.splits - 1) * CHANNELS_PER_WARPGROUP * c.tile_tokens
            rings["sums"] = plgpu.SMEM((sums,), jnp.float32)
        return rings

    def barriers_of(self, scratch: dict[str, Any]) -> Barriers:
        """The barriers of the block."""
        return Barriers(scratch["barriers"], self.config.stages, self.config.warpgroups, self.config.cluster)

    def for_each_tile(self, cluster: Index, clusters: int, visit: Callable[[SplitTile], None]) -> None:
        """Visit the tiles of this cluster; 8-bit ones come first, since they take longest."""

        def one(index: Index, _: None) -> None:
            tile = index * clusters + cluster
            channel_tile, token_tile = lax.div(tile, self.token_tiles), lax.rem(tile, self.token_tiles)
            first_token = token_tile * self.config.tile_tokens

            def visit_kind(is8: bool, tile: Index) -> None:
                visit(SplitTile(index=index, is8=is8, first_row=tile * CHANNELS_PER_WARPGROUP, first_token=first_token))

            if not (self.n4 and self.n8):
                visit_kind(not self.n4, channel_tile)
                return
            is8 = channel_tile < self.tiles8
            pl.when(is8)(lambda: visit_kind(True, channel_tile))
            pl.when(jnp.logical_not(is8))(lambda: visit_kind(False, channel_tile - self.tiles8))

        lax.fori_loop(0, lax.div(self.num_tiles - 1 - cluster, clusters) + 1, one, None)

    def load_tile(
        self, inputs: dict[str, Ref], scratch: dict[str, Any], split: Index, warp: Index, tile: SplitTile
    ) -> None:
        """Copy the warp's part of this block's groups of a tile into the ring, each as soon as its slot is empty."""
        c, groups, loaders = self.config, self.runs * self.config.run, self.loaders
        own = self.barriers_of(scratch)
        first_stage = tile.index * groups
        first = lax.rem(warp + loaders - lax.rem(first_stage, loaders), loaders)

        def load(index: Index, _: None) -> None:
            group = first + index * loaders
            slot, uses = lax.rem(first_stage + group, c.stages), lax.div(first_stage + group, c.stages)

            @pl.when(uses > 0)
            def _wait() -> None:
                own.wait(own.empty(slot), uses - 1)

            self.load_group(inputs, scratch, tile, split * groups + group, slot)

        lax.fori_loop(0, lax.div(groups - first + loaders - 1, loaders), load, None)

    def load_group(
        self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: ring.Tile, group: Index, slot: Index
    ) -> None:
        """Start to copy a group of a tile into a slot; activations only where the block does not keep them."""
        size, bits = self.group_size, "8" if tile.is8 else "4"
        row_bytes = size if tile.is8 else size // 2

        def slices(of: Slice, name: str, to: str, first: Index) -> Any:
            return Copy(
                inputs[name], (of.start(group, first),), (of.copied,), scratch[to].at[slot, pl.ds(0, of.copied)]
            )

        todo = [
            Copy(
                inputs["codes" + bits],
                (group, tile.first_row, 0),
                (None, self.tile_channels, row_bytes),
                self.code_slot(scratch, tile.is8, slot),
                swizzled(row_bytes),
            ),
            slices(self.channel_scales(tile.is8), "scales" + bits, "channel_scale_ring", tile.first_row),
        ]
        if not self.quantizes:
            activations = Copy(
                inputs["codes"],
                (tile.first_token, group * size),
                (self.tile_tokens, size),
                scratch["activation_ring"].at[slot],
                swizzled(size),
            )
            todo.append(activations)
            todo.append(slices(self.token_scales, "token_scales", "token_scale_ring", tile.first_token))
        if not tile.is8:
            todo.append(slices(self.zero_points, "zero_points4", "zero_point_ring", tile.first_row))
        start_copies(scratch["barriers"], slot, todo)
