"""Register-level parts of the Hopper kernel: unpack, dot, scale one group.

Each function here is the body of a `plgpu.inline_mgpu` call: it emits code for the 128 threads of one warpgroup. The
accumulator fragment of a `wgmma` of 64 channels x `tokens` places, in thread (warp w, lane l) of the warpgroup, channel
16 w + l // 4 + 8 h and token 8 j + 2 (l % 4) + p, for h, p in 0..1 and j in 0..tokens // 8; registers are ordered
(j, h, p).
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP

MAGIC_BITS = 0x4B400000
"""Bits of the float 12582912 = 1.5 * 2**23: an int32 accumulator that starts here holds, after an integer dot d with
|d| < 2**22, the bits of the float 12582912 + d."""

MAGIC = 12582912.0

ACCUMULATOR_LAYOUT = fa.WGMMA_LAYOUT_ACC_32BIT


def i32_constant(value: int) -> ir.Value:
    """A 32-bit integer, whose bits may also be given as those of an unsigned one."""
    return arith.constant(ir.IntegerType.get_signless(32), value - (1 << 32) if value >= 1 << 31 else value)


def f32_constant(value: float) -> ir.Value:
    """A 32-bit float."""
    return arith.constant(ir.F32Type.get(), value)


def load(ref: ir.Value, index: ir.Value, dtype: ir.Type, lanes: int = 1) -> ir.Value:
    """One load of `lanes` neighbouring elements of a 1-d reference."""
    pointer = utils.getelementptr(utils.memref_ptr(ref), [index], dtype)
    if lanes == 1:
        return llvm.load(dtype, pointer)
    return llvm.load(ir.VectorType.get((lanes,), dtype), pointer, alignment=lanes * utils.bytewidth(dtype))


def lane_position() -> tuple[ir.Value, ir.Value]:
    """Channel within the warpgroup's 64 (the h = 0 one) and first token within each 8 of this thread's fragment."""
    thread = utils.thread_idx()
    lane = arith.andi(thread, i32_constant(31))
    warp = arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(3))
    channel = arith.addi(arith.muli(warp, i32_constant(16)), arith.shrui(lane, i32_constant(2)))
    return channel, arith.muli(arith.andi(lane, i32_constant(3)), i32_constant(2))


def as_tiles(ref: ir.Value) -> ir.Value:
    """View `[rows, columns]` as the `[rows // 8, 1, 8, columns]` that Mosaic GPU takes for a swizzled operand."""
    rows = ir.MemRefType(ref.type).shape[0]
    return mgpu.memref_unsqueeze(mgpu.memref_unfold(ref, 0, (rows // 8, 8)), 1)


def zero_total(tokens: int) -> fa.FragmentedArray:
    """Float32 accumulator `[64, tokens]` of zeros."""
    return fa.FragmentedArray.splat(f32_constant(0.0), (CHANNELS_PER_WARPGROUP, tokens), ACCUMULATOR_LAYOUT)


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
    return fa.FragmentedArray.load_tiled(as_tiles(ref), swizzle, is_signed=is_signed, layout=fa.WGMMA_LAYOUT_8BIT)


def unpack_codes4(packed: fa.FragmentedArray, zero_points: list[ir.Value]) -> fa.FragmentedArray:
    """int8 codes less zero points, `[64, group_size]`, from packed bytes `[64, group_size // 2]`.

    `zero_points` holds the two channels' zero points, each copied to the four bytes of a word. Four codes at a time:
    (code | 0x80) - zero_point never borrows from the next byte, and flipping the top bit back gives the int8.
    """
    i32 = ir.IntegerType.get_signless(32)
    words = registers_as_i32(packed)
    # Shape (1, K/16, 1, 1, 2, ...): the axis of size two that picks h is the only one besides the columns.
    flat = words.reshape(-1, 2)
    halves = []
    for shift in (0, 4):
        half = np.empty(flat.shape, dtype=object)
        for index, word in np.ndenumerate(flat):
            nibbles = arith.shrui(word, i32_constant(shift)) if shift else word
            # Spelled out, since the compiler would otherwise rearrange the three operations into four.
            half[index] = utils.inline_ptx(
                "{ .reg .b32 t; lop3.b32 t, $1, 0x0f0f0f0f, 0x80808080, 0xea; sub.u32 t, t, $2; "
                "xor.b32 $0, t, 0x80808080; }",
                nibbles,
                zero_points[index[1]],
                result_types=i32,
            )
        halves.append(half.reshape(words.shape))
    return as_int8(np.concatenate(halves, axis=1))


def load_zero_points(ref: ir.Value, first: ir.Value) -> list[Any]:
    """The thread's two channels' zero points from uint8 `[first : first + 64]`, each copied to the bytes of a word."""
    channel = arith.addi(first, lane_position()[0])
    values = []
    for half in range(2):
        value = load(ref, arith.addi(channel, i32_constant(8 * half)), ir.IntegerType.get_signless(8))
        value = arith.extui(ir.IntegerType.get_signless(32), value)
        values.append(arith.muli(value, i32_constant(0x01010101)))
    return values


def load_channel_scales(ref: ir.Value, first: ir.Value) -> list[Any]:
    """The thread's two channels' (scale, -12582912 * scale) from float16 `[first : first + 64]`; exact in float32."""
    channel = arith.addi(first, lane_position()[0])
    scales = []
    for half in range(2):
        scale = load(ref, arith.addi(channel, i32_constant(8 * half)), ir.F16Type.get())
        scale = arith.extf(ir.F32Type.get(), scale)
        scales.append((scale, arith.mulf(scale, f32_constant(-MAGIC))))
    return scales


def load_token_scales(ref: ir.Value, first: ir.Value, tokens: int, *, pairs: bool) -> list[Any]:
    """Float32 scales of the thread's tokens, two for each 8 tokens, from float32 `[first : first + tokens]`.

    `pairs` promises an even `first`, so that two scales are one aligned load.
    """
    f32 = ir.F32Type.get()
    token = arith.addi(first, lane_position()[1])
    scales = []
    for block in range(tokens // 8):
        index = arith.addi(token, i32_constant(8 * block))
        if not pairs:
            scales += [load(ref, arith.addi(index, i32_constant(lane)), f32) for lane in range(2)]
            continue
        pair = load(ref, index, f32, lanes=2)
        scales += [element(pair, lane) for lane in range(2)]
    return scales


def magic_accumulator(tokens: int) -> fa.FragmentedArray:
    """int32 `[64, tokens]` of the magic number's bits, in registers from here on."""
    shape = (CHANNELS_PER_WARPGROUP, tokens)
    return fa.optimization_barrier(
        fa.FragmentedArray.splat(i32_constant(MAGIC_BITS), shape, ACCUMULATOR_LAYOUT, is_signed=True)
    )


