"""Where a finished part of a tile goes: rows of the output, at the columns of its channels."""

# mypy: disable-error-code="arg-type,call-arg,attr-defined"
# The stubs of MLIR's Python bindings know only the raw builders, not the conveniences around them.
from __future__ import annotations

import dataclasses

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import at, equal, from_lane, global_pointer, i32_constant, less


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

    def store(self, pointer: ir.Value, token: int, values: list[ir.Value], predicate: ir.Value) -> None:
        """Store words, or one value of 16 bits, `token` rows behind an element of the output, if `predicate`."""
        bits = ir.IntegerType(values[0].type).width
        offset = token * self.shape[1] * self.itemsize
        names = ", ".join(f"${1 + index}" for index in range(len(values)))
        operands, width = (f"{{{names}}}", f"v{len(values)}.b{bits}") if len(values) > 1 else (names, f"b{bits}")
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [pointer, *values, predicate],
            f"@${1 + len(values)} st.global.{width} [$0+{offset}], {operands};",
            ",".join(["l", *[{16: "h", 32: "r"}[bits]] * len(values), "b"]),
            has_side_effects=True,
        )


@dataclasses.dataclass(frozen=True)
class Columns:
    """Output columns of the 64 channels of a warpgroup, as one lane of a warp that stores them sees them.

    Attributes:
        of_lane: Of channels `lane` and `lane + 32`, each with whether the channel exists.
        first: Of channel 0.
        are_run: Whether all 64 exist and follow each other, from a column on where a lane's first vector may start.
            None for never: other rows of the output would start elsewhere.
    """

    of_lane: list[tuple[ir.Value, ir.Value]]
    first: ir.Value
    are_run: ir.Value | None

    @staticmethod
    def seen_by(lane: ir.Value, of_lane: list[tuple[ir.Value, ir.Value]], to: Destination, elements: int) -> Columns:
        """The columns of a lane, where runs are stored in vectors of `elements`; called by whole warps."""
        first = from_lane(of_lane[0][0], i32_constant(0))
        if to.shape[1] % elements:
            return Columns(of_lane, first, None)
        is_run = equal(arith.andi(first, i32_constant(elements - 1)), i32_constant(0))
        for half, (column, exists) in enumerate(of_lane):
            in_place = equal(column, arith.addi(first, arith.addi(lane, i32_constant(32 * half))))
            is_run = arith.andi(is_run, arith.andi(exists, in_place))
        return Columns(of_lane, first, nvvm.vote_sync(i32_constant(-1), is_run, "all"))
