"""The barriers of the Hopper kernel that splits the input channels, which few threads arrive at, and its copies.

Pallas' own copies have every lane of the loading warp arrive at the barrier, twice for each copy: for a stage of a few
small copies this takes as long as the memory does to bring it. Here one lane announces the bytes of all copies of a
stage and starts them, and one lane of each warp tells that it has read a stage, or stored its sums.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from pallas_kernels.mixed_matmul.mosaic_gpu.calls import Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.registers import memory_asm

WARPS = 4
"""Of a warpgroup."""

_SCALAR = plgpu.Layout.WG_SPLAT(())
_WAIT_TICKS = 10_000_000
"""Nanoseconds that a thread sleeps at most before it looks again."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy from global to shared memory.

    Attributes:
        source: The whole array.
        starts: Where the copied box starts, for each axis.
        sizes: The box; an axis of size None is left out of the destination.
        destination: In shared memory.
        transforms: Of the destination.
    """

    source: Ref
    starts: Sequence[Index]
    sizes: Sequence[int | None]
    destination: Ref
    transforms: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that arrive, those past the end of the source included."""
        return math.prod(size or 1 for size in self.sizes) * jnp.dtype(self.source.dtype).itemsize

    @property
    def swizzle(self) -> int | None:
        """Bytes of the swizzle of the destination."""
        return self.transforms[0].swizzle if self.transforms else None


def barriers(stages: int) -> Any:
    """Shared memory for the barriers, 64 bits each: full and empty of each stage, the sums', the activations'."""
    return plgpu.SMEM((2 * (2 * stages + 2),), jnp.int32)


def start_barriers(ref: Ref, stages: int, warpgroups: int, cluster: int) -> None:
    """Set the barriers up, and begin to wait for those of the other blocks; called by all threads of the block."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(ctx: Any, ref: ir.Value) -> None:
        # In turn by the warps, since an instruction sets up one barrier.
        warps = (warpgroups + 1) * WARPS
        warp, count = utils.warp_idx(), 2 * stages + 2
        eq, ult = arith.CmpIPredicate.eq, arith.CmpIPredicate.ult
        lane = arith.cmpi(eq, arith.andi(utils.thread_idx(), _i32(31)), _i32(0))
        for first in range(0, count, warps):
            index = arith.addi(warp, _i32(first))
            arrivals = arith.select(
                arith.cmpi(eq, index, _i32(2 * stages)), _i32(cluster * warpgroups * WARPS), _i32(WARPS)
            )
            arrivals = arith.select(arith.cmpi(eq, index, _i32(2 * stages + 1)), _i32(warpgroups * WARPS), arrivals)
            arrivals = arith.select(arith.cmpi(ult, index, _i32(stages)), _i32(1), arrivals)
            used = arith.andi(lane, arith.cmpi(ult, index, _i32(count)))
            nvvm.mbarrier_init(_barrier(ref, index), arrivals, predicate=used)
        memory_asm("fence.mbarrier_init.release.cluster;", "", [])
        gpu.barrier()
        if cluster > 1:
            memory_asm("barrier.cluster.arrive.relaxed.aligned;", "", [])

    emit(ref)


def wait_for_cluster() -> None:
    """Wait until all blocks of the cluster have set their barriers up."""

    @plgpu.inline_mgpu()
    def emit(ctx: Any) -> None:
        memory_asm("barrier.cluster.wait.acquire.aligned;", "", [])

    emit()


def release(ref: Ref, barrier: Index) -> None:
    """A warpgroup has read a stage."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
    def emit(ctx: Any, ref: ir.Value, barrier: Any) -> None:
        address = llvm.ptrtoint(ir.IntegerType.get_signless(32), _barrier(ref, barrier.registers.item()))
        lane = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(utils.thread_idx(), _i32(31)), _i32(0))
        memory_asm("bar.warp.sync 0xffffffff; @$1 mbarrier.arrive.shared::cta.b64 _, [$0];", "r,b", [address, lane])

    emit(ref, jnp.int32(barrier))


