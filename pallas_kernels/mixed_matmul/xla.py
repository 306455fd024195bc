"""XLA reference of the mixed-precision matmul: the integer arithmetic of the format, exactly."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.packing import PackedWeight, unpack_nibbles

MAX_GROUP_SIZE = 512
"""Largest group whose int8 x int8 dot stays below 2**24, so that a float32 dot of integers is exact."""

FEW_TOKENS = 4
"""Up to here a CPU multiplies the integers of an 8-bit weight: reading the weight takes the time, and float32 makes it
four times as large."""

STRIP = 16
"""Products that are added lane by lane before a sum: the int32 lanes of the widest registers."""

UNROLLED_GROUPS = 32
"""Groups that a step of the integer path's loop adds up: one loop over all of 896 groups takes XLA 20 to 40 s to
compile, blocks of this many 2 s, and they run as fast."""


def mixed_matmul(
    activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None, *, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Sum over groups of (int32 dot of the group) * activation scale * weight scale, in float32.

    The groups are added one after another, so that the result of a token does not depend on the others.

    Args:
        activations: Of `[tokens, in_features]`, in either layout.
        weight: `[out_features, in_features]`.
        bias: Float `[out_features]`, or None.
        out_dtype: Of the result.

    Returns:
        `[tokens, out_features]`.
    """
    tokens, group_size = activations.tokens, weight.group_size
    activations = activations.in_layout("signed")
    group_codes = activations.codes.reshape(tokens, weight.num_groups, group_size).transpose(1, 0, 2)
    arguments = group_codes, activations.scales, weight
    # The codes of several tokens would be quantised anew for each strip of 4-bit codes.
    if tokens <= (1 if weight.n4 else FEW_TOKENS) and group_size // 2 % STRIP == 0:
        total = jax.lax.platform_dependent(*arguments, cpu=_integer_products, default=_float_products)
    else:
        total = _float_products(*arguments)
    # Packed rows back to their output channels: a gather with the inverse permutation.
    channels = jnp.arange(weight.out_features, dtype=jnp.int32)
    packed_row = jnp.zeros_like(channels).at[weight.channel_order].set(channels, unique_indices=True)
    out = jnp.take(total, packed_row, axis=1)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(out_dtype)


def _float_products(codes: jax.Array, scales: jax.Array, weight: PackedWeight) -> jax.Array:
    """The product with the channels in packed order, float32 `[tokens, out_features]`, by float32 dots.

    The partial sums of the dot of a group are integers below 2**24, so every one is exact in whatever order they are
    added. The scan keeps one unpacked group of the weight in memory at a time.

    Args:
        codes: int8 `[groups, tokens, group_size]`.
        scales: float32 `[groups, tokens]`.
        weight: The weight.
    """

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
        jnp.zeros((codes.shape[1], weight.out_features), jnp.float32),
        (codes, scales, weight.codes4, weight.scales4, weight.zero_points4, weight.codes8, weight.scales8),
    )
    return total


def _integer_products(codes: jax.Array, scales: jax.Array, weight: PackedWeight) -> jax.Array:
    """`_float_products` to the bit, by integer dots of all groups at once; the channels of either width apart."""
    total4 = _sum_of_groups(_dots4(codes, weight.codes4, weight.zero_points4), scales, weight.scales4)
    total8 = _sum_of_groups(_dots8(codes, weight.codes8), scales, weight.scales8)
    return jnp.concatenate([total4, total8], axis=1)


def _sum_of_groups(dots: jax.Array, scales: jax.Array, weight_scales: jax.Array) -> jax.Array:
    """Sum over groups of dots times both scales, one group after another, float32 `[tokens, channels]`.

    Args:
        dots: int32 `[groups, tokens, channels]`.
        scales: float32 `[groups, tokens]`.
        weight_scales: float16 `[groups, channels]`.
    """

    def add_group(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        dot, scale, weight_scale = group
        row_scales = scale[:, None] * weight_scale.astype(jnp.float32)[None, :]
        # In this order of the terms the compiler fuses this product, and not the one before, with the addition.
        return dot.astype(jnp.float32) * row_scales + total, None

    start = jnp.zeros(dots.shape[1:], jnp.float32)
    return jax.lax.scan(add_group, start, (dots, scales, weight_scales), unroll=UNROLLED_GROUPS)[0]


def _dots4(codes: jax.Array, pairs: jax.Array, zero_points: jax.Array) -> jax.Array:
    """Dots with 4-bit codes less their zero points, int32 `[groups, tokens, channels]`.

    Codes are multiplied as they are unpacked, in one loop that stores nothing but the dots. The zero points are taken
    off by linearity: each times the sum of the token's codes.

    Args:
        codes: int8 `[groups, tokens, group_size]`.
        pairs: uint8 `[groups, channels, group_size // 2]`.
        zero_points: uint8 `[groups, channels]`.
    """
    half = pairs.shape[-1]
    left = codes.astype(jnp.int32)
    halves = pairs & np.uint8(15), pairs >> np.uint8(4)
    products = [
        left[:, :, None, first + start : first + start + STRIP]
        * right[:, None, :, start : start + STRIP].astype(jnp.int32)
        for first, right in zip((0, half), halves, strict=True)
        for start in range(0, half, STRIP)
    ]
    dots = jnp.sum(functools.reduce(jnp.add, products), axis=-1)
    return dots - jnp.sum(left, axis=-1)[:, :, None] * zero_points.astype(jnp.int32)[:, None, :]


def _dots8(codes: jax.Array, weight_codes: jax.Array) -> jax.Array:
    """Dots of int8 codes `[groups, tokens or channels, group_size]`, int32 `[groups, tokens, channels]`."""
    # A row of zeros more. XLA's CPU compiler has fast int8 dots for two rows and more, and where it does not make the
    # transposition before it a part of the dot, which the row prevents.
    codes = jnp.pad(codes, ((0, 0), (0, 1), (0, 0)))
    dots = jax.lax.dot_general(codes, weight_codes, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    return dots[:, :-1]


def refuses(
    activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None, **settings: object
) -> str | None:
    """Why the float32 dots would not be exact, or None; the arguments are those of `mixed_matmul`."""
    if weight.group_size > MAX_GROUP_SIZE:
        return f"the float32 dots of the reference are exact up to groups of {MAX_GROUP_SIZE}, not {weight.group_size}"
    return None
