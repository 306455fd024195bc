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
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_registers import element, i32_constant, lane_position

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


def _at(pointer: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
    return utils.getelementptr(pointer, [index], dtype)


def _less(value: ir.Value, limit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, value, i32_constant(limit))


def _equal(value: ir.Value, other: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, value, other)


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
    shifted = arith.shrui(word, i32_constant(16)) if part else word
    return arith.trunci(ir.IntegerType.get_signless(16), shifted)


def _halves(low: ir.Value, high: ir.Value, part: int) -> ir.Value:
    """A word of the low (or the high) 16 bits of two words."""
    selector = i32_constant(0x7632 if part else 0x5410)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", low, high, selector, result_types=low.type)


def _from_lane(value: ir.Value, lane: ir.Value) -> ir.Value:
    """The value of another lane of the warp, counted modulo 32."""
    return nvvm.shfl_sync(i32_constant(-1), value, lane, i32_constant(31), nvvm.ShflKind.idx)


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a finished tile goes.

    Attributes:
        columns: int32 in shared memory, where `fetch_columns` puts what it fetches.
        bias: float32 `[out_features]`, or None.
        out: `[tokens, out_features]`.
        first_row: Row of the tile's first channel among those of its bit width.
        first_token: Token of the tile.
        rows: Rows of this bit width.
        tokens: Tokens of the tile.
    """

    columns: ir.Value
    bias: ir.Value | None
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

    def columns_of_lane(self) -> list[tuple[ir.Value, ir.Value]]:
        """Output channels of channels `lane` and `lane + 32` of the tile, each with whether there is one."""
        i32 = ir.IntegerType.get_signless(32)
        utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)
        thread = utils.thread_idx()
        place = _at(utils.memref_ptr(self.columns), arith.muli(thread, i32_constant(2)), i32)
        pair = llvm.load(ir.VectorType.get((2,), i32), place, alignment=8)
        first = arith.addi(self.first_row, arith.andi(thread, i32_constant(31)))
        return [
            (element(pair, half), _less(arith.addi(first, i32_constant(32 * half)), self.rows)) for half in range(2)
        ]

    def pointer(self, token: ir.Value, column: ir.Value) -> ir.Value:
        """To an element of the output, `token` counted from the tile's first."""
        i64 = ir.IntegerType.get_signless(64)
        row = arith.muli(arith.extsi(i64, arith.addi(self.first_token, token)), arith.constant(i64, self.shape[1]))
        out = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(self.out))
        return _at(out, arith.addi(row, arith.extsi(i64, column)), self.dtype)

    def bias_of(self, column: ir.Value) -> ir.Value:
        """Bias of an output channel."""
        f32 = ir.F32Type.get()
        return llvm.load(f32, _at(utils.memref_ptr(self.bias), column, f32))

    def has_token(self, token: ir.Value) -> ir.Value:
        """Whether a token, counted from the tile's first, exists."""
        all_or_none = self.shape[0] % self.tokens == 0
        return _less(self.first_token if all_or_none else arith.addi(self.first_token, token), self.shape[0])


