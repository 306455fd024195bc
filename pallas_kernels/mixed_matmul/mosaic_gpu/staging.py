"""How a finished part of a tile lies in shared memory on its way from the fragments of `wgmma` to rows of the output.

A store from a fragment touches 4 tokens x 8 channels of a warp: pieces of sectors, each of which goes to the L2 cache
on its own. So a part passes through shared memory. It has a word for each channel and two tokens of 16 bits, or one of
32; words of the same tokens are a row, and a part of many rows passes through in pieces of `MAX_ROWS`:

    row 0   channel 0: tokens 0, 1 | channel 1: tokens 0, 1 | ... | channel 63 | padding
    row 1   channel 0: tokens 2, 3 | ...                                                       (16-bit outputs)

Written a fragment's word at a time, read along the rows: runs of channels of one token.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import abc
import dataclasses
import itertools

from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Columns, Destination
from pallas_kernels.mixed_matmul.mosaic_gpu.fragments import elements, lane_position
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, element, i32_constant

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


def words_of(
    total: fa.FragmentedArray, dtype: ir.Type, bias: list[ir.Value] | None
) -> dict[tuple[int, int, int], ir.Value]:
    """The part with the bias of the thread's two channels, in the output's type, as words.

    Returns:
        By block of 8 tokens, half of 8 channels, and first of the thread's two tokens in the word.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    registers = elements(total)
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


@dataclasses.dataclass(frozen=True)
class Piece(abc.ABC):
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

    def store(self, to: Destination, columns: Columns) -> None:
        """Store the piece; called by all threads of the warps that store."""
        if columns.are_run is None:
            self.store_elements(to, columns.of_lane)
            return
        with utils.when(columns.are_run):
            self.store_run(to, columns.first)
        with utils.when(arith.xori(columns.are_run, arith.constant(columns.are_run.type, 1))):
            self.store_elements(to, columns.of_lane)

    @abc.abstractmethod
    def store_run(self, to: Destination, first_column: ir.Value) -> None:
        """Store 64 neighbouring columns, several a lane."""

    @abc.abstractmethod
    def store_elements(self, to: Destination, columns: list[tuple[ir.Value, ir.Value]]) -> None:
        """Store columns wherever they are, each lane two of them."""

    def values_of_token(self, words: list[ir.Value], number: int) -> list[ir.Value]:
        """Words to store of neighbouring channels' words: what belongs to one of the tokens that share a word."""
        if self.staging.itemsize == 4:
            return words
        return [_halves(*pair, number) for pair in zip(words[::2], words[1::2], strict=True)]

    def value_of_token(self, word: ir.Value, number: int) -> ir.Value:
        """What belongs to one of the tokens that share a word."""
        return _part_of(word, number) if self.staging.itemsize == 2 else word


def _part_of(word: ir.Value, part: int) -> ir.Value:
    """The low or high 16 bits of a word."""
    shifted = arith.shrui(word, i32_constant(16)) if part else word
    return arith.trunci(ir.IntegerType.get_signless(16), shifted)


def _halves(low: ir.Value, high: ir.Value, part: int) -> ir.Value:
    """A word of the low (or the high) 16 bits of two words."""
    selector = i32_constant(0x7632 if part else 0x5410)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", low, high, selector, result_types=low.type)
