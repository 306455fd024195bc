"""Static settings of the Mosaic GPU matmul whose warpgroups split the input channels, and which of them to try."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import CHANNELS_PER_WARPGROUP, DOT_TOKENS, MULTIPROCESSORS

if TYPE_CHECKING:
    from pallas_kernels.mixed_matmul.triton_tiles import Problem

SHARED_MEMORY = 232448 - 4096
"""Bytes that a block may use, less room for barriers and alignment."""


@dataclasses.dataclass(frozen=True)
class MosaicGpuSplitConfig:
    """Static settings of the kernel.

    Attributes:
        tile_tokens: Tokens of a tile, one of `DOT_TOKENS`; its channels are always 64.
        warpgroups: Compute warpgroups of a block, which take runs of groups in turn: 1 to 4.
        cluster: Blocks of a cluster, each with an equal share of the groups of a tile.
        stages: Ring slots of a block, one group each, whole runs of every warpgroup.
        run: Groups of a run, between whose dots there is no gap.
    """

    tile_tokens: int
    warpgroups: int
    cluster: int
    stages: int
    run: int

    def __post_init__(self) -> None:
        """Check what the kernel takes for granted."""
        if self.tile_tokens not in DOT_TOKENS:
            raise ValueError(f"tile_tokens must be one of {DOT_TOKENS}; found {self}")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups must be 1 to 4, since each needs registers; found {self}")
        if self.stages % (self.run * self.warpgroups):
            raise ValueError(f"stages must be a multiple of run * warpgroups; found {self}")

    @property
    def splits(self) -> int:
        """Warpgroups that share a tile."""
        return self.warpgroups * self.cluster

    def fitted(self, problem: Problem) -> MosaicGpuSplitConfig:
        """These settings with shares and runs that divide the groups, and a ring that fits the shared memory."""
        cluster = _largest_divisor(problem.num_groups, self.cluster)
        run = _largest_divisor(problem.num_groups // cluster, self.run)
        for run_, cluster_, warpgroups in ((run, cluster, self.warpgroups), (1, cluster, self.warpgroups), (1, 1, 1)):
            unit = run_ * warpgroups
            slots = min(self.stages, self._room(problem, cluster_ * warpgroups) // self._stage_bytes(problem))
            if slots >= unit:
                stages = slots // unit * unit
                return MosaicGpuSplitConfig(self.tile_tokens, warpgroups, cluster_, stages, run_)
        raise ValueError(f"the shared memory does not hold a stage of {self}")

    def waves(self, problem: Problem) -> int:
        """Tiles that a cluster computes one after another."""
        channels = math.ceil(problem.n4 / CHANNELS_PER_WARPGROUP) + math.ceil(problem.n8 / CHANNELS_PER_WARPGROUP)
        tiles = channels * math.ceil(problem.tokens / self.tile_tokens)
        return math.ceil(tiles / (MULTIPROCESSORS // self.cluster))

    def _room(self, problem: Problem, splits: int) -> int:
        """Shared memory left for the ring by the two sets of sums."""
        return SHARED_MEMORY - 2 * (splits - 1) * CHANNELS_PER_WARPGROUP * self.tile_tokens * 4

    def _stage_bytes(self, problem: Problem) -> int:
        """At most, of a ring slot: codes, activations, scales and zero points."""
        codes = CHANNELS_PER_WARPGROUP * (problem.group_size if problem.n8 else problem.group_size // 2)
        token_scales = 4 * (self.tile_tokens + 32)
        return codes + self.tile_tokens * problem.group_size + token_scales + 512


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def candidates(tokens: int) -> list[MosaicGpuSplitConfig]:
    """The configurations worth trying for a number of tokens."""
    if tokens > 512:
        return []
    size = next((size for size in (8, 16, 32, 64) if tokens <= size), 64)
    if size <= 32:
        shares = [(4, 1, 16, 2), (4, 1, 16, 4), (2, 1, 16, 4), (2, 2, 16, 4), (4, 2, 16, 2), (2, 2, 16, 2)]
    else:
        shares = [(2, 1, 8, 4), (3, 1, 6, 2), (2, 1, 8, 2), (2, 2, 4, 2), (4, 1, 4, 1)]
    return [MosaicGpuSplitConfig(size, *share) for share in shares]
