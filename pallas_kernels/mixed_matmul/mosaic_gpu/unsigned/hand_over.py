"""A finished tile on its way from the warpgroups that compute to the warps that store.

Each computing warpgroup has `SLOTS` slots of shared memory, and each slot two barriers. Piece p of a tile (see
staging.py) goes through slot p % SLOTS:

    computing warpgroup                        storing warps (three)
    wait for `stored`, but the first time
    write the piece into the slot
    arrive at `staged`  ------------------->   wait for `staged`
    next piece, or the next tile               read the piece, store it
                        <-------------------   each arrives at `stored`

Both sides visit the same tiles in the same order. A slot is empty the first time, in the block's first tile. So no
later tile may have more pieces than that one: only those of a halved last wave differ, and they have fewer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu.columns import bias_of_channels, fetched_pair
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, THREADS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Destination
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Staging
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import store

SLOTS = 2
"""Of a warpgroup, for pieces of finished tiles: a tile of 128 tokens does not wait for its first half to be stored."""


@dataclasses.dataclass(frozen=True)
class HandOver:
    """The slots of a block and their protocol.

    Attributes:
        warpgroups: That compute.
        tile_tokens: Tokens of a whole tile.
        itemsize: Bytes of an output element.
    """

    warpgroups: int
    tile_tokens: int
    itemsize: int

    def memory(self) -> dict[str, Any]:
        """Shared memory of the slots, their barriers, and the columns of a bias."""
        slots = SLOTS * self.warpgroups
        return {
            "staging": plgpu.SMEM((slots, Staging(self.tile_tokens, self.itemsize).words), jnp.int32),
            "staged": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            "stored": plgpu.Barrier(num_arrivals=store.STORING_WARPS, num_barriers=slots),
            # Two for each computing thread, of a bias.
            "columns": plgpu.SMEM((self.warpgroups * 2 * THREADS_PER_WARPGROUP,), jnp.int32),
        }

    def pieces(self, tile: Tile) -> int:
        """In how many pieces a tile passes through shared memory."""
        return Staging(tile.tokens, self.itemsize).pieces

    def stage(
        self, total: Any, bias: Ref | None, dtype: Any, scratch: dict[str, Any], first_channel: Index, tile: Tile
    ) -> None:
        """Hand 64 finished channels of a tile, from `first_channel` on, over; called by the warpgroup that has them.

        Args:
            total: Float32 `[64, tokens]`, a value of Pallas.
            bias: float32 `[out_features]`, or None; with one, the columns are fetched.
            dtype: Of the output.
            scratch: The kernel's shared memory.
            first_channel: In the tile.
            tile: The tile.
        """
        bias_refs = [scratch["columns"], bias] if bias is not None else []
        first_slot = lax.div(first_channel, CHANNELS_PER_WARPGROUP) * SLOTS
        for piece in range(self.pieces(tile)):
            slot = first_slot + piece % SLOTS

            def wait(slot: Index = slot) -> None:
                plgpu.barrier_wait(scratch["stored"].at[slot])

            if piece < SLOTS:
                pl.when(tile.first_block > 0)(wait)
            else:
                wait()
            _stage(total, piece, scratch["staging"].at[slot], dtype, bias_refs)
            plgpu.barrier_arrive(scratch["staged"].at[slot])

    def store(self, order: Ref, order_start: int, rows: int, out: Ref, scratch: dict[str, Any], tile: Tile) -> None:
        """Store a tile that the computing warpgroups hand over; called by each of the storing warps.

        Args:
            order: int32 `[out_features]`, the output channel of each packed row.
            order_start: Where those of the tile's bit width start in it.
            rows: Channels of this bit width.
            out: `[tokens, out_features]`.
            scratch: The kernel's shared memory.
            tile: The tile.
        """
        for piece in range(self.pieces(tile)):

            def store_channels(warpgroup: Index, _: None, piece: int = piece) -> None:
                slot = warpgroup * SLOTS + piece % SLOTS
                plgpu.barrier_wait(scratch["staged"].at[slot])

                @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, *[plgpu.RefType()] * 3))
                def emit(ctx: Any, first_row: Any, first_token: Any, order: Any, shared: Any, out: Any) -> None:
                    to = Destination(
                        out,
                        first_row=first_row.registers.item(),
                        first_token=first_token.registers.item(),
                        rows=rows,
                        tokens=tile.tokens,
                    )
                    store.store_piece(to, order, order_start, piece, shared)

                first_row = tile.first_row + warpgroup * CHANNELS_PER_WARPGROUP
                emit(first_row, tile.first_token, order, scratch["staging"].at[slot], out)
                plgpu.barrier_arrive(scratch["stored"].at[slot])

            lax.fori_loop(0, self.warpgroups, store_channels, None)


def _stage(total: Any, piece: int, shared: Ref, dtype: Any, bias: list[Ref]) -> None:
    """Write a piece of a finished tile to shared memory; `bias` is empty, or fetched columns and the bias."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, *[plgpu.RefType()] * (1 + len(bias))))
    def emit(ctx: Any, total: Any, shared: Any, *bias: Any) -> None:
        added = bias_of_channels(fetched_pair(bias[0]), bias[1]) if bias else None
        store.stage_piece(total, piece, shared, utils.dtype_to_ir_type(jnp.dtype(dtype)), added)

    emit(total, shared, *bias)
