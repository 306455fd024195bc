"""How the 128 threads of a warpgroup hold the operands and results of `wgmma`, and what reads and writes them.

The accumulator of a dot of 64 channels x `tokens` (D in the PTX ISA's "Matrix fragments for wgmma"): thread (warp w,
lane l) of the warpgroup has channel 16 w + l // 4 + 8 h and token 8 j + 2 (l % 4) + p, for h, p in 0..1 and j in
0..tokens // 8. Its registers are ordered (j, h, p). The lanes of warp 0, each with two tokens (p = 0, 1):

    token            0     1     2     3     4     5     6     7  |  8  ...
    channel  0     |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|   j = 0: registers (0, 0, p)
             1     |---- 4 ----|---- 5 ----|---- 6 ----|---- 7 ----|
            ...
             7     |--- 28 ----|--- 29 ----|--- 30 ----|--- 31 ----|
             8     |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|          registers (0, 1, p)
            ...

The left operand (A), 64 channels x 32 bytes an instruction, gives the thread the same two channels and, of each, bytes
4 (l % 4) to + 3 and 16 further on: four words of four codes.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import element, f32_constant, i32_constant

ACCUMULATOR_LAYOUT = fa.WGMMA_LAYOUT_ACC_32BIT


def lane_position() -> tuple[ir.Value, ir.Value]:
    """Channel within the warpgroup's 64 (the h = 0 one) and first token within each 8 of this thread's fragment."""
    thread = utils.thread_idx()
    lane = arith.andi(thread, i32_constant(31))
    warp = arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(3))
    channel = arith.addi(arith.muli(warp, i32_constant(16)), arith.shrui(lane, i32_constant(2)))
    return channel, arith.muli(arith.andi(lane, i32_constant(3)), i32_constant(2))


def zero_total(tokens: int) -> fa.FragmentedArray:
    """Float32 accumulator `[64, tokens]` of zeros."""
    return fa.FragmentedArray.splat(f32_constant(0.0), (CHANNELS_PER_WARPGROUP, tokens), ACCUMULATOR_LAYOUT)


def elements(array: fa.FragmentedArray) -> list[ir.Value]:
    """The thread's values, in the order of its registers."""
    return [element(register) for register in array.registers.flat]


def fragment(values: Iterable[ir.Value], tokens: int, *, is_signed: bool | None = None) -> fa.FragmentedArray:
    """The accumulator `[64, tokens]` of these values, in the order of its registers; the inverse of `elements`.

    Args:
        values: One for each register; may be computed one at a time.
        tokens: Of the dot.
        is_signed: Of integers; None of floats.
    """
    shape = (CHANNELS_PER_WARPGROUP, tokens)
    registers = np.empty(ACCUMULATOR_LAYOUT.registers_shape(shape), dtype=object)
    for index, value in enumerate(values):
        registers.flat[index] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return fa.FragmentedArray(_registers=registers, _layout=ACCUMULATOR_LAYOUT, _is_signed=is_signed)


def registers_as_i32(array: fa.FragmentedArray) -> np.ndarray:
    """The registers of an array of bytes, as words of four."""
    i32 = ir.IntegerType.get_signless(32)
    words = np.empty(array.registers.shape, dtype=object)
    for index, register in np.ndenumerate(array.registers):
        word = vector.bitcast(ir.VectorType.get((1,), i32), register)
        words[index] = element(word)
    return words


def as_int8(words: np.ndarray) -> fa.FragmentedArray:
    """Left operand `[64, K]` from 32-bit words of four int8 codes."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    registers = np.empty(words.shape, dtype=object)
    for index, word in np.ndenumerate(words):
        single = vector.broadcast(ir.VectorType.get((1,), i32), word)
        registers[index] = vector.bitcast(ir.VectorType.get((4,), i8), single)
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=True)


def load_codes(ref: ir.Value, row_bytes: int, *, is_signed: bool) -> fa.FragmentedArray:
    """Read `[64, row_bytes]` bytes, swizzled in shared memory, in the layout of the left operand of the dot."""
    swizzle = max(row_bytes, 16)
    return fa.FragmentedArray.load_tiled(_as_tiles(ref), swizzle, is_signed=is_signed, layout=fa.WGMMA_LAYOUT_8BIT)


def _as_tiles(ref: ir.Value) -> ir.Value:
    """View `[rows, columns]` as the `[rows // 8, 1, 8, columns]` that Mosaic GPU takes for a swizzled operand."""
    rows = ir.MemRefType(ref.type).shape[0]
    return mgpu.memref_unsqueeze(mgpu.memref_unfold(ref, 0, (rows // 8, 8)), 1)


def descriptor(ref: ir.Value, swizzle: int) -> ir.Value:
    """What `wgmma` takes for a right operand in shared memory whose rows are one swizzle wide and follow each other.

    PTX ISA, "Matrix descriptor": the address and the stride of 8 rows, both in units of 16 bytes, and the swizzle.
    """
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    address = llvm.lshr(llvm.and_(address, arith.constant(i64, 0x3FFFF)), arith.constant(i64, 4))
    stride = 8 * swizzle  # bytes of 8 rows
    kind = {128: 1, 64: 2 - 4, 32: 3 - 4}[swizzle]  # the top two bits, in a signed constant
    return llvm.or_(address, arith.constant(i64, (stride >> 4 << 32) | (kind << 62)))


def issue_wgmma(
    lines: list[str],
    dtype: ir.Type,
    num_sums: int,
    *,
    start: Sequence[ir.Value] = (),
    left: Sequence[ir.Value],
    right: ir.Value,
) -> Iterator[ir.Value]:
    """Run PTX around `wgmma`, as one inline assembly, so that nothing comes between its instructions.

    Args:
        lines: Instructions. `$0` on are the sums, then come those they start from, the left words and the descriptor.
        dtype: Of the sums: a 32-bit integer or a float32.
        num_sums: Of the thread.
        start: What the sums start from, in the same registers; empty where the first instruction does not read them.
        left: Words of the left operand.
        right: Descriptor of the right one.

    Returns:
        The sums, each taken out of the result as it is asked for.
    """
    kind = "f" if dtype == ir.F32Type.get() else "r"
    tied = [str(index) for index in range(len(start))]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([dtype] * num_sums),
        [*start, *left, right],
        "{ " + " ".join(lines) + " }",
        ",".join([f"={kind}"] * num_sums + tied + ["r"] * len(left) + ["l"]),
        has_side_effects=True,
    )
    return (llvm.extractvalue(dtype, result, [index]) for index in range(num_sums))
