"""The output columns of a tile's channels, fetched by the computing threads long before the tile is stored."""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import lane_position
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import (
    at,
    element,
    from_lane,
    global_pointer,
    i32_constant,
    less,
    shared_address,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import SCALAR, Index, Ref


def fetch_columns(order: Ref, columns: Ref, first_row: Index, rows: int, order_start: int) -> None:
    """Start to fetch the output channels that a thread will want when it stores the tile.

    The copies end while the tile is computed, and take no registers until then. A thread reads what it fetched itself,
    so nothing has to be synchronised.

    Args:
        order: int32 `[out_features]`, the output channel of each packed row.
        columns: int32 in shared memory, two for each computing thread.
        first_row: Row of the tile's first channel among those of its bit width.
        rows: Rows of this bit width; the last one stands for those past the end.
        order_start: Where they start in `order`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def emit(ctx: Any, order: ir.Value, columns: ir.Value, first_row: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        thread = utils.thread_idx()
        source = global_pointer(order)
        place = at(utils.memref_ptr(columns), arith.muli(thread, i32_constant(2)), i32)
        place = shared_address(place)
        for half in range(2):
            lane = arith.addi(arith.andi(thread, i32_constant(31)), i32_constant(32 * half))
            row = arith.addi(first_row.registers.item(), lane)
            row = arith.addi(arith.minsi(row, i32_constant(rows - 1)), i32_constant(order_start))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [place, at(source, row, i32)],
                f"cp.async.ca.shared.global [$0+{4 * half}], [$1], 4;",
                "r,l",
                has_side_effects=True,
            )

    emit(order, columns, first_row)


def fetched_pair(columns: ir.Value) -> list[ir.Value]:
    """Output channels of channels `lane` and `lane + 32` of a warpgroup's, which `fetch_columns` brought."""
    i32 = ir.IntegerType.get_signless(32)
    utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)
    place = at(utils.memref_ptr(columns), arith.muli(utils.thread_idx(), i32_constant(2)), i32)
    pair = llvm.load(ir.VectorType.get((2,), i32), place, alignment=8)
    return [element(pair, half) for half in range(2)]


def bias_of_channels(columns: list[ir.Value], bias: ir.Value) -> list[ir.Value]:
    """Bias of the thread's two channels of a fragment, from what `fetched_pair` gives."""
    f32 = ir.F32Type.get()
    channel, _ = lane_position()
    # The fragment's channels, 8 apart, are both among the first or both among the last 32.
    of_half = arith.select(less(channel, 32), columns[0], columns[1])
    places = [from_lane(of_half, arith.addi(channel, i32_constant(8 * half))) for half in range(2)]
    return [llvm.load(f32, at(utils.memref_ptr(bias), place, f32)) for place in places]
