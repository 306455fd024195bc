"""Mixed-precision matmul for Hopper GPUs (Pallas Mosaic GPU): int8 `wgmma`, warp-specialised, persistent.

One block runs on each multiprocessor. One warp of its last warpgroup keeps a ring of shared-memory stages filled
through the bulk copy engine; a stage is one group of a tile: packed codes, scales, zero points, activations and their
scales. Each compute warpgroup owns 64 channels of the tile: it reads its packed codes into registers, unpacks them
there (they are the left operand of the dot), starts the integer dot on an accumulator that begins at a magic number,
and adds the scaled result to a float32 total with two fused multiply-adds an element. The tokens of a tile are divided
into parts, each with a dot of its own in flight. 4-bit and 8-bit channels are tiles of one launch.
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
from pallas_kernels.mixed_matmul.mosaic_gpu.calls import Emitted, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Staging
from pallas_kernels.mixed_matmul.mosaic_gpu.tiles import Tile, TiledKernel
from pallas_kernels.packing import PackedWeight

COMPUTE_REGISTERS, LOADER_REGISTERS = 240, 24
"""Registers of a thread: 2 x 240 + 24 is what the 512 of a multiprocessor's 65536 / 128 allow."""


def launch(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    out_dtype: jnp.dtype,
    config: MosaicGpuConfig,
    multiprocessors: int,
) -> jax.Array:
    """Quantised linear layer `[tokens, out_features]`; see `pallas_kernels.mixed_matmul.api.mixed_matmul`."""
    config = config.fitted(activations.tokens)
    sizes = (activations.tokens, weight.n4, weight.n8, weight.num_groups, weight.group_size)
    kernel = kernel_type(config)(*sizes, out_dtype.itemsize, config)
    operands = kernel.operands(activations, weight) | {"order": weight.channel_order}
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)
    run = plgpu.kernel(
        functools.partial(kernel.body, tuple(operands)),
        out_type=jax.ShapeDtypeStruct((activations.tokens, weight.out_features), out_dtype),
        scratch_types=kernel.scratch(),
        grid=(min(multiprocessors, kernel.num_tiles),),
        grid_names=("multiprocessor",),
        num_threads=config.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mixed_matmul_mosaic_gpu",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # the ring has barriers of its own, and so has the store
        ),
    )
    return run(*operands.values())


def kernel_type(config: MosaicGpuConfig) -> type[Kernel]:
    """The kernel that these settings are for."""
    if not config.unsigned:
        return Kernel
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel  # builds on this module

    return UnsignedKernel


