"""The way out of a finished tile through the warpgroup that computed it.

A warp picks up runs of channels of one token from shared memory (see staging.py): 16 bytes a lane where the 64 columns
follow each other, else one element a lane, 32 neighbouring channels at a time.
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

from pallas_kernels.mixed_matmul.mosaic_gpu.columns import bias_of_channels, fetched_pair
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, WARPS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Columns, Destination
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, element, i32_constant, less
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Piece, Staging, words_of, write_piece


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
    warp = arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(WARPS_PER_WARPGROUP - 1))
    warpgroup = arith.shrui(thread, i32_constant(7))
    base = at(utils.memref_ptr(shared), arith.muli(warpgroup, i32_constant(staging.words)), lane.type)
    pair, first = fetched_pair(columns), arith.addi(to.first_row, lane)
    of_lane = [(column, less(arith.addi(first, i32_constant(32 * half)), to.rows)) for half, column in enumerate(pair)]
    seen = Columns.seen_by(lane, of_lane, to, 16 // to.itemsize)
    words = words_of(total, to.dtype, None if bias is None else bias_of_channels(pair, bias))
    for piece in range(staging.pieces):
        utils.warpgroup_barrier()  # the piece before has been read
        rows = write_piece(words, staging, piece, base)
        utils.warpgroup_barrier()
        _Piece(base, staging, rows, piece * staging.rows * staging.tokens_per_word, warp, lane).store(to, seen)


@dataclasses.dataclass(frozen=True)
class _Piece(Piece):
    """As a thread of a warpgroup sees it."""

    def store_run(self, to: Destination, first_column: ir.Value) -> None:
        """Store 64 neighbouring columns, 16 bytes a lane."""
        elements = 16 // to.itemsize  # channels of a lane
        lanes_per_row = CHANNELS_PER_WARPGROUP // elements
        rows_per_warp = 32 // lanes_per_row
        row = arith.addi(
            arith.muli(self.warp, i32_constant(rows_per_warp)), arith.divui(self.lane, i32_constant(lanes_per_row))
        )
        channel = arith.muli(arith.remui(self.lane, i32_constant(lanes_per_row)), i32_constant(elements))
        pointer = to.pointer(self.token(row), arith.addi(first_column, channel))
        first_word = self.place(row, channel)
        for first in range(0, self.rows, rows_per_warp * WARPS_PER_WARPGROUP):
            exists = less(row, self.rows - first)
            words: list[ir.Value] = []
            for index in range(0, elements, 4):
                place = utils.getelementptr(first_word, [first * self.staging.pitch + index], self.lane.type)
                four = llvm.load(ir.VectorType.get((4,), self.lane.type), place, alignment=16)
                words += [element(four, position) for position in range(4)]
            for number in range(self.staging.tokens_per_word):
                values = self.values_of_token(words, number)
                token = first * self.staging.tokens_per_word + number
                here = arith.andi(exists, to.has_token(arith.addi(self.token(row), i32_constant(token))))
                to.store(pointer, token, values, here)

    def store_elements(self, to: Destination, columns: list[tuple[ir.Value, ir.Value]]) -> None:
        """Store columns wherever they are, each lane two of them for every fourth row."""
        pointers = [to.pointer(self.token(self.warp), column) for column, _ in columns]
        first_word = self.place(self.warp, self.lane)
        for row, half in itertools.product(range(0, self.rows, WARPS_PER_WARPGROUP), range(2)):
            place = utils.getelementptr(first_word, [row * self.staging.pitch + 32 * half], self.lane.type)
            word = llvm.load(self.lane.type, place)
            for number in range(self.staging.tokens_per_word):
                token = row * self.staging.tokens_per_word + number
                exists = to.has_token(arith.addi(self.token(self.warp), i32_constant(token)))
                here = arith.andi(columns[half][1], exists)
                to.store(pointers[half], token, [self.value_of_token(word, number)], here)
