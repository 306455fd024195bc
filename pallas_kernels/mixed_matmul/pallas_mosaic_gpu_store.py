"""Output path of the Hopper kernel: from the registers of a warpgroup to rows of the output.

A warpgroup ends a tile with 64 channels x some tokens in the fragment of `wgmma` (see pallas_mosaic_gpu_registers.py).
A store instruction straight from there touches 4 tokens x 8 channels of a warp: pieces of sectors, each of which goes
to the L2 cache on its own. So the tile passes through shared memory, where a warp picks up runs of channels of one
token: 16 bytes a lane where the 64 columns follow each other, else one element a lane, 32 neighbouring channels at a
time.

Shared memory holds rows of 64 words and some padding, one word a channel: two tokens of 16 bits, or one of 32.
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

from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_registers import lane_position

MAX_ROWS = 32
"""Rows of shared memory of a warpgroup: a tile with more passes through in slices."""

WARPS = 4
"""Of a warpgroup."""

VECTOR_ROWS = 16
"""Rows that a warpgroup reads at once, at most, where it stores vectors."""


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
        """Rows of a slice."""
        return min(MAX_ROWS, self.tokens // self.tokens_per_word)

    @property
    def pitch(self) -> int:
        """Words from row to row: the four rows that a warp writes at once start 8 banks apart."""
        return CHANNELS_PER_WARPGROUP + (8 if self.itemsize == 2 else 4)

    @property
    def words(self) -> int:
        """Words of a warpgroup, with room for rows that are read and not stored."""
        return -(-self.rows // VECTOR_ROWS) * VECTOR_ROWS * self.pitch


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _at(pointer: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
    return utils.getelementptr(pointer, [index], dtype)


def _less(value: ir.Value, limit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, value, _i32(limit))


def _equal(value: ir.Value, other: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, value, other)


def _element(vector_value: ir.Value, index: int = 0) -> ir.Value:
    return vector.extract(vector_value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def _store(pointer: ir.Value, offset: int, values: list[ir.Value], predicate: ir.Value) -> None:
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


def _part(word: ir.Value, part: int) -> ir.Value:
    """The low or high 16 bits of a word."""
    shifted = arith.shrui(word, _i32(16)) if part else word
    return arith.trunci(ir.IntegerType.get_signless(16), shifted)


def _halves(low: ir.Value, high: ir.Value, part: int) -> ir.Value:
    """A word of the low (or the high) 16 bits of two words."""
    selector = _i32(0x7632 if part else 0x5410)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", low, high, selector, result_types=low.type)


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a finished tile goes.

    Attributes:
        order: int32 `[out_features]`, the output channel of each packed row.
        bias: float32 `[out_features]`, or None.
        out: `[tokens, out_features]`.
        first_row: Row of the tile's first channel among those of its bit width.
        first_token: Token of the tile.
        rows: Rows of this bit width.
        order_start: Where they start in `order`.
    """

    order: ir.Value
    bias: ir.Value | None
    out: ir.Value
    first_row: ir.Value
    first_token: ir.Value
    rows: int
    order_start: int

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

    def column(self, channel: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Output channel of a channel of the tile (of the last one, beyond the last), and whether there is one."""
        row = arith.addi(self.first_row, channel)
        valid = _less(row, self.rows)
        safe = arith.addi(arith.select(valid, row, _i32(self.rows - 1)), _i32(self.order_start))
        return llvm.load(row.type, _at(utils.memref_ptr(self.order), safe, row.type)), valid

    def bias_of(self, column: ir.Value) -> ir.Value | None:
        """Bias of an output channel."""
        if self.bias is None:
            return None
        f32 = ir.F32Type.get()
        return llvm.load(f32, _at(utils.memref_ptr(self.bias), column, f32))

    def pointer(self, token: ir.Value, column: ir.Value) -> ir.Value:
        """To an element of the output, `token` counted from the tile's first."""
        i64 = ir.IntegerType.get_signless(64)
        row = arith.muli(arith.extsi(i64, arith.addi(self.first_token, token)), arith.constant(i64, self.shape[1]))
        out = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(self.out))
        return _at(out, arith.addi(row, arith.extsi(i64, column)), self.dtype)

    def has_token(self, token: ir.Value) -> ir.Value:
        """Whether a token, counted from the tile's first, exists."""
        return _less(arith.addi(self.first_token, token), self.shape[0])


