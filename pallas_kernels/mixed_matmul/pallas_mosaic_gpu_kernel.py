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
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu_store as store
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_calls import Emitted as _Emitted
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_calls import Index, Ref
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_calls import Slice as _Slice
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_calls import swizzled as _swizzled
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import CHANNELS_PER_WARPGROUP, MosaicGpuConfig
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


def kernel_type(config: MosaicGpuConfig) -> type[_Kernel]:
    """The kernel that these settings are for."""
    if not config.unsigned:
        return _Kernel
    from pallas_kernels.mixed_matmul import pallas_mosaic_gpu_unsigned  # builds on this module

    return pallas_mosaic_gpu_unsigned.UnsignedKernel


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile as the loops see it: which channels and tokens, and where its groups stand in the ring."""

    first_block: Index
    is8: bool
    first_row: Index
    first_token: Index


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel of one problem."""

    tokens: int
    n4: int
    n8: int
    num_groups: int
    group_size: int
    out_itemsize: int
    config: MosaicGpuConfig

    @property
    def tiles4(self) -> int:
        return pl.cdiv(self.n4, self.config.tile_channels)

    @property
    def tiles8(self) -> int:
        return pl.cdiv(self.n8, self.config.tile_channels)

    @property
    def token_tiles(self) -> int:
        return pl.cdiv(self.tokens, self.config.tile_tokens)

    @property
    def num_tiles(self) -> int:
        return (self.tiles4 + self.tiles8) * self.token_tiles

    @property
    def token_scales(self) -> _Slice:
        return _Slice(self.tokens, self.config.tile_tokens, 4)

    def channel_scales(self, is8: bool) -> _Slice:
        return _Slice(self.n8 if is8 else self.n4, self.config.tile_channels, 2)

    @property
    def zero_points(self) -> _Slice:
        return _Slice(self.n4, self.config.tile_channels, 1)

    @property
    def unroll(self) -> int:
        """Groups of a block."""
        return max(unroll for unroll in range(1, self.config.unroll + 1) if self.num_groups % unroll == 0)

    @property
    def num_blocks(self) -> int:
        return self.num_groups // self.unroll

    @property
    def stages(self) -> int:
        """Ring slots: whole blocks, so that a block's slots follow each other."""
        return max(1, self.config.stages // self.unroll) * self.unroll

    def first_slot(self, block: Index) -> Index:
        """First ring slot of a block, counted over all tiles of the multiprocessor."""
        blocks = self.stages // self.unroll
        return 0 if blocks == 1 else lax.rem(block, blocks) * self.unroll

    @property
    def staging(self) -> store.Staging:
        """How finished dots pass through shared memory."""
        return store.Staging(self.config.tile_tokens // self.config.parts, self.out_itemsize)

    def operands(self, activations: QuantizedActivations, weight: PackedWeight) -> dict[str, jax.Array]:
        """Arrays to copy from, by name.

        Rows of scales are not always multiples of 16 bytes apart, as the copy engine wants of two axes: it gets one.
        """
        arrays = {"codes": activations.codes, "token_scales": activations.scales.reshape(-1)}
        if weight.n4:
            arrays |= {"codes4": weight.codes4, "scales4": weight.scales4.reshape(-1)}
            arrays |= {"zero_points4": weight.zero_points4.reshape(-1)}
        if weight.n8:
            arrays |= {"codes8": weight.codes8, "scales8": weight.scales8.reshape(-1)}
        return arrays

    def scratch(self) -> dict[str, Any]:
        """Shared memory: the ring's stages and their barriers, and room for finished tiles."""
        c, size = self.config, self.group_size
        channel_scales = max(self.channel_scales(is8).copied for is8 in (False, True))
        rings: dict[str, Any] = {
            "activation_ring": plgpu.SMEM((self.stages, c.tile_tokens, size), jnp.int8, transforms=_swizzled(size)),
            "token_scale_ring": plgpu.SMEM((self.stages, self.token_scales.copied), jnp.float32),
            "channel_scale_ring": plgpu.SMEM((self.stages, channel_scales), jnp.float16),
            # Every copy of a stage arrives once; an 8-bit stage has no zero points and arrives without a copy.
            "full": plgpu.Barrier(num_arrivals=5 if self.n4 else 4, num_barriers=self.stages),
            "empty": plgpu.Barrier(num_arrivals=c.compute_warpgroups, num_barriers=self.stages),
            "staging": plgpu.SMEM((c.compute_warpgroups * self.staging.words,), jnp.int32),
            "columns": plgpu.SMEM((c.compute_warpgroups * 256,), jnp.int32),  # two for each thread
        }
        # A slot of 4-bit codes takes the room of one of 8-bit codes where both share the memory: slots of tiles of
        # both kinds are in use at the same time, and only equal slots have equal barriers.
        both = bool(self.n4 and self.n8)
        ring4 = plgpu.SMEM(
            (self.stages, 2 if both else 1, c.tile_channels, size // 2), jnp.uint8, transforms=_swizzled(size // 2)
        )
        ring8 = plgpu.SMEM((self.stages, c.tile_channels, size), jnp.int8, transforms=_swizzled(size))
        if self.n4:
            rings["zero_point_ring"] = plgpu.SMEM((self.stages, self.zero_points.copied), jnp.uint8)
        rings["code_rings"] = plgpu.RefUnion(ring4, ring8) if both else ring4 if self.n4 else ring8
        return rings

    def code_slot(self, scratch: dict[str, Any], is8: bool, slot: Index) -> Ref:
        """The codes of a stage."""
        ring4, ring8 = scratch["code_rings"] if self.n4 and self.n8 else (scratch["code_rings"],) * 2
        return ring8.at[slot] if is8 else ring4.at[slot, 0]

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

        @pl.when(warpgroup < self.config.compute_warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.for_each_tile(
                multiprocessor,
                multiprocessors,
                functools.partial(self.compute_tile, inputs, out, scratch, warpgroup * CHANNELS_PER_WARPGROUP),
            )

    def for_each_tile(self, multiprocessor: Index, multiprocessors: int, visit: Callable[[_Tile], None]) -> None:
        """Visit the tiles of this multiprocessor.

        8-bit tiles are spread evenly among the 4-bit ones, so that outputs which are neighbours are stored at about
        the same time.
        """
        channel_tiles = self.tiles4 + self.tiles8

        def one(index: Index, _: None) -> None:
            token_tile, channel_tile = plgpu.planar_snake(
                index * multiprocessors + multiprocessor, (self.token_tiles, channel_tiles), 0, self.config.band
            )
            first_token = token_tile * self.config.tile_tokens

            def visit_kind(is8: bool, tile: Index) -> None:
                visit(_Tile(index * self.num_blocks, is8, tile * self.config.tile_channels, first_token))

            if not (self.n4 and self.n8):
                visit_kind(not self.n4, channel_tile)
                return
            before = lax.div(channel_tile * self.tiles8, channel_tiles)  # 8-bit tiles before this one
            is8 = lax.div((channel_tile + 1) * self.tiles8, channel_tiles) != before
            pl.when(is8)(lambda: visit_kind(True, before))
            pl.when(jnp.logical_not(is8))(lambda: visit_kind(False, channel_tile - before))

        lax.fori_loop(0, lax.div(self.num_tiles - 1 - multiprocessor, multiprocessors) + 1, one, None)

    def load_tile(self, inputs: dict[str, Ref], scratch: dict[str, Any], tile: _Tile) -> None:
        """Copy the groups of a tile into the ring, each as soon as its slot is empty."""
        c, size, bits = self.config, self.group_size, "8" if tile.is8 else "4"
        scales = self.channel_scales(tile.is8)

        def load_group(group: Index, slot: Index) -> None:
            tokens = pl.ds(tile.first_token, c.tile_tokens)
            copies = [
                (
                    inputs["codes" + bits].at[group, pl.ds(tile.first_row, c.tile_channels)],
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

        def load_block(index: Index, _: None) -> None:
            block = tile.first_block + index
            first_slot = self.first_slot(block)
            for offset in range(self.unroll):

                @pl.when(block * self.unroll + offset >= self.stages)
                def _wait(offset: int = offset) -> None:
                    plgpu.barrier_wait(scratch["empty"].at[first_slot + offset])

                load_group(index * self.unroll + offset, first_slot + offset)

        lax.fori_loop(0, self.num_blocks, load_block, None)

    def compute_tile(
        self, inputs: dict[str, Ref], out: Ref, scratch: dict[str, Any], first_channel: Index, tile: _Tile
    ) -> None:
        """Compute 64 channels of a tile, from `first_channel` on, and store them."""
        c, is8 = self.config, tile.is8
        part_tokens = c.tile_tokens // c.parts
        emit = _Emitted(self.group_size, part_tokens, is8, even_tokens=self.tokens % 2 == 0)
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
