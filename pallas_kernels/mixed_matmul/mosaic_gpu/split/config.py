"""Static settings of the Mosaic GPU matmul whose warpgroups split the input channels, and which of them to try."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, DOT_TOKENS, MULTIPROCESSORS

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

    def fitted(
        self, problem: Problem, *, quantizes: bool = False, multiprocessors: int = MULTIPROCESSORS
    ) -> MosaicGpuSplitConfig:
        """These settings with shares and runs that divide the groups, and a ring that fits the shared memory.

        Args:
            problem: What to compute.
            quantizes: The kernel quantises its activations, and therefore keeps them.
            multiprocessors: Of the device.

        Raises:
            ValueError: The shared memory does not hold this.
        """
        if quantizes and problem.tokens > self.tile_tokens:
            raise ValueError(f"one tile must hold all {problem.tokens} tokens to quantise; found {self}")
        cluster = _largest_divisor(problem.num_groups, self.cluster)
        run = _largest_divisor(problem.num_groups // cluster, self.run)
        for run_, cluster_, warpgroups in ((run, cluster, self.warpgroups), (1, cluster, self.warpgroups), (1, 1, 1)):
            unit = run_ * warpgroups
            config = dataclasses.replace(self, run=run_, cluster=cluster_, warpgroups=warpgroups, stages=unit)
            slots = min(self.stages, config._slots(problem, quantizes, multiprocessors))
            if slots >= unit:
                return dataclasses.replace(config, stages=slots // unit * unit)
        raise ValueError(f"the shared memory does not hold a stage of {self}")

    def waves(self, problem: Problem, multiprocessors: int = MULTIPROCESSORS) -> int:
        """Tiles that a cluster computes one after another."""
        channels = math.ceil(problem.n4 / CHANNELS_PER_WARPGROUP) + math.ceil(problem.n8 / CHANNELS_PER_WARPGROUP)
        tiles = channels * math.ceil(problem.tokens / self.tile_tokens)
        return math.ceil(tiles / (multiprocessors // self.cluster))

    def sets_of_sums(self, problem: Problem, multiprocessors: int) -> int:
        """One, or two where a cluster has several tiles: one is read while the next tile's sums arrive in the other."""
        return min(2, self.waves(problem, multiprocessors))

    def _slots(self, problem: Problem, quantizes: bool, multiprocessors: int) -> int:
        """Ring slots that the shared memory holds beside the sums, and the activations that the kernel quantised."""
        sums = (self.splits - 1) * CHANNELS_PER_WARPGROUP * self.tile_tokens * 4
        room = SHARED_MEMORY - self.sets_of_sums(problem, multiprocessors) * sums
        codes = CHANNELS_PER_WARPGROUP * (problem.group_size if problem.n8 else problem.group_size // 2)
        of_activations = self.tile_tokens * problem.group_size
        if quantizes:
            room -= problem.num_groups // self.cluster * (of_activations + 4 * self.tile_tokens)
            return room // (codes + 512)
        return room // (codes + of_activations + 4 * (self.tile_tokens + 32) + 512)


@dataclasses.dataclass(frozen=True)
class MosaicGpuQuantizeConfig(MosaicGpuSplitConfig):
    """The same settings, of the kernel that quantises float activations itself; a tile has all tokens."""

    def fits(self, problem: Problem, multiprocessors: int) -> bool:
        """Whether a tile has all tokens, and the shared memory holds them and a ring."""
        try:
            self.fitted(problem, quantizes=True, multiprocessors=multiprocessors)
        except ValueError:
            return False
        return True

    def quantizing_microseconds(self, problem: Problem) -> float:
        """About how long a block quantises after its first weights have arrived, as measured on an H100."""
        pieces = problem.tokens * problem.num_groups / self.cluster
        return 0.0095 * max(0.0, pieces - 100)


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


def quantizing_candidates(tokens: int) -> list[MosaicGpuQuantizeConfig]:
    """The configurations worth trying where the kernel is to quantise a number of tokens."""
    if tokens > 8:  # more take longer than a launch of their own
        return []
    shares = [(2, 1, 16, 4), (4, 1, 16, 2), (4, 1, 16, 4), (2, 2, 16, 4), (4, 2, 16, 2)]
    return [MosaicGpuQuantizeConfig(8, *share) for share in shares]
