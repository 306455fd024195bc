"""Quantises activations of few tokens within the kernel that splits the input channels, straight to shared memory.

Each block does so once for all its tiles, and for its own share of the groups, while the first weights arrive; a
launch of its own takes longer. A unit is one group of one token; `group_size // PIECE` neighbouring threads, lanes of
one warp, take a unit together and exchange its largest value.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.activations import SMALLEST_SCALE
from pallas_kernels.mixed_matmul.mosaic_gpu.arithmetic import MAGIC
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import (
    element,
    f32_constant,
    i32_constant,
    memory_asm,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import SCALAR, Index, Ref, swizzled

PIECE = 16
"""Elements of a group that a thread takes at a time: what it stores at once."""

MAX_PASSES = 4
"""Pieces that a thread loads before it quantises the first."""


def quantize(x: Ref, codes: Ref, scales: Ref, first_group: Index, *, threads: int) -> None:
    """Quantise a run of groups of all tokens as `quantize_activations` does, bit for bit.

    Called by the first `threads` threads of the block. Rows of tokens past the last one stay as they are.

    Args:
        x: bfloat16, float16 or float32 `[tokens, in_features]`, in global memory.
        codes: int8 `[groups, tile_tokens, group_size]`, in shared memory, swizzled for `wgmma`.
        scales: float32 `[groups * tile_tokens]`, in shared memory.
        first_group: Group of x that is the first of `codes`.
        threads: Computing threads of the block.
    """
    groups, tile_tokens, size = codes.shape
    tokens, in_features = x.shape
    lanes = size // PIECE
    units = groups * tokens
    at_once = threads // lanes
    passes = min(MAX_PASSES, -(-units // at_once))

    @plgpu.inline_mgpu(arg_types=(SCALAR, plgpu.RefType(), plgpu.RefType(swizzled(size)), plgpu.RefType()))
    def emit(ctx: Any, first_group: fa.FragmentedArray, x: ir.Value, codes: ir.Value, scales: ir.Value) -> None:
        i32 = ir.IntegerType.get_signless(32)
        first_group = first_group.registers.item()
        thread = utils.thread_idx()
        lane = arith.remui(thread, i32_constant(lanes))
        unit_of_thread = arith.divui(thread, i32_constant(lanes))
        code_start = llvm.ptrtoint(i32, utils.memref_ptr(codes))
        scale_start = llvm.ptrtoint(i32, utils.memref_ptr(scales))

        def load_unit(unit: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
            """Its row in shared memory, and the thread's elements of it."""
            unit = arith.minui(unit, i32_constant(units - 1))  # the last one is done more than once
            group, token = arith.divui(unit, i32_constant(tokens)), arith.remui(unit, i32_constant(tokens))
            row = arith.addi(arith.muli(group, i32_constant(tile_tokens)), token)
            column = arith.muli(arith.addi(first_group, group), i32_constant(size))
            column = arith.addi(column, arith.muli(lane, i32_constant(PIECE)))
            return row, _load_piece(x, arith.addi(arith.muli(token, i32_constant(in_features)), column))

        def run(first_unit: ir.Value) -> None:
            starts = [arith.addi(first_unit, i32_constant(number * at_once)) for number in range(passes)]
            for row, values in [load_unit(unit) for unit in starts]:
                words, scale = _quantize_piece(values, lanes)
                address = arith.addi(code_start, _swizzled_offset(row, lane, size))
                memory_asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", [address, *words])
                address = arith.addi(scale_start, arith.muli(row, i32_constant(4)))
                is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, i32_constant(0))
                memory_asm("@$2 st.shared.f32 [$0], $1;", "r,f,b", [address, scale, is_first])

        if units <= passes * at_once:
            run(unit_of_thread)
        else:
            # As often for every thread, since lanes exchange their largest values.
            loop = scf.ForOp(i32_constant(0), i32_constant(units), i32_constant(passes * at_once))
            with ir.InsertionPoint(loop.body):
                run(arith.addi(loop.induction_variable, unit_of_thread))
                scf.yield_([])
        memory_asm("fence.proxy.async.shared::cta;", "", [])  # the dots read what was stored here

    emit(jnp.int32(first_group), x, codes, scales)


def _load_piece(x: ir.Value, index: ir.Value) -> list[ir.Value]:
    """`PIECE` neighbouring elements, 16 bytes an instruction."""
    dtype = ir.MemRefType(x.type).element_type
    count = 16 // utils.bytewidth(dtype)
    values = []
    for first in range(0, PIECE, count):
        pointer = utils.getelementptr(utils.memref_ptr(x), [arith.addi(index, i32_constant(first))], dtype)
        vector = llvm.load(ir.VectorType.get((count,), dtype), pointer, alignment=16)
        values += [element(vector, place) for place in range(count)]
    return values


def _quantize_piece(values: list[ir.Value], lanes: int) -> tuple[list[ir.Value], ir.Value]:
    """Words of four int8 codes, and the scale of the group that `lanes` neighbouring threads have pieces of.

    The steps of `triton_common.quantize_groups`.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    floats = [value if value.type == f32 else arith.extf(f32, value) for value in values]
    largest = functools.reduce(arith.maximumf, [mlir_math.absf(value) for value in floats])
    distance = 1
    while distance < lanes:
        largest = arith.maximumf(largest, utils.shfl_bfly(largest, distance))
        distance *= 2
    scale = utils.inline_ptx("div.rn.f32 $0, $1, 0f42FE0000;", largest, result_types=f32)  # 127
    is_small = arith.cmpf(arith.CmpFPredicate.OLT, scale, f32_constant(SMALLEST_SCALE))
    scale = arith.select(is_small, f32_constant(0.0), scale)
    is_positive = arith.cmpf(arith.CmpFPredicate.OGT, scale, f32_constant(0.0))
    divisor = arith.select(is_positive, scale, f32_constant(1.0))
    inverse = utils.inline_ptx("rcp.rn.f32 $0, $1;", divisor, result_types=f32)
    words = []
    for first in range(0, PIECE, 4):
        codes = []
        for value in floats[first : first + 4]:
            quotient = arith.mulf(value, inverse)
            remainder = mlir_math.fma(arith.negf(quotient), divisor, value)
            rounded = arith.addf(mlir_math.fma(remainder, inverse, quotient), f32_constant(MAGIC))
            codes.append(arith.bitcast(i32, rounded))
        pick = "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 $0, a, b, 0x5410; }"
        words.append(utils.inline_ptx(pick, *codes, result_types=i32))
    return words, scale


def _swizzled_offset(row: ir.Value, piece: ir.Value, size: int) -> ir.Value:
    """Where a piece of 16 bytes of a row of `size` bytes lies in a swizzled operand of `wgmma`."""
    offset = arith.addi(arith.muli(row, i32_constant(size)), arith.muli(piece, i32_constant(16)))
    turn = arith.andi(arith.shrui(offset, i32_constant(7)), i32_constant(size // 16 - 1))
    return arith.xori(offset, arith.shli(turn, i32_constant(4)))
