"""What both Triton kernels of the mixed matmul use: the problem, its operands, the store of a finished tile."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.packing import PackedWeight

Refs = dict[str, Any]
"""Operands by name, each flattened to one axis: the kernels compute their own offsets."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of one call.

    Attributes:
        tokens: M.
        in_features: K.
        group_size: Input channels that share a scale.
        n4: Output channels with 4 bits.
        n8: Output channels with 8 bits.
    """

    tokens: int
    in_features: int
    group_size: int
    n4: int
    n8: int

    @property
    def out_features(self) -> int:
        """Output channels of both bit widths."""
        return self.n4 + self.n8

    @property
    def num_groups(self) -> int:
        """Groups along the input channels."""
        return self.in_features // self.group_size

    def channels(self, bits: int) -> int:
        """Output channels of this bit width."""
        return self.n4 if bits == 4 else self.n8


def problem_of(activations: QuantizedActivations, weight: PackedWeight) -> Problem:
    """The sizes of a call."""
    return Problem(activations.tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)


def operands(activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None) -> dict[str, jax.Array]:
    """Flattened operands; those of a bit width that no channel has are left out."""
    arrays = {"codes": activations.codes, "activation_scales": activations.scales, "order": weight.channel_order}
    if weight.n4:
        arrays |= {"codes4": weight.codes4, "scales4": weight.scales4, "zero_points4": weight.zero_points4}
    if weight.n8:
        arrays |= {"codes8": weight.codes8, "scales8": weight.scales8}
    if bias is not None:
        arrays["bias"] = bias
    return {name: array.reshape(-1) for name, array in arrays.items()}


def iota(size: int, axis: int, ndim: int) -> jax.Array:
    """0..size-1 along one of `ndim` axes, the others of size 1."""
    shape = [1] * ndim
    shape[axis] = size
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def clamp(index: jax.Array, size: int, block: int) -> jax.Array:
    """Indices of a block, those past the end replaced by the last one; what is computed from them is not stored.

    Cheaper than masks; left out where blocks divide the size, since it hides from Triton that neighbours are adjacent.
    """
    return index if size % block == 0 else jnp.minimum(index, size - 1)


class Destination(NamedTuple):
    """Where the rows of a tile go, each `[rows, 1]`; loaded before the main loop, since it takes a while to arrive."""

    channel: jax.Array
    exists: jax.Array
    bias: jax.Array | None


def load_destination(refs: Refs, problem: Problem, bits: int, row0: jax.Array, rows: int) -> Destination:
    """The output channels of a tile's rows, and their biases."""
    row = row0 + iota(rows, 0, 2)
    exists = row < problem.channels(bits)
    first = 0 if bits == 4 else problem.n4
    # Rows past the end point past the output: interpret mode writes masked elements back, which must not hit real ones.
    beyond = problem.tokens * problem.out_features
    channel = plgpu.load(refs["order"].at[first + row], mask=exists, other=beyond)
    bias = plgpu.load(refs["bias"].at[channel], mask=exists, other=0) if "bias" in refs else None
    return Destination(channel, exists, bias)


def store_tile(out_ref: Any, tile: jax.Array, destination: Destination, problem: Problem, token0: jax.Array) -> None:
    """Add the bias to a finished float32 tile `[rows, tokens]` and put its columns in their places in the output."""
    token = token0 + iota(tile.shape[1], 1, 2)
    if destination.bias is not None:
        tile = tile + destination.bias.astype(jnp.float32)
    plgpu.store(
        out_ref.at[token * problem.out_features + destination.channel],
        tile.astype(out_ref.dtype),
        mask=destination.exists & (token < problem.tokens),
    )
