"""Output path of the Hopper kernel: from the registers of a warpgroup to rows of the output.

A warpgroup ends a tile with 64 channels x some tokens in the fragment of `wgmma` (see mosaic_gpu/registers.py).
A store instruction straight from there touches 4 tokens x 8 channels of a warp: pieces of sectors, each of which goes
to the L2 cache on its own. So the tile passes through shared memory, where a warp picks up runs of channels of one
token: 16 bytes a lane where the 64 columns follow each other, else one element a lane, 32 neighbouring channels at a
time.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses
import itertools

from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.registers import element, i32_constant, lane_position
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import (
    Destination,
    Piece,
    Staging,
    at,
    from_lane,
    global_pointer,
    halves,
    is_run,
    less,
    part_of,
    store,
    words_of,
    write_piece,
)

WARPS = 4
"""Of a warpgroup."""


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
    source = global_pointer(order)
    place = at(utils.memref_ptr(columns), arith.muli(thread, i32_constant(2)), i32)
    place = llvm.ptrtoint(i32, place)
    for half in range(2):
        row = arith.addi(first_row, arith.addi(arith.andi(thread, i32_constant(31)), i32_constant(32 * half)))
        row = arith.addi(arith.minsi(row, i32_constant(rows - 1)), i32_constant(order_start))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [place, at(source, row, i32)],
            f"cp.async.ca.shared.global [$0+{4 * half}], [$1], 4;",
            "r,l",
            has_side_effects=True,
        )


def fetched_pair(columns: ir.Value) -> list[ir.Value]:
    """Output channels of channels `lane` and `lane + 32` of a warpgroup's, which `fetch_columns` brought."""
    i32 = ir.IntegerType.get_signless(32)
    utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)
    place = at(utils.memref_ptr(columns), arith.muli(utils.thread_idx(), i32_constant(2)), i32)
    pair = llvm.load(ir.VectorType.get((2,), i32), place, alignment=8)
    return [element(pair, half) for half in range(2)]


def bias_of_channels(columns: list[ir.Value], bias: ir.Value) -> list[ir.Value]:
    """Bias of the thread's two channels of a fragment, from what `fetched_pair` gives."""
    f32 = ir.F32Type.get()
    channel, _ = lane_position()
    # The fragment's channels, 8 apart, are both among the first or both among the last 32.
    of_half = arith.select(less(channel, 32), columns[0], columns[1])
    places = [from_lane(of_half, arith.addi(channel, i32_constant(8 * half))) for half in range(2)]
    return [llvm.load(f32, at(utils.memref_ptr(bias), place, f32)) for place in places]


def store_tile(
    total: fa.FragmentedArray, to: Destination, columns: ir.Value, bias: ir.Value | None, shared: ir.Value
) -> None:
    """Store a finished part `[64 channels, tokens]` through shared memory.

    Args:
        total: The part, in float32.
        to: Where it goes.
        columns: int32 in shared memory, where `fetch_columns` put what it fetched.
        bias: float32 `[out_features]`, or None.
        shared: int32 `[warpgroups * Staging.words]`.
    """
    staging = Staging(total.shape[1], to.itemsize)
    thread = utils.thread_idx()
    lane = arith.andi(thread, i32_constant(31))
    warp = arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(WARPS - 1))
    warpgroup = arith.shrui(thread, i32_constant(7))
    base = at(utils.memref_ptr(shared), arith.muli(warpgroup, i32_constant(staging.words)), lane.type)
    pair, first = fetched_pair(columns), arith.addi(to.first_row, lane)
    columns_of_lane = [
        (column, less(arith.addi(first, i32_constant(32 * half)), to.rows)) for half, column in enumerate(pair)
    ]
    first_column = from_lane(pair[0], i32_constant(0))
    whole = is_run(columns_of_lane, first_column, lane, to, 16 // to.itemsize)
    words = words_of(total, to.dtype, None if bias is None else bias_of_channels(pair, bias))
    for piece in range(staging.pieces):
        utils.warpgroup_barrier()  # the piece before has been read
        rows = write_piece(words, staging, piece, base)
        utils.warpgroup_barrier()
        staged = _Piece(base, staging, rows, piece * staging.rows * staging.tokens_per_word, warp, lane)
        if whole is None:
            staged.store_elements(to, columns_of_lane)
            continue
        with utils.when(whole):
            staged.store_vectors(to, first_column)
        with utils.when(arith.xori(whole, arith.constant(whole.type, 1))):
            staged.store_elements(to, columns_of_lane)


@dataclasses.dataclass(frozen=True)
class _Piece(Piece):
    """As a thread of a warpgroup sees it."""

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
            exists = less(row, self.rows - first)
            words: list[ir.Value] = []
            for index in range(0, elements, 4):
                place = utils.getelementptr(first_word, [first * self.staging.pitch + index], i32)
                four = llvm.load(ir.VectorType.get((4,), i32), place, alignment=16)
                words += [element(four, position) for position in range(4)]
            for part in range(self.staging.tokens_per_word):
                values = words
                if to.itemsize == 2:
                    values = [halves(*pair, part) for pair in zip(words[::2], words[1::2], strict=True)]
                token = first * self.staging.tokens_per_word + part
                here = arith.andi(exists, to.has_token(arith.addi(self.token(row), i32_constant(token))))
                store(pointer, token * to.shape[1] * to.itemsize, values, here)

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
                value = part_of(word, part) if to.itemsize == 2 else word
                store(pointers[half], token * to.shape[1] * to.itemsize, [value], here)