def fetch_columns(order: ir.Value, columns: ir.Value, *, first_row: ir.Value, rows: int, order_start: int) -> None:
    """Start to fetch the output channels that a thread will want when it stores the tile.

    The copies end while the tile is computed, and take no registers until then. A thread reads what it fetched itself,
    so nothing has to be synchronised.

    Args:
        order: int32 `[out_features]`, the output channel of each packed row.
        columns: int32 in shared memory, two for each computing thread.
        first_row: Row of the tile's first channel among those of its bit width.
        rows: Rows of this bit width.
        order_start: Where they start in `order`.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = utils.thread_idx()
    source = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(order))
    place = _at(utils.memref_ptr(columns), arith.muli(thread, i32_constant(2)), i32)
    place = llvm.ptrtoint(i32, place)
    for half in range(2):
        row = arith.addi(first_row, arith.addi(arith.andi(thread, i32_constant(31)), i32_constant(32 * half)))
        row = arith.addi(arith.minsi(row, i32_constant(rows - 1)), i32_constant(order_start))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [place, _at(source, row, i32)],
            f"cp.async.ca.shared.global [$0+{4 * half}], [$1], 4;",
            "r,l",
            has_side_effects=True,
        )


def store_tile(total: fa.FragmentedArray, to: Destination, shared: ir.Value) -> None:
    """Store a finished tile `[64 channels, tokens]` through shared memory.

    Args:
        total: The tile, in float32.
        to: Where it goes.
        shared: int32 `[warpgroups * Staging.words]`.
    """
    staging = Staging(total.shape[1], to.itemsize)
    thread = utils.thread_idx()
    lane = arith.andi(thread, i32_constant(31))
    warp = arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(WARPS - 1))
    i32 = lane.type
    base = _at(
        utils.memref_ptr(shared), arith.muli(arith.shrui(thread, i32_constant(7)), i32_constant(staging.words)), i32
    )
    columns = to.columns_of_lane()
    first_column = _from_lane(columns[0][0], i32_constant(0))
    whole = _whole(columns, first_column, lane, to)
    channel, token = lane_position()
    bias: list[ir.Value | None] = [None, None]
    if to.bias is not None:
        # The fragment's channels, 8 apart, are both among the first or both among the last 32.
        of_half = arith.select(_less(channel, 32), columns[0][0], columns[1][0])
        bias = [to.bias_of(_from_lane(of_half, arith.addi(channel, i32_constant(8 * half)))) for half in range(2)]
    words = _words(total, to, bias)
    first_row = arith.divui(token, i32_constant(staging.tokens_per_word))
    write_base = _at(base, arith.addi(arith.muli(first_row, i32_constant(staging.pitch)), channel), i32)
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


def _words(
    total: fa.FragmentedArray, to: Destination, bias: list[ir.Value | None]
) -> dict[tuple[int, int, int], ir.Value]:
    """The tile with the bias of the thread's two channels, in the output's type, as words.

    Returns:
        By block of 8 tokens, half of 8 channels, and first of the thread's two tokens in the word.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    registers = [element(register) for register in total.registers.flat]
    words: dict[tuple[int, int, int], ir.Value] = {}
    for block, half in itertools.product(range(len(registers) // 4), range(2)):
        values = registers[4 * block + 2 * half : 4 * block + 2 * half + 2]
        if bias[half] is not None:
            values = [arith.addf(value, bias[half]) for value in values]
        if to.itemsize == 4:
            words |= {(block, half, lane): arith.bitcast(i32, value) for lane, value in enumerate(values)}
            continue
        pair = vector.from_elements(ir.VectorType.get((2,), f32), values)
        pair = arith.truncf(ir.VectorType.get((2,), to.dtype), pair)
        words[block, half, 0] = element(vector.bitcast(ir.VectorType.get((1,), i32), pair))
    return words


def _whole(
    columns: list[tuple[ir.Value, ir.Value]], first_column: ir.Value, lane: ir.Value, to: Destination
) -> ir.Value | None:
    """Whether all 64 channels are there, in columns that follow each other and start at 16 bytes; None for never."""
    elements = 16 // to.itemsize
    if to.shape[1] % elements:
        return None
    whole = _equal(arith.andi(first_column, i32_constant(elements - 1)), i32_constant(0))
    for half, (column, valid) in enumerate(columns):
        in_place = _equal(column, arith.addi(first_column, arith.addi(lane, i32_constant(32 * half))))
        whole = arith.andi(whole, arith.andi(valid, in_place))
    return nvvm.vote_sync(i32_constant(-1), whole, "all")


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
        return arith.addi(arith.muli(row, i32_constant(self.staging.tokens_per_word)), i32_constant(self.first_token))

    def place(self, row: ir.Value, word: ir.Value) -> ir.Value:
        """Pointer to a word of a row."""
        return _at(self.base, arith.addi(arith.muli(row, i32_constant(self.staging.pitch)), word), word.type)

    def store_vectors(self, to: Destination, first_column: ir.Value) -> None:
        """Store 64 neighbouring columns, 16 bytes a lane."""
        i32 = self.lane.type
        elements = 16 // to.itemsize  # channels of a lane
        lanes_per_row = CHANNELS_PER_WARPGROUP // elements
        rows_per_warp = 32 // lanes_per_row
        row = arith.addi(
            arith.muli(self.warp, i32_constant(rows_per_warp)), arith.divui(self.lane, i32_constant(lanes_per_row))
        )
        channel = arith.muli(arith.remui(self.lane, i32_constant(lanes_per_row)), i32_constant(elements))
        pointer = to.pointer(self.token(row), arith.addi(first_column, channel))
        first_word = self.place(row, channel)
        for first in range(0, self.rows, rows_per_warp * WARPS):
            exists = _less(row, self.rows - first)
            words: list[ir.Value] = []
            for index in range(0, elements, 4):
                place = utils.getelementptr(first_word, [first * self.staging.pitch + index], i32)
                four = llvm.load(ir.VectorType.get((4,), i32), place, alignment=16)
                words += [element(four, position) for position in range(4)]
            for part in range(self.staging.tokens_per_word):
                values = words
                if to.itemsize == 2:
                    values = [_halves(*pair, part) for pair in zip(words[::2], words[1::2], strict=True)]
                token = first * self.staging.tokens_per_word + part
                here = arith.andi(exists, to.has_token(arith.addi(self.token(row), i32_constant(token))))
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
                here = arith.andi(
                    columns[half][1], to.has_token(arith.addi(self.token(self.warp), i32_constant(token)))
                )
                value = _part(word, part) if to.itemsize == 2 else word
                _store(pointers[half], token * to.shape[1] * to.itemsize, [value], here)
