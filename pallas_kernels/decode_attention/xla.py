"""XLA reference of the decode step of attention, and the masked attention that prefill shares with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.quantize_activations import xla as quantize_xla
from pallas_kernels.rotary import rotate


def masked_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, query_positions: jax.Array, window: int | None
) -> jax.Array:
    """Softmax attention in which slot j of the keys holds position j of its row; the softmax is float32.

    Args:
        queries: Float `[batch, length, heads, head_dim]`.
        keys: Float `[batch, slots, kv_heads, head_dim]`; query head i reads kv head i // (heads / kv_heads).
        values: Like `keys`.
        query_positions: int32 `[batch, length]`.
        window: A query at position p sees the slots p - window + 1 .. p; None: 0 .. p.

    Returns:
        Like `queries`.
    """
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=visible_slots(keys.shape[1], query_positions, window)[:, None]
    )


def visible_slots(slots: int, query_positions: jax.Array, window: int | None) -> jax.Array:
    """Which of the slots each query sees.

    Args:
        slots: Number of slots; slot j holds position j.
        query_positions: int32 `[batch, length]`.
        window: A query at position p sees the slots p - window + 1 .. p; None: 0 .. p.

    Returns:
        Bool `[batch, length, slots]`.
    """
    slot = jnp.arange(slots)
    visible = slot <= query_positions[..., None]
    if window is not None:
        visible &= slot > query_positions[..., None] - window
    return visible


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    *,
    window: int | None,
    quantize_group_size: int | None = None,
) -> tuple[jax.Array | QuantizedActivations, LayerCache]:
    """Rotates, writes to the cache, attends to it.

    Arguments and result are those of the public `decode_attention`, which has checked them.
    """
    batch, _, head_dim = qkv.shape
    kv_heads = cache.keys.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    queries, keys, values = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
    queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
    cache = cache.write(positions[:, None], keys[:, None], values[:, None])
    mixed = masked_attention(queries[:, None], *cache.read(qkv.dtype), positions[:, None], window)
    mixed = mixed.reshape(batch, heads * head_dim)
    if quantize_group_size is None:
        return mixed, cache
    return quantize_xla.quantize_activations(mixed, group_size=quantize_group_size), cache
