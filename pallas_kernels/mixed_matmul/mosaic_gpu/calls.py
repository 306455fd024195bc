"""The arithmetic of a group on signed operands, as calls from Pallas.

Pallas' tracing and MLIR meet in `plgpu.inline_mgpu`: the body of a call gets references as memrefs, values in the given
layouts as `FragmentedArray`s, and emits code where the call stands.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixed_matmul.mosaic_gpu import arithmetic, fragments
from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import ACCUMULATOR, SCALAR, Index, Ref, swizzled


@dataclasses.dataclass(frozen=True)
class DotTypes:
    """What a warpgroup's dots of one size take and give, as types of calls from Pallas.

    Attributes:
        group_size: Input channels of a dot.
        tokens: Tokens of a dot.
    """

    group_size: int
    tokens: int

    @property
    def total_type(self) -> Any:
        """What a part's totals are."""
        return plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, self.tokens), jnp.float32, ACCUMULATOR)

    @property
    def accumulator_type(self) -> Any:
        """What a dot gives."""
        return dataclasses.replace(self.total_type, dtype=jnp.int32)

    @property
    def codes_type(self) -> Any:
        """The left operand of a dot."""
        return plgpu.ShapeDtypeStruct((CHANNELS_PER_WARPGROUP, self.group_size), jnp.int8, plgpu.Layout.WGMMA_8BIT)

    def zero_total(self) -> Any:
        """Totals of nothing."""
        return plgpu.inline_mgpu(return_type=self.total_type)(lambda ctx: fragments.zero_total(self.tokens))()


@dataclasses.dataclass(frozen=True)
class GroupArithmetic(DotTypes):
    """The steps of arithmetic.py; a call of each emits it.

    Attributes:
        even_tokens: The number of tokens of the whole problem is even, so that pairs of scales are aligned.
    """

    even_tokens: bool

    def magic_accumulator(self) -> Any:
        """What a dot starts from."""
        emit = plgpu.inline_mgpu(return_type=self.accumulator_type)
        return emit(lambda ctx: arithmetic.magic_accumulator(self.tokens))()

    def load_codes8(self, codes: Ref) -> Any:
        """8-bit codes of a stage, ready for the dot."""
        ref_type = plgpu.RefType(swizzled(self.group_size))
        emit = plgpu.inline_mgpu(arg_types=(ref_type,), return_type=self.codes_type)
        return emit(lambda ctx, ref: fragments.load_codes(ref, self.group_size, is_signed=True))(codes)

    def load_codes4(self, codes: Ref, zero_points: Ref, first: Index) -> Any:
        """4-bit codes of a stage less their zero points, those at `first` on, ready for the dot."""
        row_bytes = self.group_size // 2
        ref_types = (plgpu.RefType(swizzled(row_bytes)), plgpu.RefType(), SCALAR)

        @plgpu.inline_mgpu(arg_types=ref_types, return_type=self.codes_type)
        def emit(ctx: Any, codes: Any, zero_points: Any, first: Any) -> Any:
            packed = fragments.load_codes(codes, row_bytes, is_signed=False)
            return arithmetic.unpack_codes4(packed, arithmetic.load_zero_points(zero_points, first.registers.item()))

        return emit(codes, zero_points, first)

    def start_dot(self, accumulator: Any, codes: Any, activations: Ref) -> Any:
        """Start the dot of a group."""
        arg_types = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, plgpu.RefType(swizzled(self.group_size)))

        @plgpu.inline_mgpu(arg_types=arg_types, return_type=self.accumulator_type)
        def emit(ctx: Any, accumulator: Any, codes: Any, activations: Any) -> Any:
            return arithmetic.issue_dot(accumulator, codes, activations, self.group_size)

        return emit(accumulator, codes, activations)

    def finish_dot(
        self,
        in_flight: int,
        accumulator: Any,
        codes: Any,
        total: Any,
        channel_scales: Ref,
        first_channel: Index,
        token_scales: Ref,
        first_token: Index,
    ) -> Any:
        """Wait for a dot, `in_flight` others having started since, and add it, scaled, to the total."""
        layouts = (ACCUMULATOR, plgpu.Layout.WGMMA_8BIT, ACCUMULATOR)

        @plgpu.inline_mgpu(
            arg_types=(*layouts, plgpu.RefType(), SCALAR, plgpu.RefType(), SCALAR), return_type=self.total_type
        )
        def emit(ctx: Any, accumulator: Any, codes: Any, total: Any, *scales: Any) -> Any:
            channel_ref, first_channel, token_ref, first_token = scales
            of_channels = arithmetic.load_channel_scales(channel_ref, first_channel.registers.item())
            of_tokens = arithmetic.load_token_scales(
                token_ref, first_token.registers.item(), self.tokens, pairs=self.even_tokens
            )
            accumulator = arithmetic.wait_dot(accumulator, codes, in_flight)
            return arithmetic.add_scaled(total, accumulator, of_channels, of_tokens)

        return emit(accumulator, codes, total, channel_scales, first_channel, token_scales, first_token)
