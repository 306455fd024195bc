"""Activations quantised to int8 with one scale for each token and group of input channels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

SMALLEST_SCALE = 2.0**-126
"""The least normal float32. A smaller scale counts as 0, since its inverse overflows and GPUs flush it anyway."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedActivations:
    """x[m, k] ~ codes[m, k] * scales[k // group_size, m].

    Attributes:
        codes: int8 `[tokens, in_features]`, -127..127.
        scales: float32 `[num_groups, tokens]`, absmax / 127 of the token's group; 0 (as are the
            codes) for an all-zero group. Group-major,
            as the weights' scales are, since kernels walk along the groups.
        group_size: Input channels that share a scale.
        counters: None, or int32 zeros, which quantising kernels write along the way: a matmul that splits K counts its
            finished programs in them, and would otherwise need a launch of its own to clear some.
    """

    codes: Any
    scales: Any
    group_size: int = dataclasses.field(metadata={"static": True})
    counters: Any = None

    @property
    def tokens(self) -> int:
        """Rows (M)."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Input channels (K)."""
        return int(self.codes.shape[1])


def validate(activations: QuantizedActivations) -> None:
    """Check shapes and dtypes.

    Raises:
        ValueError: Naming the field, what was expected and what was found.
    """
    codes, scales = activations.codes, activations.scales
    if len(codes.shape) != 2 or codes.dtype != np.int8 or codes.shape[1] % activations.group_size:
        raise ValueError(
            "QuantizedActivations.codes must be int8 [tokens, in_features] with in_features a multiple of the group "
            f"size {activations.group_size}, found {codes.dtype} {list(codes.shape)}"
        )
    expected = (codes.shape[1] // activations.group_size, codes.shape[0])
    if tuple(scales.shape) != expected or scales.dtype != np.float32:
        raise ValueError(
            f"QuantizedActivations.scales must be float32 {list(expected)}, found {scales.dtype} {list(scales.shape)}"
        )


def validate_input(name: str, x: Any, group_size: int) -> None:
    """Check a float `[tokens, features]` array that is to be quantised in groups.

    Raises:
        ValueError: Not two axes, not a float, or `features` not a multiple of `group_size`.
    """
    if len(x.shape) != 2 or not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        raise ValueError(f"{name} must be a float [tokens, features] array, found {x.dtype} {list(x.shape)}")
    if group_size < 2 or x.shape[1] % group_size:
        raise ValueError(f"{name} has {x.shape[1]} features, which is not a multiple of the group size {group_size}")
