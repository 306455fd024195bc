"""The end of a tile whose input channels were split: its sums meet in shared memory, and the total is stored.

Each function is called by all threads of a warpgroup. A tile is 64 channels x some tokens, in the fragment of `wgmma`
that mosaic_gpu/registers.py describes.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mixed_matmul.mosaic_gpu.calls import ACCUMULATOR, SCALAR, Index, Ref
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.registers import element, i32_constant, lane_position, memory_asm


def push_sums(total: Any, sums: Ref, first: Index, *, remote: bool) -> None:
    """Store a tile's float32 sums at `sums[first:]`, in the shared memory of the cluster's first block if `remote`."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), SCALAR))
    def emit(ctx: Any, total: fa.FragmentedArray, sums: ir.Value, first: fa.FragmentedArray) -> None:
        asm = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
        if remote:
            asm = "mapa.shared::cluster.u32 a, $0, 0; st.shared::cluster.v4.f32 [a], {$1, $2, $3, $4};"
        for address, values in zip(_addresses(sums, first, total), _fours(_elements(total)), strict=True):
            memory_asm(f"{{ .reg .b32 a; {asm} }}", "r,f,f,f,f", [address, *values])

    emit(total, sums, first)


def add_sums(total: Any, sums: Ref, firsts: list[Index], *, remote: bool) -> Any:
    """`total` plus the sums that were stored at `sums[first:]`, for each of `firsts` in turn."""
    tokens = total.shape[1]
    total_type = plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, tokens), jnp.float32, ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), *[SCALAR] * len(firsts)), return_type=total_type)
    def emit(ctx: Any, total: fa.FragmentedArray, sums: ir.Value, *firsts: fa.FragmentedArray) -> fa.FragmentedArray:
        f32 = ir.F32Type.get()
        four_floats = llvm.StructType.get_literal([f32] * 4)
        values = _elements(total)
        for first in firsts:
            for block, address in enumerate(_addresses(sums, first, total)):
                others = memory_asm("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [address], four_floats)
                for lane in range(4):
                    other = llvm.extractvalue(f32, others, [lane])
                    values[4 * block + lane] = arith.addf(values[4 * block + lane], other)
        added = np.empty(total.registers.shape, dtype=object)
        for place, value in enumerate(values):
            added.flat[place] = vector.broadcast(ir.VectorType.get((1,), f32), value)
        return fa.FragmentedArray(_registers=added, _layout=total.layout, _is_signed=None)

    return emit(total, sums, *firsts)


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
        source = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(order))
        for half in range(2):
            row = arith.addi(arith.minsi(_row(first_row, half), i32_constant(rows - 1)), i32_constant(order_start))
            memory_asm(
                "cp.async.ca.shared.global [$0], [$1], 4;",
                "r,l",
                [_own_column(columns, half), utils.getelementptr(source, [row], i32)],
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
        values = _elements(total)
        first_token = arith.addi(first_token.registers.item(), lane_position()[1])
        start = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(out))
        memory_asm("cp.async.wait_all;", "", [])
        for half in range(2):
            has_row = arith.cmpi(arith.CmpIPredicate.slt, _row(first_row, half), i32_constant(rows))
            column = memory_asm("ld.shared.b32 $0, [$1];", "=r,r", [_own_column(columns, half)], i32)
            added = [llvm.load(f32, utils.getelementptr(utils.memref_ptr(ref), [column], f32)) for ref in bias]
            column_start = utils.getelementptr(start, [arith.extsi(i64, column)], dtype)
            for block, lane in itertools.product(range(len(values) // 4), range(2)):
                token = arith.addi(first_token, i32_constant(8 * block + lane))
                exists = arith.andi(has_row, arith.cmpi(arith.CmpIPredicate.slt, token, i32_constant(num_tokens)))
                offset = arith.muli(arith.extsi(i64, token), arith.constant(i64, out_features))
                value = values[4 * block + 2 * half + lane]
                for term in added:
                    value = arith.addf(value, term)
                value = llvm.bitcast(bits, value if dtype == f32 else arith.truncf(dtype, value))
                memory_asm(
                    f"@$2 st.global.b{bits.width} [$0], $1;",
                    f"l,{'r' if dtype == f32 else 'h'},b",
                    [utils.getelementptr(column_start, [offset], dtype), value, exists],
                )

    emit(total, columns, first_row, first_token, *refs)


def _elements(total: fa.FragmentedArray) -> list[ir.Value]:
    """The thread's float32 values."""
    return [element(register) for register in total.registers.flat]


def _fours(values: list[ir.Value]) -> list[list[ir.Value]]:
    return [values[start : start + 4] for start in range(0, len(values), 4)]


def _row(first_row: fa.FragmentedArray, half: int) -> ir.Value:
    """Row, among those of the bit width, of one of the thread's two channels."""
    return arith.addi(first_row.registers.item(), arith.addi(lane_position()[0], i32_constant(8 * half)))


def _addresses(sums: ir.Value, first: fa.FragmentedArray, total: fa.FragmentedArray) -> list[ir.Value]:
    """Where in shared memory the thread puts its values, four at a time, the threads' fours side by side."""
    thread = arith.andi(utils.thread_idx(), i32_constant(utils.WARPGROUP_SIZE - 1))
    place = arith.addi(first.registers.item(), arith.muli(thread, i32_constant(4)))
    pointer = utils.getelementptr(utils.memref_ptr(sums), [place], ir.F32Type.get())
    address = llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)
    blocks = total.registers.size // 4
    return [arith.addi(address, i32_constant(16 * utils.WARPGROUP_SIZE * block)) for block in range(blocks)]


def _own_column(columns: ir.Value, half: int) -> ir.Value:
    """Where in shared memory the output channel of one of the thread's two channels is."""
    place = arith.addi(arith.muli(utils.thread_idx(), i32_constant(2)), i32_constant(half))
    pointer = utils.getelementptr(utils.memref_ptr(columns), [place], ir.IntegerType.get_signless(32))
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)
