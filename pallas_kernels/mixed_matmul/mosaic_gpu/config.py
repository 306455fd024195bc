"""Static settings of the Mosaic GPU matmul, and a rule that picks them for shapes that no table knows."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from pallas_kernels.unsigned_operands import TOKENS_OF_SCALES

if TYPE_CHECKING:
    from pallas_kernels.mixed_matmul.triton_tiles import Problem

CHANNELS_PER_WARPGROUP = 64
"""Rows of one `wgmma`: the output channels of a tile that one warpgroup computes."""

WARPS_PER_WARPGROUP, THREADS_PER_WARPGROUP = 4, 128
"""What CUDA calls a warpgroup: the threads that issue a `wgmma` together."""

DOT_TOKENS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
"""Columns that an integer `wgmma` can have, up to the largest dot whose accumulators fit the registers."""

MULTIPROCESSORS = 132
"""Of an H100 SXM, for the rule; the launch asks the device."""

HALF_TILE = 0.6
"""Time of half a tile's tokens, where a tile takes 1: codes are unpacked all the same."""

MAX_HALVED_WAVES = 8
"""Where there are more waves, half tiles gain little, and a kernel of three or four kinds of tiles may spill."""


def can_halve(tile_tokens: int) -> bool:
    """Whether a tile of unsigned operands can be visited as two halves of its tokens."""
    return tile_tokens // 2 in DOT_TOKENS and tile_tokens % (2 * TOKENS_OF_SCALES) == 0


def halved_tiles(num_tiles: int, tile_tokens: int, multiprocessors: int) -> int:
    """Tiles of a last wave that would keep at most half of the multiprocessors busy: two take half of each."""
    rest = num_tiles % multiprocessors
    if not can_halve(tile_tokens) or num_tiles > MAX_HALVED_WAVES * multiprocessors:
        return 0
    return rest if 2 * rest <= multiprocessors < num_tiles else 0


def has_room_to_halve(tiles4: int, tiles8: int, tile_tokens: int, multiprocessors: int) -> bool:
    """Whether all tiles are one wave, also with every 8-bit tile as two halves.

    The wave is then as long as a 4-bit tile: 6144 x 4096 at 256 tokens took 22.7 instead of 26.9 us.
    """
    return bool(tiles4 and tiles8) and can_halve(tile_tokens) and tiles4 + 2 * tiles8 <= multiprocessors


def tile_time(tile_tokens: int) -> float:
    """Time of a tile of unsigned operands, about, where one of 128 tokens takes 1."""
    return 0.2 + 0.8 * tile_tokens / 128


def extra_of_8_bits(num_groups: int, tile_tokens: int) -> float:
    """Time of an 8-bit tile beyond that of a 4-bit one, 1, where there are both: its columns have gaps.

    Fitted to times of an H100: in us 3.6 for the store of 128 tokens and 0.02 a group, where a tile takes 0.7 and 0.515
    a group.
    """
    extra = (3.6 + 0.02 * num_groups) * tile_tokens / 128
    return extra / ((0.7 + 0.515 * num_groups) * tile_time(tile_tokens))


@dataclasses.dataclass(frozen=True)
class MosaicGpuConfig:
    """Static settings of the kernel.

    Attributes:
        tile_tokens: Tokens of a tile: `parts` dots of `DOT_TOKENS` tokens, together at most 128.
        compute_warpgroups: Warpgroups that compute, each 64 channels of the tile: 1 or 2.
        stages: Ring slots in shared memory, one group each; rounded down to whole blocks of `unroll` groups.
        unroll: Groups of a block, between whose dots there is no gap; the largest divisor of the number of groups that
            does not exceed it is used.
        parts: Dots a warpgroup keeps in flight, each over an equal part of the tile's tokens: while one runs, the
            result of another is scaled.
        band: Token tiles of a band; the tiles of a band that share channels are visited one after another.
        unsigned: Unsigned operands (see mosaic_gpu/unsigned/kernel.py), for groups of 128 and weights with the sums of
            their codes; other weights take the `signed` settings. A tile's tokens are one part and whole sixteens, and
            a block may go round the ring more than once.
    """

    tile_tokens: int = 128
    compute_warpgroups: int = 2
    stages: int = 6
    unroll: int = 2
    parts: int = 2
    band: int = 8
    unsigned: bool = False

    def __post_init__(self) -> None:
        """Check what the kernel takes for granted."""
        if self.tile_tokens % self.parts or self.tile_tokens // self.parts not in DOT_TOKENS or self.tile_tokens > 128:
            raise ValueError(f"tile_tokens must be parts times one of {DOT_TOKENS}, and at most 128; found {self}")
        if self.compute_warpgroups not in (1, 2):
            raise ValueError(f"compute_warpgroups must be 1 or 2, since each needs most of the registers; found {self}")
        if self.unsigned and (self.parts != 1 or self.stages < 2 or self.tile_tokens % TOKENS_OF_SCALES):
            raise ValueError(
                "with unsigned operands parts must be 1, stages at least 2 and tile_tokens a multiple of "
                f"{TOKENS_OF_SCALES}; found {self}"
            )

    def fitted(self, tokens: int) -> MosaicGpuConfig:
        """These settings without a part that no token ever reaches.

        The assembler removes the dots of such a part, whose results nobody stores, but still counts them where a wait
        leaves dots in flight: the wait would end too early.
        """
        if tokens > self.tile_tokens * (self.parts - 1) // self.parts:
            return self
        return dataclasses.replace(self, tile_tokens=next(size for size in DOT_TOKENS if tokens <= size), parts=1)

    @property
    def signed(self) -> MosaicGpuConfig:
        """Settings with signed operands for the same tiles."""
        if not self.unsigned:
            return self
        ring = {"stages": 6, "unroll": 2, "parts": 2} if self.tile_tokens == 128 else {"stages": 8, "unroll": 4}
        return dataclasses.replace(self, unsigned=False, **ring)

    @property
    def tile_channels(self) -> int:
        """Output channels of a tile."""
        return self.compute_warpgroups * CHANNELS_PER_WARPGROUP


