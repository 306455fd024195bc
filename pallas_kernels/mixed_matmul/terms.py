"""Activations as a sum of int8 terms: more bits than 8 from the same kernels.

x ~ s1 c1 + s2 c2, where s2 c2 quantises what s1 c1 leaves of x. The terms go through one product as so many times the
tokens, and their results are added. With few tokens a product takes the time in which its weights are read, whatever
the number of tokens; so this is for layers where few tokens and great accuracy meet, such as the output head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.quantize_activations.api import quantize_activations


def quantize(x: jax.Array, group_size: int, terms: int, *, implementation: str = "auto") -> QuantizedActivations:
    """Float x `[tokens, features]` as `terms * tokens` rows of codes: the first term of all tokens, then the second.

    Each term leaves at most 1/254 of the largest error before it: two are within 1/64516 of a group's
    largest value.

    Raises:
        ValueError: Wrong rank, dtype or group size.
        NotImplementedError: The implementation asked for cannot run here.
    """
    remainder = x.astype(jnp.float32)
    parts = []
    for _ in range(terms):
        part = quantize_activations(remainder, group_size, implementation=implementation)
        parts.append(part)
        scales = jnp.repeat(part.scales.T, group_size, axis=1)
        remainder = remainder - part.codes.astype(jnp.float32) * scales
    return QuantizedActivations(
        codes=jnp.concatenate([part.codes for part in parts]),
        scales=jnp.concatenate([part.scales for part in parts], axis=1),
        group_size=group_size,
    )


def add(products: jax.Array, terms: int, bias: jax.Array | None) -> jax.Array:
    """`[tokens, out_features]`: the sum of the float32 results `[terms * tokens, out_features]`, and the bias."""
    total = products.reshape(terms, -1, products.shape[1]).sum(axis=0)
    return total if bias is None else total + bias.astype(jnp.float32)
