"""Rotary position embedding of query and key heads, given the tables of the positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the channel pairs (i, i + head_dim / 2) of every head (arXiv 2104.09864, half-split layout).

    Args:
        x: Float `[..., heads, head_dim]`.
        cos: float32 `[..., head_dim / 2]`, the same leading axes as `x` without the heads.
        sin: Like `cos`.

    Returns:
        The rotated heads in the dtype of `x`; the arithmetic is float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
