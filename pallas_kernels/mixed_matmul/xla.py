"""XLA reference of the mixed-precision matmul: the integer arithmetic of the format, exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.packing import PackedWeight, unpack_nibbles

MAX_GROUP_SIZE = 512
"""Largest group whose int8 x int8 dot stays below 2**24, so that a float32 dot of integers is exact."""


def mixed_matmul(
    activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None, *, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Sum over groups of (int32 dot of the group) * activation scale * weight scale, in float32.

    The dot of one group runs in float32: its partial sums are integers below 2**24, so every one is exact in whatever
    order they are added. The scan keeps one unpacked group of the weight in memory at a time.
    """
    tokens, group_size = activations.tokens, weight.group_size
    codes = activations.in_layout("signed").codes
    group_codes = codes.reshape(tokens, weight.num_groups, group_size).transpose(1, 0, 2)

    def add_group(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        codes, scales, codes4, scales4, zero_points4, codes8, scales8 = group
        weight4 = unpack_nibbles(codes4).astype(jnp.float32) - zero_points4.astype(jnp.float32)[:, None]
        rows = jnp.concatenate([weight4, codes8.astype(jnp.float32)], axis=0)
        row_scales = jnp.concatenate([scales4, scales8]).astype(jnp.float32)
        dots = jax.lax.dot_general(
            codes.astype(jnp.float32),
            rows,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return total + dots * (scales[:, None] * row_scales[None, :]), None

    total, _ = jax.lax.scan(
        add_group,
        jnp.zeros((tokens, weight.out_features), jnp.float32),
        (
            group_codes,
            activations.scales,
            weight.codes4,
            weight.scales4,
            weight.zero_points4,
            weight.codes8,
            weight.scales8,
        ),
    )
    # Packed rows back to their output channels: a gather with the inverse permutation.
    channels = jnp.arange(weight.out_features, dtype=jnp.int32)
    packed_row = jnp.zeros_like(channels).at[weight.channel_order].set(channels, unique_indices=True)
    out = jnp.take(total, packed_row, axis=1)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(out_dtype)


def refuses(
    activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None, **settings: object
) -> str | None:
    """Why the float32 dots would not be exact, or None."""
    if weight.group_size > MAX_GROUP_SIZE:
        return f"the float32 dots of the reference are exact up to groups of {MAX_GROUP_SIZE}, not {weight.group_size}"
    return None
