"""The sums of a tile whose input channels were split, on their way to the warpgroup that stores it.

Sums lie in the shared memory of the cluster's first block, those of each other warpgroup of the cluster in a place of
their own, in the order of the threads' registers: four values a thread, the threads' fours side by side, and so on.
They are added in a fixed order, so that the same input gives the same bits. Each function is called by all threads of a
warpgroup.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, THREADS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import elements, fragment
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, i32_constant, memory_asm, shared_address
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref


def push_sums(total: Any, sums: Ref, first: Index, *, remote: bool) -> None:
    """Store a tile's float32 sums at `sums[first:]`, in the shared memory of the cluster's first block if `remote`."""

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), SCALAR))
    def emit(ctx: Any, total: fa.FragmentedArray, sums: ir.Value, first: fa.FragmentedArray) -> None:
        asm = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
        if remote:
            asm = "mapa.shared::cluster.u32 a, $0, 0; st.shared::cluster.v4.f32 [a], {$1, $2, $3, $4};"
        for address, values in zip(_addresses(sums, first, total), _fours(total), strict=True):
            memory_asm(f"{{ .reg .b32 a; {asm} }}", "r,f,f,f,f", [address, *values])

    emit(total, sums, first)


def add_sums(total: Any, sums: Ref, firsts: list[Index]) -> Any:
    """`total` plus the sums that were stored at `sums[first:]`, for each of `firsts` in turn."""
    tokens = total.shape[1]
    total_type = plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, tokens), jnp.float32, ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR, plgpu.RefType(), *[SCALAR] * len(firsts)), return_type=total_type)
    def emit(ctx: Any, total: fa.FragmentedArray, sums: ir.Value, *firsts: fa.FragmentedArray) -> fa.FragmentedArray:
        f32 = ir.F32Type.get()
        four_floats = llvm.StructType.get_literal([f32] * 4)
        values = elements(total)
        for first in firsts:
            for block, address in enumerate(_addresses(sums, first, total)):
                others = memory_asm("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [address], four_floats)
                for lane in range(4):
                    other = llvm.extractvalue(f32, others, [lane])
                    values[4 * block + lane] = arith.addf(values[4 * block + lane], other)
        return fragment(values, total.shape[1])

    return emit(total, sums, *firsts)


def _fours(total: fa.FragmentedArray) -> list[list[ir.Value]]:
    """The thread's values, four at a time."""
    values = elements(total)
    return [values[start : start + 4] for start in range(0, len(values), 4)]


def _addresses(sums: ir.Value, first: fa.FragmentedArray, total: fa.FragmentedArray) -> list[ir.Value]:
    """Where in shared memory the thread puts its fours."""
    thread = arith.andi(utils.thread_idx(), i32_constant(THREADS_PER_WARPGROUP - 1))
    place = arith.addi(first.registers.item(), arith.muli(thread, i32_constant(4)))
    address = shared_address(at(utils.memref_ptr(sums), place, ir.F32Type.get()))
    blocks = total.registers.size // 4
    return [arith.addi(address, i32_constant(16 * THREADS_PER_WARPGROUP * block)) for block in range(blocks)]
