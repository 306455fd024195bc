"""Short names for the MLIR that the kernels are written in: constants, addresses, loads, comparisons, PTX.

Everything here emits code for one thread, at the insertion point of the `plgpu.inline_mgpu` call around it.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector


def i32_constant(value: int) -> ir.Value:
    """A 32-bit integer, whose bits may also be given as those of an unsigned one."""
    return arith.constant(ir.IntegerType.get_signless(32), value - (1 << 32) if value >= 1 << 31 else value)


def f32_constant(value: float) -> ir.Value:
    """A 32-bit float."""
    return arith.constant(ir.F32Type.get(), value)


def less(value: ir.Value, limit: int) -> ir.Value:
    """Whether a signed integer is less than a number."""
    return arith.cmpi(arith.CmpIPredicate.slt, value, i32_constant(limit))


def unsigned_less(value: ir.Value, limit: int) -> ir.Value:
    """Whether an unsigned integer is less than a number."""
    return arith.cmpi(arith.CmpIPredicate.ult, value, i32_constant(limit))


def equal(value: ir.Value, other: ir.Value) -> ir.Value:
    """Whether two integers are equal."""
    return arith.cmpi(arith.CmpIPredicate.eq, value, other)


def element(register: ir.Value, index: int = 0) -> ir.Value:
    """An element of a vector: by default the first, which is the only one of most registers."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def at(pointer: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
    """Pointer to an element."""
    return utils.getelementptr(pointer, [index], dtype)


def load(ref: ir.Value, index: ir.Value, dtype: ir.Type, lanes: int = 1) -> ir.Value:
    """One load of `lanes` neighbouring elements of a 1-d reference; several must be aligned to their size."""
    pointer = at(utils.memref_ptr(ref), index, dtype)
    if lanes == 1:
        return llvm.load(dtype, pointer)
    return llvm.load(ir.VectorType.get((lanes,), dtype), pointer, alignment=lanes * utils.bytewidth(dtype))


def global_pointer(ref: ir.Value) -> ir.Value:
    """To an array that is known to lie in global memory."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))


def shared_address(pointer: ir.Value) -> ir.Value:
    """A pointer to shared memory as the 32-bit address that PTX takes."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def lane_of_warp() -> ir.Value:
    """Of the thread, 0 to 31."""
    return arith.andi(utils.thread_idx(), i32_constant(31))


def from_lane(value: ir.Value, lane: ir.Value) -> ir.Value:
    """The value of another lane of the warp, counted modulo 32."""
    return nvvm.shfl_sync(i32_constant(-1), value, lane, i32_constant(31), nvvm.ShflKind.idx)


def memory_asm(asm: str, constraints: str, operands: list[ir.Value], result: ir.Type | None = None) -> Any:
    """Inline PTX that touches memory; a label `again` becomes one of its own."""
    result = ir.Type.parse("!llvm.void") if result is None else result
    constraints = ",".join([*([constraints] if constraints else []), "~{memory}"])
    asm = asm.replace("again", "again${:uid}")
    return llvm.inline_asm(result, operands, asm, constraints, has_side_effects=True)
