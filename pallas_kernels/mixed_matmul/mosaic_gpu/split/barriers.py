"""The barriers of the kernel that splits the input channels, at which few threads arrive.

They lie one after another in shared memory, 64 bits each:

    barrier                    arrivals a use                           who waits
    0 .. stages - 1            one lane, and the bytes of the copies    full: the warpgroup that owns the slot
    stages .. 2 stages - 1     a lane of each warp of a warpgroup       empty: the warp that loads the slot
    2 stages                   a lane of each computing warp of the     sums: all computing warps of the cluster
                               cluster, at the barrier of every block
    2 stages + 1               a lane of each computing warp            activations that the block quantised (once)

A wait names the parity of the use it waits for, so nobody has to remember phases; it must not fall a whole use behind,
which holds since each slot has one owner on either side.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from pallas_kernels.mixed_matmul.mosaic_gpu.config import WARPS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import (
    at,
    equal,
    i32_constant,
    lane_of_warp,
    memory_asm,
    shared_address,
    unsigned_less,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import SCALAR, Index, Ref

_WAIT_TICKS = 10_000_000
"""Nanoseconds that a thread sleeps at most before it looks again."""


def memory(stages: int) -> Any:
    """Shared memory for the barriers of a block."""
    return plgpu.SMEM((2 * (2 * stages + 2),), jnp.int32)


def barrier_pointer(ref: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to a barrier."""
    return at(utils.memref_ptr(ref), index, ir.IntegerType.get_signless(64))


@dataclasses.dataclass(frozen=True)
class Barriers:
    """The barriers of a block.

    Attributes:
        ref: Where they lie.
        stages: Ring slots.
        warpgroups: That compute.
        cluster: Blocks of the cluster.
    """

    ref: Ref
    stages: int
    warpgroups: int
    cluster: int

    def empty(self, slot: Index) -> Index:
        """Number of the barrier that tells that a slot was read; that of the slot itself tells that it is full."""
        return self.stages + slot

    @property
    def sums(self) -> int:
        """Number of the barrier that tells that all sums of a tile are there."""
        return 2 * self.stages

    @property
    def activations(self) -> int:
        """Number of the barrier that tells that the block has quantised its activations."""
        return 2 * self.stages + 1

    def start(self) -> None:
        """Set the barriers up, and begin to wait for those of the other blocks; called by all threads of the block."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(ctx: Any, ref: ir.Value) -> None:
            # In turn by the warps, since an instruction sets up one barrier.
            warps = (self.warpgroups + 1) * WARPS_PER_WARPGROUP
            of_block = self.warpgroups * WARPS_PER_WARPGROUP
            warp, count = utils.warp_idx(), 2 * self.stages + 2
            is_first_lane = equal(lane_of_warp(), i32_constant(0))
            for first in range(0, count, warps):
                index = arith.addi(warp, i32_constant(first))
                arrivals = arith.select(
                    equal(index, i32_constant(self.sums)),
                    i32_constant(self.cluster * of_block),
                    i32_constant(WARPS_PER_WARPGROUP),
                )
                of_activations = equal(index, i32_constant(self.activations))
                arrivals = arith.select(of_activations, i32_constant(of_block), arrivals)
                arrivals = arith.select(unsigned_less(index, self.stages), i32_constant(1), arrivals)
                used = arith.andi(is_first_lane, unsigned_less(index, count))
                nvvm.mbarrier_init(barrier_pointer(ref, index), arrivals, predicate=used)
            memory_asm("fence.mbarrier_init.release.cluster;", "", [])
            gpu.barrier()
            if self.cluster > 1:
                memory_asm("barrier.cluster.arrive.relaxed.aligned;", "", [])

        emit(self.ref)

    def wait_for_cluster(self) -> None:
        """Wait until all blocks of the cluster, if there are others, have set their barriers up."""
        if self.cluster == 1:
            return

        @plgpu.inline_mgpu()
        def emit(ctx: Any) -> None:
            memory_asm("barrier.cluster.wait.acquire.aligned;", "", [])

        emit()

    def arrive(self, barrier: Index) -> None:
        """Arrive at a barrier of the block, a lane of each warp; called by a warpgroup."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
        def emit(ctx: Any, ref: ir.Value, barrier: Any) -> None:
            address = shared_address(barrier_pointer(ref, barrier.registers.item()))
            is_first_lane = equal(lane_of_warp(), i32_constant(0))
            memory_asm(
                "bar.warp.sync 0xffffffff; @$1 mbarrier.arrive.shared::cta.b64 _, [$0];",
                "r,b",
                [address, is_first_lane],
            )

        emit(self.ref, jnp.int32(barrier))

    def wait(self, barrier: Index, uses: Index) -> None:
        """Wait for the end of a use of a barrier, which was used `uses` times before."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
        def emit(ctx: Any, ref: ir.Value, barrier: Any, uses: Any) -> None:
            parity = arith.andi(uses.registers.item(), i32_constant(1))
            pointer = barrier_pointer(ref, barrier.registers.item())
            nvvm.mbarrier_try_wait_parity(pointer, parity, i32_constant(_WAIT_TICKS))

        emit(self.ref, jnp.int32(barrier), jnp.int32(uses))

    def announce_sums(self) -> None:
        """Tell all blocks of the cluster that the warp has stored its sums, and read those before."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def emit(ctx: Any, ref: ir.Value) -> None:
            address = shared_address(barrier_pointer(ref, i32_constant(self.sums)))
            lane = lane_of_warp()
            announces = unsigned_less(lane, self.cluster)  # a lane for each block
            memory_asm(
                "{ .reg .b32 a; bar.warp.sync 0xffffffff; mapa.shared::cluster.u32 a, $0, $1; "
                "@$2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }"
                if self.cluster > 1
                else "bar.warp.sync 0xffffffff; @$2 mbarrier.arrive.shared::cta.b64 _, [$0];",
                "r,r,b",
                [address, lane, announces],
            )

        emit(self.ref)

    def wait_for_sums(self, uses: Index) -> None:
        """Wait for the sums of all warps of the cluster, `uses` tiles having had theirs before.

        As `wait`, but what other blocks have stored is seen afterwards.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
        def emit(ctx: Any, ref: ir.Value, uses: Any) -> None:
            address = shared_address(barrier_pointer(ref, i32_constant(self.sums)))
            parity = arith.andi(uses.registers.item(), i32_constant(1))
            memory_asm(
                "{ .reg .pred done; again: "
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], $1, $2; @!done bra again; }",
                "r,r,r",
                [address, parity, i32_constant(_WAIT_TICKS)],
            )

        emit(self.ref, jnp.int32(uses))