@dataclasses.dataclass(frozen=True)
class Kernel(TiledKernel):
    """The kernel of one problem."""

    @property
    def stages(self) -> int:
        """Ring slots: whole blocks, so that a block's slots follow each other."""
        return max(1, self.config.stages // self.unroll) * self.unroll

    def first_slot(self, block: Index) -> Index:
        """First ring slot of a block, counted over all tiles of the multiprocessor."""
        blocks = self.stages // self.unroll
        return 0 if blocks == 1 else lax.rem(block, blocks) * self.unroll

    @property
    def staging(self) -> Staging:
        """How finished dots pass through shared memory."""
        return Staging(self.config.tile_tokens // self.config.parts, self.out_itemsize)

    def staging_memory(self) -> dict[str, Any]:
        """Shared memory for finished tiles on their way to the output."""
        warpgroups = self.config.compute_warpgroups
        return {
            "staging": plgpu.SMEM((warpgroups * self.staging.words,), jnp.int32),
            "columns": plgpu.SMEM((warpgroups * 256,), jnp.int32),  # two for each thread
        }

    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring's stages and their barriers, and room for finished tiles."""
        return self.rings(readers=self.config.compute_warpgroups) | self.staging_memory() | self.code_rings()

    def visitor_that_stores(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any]
    ) -> Callable[[Tile], None] | None:
        """What the warps that do not load do with each tile, if anything."""
        return None

    def body(self, names: tuple[str, ...], *refs: Ref, **scratch: Any) -> None:
        """The kernel: the first warpgroups compute, one warp of the last one loads."""
        inputs, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
        warpgroup, multiprocessor = lax.axis_index("warpgroup"), lax.axis_index("multiprocessor")
        multiprocessors = lax.axis_size("multiprocessor")

        @pl.when(warpgroup == self.config.compute_warpgroups)
        def _loader() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            # One warp, since the instructions of the other three would take issue slots from the compute warps.
            @plgpu.warp_map
            def _warps(warp: Index) -> None:
                @pl.when(warp == 0)
                def _first_warp() -> None:
                    self.for_each_tile(
                        multiprocessor, multiprocessors, functools.partial(self.load_tile, inputs, scratch)
                    )

                visit = self.visitor_that_stores(inputs, out, scratch)
                if visit is not None:
                    pl.when(warp > 0)(lambda: self.for_each_tile(multiprocessor, multiprocessors, visit))

        @pl.when(warpgroup < self.config.compute_warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.for_each_tile(
                multiprocessor,
                multiprocessors,
                functools.partial(self.compute_tile, inputs, out, scratch, warpgroup * CHANNELS_PER_WARPGROUP),
            )

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
        c, is8 = self.config, tile.is8
        part_tokens = c.tile_tokens // c.parts
        emit = Emitted(self.group_size, part_tokens, even_tokens=self.tokens % 2 == 0)
        first_row, rows = tile.first_row + first_channel, self.n8 if is8 else self.n4
        emit.fetch_columns(inputs["order"], scratch["columns"], first_row, rows, self.n4 if is8 else 0)

        def wait_and_load(group: Index, slot: Index) -> Any:
            """Wait for a stage and read its codes, ready for the dot."""
            plgpu.barrier_wait(scratch["full"].at[slot])
            codes = self.code_slot(scratch, is8, slot).at[pl.ds(first_channel, CHANNELS_PER_WARPGROUP)]
            if is8:
                return emit.load_codes8(codes)
            lead = self.zero_points.lead(group)
            return emit.load_codes4(codes, scratch["zero_point_ring"].at[slot], lead + first_channel)

        def start(accumulator: Any, codes: Any, slot: Index, part: int) -> Any:
            tokens = pl.ds(part * part_tokens, part_tokens)
            return emit.start_dot(accumulator, codes, scratch["activation_ring"].at[slot, tokens])

        def finish(
            in_flight: int, accumulator: Any, codes: Any, total: Any, group: Index, slot: Index, part: int
        ) -> Any:
            return emit.finish_dot(
                in_flight,
                accumulator,
                codes,
                total,
                scratch["channel_scale_ring"].at[slot],
                self.channel_scales(is8).lead(group) + first_channel,
                scratch["token_scale_ring"].at[slot],
                self.token_scales.lead(group) + part * part_tokens,
            )

        def add_block(index: Index, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            """Add the groups of a block. All its dots are done at the end: the assembler follows none around a loop."""
            totals = list(carry)
            first_slot = self.first_slot(tile.first_block + index)
            codes = wait_and_load(index * self.unroll, first_slot)
            # All accumulators first, so that nothing stands between the dots.
            accumulators = [emit.magic_accumulator() for _ in range(c.parts)]
            accumulators = [start(accumulators[part], codes, first_slot, part) for part in range(c.parts)]
            for offset in range(self.unroll):
                group, slot = index * self.unroll + offset, first_slot + offset
                is_last = offset == self.unroll - 1
                next_codes = codes if is_last else wait_and_load(group + 1, slot + 1)
                for part in range(c.parts):
                    in_flight = c.parts - 1 - (part if is_last else 0)
                    totals[part] = finish(in_flight, accumulators[part], codes, totals[part], group, slot, part)
                    if part == c.parts - 1:
                        plgpu.barrier_arrive(scratch["empty"].at[slot])
                    if not is_last:
                        accumulators[part] = start(emit.magic_accumulator(), next_codes, slot + 1, part)
                codes = next_codes
            return tuple(totals)

        zeros = tuple(emit.zero_total() for _ in range(c.parts))
        totals = lax.fori_loop(0, self.num_blocks, add_block, zeros)
        refs = [scratch["staging"], scratch["columns"], out, *([inputs["bias"]] if "bias" in inputs else [])]
        for part, total in enumerate(totals):
            first_token = tile.first_token + part * part_tokens
            emit.store(total, first_row, first_token, rows, refs)
