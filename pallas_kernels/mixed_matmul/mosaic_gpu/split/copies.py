"""The copies of a stage in the kernel that splits the input channels, all started by one lane.

Pallas' own copies have every lane of the loading warp arrive at the barrier, twice for each copy: for a stage of a few
small copies this takes as long as the memory does to bring it. Here one lane announces the bytes of all copies of a
stage and starts them.
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
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import i32_constant
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import SCALAR, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.split.barriers import barrier_pointer


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


def start_copies(ref: Ref, stage: Index, copies: Sequence[Copy]) -> None:
    """Start the copies of a stage, at whose end its barrier changes its phase; called by one warp."""
    starts = [start for copy in copies for start in copy.starts]
    ref_types = [t for copy in copies for t in (plgpu.RefType(), plgpu.RefType(copy.transforms))]
    refs = [r for copy in copies for r in (copy.source, copy.destination)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, *[SCALAR] * len(starts), *ref_types))
    def emit(ctx: Any, ref: ir.Value, stage: Any, *values: Any) -> None:
        lane = utils.single_thread_predicate(utils.ThreadSubset.WARP)
        address = barrier_pointer(ref, stage.registers.item())
        nbytes = sum(copy.nbytes for copy in copies)
        nvvm.mbarrier_arrive_expect_tx(address, i32_constant(nbytes), predicate=lane)
        barrier = utils.BarrierRef(address, i32_constant(0), None, 1)
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
