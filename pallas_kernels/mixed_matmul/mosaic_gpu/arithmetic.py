"""A group on signed operands: unpack the codes, start the dot, wait for it, scale it; of two of the three kernels.

Each function is the body of a `plgpu.inline_mgpu` call: it emits code for the 128 threads of one warpgroup, which hold
operands and results as fragments.py says. Of a group and one output (MixLLM, section 4.1):

    total += (sum over k of a[k] * (q[k] - z)) * channel scale * token scale

q - z is made of the packed codes in registers (`unpack_codes4`). The integer sum starts at the bits of the float
12582912, so that its own bits, read as a float, are 12582912 + sum, without a conversion; `add_scaled` takes the
12582912 off in a multiply-add that is needed anyway.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import (
    ACCUMULATOR_LAYOUT,
    as_int8,
    descriptor,
    elements,
    fragment,
    issue_wgmma,
    lane_position,
    registers_as_i32,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import element, f32_constant, i32_constant, load

MAGIC_BITS = 0x4B400000
"""Bits of the float 12582912 = 1.5 * 2**23: an int32 accumulator that starts here holds, after an integer dot d with
|d| < 2**22, the bits of the float 12582912 + d."""

MAGIC = 12582912.0
"""The float of these bits. Times a float16 scale it is exact in float32."""


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
    tokens = accumulator.shape[1]
    sums = elements(accumulator)
    words = list(registers_as_i32(codes).flat)
    num_sums, first_word, steps = len(sums), 2 * len(sums), len(words) // 4
    outputs = ", ".join(f"${index}" for index in range(num_sums))
    lines = [".reg .pred add;", f".reg .b64 d<{steps}>;", "setp.eq.b32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
    for step in range(steps):
        left = ", ".join(f"${first_word + 4 * step + index}" for index in range(4))
        lines.append(f"add.s64 d{step}, ${first_word + len(words)}, {2 * step};")  # 32 bytes on, in units of 16
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{outputs}}}, {{{left}}}, d{step}, add;")
    lines.append("wgmma.commit_group.sync.aligned;")
    right = descriptor(activations, swizzle)
    i32 = ir.IntegerType.get_signless(32)
    new = issue_wgmma(lines, i32, num_sums, start=sums, left=words, right=right)
    return fragment(new, tokens, is_signed=True)


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
    """`total + (accumulator as float - magic) * channel scale * token scale`, two fused multiply-adds an element.

    Args:
        total: Float32 `[64, tokens]`.
        accumulator: int32 `[64, tokens]`, finished.
        channel_scales: Of the thread's two channels: what `load_channel_scales` gives.
        token_scales: Of its tokens: what `load_token_scales` gives.
    """
    f32 = ir.F32Type.get()

    def sums() -> Iterator[ir.Value]:
        for index, (old, dot) in enumerate(zip(total.registers.flat, accumulator.registers.flat, strict=True)):
            block, half, lane = index // 4, index // 2 % 2, index % 2
            scale, minus_magic_scale = channel_scales[half]
            weighted = mlir_math.fma(arith.bitcast(f32, element(dot)), scale, minus_magic_scale)
            yield mlir_math.fma(weighted, token_scales[2 * block + lane], element(old))

    return fragment(sums(), total.shape[1])