_UNSIGNED: dict[str, Any] = {"stages": 4, "unroll": 4, "parts": 1, "unsigned": True}
"""The ring of tiles with unsigned operands."""

_UNSIGNED_TILES = (128, 112, 96, 80, 64)
"""Tokens of tiles with unsigned operands that are worth trying."""


def default(problem: Problem) -> MosaicGpuConfig:
    """What the tuned cases have in common: narrow tiles where there are too few to keep all multiprocessors busy."""

    def tiles(tokens: int) -> int:
        return sum(tiles_of(problem, 128, tokens))

    def time(tile_tokens: int) -> float:
        return tile_time(tile_tokens) * waves(problem, MosaicGpuConfig(tile_tokens, **_UNSIGNED))

    if problem.tokens <= 64:
        tile_tokens = next(size for size in (8, 16, 32, 64) if problem.tokens <= size)
        if tiles(tile_tokens) <= MULTIPROCESSORS:
            return MosaicGpuConfig(tile_tokens, 1, 12 if tile_tokens == 64 else 16, 4, parts=1)
        return MosaicGpuConfig(tile_tokens, 2, 8, 4, parts=1)
    if problem.tokens > 256:
        return MosaicGpuConfig(min(_UNSIGNED_TILES, key=time), **_UNSIGNED)
    if 2 * tiles(128) > MULTIPROCESSORS and has_room_to_halve(*tiles_of(problem, 128, 128), 128, MULTIPROCESSORS):
        return MosaicGpuConfig(128, **_UNSIGNED)
    if tiles(128) <= MULTIPROCESSORS * 3 // 4:
        return MosaicGpuConfig(64, 2, 8, 4, parts=1)
    return MosaicGpuConfig()


def tiles_of(problem: Problem, tile_channels: int, tile_tokens: int) -> tuple[int, int]:
    """Tiles of 4-bit and of 8-bit channels."""
    token_tiles = math.ceil(problem.tokens / tile_tokens)
    return math.ceil(problem.n4 / tile_channels) * token_tiles, math.ceil(problem.n8 / tile_channels) * token_tiles


def waves(problem: Problem, config: MosaicGpuConfig) -> float:
    """Time of the busiest multiprocessor of an H100 in that of a 4-bit tile: `HALF_TILE` for a halved one.

    With unsigned operands it has at least one 8-bit tile where there are any, unless those are halved in a single wave.
    """
    tiles = tiles_of(problem, config.tile_channels, config.tile_tokens)
    whole, rest = divmod(sum(tiles), MULTIPROCESSORS)
    if not config.unsigned:
        return whole + (rest > 0)
    if has_room_to_halve(*tiles, config.tile_tokens, MULTIPROCESSORS):
        return 1.0
    is_halved = halved_tiles(sum(tiles), config.tile_tokens, MULTIPROCESSORS) > 0
    extra = extra_of_8_bits(problem.num_groups, config.tile_tokens) if all(tiles) else 0.0
    return whole + (HALF_TILE if is_halved else rest > 0) + extra


def candidates(tokens: int) -> list[MosaicGpuConfig]:
    """The configurations worth trying for a number of tokens."""
    if tokens <= 64:
        sizes = [size for size in (8, 16, 32, 64) if tokens <= 2 * size and (size < 2 * tokens or size == 8)]
        return [
            MosaicGpuConfig(size, warpgroups, stages, 4, parts=1)
            for size in sizes
            for warpgroups, stages in ((1, 12 if size == 64 else 16), (2, 8))
        ]
    signed = [MosaicGpuConfig(), MosaicGpuConfig(64, 2, 8, 4, parts=1), MosaicGpuConfig(64, 2, 8, 4)]
    unsigned = [MosaicGpuConfig(size, **_UNSIGNED) for size in _UNSIGNED_TILES]
    if tokens > 1024:
        unsigned.append(MosaicGpuConfig(128, **{**_UNSIGNED, "unroll": 8}))
    return [*unsigned, *signed, MosaicGpuConfig(128, 1, **_UNSIGNED)]
