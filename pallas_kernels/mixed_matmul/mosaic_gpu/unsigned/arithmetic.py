"""A group on unsigned operands: codes, dot, scale; and the zero points of 32 groups.

Each function is the body of a `plgpu.inline_mgpu` call, for the 128 threads of one warpgroup, which hold operands and
results as fragments.py says. Why the operands are unsigned is in unsigned/kernel.py.

A dot's bits, read as a float32, are the denormal dot * 2**-149. Scaled by a float16 scale times 2**111 they are normal
numbers, so totals carry the factor `TOTAL_SCALE` = 2**-38 until the tile is finished (`unscaled`).
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import (
    as_int8,
    descriptor,
    elements,
    fragment,
    issue_wgmma,
    lane_position,
    registers_as_i32,
)
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, element, f32_constant, i32_constant, load
from pallas_kernels.unsigned_operands import OFFSET, TOKENS_OF_SCALES

TOTAL_SCALE = 2.0**-38
"""Of the totals: a dot's bits are the float dot * 2**-149, and a float16 scale times 2**111 is still a float32."""

SCALE_PADDING, ZERO_POINT_PADDING = 8, 16
"""Elements more in a row of a correction's scales or zero points, so that a warp reads other banks in other rows."""


def unpack_codes4(packed: fa.FragmentedArray) -> fa.FragmentedArray:
    """Codes 0..15 as bytes, `[64, group_size]`, from packed bytes `[64, group_size // 2]`."""
    words = registers_as_i32(packed)
    halves = [np.empty(words.shape, dtype=object) for _ in range(2)]
    for index, word in np.ndenumerate(words):
        for half, shift in zip(halves, (0, 4), strict=True):
            nibbles = arith.shrui(word, i32_constant(shift)) if shift else word
            half[index] = arith.andi(nibbles, i32_constant(0x0F0F0F0F))
    return as_int8(np.concatenate(halves, axis=1))


def offset_codes8(codes: fa.FragmentedArray) -> fa.FragmentedArray:
    """int8 codes plus 128, as unsigned bytes."""
    words = registers_as_i32(codes)
    for index, word in np.ndenumerate(words):
        words[index] = arith.xori(word, i32_constant(0x80808080))
    return as_int8(words)


def issue_dot(codes: fa.FragmentedArray, activations: ir.Value, tokens: int) -> fa.FragmentedArray:
    """Start the dot of one group, `[64, K] x [tokens, K]` of unsigned bytes; one commit group.

    Its first instruction writes its accumulator without reading it, so that it needs no start value and the assembler
    may start it early, in other registers, while the former dot is scaled.
    """
    words = list(registers_as_i32(codes).flat)
    num_sums, steps = tokens // 2, len(words) // 4
    outputs = ", ".join(f"${index}" for index in range(num_sums))
    lines = [".reg .pred first, next;", ".reg .b32 low, high;", f".reg .b32 l<{steps}>;", f".reg .b64 d<{steps}>;"]
    lines += [
        "setp.ne.b32 first, 0, 0;",
        "setp.eq.b32 next, 0, 0;",
        f"mov.b64 {{low, high}}, ${num_sums + len(words)};",
    ]
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(steps):
        left = ", ".join(f"${num_sums + 4 * step + index}" for index in range(4))
        adds = "next" if step else "first"
        # 32 bytes on, in units of 16; the address is in the lower half alone.
        lines.append(f"add.u32 l{step}, low, {2 * step}; mov.b64 d{step}, {{l{step}, high}};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.u8.u8 {{{outputs}}}, {{{left}}}, d{step}, {adds};"
        )
    lines.append("wgmma.commit_group.sync.aligned;")
    right = descriptor(activations, 32 * steps)
    sums = issue_wgmma(lines, ir.IntegerType.get_signless(32), num_sums, left=words, right=right)
    return fragment(sums, tokens, is_signed=True)


def load_channel_scales(scales: ir.Value, sums: ir.Value, first: ir.Value) -> list[Any]:
    """The thread's two channels' (2**111 scale, -128 TOTAL_SCALE scale * sum of the codes).

    Args:
        scales: float16, those of the warpgroup's 64 channels at `[first : first + 64]`.
        sums: uint16, sums of the unsigned codes, likewise.
        first: Where they start.
    """
    f32 = ir.F32Type.get()
    channel = arith.addi(first, lane_position()[0])
    pairs = []
    for half in range(2):
        place = arith.addi(channel, i32_constant(8 * half))
        scale = arith.extf(f32, load(scales, place, ir.F16Type.get()))
        scale = arith.mulf(scale, f32_constant(TOTAL_SCALE * 2.0**149))
        total = _denormal(load(sums, place, ir.IntegerType.get_signless(16)))
        pairs.append((scale, arith.mulf(arith.mulf(total, f32_constant(-float(OFFSET))), scale)))
    return pairs