def issue_dot(
    accumulator: fa.FragmentedArray, codes: fa.FragmentedArray, activations: ir.Value, swizzle: int
) -> fa.FragmentedArray:
    """Start adding the integer dot of one group, `[64, K] x [tokens, K]`, to the accumulator; one commit group.

    The instructions are written out here, since Mosaic GPU's own `wgmma` passes the left operand through a barrier
    that copies it where it is used again, and takes no left operand of 32 columns.
    """
    i32 = ir.IntegerType.get_signless(32)
    tokens = accumulator.shape[1]
    sums = [element(register) for register in accumulator.registers.flat]
    words = list(registers_as_i32(codes).flat)
    num_sums, first_word, steps = len(sums), 2 * len(sums), len(words) // 4
    descriptor_index = first_word + len(words)
    outputs = ", ".join(f"${index}" for index in range(num_sums))
    lines = [".reg .pred add;", f".reg .b64 d<{steps}>;", "setp.eq.b32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
    for step in range(steps):
        left = ", ".join(f"${first_word + 4 * step + index}" for index in range(4))
        lines.append(f"add.s64 d{step}, ${descriptor_index}, {2 * step};")  # 32 bytes on, in units of 16
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{outputs}}}, {{{left}}}, d{step}, add;")
    lines.append("wgmma.commit_group.sync.aligned;")
    tied = [str(index) for index in range(num_sums)]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * num_sums),
        [*sums, *words, descriptor(activations, swizzle)],
        "{ " + " ".join(lines) + " }",
        ",".join(["=r"] * num_sums + tied + ["r"] * len(words) + ["l"]),
        has_side_effects=True,
    )
    registers = np.empty(accumulator.registers.shape, dtype=object)
    for index in range(num_sums):
        word = llvm.extractvalue(i32, result, [index])
        registers.flat[index] = vector.broadcast(ir.VectorType.get((1,), i32), word)
    return fa.FragmentedArray(_registers=registers, _layout=accumulator.layout, _is_signed=True)


