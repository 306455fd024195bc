"""A finished tile of the Hopper kernel on its way from the warpgroups that compute to the warps that store."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu.calls import ACCUMULATOR, SCALAR, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.signed import store
from pallas_kernels.mixed_matmul.mosaic_gpu.signed.kernel import Kernel
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Destination, Staging
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import store as store_apart

SLOTS = 2
"""Of a warpgroup, for pieces of finished tiles: a tile of 128 tokens does not wait for its first half to be stored."""


@dataclasses.dataclass(frozen=True)
class HandingOverKernel(Kernel):
    """A kernel whose computing warpgroups go on with the next tile while other warps store; tiles are one part."""

    def staging_memory(self) -> dict[str, Any]:
        """As in the base class, with barriers between those that stage and those that store."""
        warpgroups = self.config.compute_warpgroups
        slots = SLOTS * warpgroups
        return {
            "staging": plgpu.SMEM((slots, self.staging.words), jnp.int32),
            "staged": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            "stored": plgpu.Barrier(num_arrivals=store_apart.STORING_WARPS, num_barriers=slots),
            "columns": plgpu.SMEM((warpgroups * 256,), jnp.int32),  # two for each thread, of a bias
        }

    def pieces(self, tile: Tile) -> int:
        """In how many pieces a tile passes through shared memory."""
        return Staging(tile.tokens, self.out_itemsize).pieces

    def stage_tile(
        self,
        total: Any,
        inputs: dict[str, Ref],
        out: Ref,
        scratch: dict[str, Any],
        first_channel: Index,
        tile: Tile,
    ) -> None:
        """Hand 64 finished channels of a tile, from `first_channel` on, to the warps that store."""
        bias = [scratch["columns"], inputs["bias"]] if "bias" in inputs else []
        first_slot = lax.div(first_channel, CHANNELS_PER_WARPGROUP) * SLOTS
        for piece in range(self.pieces(tile)):
            slot = first_slot + piece % SLOTS

            def wait(slot: Index = slot) -> None:
                plgpu.barrier_wait(scratch["stored"].at[slot])

            if piece < SLOTS:
                pl.when(tile.first_block > 0)(wait)
            else:
                wait()
            _stage(total, piece, scratch["staging"].at[slot], out.dtype, bias)
            plgpu.barrier_arrive(scratch["staged"].at[slot])

    def visitor_that_stores(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any]
    ) -> Callable[[Tile], None] | None:
        """Stores the tiles that are handed over."""
        return functools.partial(self.store_tile, inputs, out, scratch)

    def store_tile(self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], tile: Tile) -> None:
        """Store a tile that the computing warpgroups hand over; called by a warp that does not load."""
        rows, order_start = (self.n8, self.n4) if tile.is8 else (self.n4, 0)
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
                    store_apart.store_piece(to, order, order_start, piece, shared)

                first_row = tile.first_row + warpgroup * CHANNELS_PER_WARPGROUP
                emit(first_row, tile.first_token, inputs["order"], scratch["staging"].at[slot], out)
                plgpu.barrier_arrive(scratch["stored"].at[slot])

            lax.fori_loop(0, self.config.compute_warpgroups, store_channels, None)


def _stage(total: Any, piece: int, shared: Ref, dtype: Any, bias: list[Ref]) -> None:
    """Write a piece of a finished tile to shared memory; `bias` is empty, or fetched columns and the bias."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, *[plgpu.RefType()] * (1 + len(bias))))
    def emit(ctx: Any, total: Any, shared: Any, *bias: Any) -> None:
        added = store.bias_of_channels(store.fetched_pair(bias[0]), bias[1]) if bias else None
        store_apart.stage_piece(total, piece, shared, utils.dtype_to_ir_type(jnp.dtype(dtype)), added)

    emit(total, shared, *bias)
