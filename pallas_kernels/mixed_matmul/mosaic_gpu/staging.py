"""What both ways of a finished tile to the output have in common: how it lies in shared memory, and where it goes.

A part of a tile passes through in pieces of some rows: 64 words and some padding, one word a channel, two tokens of 16
bits or one of 32.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses
import itertools

from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.registers import element, i32_constant, lane_position

MAX_ROWS = 32
"""Rows of a piece: a part with more passes through in several."""

ROWS_AT_ONCE = 16
"""Rows that are read at once, at most: there is room for them."""


@dataclasses.dataclass(frozen=True)
class Staging:
    """How a dot's tokens lie in shared memory.

    Attributes:
        tokens: Tokens of a dot, a multiple of 8.
        itemsize: Bytes of an output element, 2 or 4.
    """

    tokens: int
    itemsize: int

    @property
    def tokens_per_word(self) -> int:
        """Neighbouring tokens of a channel that share a word."""
        return 4 // self.itemsize

    @property
    def rows(self) -> int:
        """Rows of a piece."""
        return min(MAX_ROWS, self.all_rows)

    @property
    def all_rows(self) -> int:
        """Rows of all pieces."""
        return self.tokens // self.tokens_per_word

    @property
    def pieces(self) -> int:
        """Of a part."""
        return -(-self.all_rows // self.rows)

    @property
    def pitch(self) -> int:
        """Words from row to row: the four rows that a warp writes at once start 8 banks apart."""
        return CHANNELS_PER_WARPGROUP + (8 if self.itemsize == 2 else 4)

    @property
    def words(self) -> int:
        """Words of a piece, with room for rows that are read and not stored."""
        return -(-self.rows // ROWS_AT_ONCE) * ROWS_AT_ONCE * self.pitch


def at(pointer: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
    """Pointer to an element."""
    return utils.getelementptr(pointer, [index], dtype)


def less(value: ir.Value, limit: int) -> ir.Value:
    """Whether a value is less than a number."""
    return arith.cmpi(arith.CmpIPredicate.slt, value, i32_constant(limit))


def from_lane(value: ir.Value, lane: ir.Value) -> ir.Value:
    """The value of another lane of the warp, counted modulo 32."""
    return nvvm.shfl_sync(i32_constant(-1), value, lane, i32_constant(31), nvvm.ShflKind.idx)


def global_pointer(ref: ir.Value) -> ir.Value:
    """To an array that is known to lie in global memory."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))


def equal(value: ir.Value, other: ir.Value) -> ir.Value:
    """Whether two integers are equal."""
    return arith.cmpi(arith.CmpIPredicate.eq, value, other)


def store(pointer: ir.Value, offset: int, values: list[ir.Value], predicate: ir.Value) -> None:
    """Store words, or one value of 16 bits, `offset` bytes behind a pointer to global memory."""
    bits = ir.IntegerType(values[0].type).width
    names = ", ".join(f"${1 + index}" for index in range(len(values)))
    operands, width = (f"{{{names}}}", f"v{len(values)}.b{bits}") if len(values) > 1 else (names, f"b{bits}")
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [pointer, *values, predicate],
        f"@${1 + len(values)} st.global.{width} [$0+{offset}], {operands};",
        ",".join(["l", *[{16: "h", 32: "r"}[bits]] * len(values), "b"]),
        has_side_effects=True,
    )


def part_of(word: ir.Value, part: int) -> ir.Value:
    """The low or high 16 bits of a word."""
    shifted = arith.shrui(word, i32_constant(16)) if part else word
    return arith.trunci(ir.IntegerType.get_signless(16), shifted)


def halves(low: ir.Value, high: ir.Value, part: int) -> ir.Value:
    """A word of the low (or the high) 16 bits of two words."""
    selector = i32_constant(0x7632 if part else 0x5410)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", low, high, selector, result_types=low.type)


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a finished part of a tile goes.

    Attributes:
        out: `[tokens, out_features]`.
        first_row: Row of the part's first channel among those of its bit width.
        first_token: Token of the part.
        rows: Rows of this bit width.
        tokens: Tokens of the part.
    """

    out: ir.Value
    first_row: ir.Value
    first_token: ir.Value
    rows: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and channels of the output."""
        tokens, out_features = ir.MemRefType(self.out.type).shape
        return tokens, out_features

    @property
    def dtype(self) -> ir.Type:
        """Of the output."""
        return ir.MemRefType(self.out.type).element_type

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the output."""
        return utils.bytewidth(self.dtype)

    def pointer(self, token: ir.Value, column: ir.Value) -> ir.Value:
        """To an element of the output, `token` counted from the part's first."""
        i64 = ir.IntegerType.get_signless(64)
        row = arith.muli(arith.extsi(i64, arith.addi(self.first_token, token)), arith.constant(i64, self.shape[1]))
        return at(global_pointer(self.out), arith.addi(row, arith.extsi(i64, column)), self.dtype)

    def has_token(self, token: ir.Value) -> ir.Value:
        """Whether a token, counted from the part's first, exists."""
        all_or_none = self.shape[0] % self.tokens == 0
        return less(self.first_token if all_or_none else arith.addi(self.first_token, token), self.shape[0])


