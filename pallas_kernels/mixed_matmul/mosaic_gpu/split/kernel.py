"""The kernel for few tokens: warpgroups and clusters of blocks split the input channels.

With few tokens there are too few tiles of 64 channels to keep all multiprocessors loading, and one warpgroup takes
longer for the dots and scales of a group than the memory takes to bring the next one. So the groups of a tile are
shared out in runs: among the blocks of a cluster, each with a loader and a ring of its own, and in turn among the
warpgroups of a block (ring.py). Their sums meet in the shared memory of the cluster's first block, whose first
warpgroup adds them in a fixed order and stores the tile:

    each warpgroup                 the first of the first block            meanwhile
    its runs of the tile           its runs of the tile                    loading warps fill the ring
    push its sums                                                          for the next tile
    announce to all blocks         announce to all blocks
    wait for all sums              wait for all sums
    next tile                      add, store; next tile

Sums of the next tile may arrive while those of this one are read: they go to the other of two sets. All wait, so that
nobody is two tiles ahead.
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
from pallas_kernels.mixed_matmul.mosaic_gpu.calls import GroupArithmetic
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, THREADS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import COMPILER_PARAMS, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.split import quantize, store, sums
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.loop import TileLoop
from pallas_kernels.mixed_matmul.mosaic_gpu.split.ring import SplitRing, SplitTile
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

    Args:
        activations: Quantised in the signed layout, or float `[tokens, in_features]`, not more tokens than a tile has:
            then they are quantised in the same launch.
        weight: `[out_features, in_features]`.
        bias: Float `[out_features]`, or None.
        out_dtype: bfloat16, float16 or float32.
        config: Settings.
        multiprocessors: Of the device.

    Raises:
        ValueError: The shared memory does not hold these settings.
    """
    quantizes = not isinstance(activations, QuantizedActivations)
    tokens = activations.tokens if isinstance(activations, QuantizedActivations) else activations.shape[0]
    problem = Problem(tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)
    config = config.fitted(problem, quantizes=quantizes, multiprocessors=multiprocessors)
    sets = config.sets_of_sums(problem, multiprocessors)
    kernel = SplitKernel(tokens, weight.n4, weight.n8, weight.num_groups, weight.group_size, config, sets, quantizes)
    operands = kernel.operands(activations, weight) | kernel.output_operands(weight, bias)
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
        compiler_params=COMPILER_PARAMS,
    )
    return run(*operands.values())


def registers_of_a_computing_thread(warpgroups: int) -> int:
    """What the loading warpgroup leaves of the registers that the block has from its launch on.

    Asking for more would wait forever: they come from the block's own, which are the same number for each thread, a
    multiple of 8, and not all of the multiprocessor's.
    """
    at_launch = min(248, 65536 // (THREADS_PER_WARPGROUP * (warpgroups + 1)) // 8 * 8)
    return min(240, ((warpgroups + 1) * at_launch - LOADER_REGISTERS) // warpgroups // 8 * 8)


@dataclasses.dataclass(frozen=True)
class SplitKernel(SplitRing):
    """The kernel of one problem."""

    def body(self, names: tuple[str, ...], *refs: Ref, **scratch: Any) -> None:
        """The kernel: the first warpgroups compute, those of the last one loads."""
        inputs, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        split, clusters = lax.axis_index("split"), lax.axis_size("cluster")
        c, barriers = self.config, self.barriers_of(scratch)
        barriers.start()
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

            barriers.wait_for_cluster()

        @pl.when(warpgroup < c.warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(compute_registers, action="increase")
            barriers.wait_for_cluster()
            if self.quantizes:
                first_group = split * (self.num_groups // c.cluster)
                rings = scratch["activation_ring"], scratch["token_scale_ring"]
                quantize.quantize(inputs["codes"], *rings, first_group, threads=THREADS_PER_WARPGROUP * c.warpgroups)
                barriers.arrive(barriers.activations)
                barriers.wait(barriers.activations, 0)
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
        c, rows = self.config, self.n8 if tile.is8 else self.n4
        even_tokens = self.tokens % 2 == 0 or self.quantizes
        arithmetic = GroupArithmetic(self.group_size, c.tile_tokens, even_tokens=even_tokens)
        # The runs of all tiles go to the warpgroups in turn, so that a ring slot is always the same warpgroup's.
        first_run = tile.index * self.runs
        first = lax.rem(warpgroup + c.warpgroups - lax.rem(first_run, c.warpgroups), c.warpgroups)
        loop = TileLoop(self, scratch, split, tile, arithmetic, first_run, first)
        which = split * c.warpgroups + warpgroup

        @pl.when(which == 0)
        def _fetch_columns() -> None:
            order_start = self.n4 if tile.is8 else 0
            store.fetch_columns(inputs["order"], scratch["columns"], tile.first_row, rows, order_start)

        total = lax.fori_loop(0, loop.num_runs, loop.add_run, arithmetic.zero_total())

        def store_tile(total: Any) -> None:
            store.store_tile(total, scratch["columns"], tile.first_row, tile.first_token, rows, inputs.get("bias"), out)

        if c.splits == 1:
            store_tile(total)
            return
        size = CHANNELS_PER_WARPGROUP * c.tile_tokens
        base = lax.rem(tile.index, self.sets_of_sums) * ((c.splits - 1) * size)

        @pl.when(which > 0)
        def _push() -> None:
            sums.push_sums(total, scratch["sums"], base + (which - 1) * size, remote=c.cluster > 1)

        barriers = self.barriers_of(scratch)
        barriers.announce_sums()
        barriers.wait_for_sums(tile.index)

        @pl.when(which == 0)
        def _add() -> None:
            firsts = [base + other * size for other in range(c.splits - 1)]
            store_tile(sums.add_sums(total, scratch["sums"], firsts))