def add_scaled(
    total: fa.FragmentedArray, dot: fa.FragmentedArray, channel_scales: list[Any], token_scales: ir.Value
) -> fa.FragmentedArray:
    """`total + (dot as a denormal float * scale + offset) * token scale`, two fused multiply-adds an element.

    `token_scales` is float32, those of the tile from its first token on, in the order of `unsigned_operands`.
    """
    f32 = ir.F32Type.get()

    def sums() -> Iterator[ir.Value]:
        first = arith.muli(lane_position()[1], i32_constant(2))
        for block in range(total.registers.size // 8):
            # Loaded where they are used: the assembler then finds registers for them.
            four = load(token_scales, arith.addi(first, i32_constant(TOKENS_OF_SCALES * block)), f32, lanes=4)
            of_tokens = [element(four, number) for number in range(4)]
            for eight, half, lane in itertools.product(range(2), range(2), range(2)):
                index = 8 * block + 4 * eight + 2 * half + lane
                bits = arith.bitcast(f32, element(dot.registers.flat[index]))
                weighted = mlir_math.fma(bits, *channel_scales[half])
                yield mlir_math.fma(weighted, of_tokens[2 * eight + lane], element(total.registers.flat[index]))

    return fragment(sums(), total.shape[1])


def subtract_zero_points(
    total: fa.FragmentedArray,
    activation_sums: ir.Value,
    first_channel: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None = None,
) -> fa.FragmentedArray:
    """Take `scale * zero point * (activation sum * token scale)` of 32 groups off the totals; waits for it.

    A product `[64, 32] x [32, tokens]` of two factors in two bfloat16 terms each, of which three products count.

    Args:
        total: Float32 `[64, tokens]`, times `TOTAL_SCALE`.
        activation_sums: bfloat16 as bytes `[tokens, 128]` in shared memory: for the 32 groups the upper term, then the
            lower term. Zero where there is no group.
        first_channel: The warpgroup's first channel of the tile.
        scales: float16 `[32, channels + SCALE_PADDING]` in shared memory.
        zero_points: uint8 `[32, channels + ZERO_POINT_PADDING]`, or None where all are `OFFSET`.
    """
    left = _zero_point_words(first_channel, scales, zero_points)
    sums = elements(total)
    keys = list(itertools.product(range(2), range(2), range(4)))
    num_sums, tokens = len(sums), total.shape[1]
    outputs = ", ".join(f"${index}" for index in range(num_sums))
    lines = [".reg .pred add;", ".reg .b64 d<4>;", "setp.eq.b32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
    lines += [f"add.s64 d{step}, ${2 * num_sums + len(keys)}, {2 * step};" for step in range(4)]
    for (term, right_term), step in itertools.product(((0, 0), (0, 1), (1, 0)), range(2)):
        words = ", ".join(f"${2 * num_sums + keys.index((term, step, index))}" for index in range(4))
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 "
            f"{{{outputs}}}, {{{words}}}, d{2 * right_term + step}, add, 1, 1, 0;"
        )
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    right = descriptor(activation_sums, 128)
    new = issue_wgmma(lines, ir.F32Type.get(), num_sums, start=sums, left=[left[key] for key in keys], right=right)
    return fa.optimization_barrier(fragment(new, tokens))


def _zero_point_words(
    first_channel: ir.Value, scales: ir.Value, zero_points: ir.Value | None
) -> dict[tuple[int, int, int], ir.Value]:
    """Minus scale * zero point of 32 groups and the thread's two channels, times `TOTAL_SCALE`, as a left operand.

    Returns:
        Words of two bfloat16 by term (upper, lower), step of 16 groups, and register: channel half, then group half.
    """
    f32 = ir.F32Type.get()
    channel, pair = lane_position()
    channel = arith.addi(first_channel, channel)
    words: dict[tuple[int, int, int], ir.Value] = {}
    for half, step, upper in itertools.product(range(2), range(2), range(2)):
        values = []
        for one in range(2):
            group = 16 * step + 8 * upper + one
            scale = arith.extf(f32, _load_of_group(scales, pair, group, channel, 8 * half, ir.F16Type.get()))
            if zero_points is None:
                values.append(arith.mulf(scale, f32_constant(-OFFSET * TOTAL_SCALE)))
                continue
            byte = _load_of_group(zero_points, pair, group, channel, 8 * half, ir.IntegerType.get_signless(8))
            values.append(arith.mulf(arith.mulf(scale, f32_constant(-TOTAL_SCALE * 2.0**149)), _denormal(byte)))
        word = _bfloat16_pair(values)
        rounded = [arith.shli(word, i32_constant(16)), arith.andi(word, i32_constant(0xFFFF0000))]
        rest = [arith.subf(value, arith.bitcast(f32, bits)) for value, bits in zip(values, rounded, strict=True)]
        words[0, step, 2 * upper + half], words[1, step, 2 * upper + half] = word, _bfloat16_pair(rest)
    return words


def unscaled(total: fa.FragmentedArray) -> fa.FragmentedArray:
    """The totals without `TOTAL_SCALE`."""
    values = (arith.mulf(element(register), f32_constant(1 / TOTAL_SCALE)) for register in total.registers.flat)
    return fragment(values, total.shape[1])


def _denormal(integer: ir.Value) -> ir.Value:
    """The float32 with the bits of a short unsigned integer: the integer times 2**-149, without a conversion."""
    return arith.bitcast(ir.F32Type.get(), arith.extui(ir.IntegerType.get_signless(32), integer))


def _load_of_group(
    ref: ir.Value, first_group: ir.Value, group: int, first_channel: ir.Value, channel: int, dtype: ir.Type
) -> ir.Value:
    """`ref[first_group + group, first_channel + channel]`; what is static is part of the instruction."""
    pitch = ir.MemRefType(ref.type).shape[1]
    place = arith.addi(arith.muli(first_group, i32_constant(pitch)), first_channel)
    pointer = at(utils.memref_ptr(ref), place, dtype)
    return llvm.load(dtype, utils.getelementptr(pointer, [group * pitch + channel], dtype))


def _bfloat16_pair(values: list[ir.Value]) -> ir.Value:
    """Two floats, rounded to nearest, in one word; the first one in its lower half."""
    return utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", *values, result_types=ir.IntegerType.get_signless(32))
