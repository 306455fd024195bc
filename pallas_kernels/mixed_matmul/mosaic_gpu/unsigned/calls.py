"""The arithmetic of a group on unsigned operands, as calls from Pallas; see calls.py of the package above."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu import arithmetic as signed
from pallas_kernels.mixed_matmul.mosaic_gpu import fragments
from pallas_kernels.mixed_matmul.mosaic_gpu.calls import DotTypes
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref, swizzled
from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import arithmetic

SUMS_BYTES = 128
"""Of a token: two bfloat16 terms of its activation sums in 32 groups."""


@dataclasses.dataclass(frozen=True)
class UnsignedArithmetic(DotTypes):
    """The steps of unsigned/arithmetic.py; a call of each emits it.

    Attributes:
        is8: 8-bit channels, not 4-bit ones.
    """

    is8: bool

    def load_codes(self, codes: Ref) -> Any:
        """Codes of a stage, ready for the dot."""
        row_bytes = self.group_size if self.is8 else self.group_size // 2

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(row_bytes)),), return_type=self.codes_type)
        def emit(ctx: Any, codes: Any) -> Any:
            if self.is8:
                return arithmetic.offset_codes8(fragments.load_codes(codes, row_bytes, is_signed=True))
            return arithmetic.unpack_codes4(fragments.load_codes(codes, row_bytes, is_signed=False))

        return emit(codes)

    def start(self, codes: Any, activations: Ref) -> Any:
        """Start the dot of a group."""
        arg_types = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzled(self.group_size)))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.accumulator_type)
        def emit(ctx: Any, codes: Any, activations: Any) -> Any:
            return arithmetic.issue_dot(codes, activations, self.tokens)

        return emit(codes, activations)

    def finish(self, dot: Any, codes: Any, total: Any, scales: list[Ref], first_channel: Index) -> Any:
        """Wait for a dot and add it; `scales` are those of the channels, the sums of their codes, and the tokens'."""
        arg_types = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, ACCUMULATOR, *[plgpu.RefType()] * 3, SCALAR)

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.total_type)
        def emit(ctx: Any, dot: Any, codes: Any, total: Any, *rest: Any) -> Any:
            channel_scales, code_sums, token_scales, first_channel = rest
            of_channels = arithmetic.load_channel_scales(channel_scales, code_sums, first_channel.registers.item())
            dot = signed.wait_dot(dot, codes, in_flight=0)
            return arithmetic.add_scaled(total, dot, of_channels, token_scales)

        return emit(dot, codes, total, *scales, first_channel)

    def subtract_zero_points(self, total: Any, activation_sums: Ref, channels: list[Ref], first: Index) -> Any:
        """Take the zero points of 32 groups off.

        `channels` are scales, and zero points where they differ; the warpgroup's start at channel `first`.
        """
        types = (ACCUMULATOR, plgpu.RefType(swizzled(SUMS_BYTES)), SCALAR)

        @plgpu.inline_mgpu(arg_types=(*types, *[plgpu.RefType()] * len(channels)), return_type=self.total_type)
        def emit(ctx: Any, total: Any, sums: Any, first: Any, *channels: Any) -> Any:
            return arithmetic.subtract_zero_points(total, sums, first.registers.item(), *channels)

        return emit(total, activation_sums, first, *channels)

    def unscaled(self, total: Any) -> Any:
        """The finished totals."""
        emit = plgpu.inline_mgpu(arg_types=(ACCUMULATOR,), return_type=self.total_type)
        return emit(lambda ctx, total: arithmetic.unscaled(total))(total)
