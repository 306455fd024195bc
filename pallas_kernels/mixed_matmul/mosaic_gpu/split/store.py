"""The way out of a finished tile of the kernel that splits the input channels: straight from the registers.

Each function is called by all threads of the warpgroup that stores, the first of the cluster's first block. A tile is
64 channels x some tokens, in the fragment of `wgmma` that fragments.py describes.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import itertools
from typing import Any

from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import elements, lane_position
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import (
    at,
    global_pointer,
    i32_constant,
    less,
    memory_asm,
    shared_address,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref


def fetch_columns(order: Ref, columns: Ref, first_row: Index, rows: int, order_start: int) -> None:
    """Start to fetch the output channels that a thread will want when it stores the tile; past the end, the last one.

    The copies end while the tile is computed. As a load to registers, whatever the compiler makes of the channels ahead
    of time would wait for it before the first group.

    Args:
        order: int32 `[out_features]`, the output channel of each packed row.
        columns: int32 `[256]` in shared memory, two for each thread of the block's first warpgroup, which stores.
        first_row: Row of the tile among those of its bit width.
        rows: Rows of this bit width.
        order_start: Where they start in `order`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def emit(ctx: Any, order: ir.Value, columns: ir.Value, first_row: fa.FragmentedArray) -> None:
        i32 = ir.IntegerType.get_signless(32)
        source = global_pointer(order)
        for half in range(2):
            row = arith.addi(arith.minsi(_row(first_row, half), i32_constant(rows - 1)), i32_constant(order_start))
            memory_asm(
                "cp.async.ca.shared.global [$0], [$1], 4;",
                "r,l",
                [_own_column(columns, half), at(source, row, i32)],
            )

    emit(order, columns, first_row)


def store_tile(
    total: Any, columns: Ref, first_row: Index, first_token: Index, rows: int, bias: Ref | None, out: Ref
) -> None:
    """Store a finished tile in `out [tokens, out_features]`, its rows at the fetched `columns`.

    Straight from the registers, two or four bytes at a time: a tile with few tokens is little to store.
    """
    refs = [out] if bias is None else [out, bias]

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), SCALAR, SCALAR, *[plgpu.RefType()] * len(refs)))
    def emit(ctx: Any, total: Any, columns: Any, first_row: Any, first_token: Any, out: Any, *bias: Any) -> None:
        i32, i64, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.F32Type.get()
        num_tokens, out_features = ir.MemRefType(out.type).shape
        dtype = ir.MemRefType(out.type).element_type
        bits = ir.IntegerType.get_signless(32 if dtype == f32 else 16)
        values = elements(total)
        first_token = arith.addi(first_token.registers.item(), lane_position()[1])
        start = global_pointer(out)
        memory_asm("cp.async.wait_all;", "", [])
        for half in range(2):
            has_row = less(_row(first_row, half), rows)
            column = memory_asm("ld.shared.b32 $0, [$1];", "=r,r", [_own_column(columns, half)], i32)
            added = [llvm.load(f32, at(utils.memref_ptr(ref), column, f32)) for ref in bias]
            column_start = at(start, arith.extsi(i64, column), dtype)
            for block, lane in itertools.product(range(len(values) // 4), range(2)):
                token = arith.addi(first_token, i32_constant(8 * block + lane))
                exists = arith.andi(has_row, less(token, num_tokens))
                offset = arith.muli(arith.extsi(i64, token), arith.constant(i64, out_features))
                value = values[4 * block + 2 * half + lane]
                for term in added:
                    value = arith.addf(value, term)
                value = llvm.bitcast(bits, value if dtype == f32 else arith.truncf(dtype, value))
                memory_asm(
                    f"@$2 st.global.b{bits.width} [$0], $1;",
                    f"l,{'r' if dtype == f32 else 'h'},b",
                    [at(column_start, offset, dtype), value, exists],
                )

    emit(total, columns, first_row, first_token, *refs)


def _row(first_row: fa.FragmentedArray, half: int) -> ir.Value:
    """Row, among those of the bit width, of one of the thread's two channels."""
    return arith.addi(first_row.registers.item(), arith.addi(lane_position()[0], i32_constant(8 * half)))


def _own_column(columns: ir.Value, half: int) -> ir.Value:
    """Where in shared memory the output channel of one of the thread's two channels is."""
    place = arith.addi(arith.muli(utils.thread_idx(), i32_constant(2)), i32_constant(half))
    return shared_address(at(utils.memref_ptr(columns), place, ir.IntegerType.get_signless(32)))