def descriptor(ref: ir.Value, swizzle: int) -> ir.Value:
    """What `wgmma` takes for a right operand in shared memory whose rows are one swizzle wide and follow each other."""
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    address = llvm.lshr(llvm.and_(address, arith.constant(i64, 0x3FFFF)), arith.constant(i64, 4))
    stride = 8 * swizzle  # bytes of 8 rows
    kind = {128: 1, 64: 2 - 4, 32: 3 - 4}[swizzle]  # the top two bits, in a signed constant
    return llvm.or_(address, arith.constant(i64, (stride >> 4 << 32) | (kind << 62)))


def element(register: ir.Value, index: int = 0) -> ir.Value:
    """An element of a vector: by default the first, which is the only one of most registers."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def wait_dot(accumulator: fa.FragmentedArray, codes: fa.FragmentedArray, in_flight: int) -> fa.FragmentedArray:
    """Wait for the dot that `issue_dot(accumulator, codes, ...)` started, `in_flight` others having started since.

    The dot reads `codes` until then. The compiler does not know: naming them after the wait keeps it from writing the
    next group's codes to the same registers, which would make it run the dots one instruction at a time.
    """
    utils.inline_ptx(f"wgmma.wait_group.sync.aligned {in_flight};", has_side_effects=True)
    words = list(registers_as_i32(codes).flat)
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, words, "", ",".join("r" * len(words)), has_side_effects=True)
    return fa.optimization_barrier(accumulator)


def add_scaled(
    total: fa.FragmentedArray,
    accumulator: fa.FragmentedArray,
    channel_scales: list[tuple[ir.Value, ir.Value]],
    token_scales: list[ir.Value],
) -> fa.FragmentedArray:
    """`total + (accumulator as float - magic) * channel scale * token scale`, two fused multiply-adds an element."""
    f32 = ir.F32Type.get()
    registers = np.empty(total.registers.shape, dtype=object)
    elements = zip(total.registers.flat, accumulator.registers.flat, strict=True)
    for index, (old, dot) in enumerate(elements):
        block, half, lane = index // 4, index // 2 % 2, index % 2
        scale, minus_magic_scale = channel_scales[half]
        weighted = mlir_math.fma(arith.bitcast(f32, element(dot)), scale, minus_magic_scale)
        new = mlir_math.fma(weighted, token_scales[2 * block + lane], element(old))
        registers.flat[index] = vector.broadcast(ir.VectorType.get((1,), f32), new)
    return fa.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)


def memory_asm(asm: str, constraints: str, operands: list[ir.Value], result: ir.Type | None = None) -> Any:
    """Inline PTX that touches memory; a label `again` becomes one of its own."""
    result = ir.Type.parse("!llvm.void") if result is None else result
    constraints = ",".join([*([constraints] if constraints else []), "~{memory}"])
    asm = asm.replace("again", "again${:uid}")
    return llvm.inline_asm(result, operands, asm, constraints, has_side_effects=True)
