"""The way out of a finished tile through warps of their own, beside the next tile.

The computing warpgroups write it to shared memory (see staging.py), and the three warps that do neither compute nor
load bring it to the output: two neighbouring columns a lane where the 64 of a warpgroup follow each other, else one, 32
neighbouring channels at a time. They have 24 registers a thread, hence the loops.
"""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Columns, Destination
from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, element, global_pointer, i32_constant, less
from pallas_kernels.mixed_matmul.mosaic_gpu.staging import Piece, Staging, words_of, write_piece

STORING_WARPS = 3
"""Of the loading warpgroup, those that do not load."""

ROWS_IN_TURN = 2
"""Of a warp, in one iteration."""


def stage_piece(
    total: fa.FragmentedArray, piece: int, shared: ir.Value, dtype: ir.Type, bias: list[ir.Value] | None
) -> None:
    """Write a piece of a finished part `[64 channels, tokens]` to shared memory, in the type of the output.

    Args:
        total: The part, in float32.
        piece: Which one.
        shared: int32 `[Staging.words]`.
        dtype: Of the output.
        bias: Of the thread's two channels of the fragment, or None.
    """
    staging = Staging(total.shape[1], utils.bytewidth(dtype))
    write_piece(words_of(total, dtype, bias), staging, piece, utils.memref_ptr(shared))


def store_piece(to: Destination, order: ir.Value, order_start: int, piece: int, shared: ir.Value) -> None:
    """Store a piece that `stage_piece` wrote; called by all warps of a warpgroup but the first.

    Args:
        to: Where the part goes.
        order: int32 `[out_features]`, the output channel of each packed row.
        order_start: Where the rows of this bit width start in `order`.
        piece: Which one of the part.
        shared: int32 `[Staging.words]`.
    """
    staging = Staging(to.tokens, to.itemsize)
    # Read anew for each piece: what the compiler can tell beforehand it keeps, in more registers than there are.
    thread = utils.inline_ptx(
        "mov.u32 $0, %tid.x;", result_types=ir.IntegerType.get_signless(32), has_side_effects=True
    )
    lane = arith.andi(thread, i32_constant(31))
    warp = arith.subi(arith.andi(arith.shrui(thread, i32_constant(5)), i32_constant(3)), i32_constant(1))
    of_lane = []
    for half in range(2):
        row = arith.addi(to.first_row, arith.addi(lane, i32_constant(32 * half)))
        place = arith.addi(arith.minsi(row, i32_constant(to.rows - 1)), i32_constant(order_start))
        column = llvm.load(lane.type, at(global_pointer(order), place, lane.type))
        of_lane.append((column, less(row, to.rows)))
    columns = Columns.seen_by(lane, of_lane, to, 2)
    first_row = piece * staging.rows
    rows = min(staging.rows, staging.all_rows - first_row)
    first_token = first_row * staging.tokens_per_word
    _Piece(utils.memref_ptr(shared), staging, rows, first_token, warp, lane).store(to, columns)


@dataclasses.dataclass(frozen=True)
class _Piece(Piece):
    """As a thread of a storing warp sees it."""

    def store_run(self, to: Destination, first_column: ir.Value) -> None:
        """Store 64 neighbouring columns, two a lane."""
        column = arith.addi(first_column, arith.muli(self.lane, i32_constant(2)))

        def store_row(row: ir.Value, row_to_read: ir.Value, exists: ir.Value) -> None:
            place = self.place(row_to_read, arith.muli(self.lane, i32_constant(2)))
            pair = llvm.load(ir.VectorType.get((2,), row.type), place, alignment=8)
            words = [element(pair, 0), element(pair, 1)]
            pointer = to.pointer(self.token(row), column)
            for number in range(self.staging.tokens_per_word):
                here = arith.andi(exists, to.has_token(arith.addi(self.token(row), i32_constant(number))))
                to.store(pointer, number, self.values_of_token(words, number), here)

        self.for_each_row(store_row)

    def store_elements(self, to: Destination, columns: list[tuple[ir.Value, ir.Value]]) -> None:
        """Store columns wherever they are, each lane two of them."""

        def store_row(row: ir.Value, row_to_read: ir.Value, exists: ir.Value) -> None:
            for half, (column, valid) in enumerate(columns):
                word = llvm.load(row.type, self.place(row_to_read, arith.addi(self.lane, i32_constant(32 * half))))
                pointer = to.pointer(self.token(row), column)
                for number in range(self.staging.tokens_per_word):
                    here = to.has_token(arith.addi(self.token(row), i32_constant(number)))
                    value = self.value_of_token(word, number)
                    to.store(pointer, number, [value], arith.andi(arith.andi(here, exists), valid))

        self.for_each_row(store_row)

    def for_each_row(self, visit: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
        """Visit the rows of this warp: a row, the same or the last one there is, and whether it is there."""
        step = ROWS_IN_TURN * STORING_WARPS
        loop = scf.ForOp(i32_constant(0), i32_constant(self.rows), i32_constant(step), [])
        with ir.InsertionPoint(loop.body):
            for number in range(ROWS_IN_TURN):
                row = arith.addi(self.warp, arith.addi(loop.induction_variable, i32_constant(number * STORING_WARPS)))
                visit(row, arith.minsi(row, i32_constant(self.rows - 1)), less(row, self.rows))
            scf.YieldOp([])