def announce_sums(ref: Ref, barrier: int, cluster: int) -> None:
    """Tell all blocks of the cluster that the warp has stored its sums, and read those before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(ctx: Any, ref: ir.Value) -> None:
        address = llvm.ptrtoint(ir.IntegerType.get_signless(32), _barrier(ref, _i32(barrier)))
        lane = arith.andi(utils.thread_idx(), _i32(31))
        announces = arith.cmpi(arith.CmpIPredicate.ult, lane, _i32(cluster))
        memory_asm(
            "{ .reg .b32 a; bar.warp.sync 0xffffffff; mapa.shared::cluster.u32 a, $0, $1; "
            "@$2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }"
            if cluster > 1
            else "bar.warp.sync 0xffffffff; @$2 mbarrier.arrive.shared::cta.b64 _, [$0];",
            "r,r,b",
            [address, lane, announces],
        )

    emit(ref)


def wait_for_sums(ref: Ref, barrier: int, uses: Index) -> None:
    """Wait for the sums of all warps of the cluster, the `uses`-th time."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
    def emit(ctx: Any, ref: ir.Value, uses: Any) -> None:
        address = llvm.ptrtoint(ir.IntegerType.get_signless(32), _barrier(ref, _i32(barrier)))
        parity = arith.andi(uses.registers.item(), _i32(1))
        memory_asm(
            "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], $1, $2; "
            "@!done bra again; }",
            "r,r,r",
            [address, parity, _i32(_WAIT_TICKS)],
        )

    emit(ref, jnp.int32(uses))


def start_copies(ref: Ref, stage: Index, copies: Sequence[Copy]) -> None:
    """Start the copies of a stage, at whose end its barrier changes its phase; called by one warp."""
    starts = [start for copy in copies for start in copy.starts]
    ref_types = [t for copy in copies for t in (plgpu.RefType(), plgpu.RefType(copy.transforms))]
    refs = [r for copy in copies for r in (copy.source, copy.destination)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, *[_SCALAR] * len(starts), *ref_types))
    def emit(ctx: Any, ref: ir.Value, stage: Any, *values: Any) -> None:
        lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
        address = _barrier(ref, stage.registers.item())
        nbytes = sum(copy.nbytes for copy in copies)
        nvvm.mbarrier_arrive_expect_tx(address, _i32(nbytes), predicate=lane)
        barrier = utils.BarrierRef(address, _i32(0), None, 1)
        indices = iter(values[: len(starts)])
        operands = iter(values[len(starts) :])
        for copy in copies:
            box = []
            for size in copy.sizes:
                start = arith.index_cast(ir.IndexType.get(), next(indices).registers.item())
                box.append(start if size is None else mgpu.ds(start, size))
            ctx.async_copy(
                src_ref=next(operands),
                dst_ref=next(operands),
                gmem_slice=tuple(box),
                barrier=barrier,
                arrive=False,
                swizzle=copy.swizzle,
                predicate=lane,
            )

    emit(ref, jnp.int32(stage), *(jnp.int32(start) for start in starts), *refs)


def wait(ref: Ref, stage: Index, uses: Index) -> None:
    """Wait for the copies of a stage that was used `uses` times before; called by a warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def emit(ctx: Any, ref: ir.Value, stage: Any, uses: Any) -> None:
        parity = arith.andi(uses.registers.item(), _i32(1))
        nvvm.mbarrier_try_wait_parity(_barrier(ref, stage.registers.item()), parity, _i32(_WAIT_TICKS))

    emit(ref, jnp.int32(stage), jnp.int32(uses))


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _barrier(ref: ir.Value, stage: ir.Value) -> ir.Value:
    return utils.getelementptr(utils.memref_ptr(ref), [stage], ir.IntegerType.get_signless(64))
