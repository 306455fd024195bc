"""Mixed-precision matmul for Hopper GPUs with few tokens: warpgroups and clusters of blocks split the input channels.

With few tokens there are too few tiles of 64 channels to keep all multiprocessors loading, and one warpgroup takes
longer for the dots and scales of a group than the memory takes to bring the next one. So the groups of a tile are
shared out in runs: among the blocks of a cluster, each with a loader and a ring of its own, and in turn among the
warpgroups of a block. Their sums meet in the shared memory of the cluster's first block, which adds them in a fixed
order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.mosaic_gpu.calls import Emitted, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.split import copies, output, quantize
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.ring import THREADS, SplitRing, SplitTile
from pallas_kernels.mixed_matmul.triton_tiles import Problem
from pallas_kernels.packing import PackedWeight

LOADER_REGISTERS = 24
"""Of a loading thread."""


def launch(
    activations: QuantizedActivations | jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None,
    out_dtype: jnp.dtype,
    config: MosaicGpuSplitConfig,
    multiprocessors: int,
) -> jax.Array:
    """Quantised linear layer `[tokens, out_features]`; see `pallas_kernels.mixed_matmul.api.mixed_matmul`.

    Float activations `[tokens, in_features]`, not more tokens than a tile has, are quantised in the same launch.
    """
    quantizes = not isinstance(activations, QuantizedActivations)
    tokens = activations.tokens if isinstance(activations, QuantizedActivations) else activations.shape[0]
    problem = Problem(tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)
    config = config.fitted(problem, quantizes=quantizes, multiprocessors=multiprocessors)
    sets = config.sets_of_sums(problem, multiprocessors)
    kernel = _Kernel(tokens, weight.n4, weight.n8, weight.num_groups, weight.group_size, config, sets, quantizes)
    if isinstance(activations, QuantizedActivations):
        operands = kernel.operands(activations, weight)
    else:
        operands = kernel.operands(QuantizedActivations(activations, activations, weight.group_size), weight)
        del operands["token_scales"]
    operands["order"] = weight.channel_order
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)
    run = plgpu.kernel(
        functools.partial(kernel.body, tuple(operands)),
        out_type=jax.ShapeDtypeStruct((tokens, weight.out_features), out_dtype),
        scratch_types=kernel.scratch(),
        grid=(min(multiprocessors // config.cluster, kernel.num_tiles),),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("split",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="mixed_matmul_mosaic_gpu_split",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # the ring and the sums have barriers of their own
        ),
    )
    return run(*operands.values())


def registers_of_a_computing_thread(warpgroups: int) -> int:
    """What the loading warpgroup leaves of the registers that the block has from its launch on.

    Asking for more would wait forever: they come from the block's own, which are the same number for each thread, a
    multiple of 8, and not all of the multiprocessor's.
    """
    at_launch = min(248, 65536 // (THREADS * (warpgroups + 1)) // 8 * 8)
    return min(240, ((warpgroups + 1) * at_launch - LOADER_REGISTERS) // warpgroups // 8 * 8)


@dataclasses.dataclass(frozen=True)
class _Kernel(SplitRing):
    """The kernel of one problem."""

    def body(self, names: tuple[str, ...], *refs: Ref, **scratch: Any) -> None:
        """The kernel: the first warpgroups compute, those of the last one loads."""
        inputs, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        split, clusters = lax.axis_index("split"), lax.axis_size("cluster")
        c = self.config
        copies.start_barriers(scratch["barriers"], c.stages, c.warpgroups, c.cluster)
        compute_registers = registers_of_a_computing_thread(c.warpgroups)

        @pl.when(warpgroup == c.warpgroups)
        def _loader() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _warps(warp: Index) -> None:
                @pl.when(warp < self.loaders)
                def _load() -> None:
                    load_tile = functools.partial(self.load_tile, inputs, scratch, split, warp)
                    self.for_each_tile(cluster, clusters, load_tile)

            if c.cluster > 1:
                copies.wait_for_cluster()

        @pl.when(warpgroup < c.warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(compute_registers, action="increase")
            if c.cluster > 1:
                copies.wait_for_cluster()
            if self.quantizes:
                first_group = split * (self.num_groups // c.cluster)
                rings = scratch["activation_ring"], scratch["token_scale_ring"]
                quantize.quantize(inputs["codes"], *rings, first_group, threads=THREADS * c.warpgroups)
                copies.release(scratch["barriers"], 2 * c.stages + 1)
                copies.wait(scratch["barriers"], 2 * c.stages + 1, 0)
            self.for_each_tile(
                cluster, clusters, functools.partial(self.compute_tile, inputs, out, scratch, warpgroup, split)
            )

    def compute_tile(
        self,
        inputs: dict[str, Ref],
        out: Ref,
        scratch: dict[str, Any],
        warpgroup: Index,
        split: Index,
        tile: SplitTile,
    ) -> None:
        """Compute the warpgroup's runs of a tile, add them up with those of the others, and store the sum."""
        c, is8 = self.config, tile.is8
        emit = Emitted(self.group_size, c.tile_tokens, even_tokens=self.tokens % 2 == 0 or self.quantizes)

        def wait_and_load(group: Index, slot: Index, uses: Index) -> Any:
            copies.wait(scratch["barriers"], slot, uses)
            codes = self.code_slot(scratch, is8, slot)
            if is8:
                return emit.load_codes8(codes)
            return emit.load_codes4(codes, scratch["zero_point_ring"].at[slot], self.zero_points.lead(group))

        def place(group: Index, slot: Index) -> Index:
            """Where the activations of a group are."""
            return group - split * (self.num_groups // c.cluster) if self.quantizes else slot

        def start(codes: Any, group: Index, slot: Index) -> Any:
            return emit.start_dot(emit.magic_accumulator(), codes, scratch["activation_ring"].at[place(group, slot)])

        def token_scales(group: Index, slot: Index) -> tuple[Ref, Index]:
            if self.quantizes:
                return scratch["token_scale_ring"], place(group, slot) * c.tile_tokens
            return scratch["token_scale_ring"].at[slot], self.token_scales.lead(group)

        def finish(accumulator: Any, codes: Any, total: Any, group: Index, slot: Index) -> Any:
            return emit.finish_dot(
                0,
                accumulator,
                codes,
                total,
                scratch["channel_scale_ring"].at[slot],
                self.channel_scales(is8).lead(group),
                *token_scales(group, slot),
            )

        # The runs of all tiles go to the warpgroups in turn, so that a ring slot is always the same warpgroup's.
        first_run = tile.index * self.runs
        first = lax.rem(warpgroup + c.warpgroups - lax.rem(first_run, c.warpgroups), c.warpgroups)

        def add_run(index: Index, total: Any) -> Any:
            run = first + index * c.warpgroups
            first_slot = self.first_slot(first_run + run)
            first_group = (split * self.runs + run) * c.run
            uses = self.uses(first_run + run)
            codes = wait_and_load(first_group, first_slot, uses)
            accumulator = start(codes, first_group, first_slot)
            for offset in range(c.run):
                group, slot = first_group + offset, first_slot + offset
                is_last = offset == c.run - 1
                next_codes = codes if is_last else wait_and_load(group + 1, slot + 1, uses)
                total = finish(accumulator, codes, total, group, slot)
                copies.release(scratch["barriers"], c.stages + slot)
                if not is_last:
                    accumulator = start(next_codes, group + 1, slot + 1)
                codes = next_codes
            return total

        rows = self.n8 if is8 else self.n4
        which = split * c.warpgroups + warpgroup

        @pl.when(which == 0)
        def _fetch_columns() -> None:
            order_start = self.n4 if is8 else 0
            output.fetch_columns(inputs["order"], scratch["columns"], tile.first_row, rows, order_start)

        runs = lax.div(self.runs - first + c.warpgroups - 1, c.warpgroups)
        total = lax.fori_loop(0, runs, add_run, emit.zero_total())

        def store(total: Any) -> None:
            output.store_tile(
                total, scratch["columns"], tile.first_row, tile.first_token, rows, inputs.get("bias"), out
            )

        if c.splits == 1:
            store(total)
            return
        size = CHANNELS_PER_WARPGROUP * c.tile_tokens
        base = lax.rem(tile.index, self.sets_of_sums) * ((c.splits - 1) * size)

        @pl.when(which > 0)
        def _push() -> None:
            output.push_sums(total, scratch["sums"], base + (which - 1) * size, remote=c.cluster > 1)

        copies.announce_sums(scratch["barriers"], 2 * c.stages, c.cluster)
        copies.wait_for_sums(scratch["barriers"], 2 * c.stages, tile.index)

        @pl.when(which == 0)
        def _add() -> None:
            firsts = [base + other * size for other in range(c.splits - 1)]
            store(output.add_sums(total, scratch["sums"], firsts, remote=c.cluster > 1))
