"""The tiles of the persistent kernels, and their order.

Places of the order go to the multiprocessors in turn: with 132 of them, the first wave is places 0 to 131. Places run
in bands of `band` token tiles, within a band down all of its token tiles before the next channel tile, and back again
in the next band, so that the tiles of a wave share channels and tokens, which then come from the L2 cache:

    channel tile     0    1    2    3   ...
    token tile 0     0    2    4    6         a band of two token tiles
               1     1    3    5    7
               2    ...      10    8          the next band comes back
               3    ...      11    9

8-bit tiles are spread evenly among the 4-bit ones along the channels. From wave to wave the multiprocessors move on by
some places, where one would get far more 8-bit tiles than another otherwise. Where the last wave would keep at most
half of the multiprocessors busy, its tiles are halved, if the kernel can: two multiprocessors take half of the tokens
each. Where all tiles are one wave that leaves room, it is the 8-bit tiles that are halved: they would take longest,
since their columns have gaps.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu import ring
from pallas_kernels.mixed_matmul.mosaic_gpu.config import HALF_TILE, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Index


@dataclasses.dataclass(frozen=True)
class Tile(ring.Tile):
    """A tile as the loops see it: which channels and tokens, and where its groups stand in the ring.

    Attributes:
        tokens: How many it has.
        first_block: Blocks that the multiprocessor has before it.
    """

    tokens: int
    first_block: Index


def channel_tiles_in_order(token_tiles: int, channel_tiles: int, band: int) -> np.ndarray:
    """Channel tile of each place of the order, int `[token_tiles * channel_tiles]`."""
    number, within = np.divmod(np.arange(token_tiles * channel_tiles), band * channel_tiles)
    channel = within // np.minimum(band, token_tiles - number * band)
    return np.where(number % 2 == 0, channel, channel_tiles - 1 - channel)


@functools.cache
def balancing_turn(
    tiles4: int, tiles8: int, token_tiles: int, band: int, halved: int, multiprocessors: int, extra: float
) -> int:
    """By how many places a multiprocessor should move on from wave to wave.

    Without, a multiprocessor may get nothing but 8-bit tiles where a number of waves makes a band (4096 channels of 33
    tiles, 132 multiprocessors).

    Args:
        tiles4: Tiles of 4-bit channels.
        tiles8: Tiles of 8-bit channels.
        token_tiles: Tiles along the tokens.
        band: Token tiles of a band.
        halved: Tiles of the last wave that are visited as two halves each.
        multiprocessors: That compute.
        extra: Time that an 8-bit tile takes beyond that of a 4-bit one, 1: columns with gaps are slow to store.

    Returns:
        The turn with which the busiest multiprocessor has the least to do; 0 where none gains 1 %.
    """
    channel_tiles = tiles4 + tiles8
    if not (tiles4 and tiles8) or token_tiles * channel_tiles <= multiprocessors:
        return 0
    channel = channel_tiles_in_order(token_tiles, channel_tiles, band)
    is8 = (channel + 1) * tiles8 // channel_tiles != channel * tiles8 // channel_tiles
    cost = 1 + extra * is8
    whole = cost.size - halved
    cost = np.concatenate([cost[:whole], HALF_TILE * np.repeat(cost[whole:], 2)])
    wave, place = np.divmod(np.arange(cost.size), multiprocessors)

    def busiest(turn: int) -> float:
        return float(np.bincount((place - wave * turn) % multiprocessors, cost, multiprocessors).max())

    best = min(range(multiprocessors), key=busiest)
    return best if busiest(best) < 0.99 * busiest(0) else 0


@dataclasses.dataclass(frozen=True)
class TiledKernel(ring.RingKernel, abc.ABC):
    """A persistent kernel of one problem, but for the loops over the groups of a tile.

    Attributes:
        out_itemsize: Bytes of an output element.
        config: Settings that were fitted to the number of tokens.
    """

    out_itemsize: int
    config: MosaicGpuConfig

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.config.tile_tokens

    @property
    def tile_channels(self) -> int:
        """Output channels of a tile."""
        return self.config.tile_channels

    @property
    def unroll(self) -> int:
        """Groups of a block."""
        return max(unroll for unroll in range(1, self.config.unroll + 1) if self.num_groups % unroll == 0)

    @property
    def num_blocks(self) -> int:
        """Blocks of a tile."""
        return self.num_groups // self.unroll

    def halved(self, multiprocessors: int) -> int:
        """Tiles at the end that are visited as two halves each."""
        return 0

    def splits8(self, multiprocessors: int) -> bool:
        """Whether 8-bit tiles are visited as two halves each, all tiles at the same time."""
        return False

    def blocks(self, multiprocessors: int) -> int:
        """Blocks to launch, one on each multiprocessor; for these all methods here give the same answers."""
        if self.splits8(multiprocessors):
            return (self.tiles4 + 2 * self.tiles8) * self.token_tiles
        return min(multiprocessors, self.num_tiles)

    def turn(self, multiprocessors: int) -> int:
        """Places by which a multiprocessor moves on from wave to wave."""
        return 0

    def for_each_tile(self, multiprocessor: Index, multiprocessors: int, visit: Callable[[Tile], None]) -> None:
        """Visit the tiles of this multiprocessor.

        8-bit tiles are spread evenly among the 4-bit ones, so that outputs which are neighbours are stored at about
        the same time.
        """
        channel_tiles, tile_tokens = self.tiles4 + self.tiles8, self.config.tile_tokens
        if self.splits8(multiprocessors):
            self._visit_one(multiprocessor, visit)
            return

        def visit_place(place: Index, first_block: Index, first: Index, tokens: int) -> None:
            """Visit `tokens` tokens, from `first` on, of the tile at a place of the order."""
            token_tile, channel_tile = plgpu.planar_snake(place, (self.token_tiles, channel_tiles), 0, self.config.band)
            first_token = token_tile * tile_tokens + first

            def visit_kind(is8: bool, tile: Index) -> None:
                visit(
                    Tile(
                        is8=is8,
                        first_row=tile * self.tile_channels,
                        first_token=first_token,
                        tokens=tokens,
                        first_block=first_block,
                    )
                )

            if not (self.n4 and self.n8):
                visit_kind(not self.n4, channel_tile)
                return
            before = lax.div(channel_tile * self.tiles8, channel_tiles)  # 8-bit tiles before this one
            is8 = lax.div((channel_tile + 1) * self.tiles8, channel_tiles) != before
            pl.when(is8)(lambda: visit_kind(True, before))
            pl.when(jnp.logical_not(is8))(lambda: visit_kind(False, channel_tile - before))

        halved, turn = self.halved(multiprocessors), self.turn(multiprocessors)
        whole = self.num_tiles - halved
        waves = whole // multiprocessors

        def place_in(wave: Index) -> Index:
            """Which place of a wave is this multiprocessor's."""
            return lax.rem(multiprocessor + wave * turn, multiprocessors) if turn else multiprocessor

        def visit_whole(wave: Index, _: None) -> None:
            visit_place(wave * multiprocessors + place_in(wave), wave * self.num_blocks, 0, tile_tokens)

        last = place_in(waves)
        lax.fori_loop(0, lax.div(whole - 1 - last, multiprocessors) + 1, visit_whole, None)
        if halved:

            @pl.when(last < 2 * halved)
            def _half() -> None:
                first_block, half = waves * self.num_blocks, lax.rem(last, 2)
                visit_place(whole + lax.div(last, 2), first_block, half * (tile_tokens // 2), tile_tokens // 2)

    def _visit_one(self, place: Index, visit: Callable[[Tile], None]) -> None:
        """Visit the one tile of a multiprocessor where 8-bit tiles are halved: they come behind the 4-bit ones."""

        def visit_kind(is8: bool, place: Index) -> None:
            halves = 2 if is8 else 1
            tokens, token_tiles = self.tile_tokens // halves, self.token_tiles * halves
            first_row, first_token = (
                lax.div(place, token_tiles) * self.tile_channels,
                lax.rem(place, token_tiles) * tokens,
            )
            visit(Tile(is8=is8, first_row=first_row, first_token=first_token, tokens=tokens, first_block=0))

        whole = self.tiles4 * self.token_tiles
        pl.when(place < whole)(lambda: visit_kind(False, place))
        pl.when(place >= whole)(lambda: visit_kind(True, place - whole))