def words_of(
    total: fa.FragmentedArray, dtype: ir.Type, bias: list[ir.Value] | None
) -> dict[tuple[int, int, int], ir.Value]:
    """The part with the bias of the thread's two channels, in the output's type, as words.

    Returns:
        By block of 8 tokens, half of 8 channels, and first of the thread's two tokens in the word.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    registers = [element(register) for register in total.registers.flat]
    words: dict[tuple[int, int, int], ir.Value] = {}
    for block, half in itertools.product(range(len(registers) // 4), range(2)):
        values = registers[4 * block + 2 * half : 4 * block + 2 * half + 2]
        if bias is not None:
            values = [arith.addf(value, bias[half]) for value in values]
        if utils.bytewidth(dtype) == 4:
            words |= {(block, half, lane): arith.bitcast(i32, value) for lane, value in enumerate(values)}
            continue
        pair = vector.from_elements(ir.VectorType.get((2,), f32), values)
        pair = arith.truncf(ir.VectorType.get((2,), dtype), pair)
        words[block, half, 0] = element(vector.bitcast(ir.VectorType.get((1,), i32), pair))
    return words


def write_piece(words: dict[tuple[int, int, int], ir.Value], staging: Staging, piece: int, base: ir.Value) -> int:
    """Write a piece of a part's words to shared memory; returns its rows."""
    channel, token = lane_position()
    first_row = arith.divui(token, i32_constant(staging.tokens_per_word))
    place = at(base, arith.addi(arith.muli(first_row, i32_constant(staging.pitch)), channel), channel.type)
    blocks = staging.rows * staging.tokens_per_word // 8
    first_block, last_block = piece * blocks, min((piece + 1) * blocks, staging.tokens // 8)
    for block, half, pair in itertools.product(
        range(first_block, last_block), range(2), range(0, 2, staging.tokens_per_word)
    ):
        row = ((block - first_block) * 8 + pair) // staging.tokens_per_word
        llvm.store(words[block, half, pair], utils.getelementptr(place, [row * staging.pitch + 8 * half], channel.type))
    return (last_block - first_block) * 8 // staging.tokens_per_word


def is_run(
    columns: list[tuple[ir.Value, ir.Value]], first_column: ir.Value, lane: ir.Value, to: Destination, elements: int
) -> ir.Value | None:
    """Whether all 64 channels are there, in columns that follow each other from a multiple of `elements` on.

    None for never: other rows of the output would start elsewhere.
    """
    if to.shape[1] % elements:
        return None
    whole = equal(arith.andi(first_column, i32_constant(elements - 1)), i32_constant(0))
    for half, (column, valid) in enumerate(columns):
        in_place = equal(column, arith.addi(first_column, arith.addi(lane, i32_constant(32 * half))))
        whole = arith.andi(whole, arith.andi(valid, in_place))
    return nvvm.vote_sync(i32_constant(-1), whole, "all")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of a finished part that lie in shared memory, as one of the threads that store them sees them.

    Attributes:
        base: Pointer to them.
        staging: How they lie there.
        rows: Rows that are filled.
        first_token: Token of the first row, counted from the part's first.
        warp: Of the thread, among those that store.
        lane: Of the thread.
    """

    base: ir.Value
    staging: Staging
    rows: int
    first_token: int
    warp: ir.Value
    lane: ir.Value

    def token(self, row: ir.Value) -> ir.Value:
        """Token at the start of a row."""
        return arith.addi(arith.muli(row, i32_constant(self.staging.tokens_per_word)), i32_constant(self.first_token))

    def place(self, row: ir.Value, word: ir.Value) -> ir.Value:
        """Pointer to a word of a row."""
        return at(self.base, arith.addi(arith.muli(row, i32_constant(self.staging.pitch)), word), word.type)
