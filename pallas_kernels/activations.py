"""Activations quantised to int8 with one scale for each token and group of input channels."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

from pallas_kernels import unsigned_operands

Layout = Literal["signed", "unsigned"]
"""How codes and scales lie in memory: int8 and one after another, or as `unsigned_operands` says, which a kernel for
Hopper wants."""

SMALLEST_SCALE = 2.0**-126
"""The least normal float32. A smaller scale counts as 0, since its inverse overflows and GPUs flush it anyway."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedActivations:
    """x[m, k] ~ codes[m, k] * scales[k // group_size, m], in the signed layout.

    Attributes:
        codes: int8 `[tokens, in_features]`, -127..127; in the unsigned layout the same codes as the uint8
            `[tokens, in_features + 128 * ceil(num_groups / 32)]` of `unsigned_operands`.
        scales: float32 `[num_groups, tokens]`, absmax / 127 of the token's group; 0 (as are the codes) for an all-zero
            group. Group-major, as the weights' scales are, since kernels walk along the groups. In the unsigned layout
            `[num_groups, tokens rounded up to a multiple of 16]`, token m at `unsigned_operands.scale_place(m)`.
        group_size: Input channels that share a scale.
        counters: None, or int32 zeros, which quantising kernels write along the way: a matmul that splits K counts its
            finished programs in them, and would otherwise need a launch of its own to clear some.
        layout: Of codes and scales.
    """

    codes: Any
    scales: Any
    group_size: int = dataclasses.field(metadata={"static": True})
    counters: Any = None
    layout: Layout = dataclasses.field(default="signed", metadata={"static": True})

    @property
    def tokens(self) -> int:
        """Rows (M)."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Input channels (K)."""
        return int(self.scales.shape[0]) * self.group_size

    def in_layout(self, layout: Layout) -> QuantizedActivations:
        """The same values in another layout: a pass over them, which quantising into that layout saves.

        Raises:
            ValueError: An unsigned layout of groups that it is not for.
        """
        if layout == self.layout:
            return self
        validate_layout(layout, self.group_size)
        if layout == "unsigned":
            codes = unsigned_operands.unsigned_codes(self.codes, self.scales)
            scales = unsigned_operands.placed_scales(self.scales)
        else:
            codes = unsigned_operands.signed_codes(self.codes, self.in_features)
            scales = unsigned_operands.scales_of_tokens(self.scales, self.tokens)
        return dataclasses.replace(self, codes=codes, scales=scales, layout=layout)


def validate(activations: QuantizedActivations) -> None:
    """Check shapes and dtypes.

    Raises:
        ValueError: Naming the field, what was expected and what was found.
    """
    codes, scales, group_size = activations.codes, activations.scales, activations.group_size
    validate_layout(activations.layout, group_size)
    if activations.layout == "unsigned":
        width = unsigned_operands.operand_width(activations.in_features) if len(scales.shape) == 2 else None
        if len(codes.shape) != 2 or codes.dtype != np.uint8 or codes.shape[1] != width:
            raise ValueError(
                f"QuantizedActivations.codes in the unsigned layout must be uint8 [tokens, {width}] for scales "
                f"{list(scales.shape)}, found {codes.dtype} {list(codes.shape)}"
            )
        expected = scales.shape[0], unsigned_operands.scale_width(codes.shape[0])
    else:
        if len(codes.shape) != 2 or codes.dtype != np.int8 or codes.shape[1] % group_size:
            raise ValueError(
                "QuantizedActivations.codes must be int8 [tokens, in_features] with in_features a multiple of the "
                f"group size {group_size}, found {codes.dtype} {list(codes.shape)}"
            )
        expected = codes.shape[1] // group_size, codes.shape[0]
    if tuple(scales.shape) != expected or scales.dtype != np.float32:
        raise ValueError(
            f"QuantizedActivations.scales in the {activations.layout} layout must be float32 {list(expected)} for "
            f"{codes.shape[0]} tokens, found {scales.dtype} {list(scales.shape)}"
        )


def validate_layout(layout: Layout, group_size: int) -> None:
    """Check that there is such a layout, for groups of this size.

    Raises:
        ValueError: Unknown, or unsigned with groups other than those of 128.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, found {layout!r}")
    if layout == "unsigned" and group_size != unsigned_operands.GROUP_SIZE:
        raise ValueError(f"the unsigned layout is for groups of {unsigned_operands.GROUP_SIZE}, not {group_size}")


def validate_input(name: str, x: Any, group_size: int) -> None:
    """Check a float `[tokens, features]` array that is to be quantised in groups.

    Raises:
        ValueError: Not two axes, not a float, or `features` not a multiple of `group_size`.
    """
    if len(x.shape) != 2 or not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        raise ValueError(f"{name} must be a float [tokens, features] array, found {x.dtype} {list(x.shape)}")
    if group_size < 2 or x.shape[1] % group_size:
        raise ValueError(f"{name} has {x.shape[1]} features, which is not a multiple of the group size {group_size}")