def store_tile(total: fa.FragmentedArray, to: Destination, shared: ir.Value) -> None:
    """Store a finished tile `[64 channels, tokens]` through shared memory.

    Args:
        total: The tile, in float32.
        to: Where it goes.
        shared: int32 `[warpgroups * Staging.words]`.
    """
    staging = Staging(total.shape[1], to.itemsize)
    thread = utils.thread_idx()
    lane = arith.andi(thread, _i32(31))
    warp = arith.andi(arith.shrui(thread, _i32(5)), _i32(WARPS - 1))
    i32 = lane.type
    base = _at(utils.memref_ptr(shared), arith.muli(arith.shrui(thread, _i32(7)), _i32(staging.words)), i32)
    # All of these loads before the barriers, which hide their latency.
    columns = [to.column(arith.addi(lane, _i32(32 * half))) for half in range(2)]
    first_column, _ = to.column(_i32(0))
    channel, token = lane_position()
    fragment_columns = [] if to.bias is None else [to.column(arith.addi(channel, _i32(8 * h)))[0] for h in range(2)]
    words = _words(total, to, fragment_columns)
    whole = _whole(columns, first_column, lane, to)
    first_row = arith.divui(token, _i32(staging.tokens_per_word))
    write_base = _at(base, arith.addi(arith.muli(first_row, _i32(staging.pitch)), channel), i32)
    blocks = staging.rows * staging.tokens_per_word // 8
    for first_block in range(0, total.shape[1] // 8, blocks):
        last_block = min(first_block + blocks, total.shape[1] // 8)
        rows = (last_block - first_block) * 8 // staging.tokens_per_word
        utils.warpgroup_barrier()  # the slice before has been read
        for block, half, pair in itertools.product(
            range(first_block, last_block), range(2), range(0, 2, staging.tokens_per_word)
        ):
            row = ((block - first_block) * 8 + pair) // staging.tokens_per_word
            place = utils.getelementptr(write_base, [row * staging.pitch + 8 * half], i32)
            llvm.store(words[block, half, pair], place)
        utils.warpgroup_barrier()
        staged = _Slice(base, staging, rows, 8 * first_block, warp, lane)
        if whole is None:
            staged.store_elements(to, columns)
            continue
        with utils.when(whole):
            staged.store_vectors(to, first_column)
        with utils.when(arith.xori(whole, arith.constant(whole.type, 1))):
            staged.store_elements(to, columns)


def _words(total: fa.FragmentedArray, to: Destination, columns: list[ir.Value]) -> dict[tuple[int, int, int], ir.Value]:
    """The tile with its bias, in the output's type, as words.

    Args:
        total: The tile, in float32.
        to: Where it goes.
        columns: Output channels of the thread's two rows of the fragment, for the bias.

    Returns:
        By block of 8 tokens, half of 8 channels, and first of the thread's two tokens in the word.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    added = [to.bias_of(column) for column in columns] if to.bias is not None else [None, None]
    registers = [_element(register) for register in total.registers.flat]
    words: dict[tuple[int, int, int], ir.Value] = {}
    for block, half in itertools.product(range(len(registers) // 4), range(2)):
        values = registers[4 * block + 2 * half : 4 * block + 2 * half + 2]
        if added[half] is not None:
            values = [arith.addf(value, added[half]) for value in values]
        if to.itemsize == 4:
            words |= {(block, half, lane): arith.bitcast(i32, value) for lane, value in enumerate(values)}
            continue
        pair = vector.from_elements(ir.VectorType.get((2,), f32), values)
        pair = arith.truncf(ir.VectorType.get((2,), to.dtype), pair)
        words[block, half, 0] = _element(vector.bitcast(ir.VectorType.get((1,), i32), pair))
    return words


def _whole(
    columns: list[tuple[ir.Value, ir.Value]], first_column: ir.Value, lane: ir.Value, to: Destination
) -> ir.Value | None:
    """Whether all 64 channels are there, in columns that follow each other and start at 16 bytes; None for never."""
    elements = 16 // to.itemsize
    if to.shape[1] % elements:
        return None
    whole = _equal(arith.andi(first_column, _i32(elements - 1)), _i32(0))
    for half, (column, valid) in enumerate(columns):
        in_place = _equal(column, arith.addi(first_column, arith.addi(lane, _i32(32 * half))))
        whole = arith.andi(whole, arith.andi(valid, in_place))
    return nvvm.vote_sync(_i32(-1), whole, "all")


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Tokens of a finished tile that lie in shared memory, as one of the threads that store them sees them.

    Attributes:
        base: Pointer to the warpgroup's shared memory.
        staging: How they lie there.
        rows: Rows that are filled.
        first_token: Token of the first row, counted from the tile's first.
        warp: Of the thread, in its warpgroup.
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
        return arith.addi(arith.muli(row, _i32(self.staging.tokens_per_word)), _i32(self.first_token))

    def place(self, row: ir.Value, word: ir.Value) -> ir.Value:
        """Pointer to a word of a row."""
        return _at(self.base, arith.addi(arith.muli(row, _i32(self.staging.pitch)), word), word.type)

    def store_vectors(self, to: Destination, first_column: ir.Value) -> None:
        """Store 64 neighbouring columns, 16 bytes a lane."""
        i32 = self.lane.type
        elements = 16 // to.itemsize  # channels of a lane
        lanes_per_row = CHANNELS_PER_WARPGROUP // elements
        rows_per_warp = 32 // lanes_per_row
        row = arith.addi(arith.muli(self.warp, _i32(rows_per_warp)), arith.divui(self.lane, _i32(lanes_per_row)))
        channel = arith.muli(arith.remui(self.lane, _i32(lanes_per_row)), _i32(elements))
        pointer = to.pointer(self.token(row), arith.addi(first_column, channel))
        first_word = self.place(row, channel)
        for first in range(0, self.rows, rows_per_warp * WARPS):
            exists = _less(row, self.rows - first)
            words: list[ir.Value] = []
            for index in range(0, elements, 4):
                place = utils.getelementptr(first_word, [first * self.staging.pitch + index], i32)
                four = llvm.load(ir.VectorType.get((4,), i32), place, alignment=16)
                words += [_element(four, position) for position in range(4)]
            for part in range(self.staging.tokens_per_word):
                values = words
                if to.itemsize == 2:
                    values = [_halves(*pair, part) for pair in zip(words[::2], words[1::2], strict=True)]
                token = first * self.staging.tokens_per_word + part
                here = arith.andi(exists, to.has_token(arith.addi(self.token(row), _i32(token))))
                _store(pointer, token * to.shape[1] * to.itemsize, values, here)

    def store_elements(self, to: Destination, columns: list[tuple[ir.Value, ir.Value]]) -> None:
        """Store columns wherever they are, each lane two of them for every fourth row."""
        i32 = self.lane.type
        pointers = [to.pointer(self.token(self.warp), column) for column, _ in columns]
        first_word = self.place(self.warp, self.lane)
        for row, half in itertools.product(range(0, self.rows, WARPS), range(2)):
            word = llvm.load(i32, utils.getelementptr(first_word, [row * self.staging.pitch + 32 * half], i32))
            for part in range(self.staging.tokens_per_word):
                token = row * self.staging.tokens_per_word + part
                here = arith.andi(columns[half][1], to.has_token(arith.addi(self.token(self.warp), _i32(token))))
                value = _part(word, part) if to.itemsize == 2 else word
                _store(pointers[half], token * to.shape[1] * to.itemsize, [value], here)
