"""Grouped-query causal attention with optional sliding window, q/k norm and key/value cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixllm_jax.models.cache import LayerCache
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.norm import RMSNorm
from mixllm_jax.models.rope import RotaryEmbedding, apply_rotary


def attend(
    queries: Float[Array, "batch length heads head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
    query_positions: Int[Array, "batch length"],
    window: int | None,
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention in which slot j of the keys holds position j of its row.

    A query at position p sees slots p - window + 1 .. p. Nothing else needs masking: rows are right-padded, so padding
    and slots never written lie behind every real query. The softmax is float32.
    """
    slots = jnp.arange(keys.shape[1])
    visible = slots <= query_positions[..., None]
    if window is not None:
        visible &= slots > query_positions[..., None] - window
    return jax.nn.dot_product_attention(
        queries, keys.astype(queries.dtype), values.astype(queries.dtype), mask=visible[:, None]
    )


class Attention(nnx.Module):
    """What lies between the projections: splits q, k, v, norms and rotates, reads and writes the cache, attends."""

    def __init__(
        self,
        config: ModelConfig,
        qkv_proj: Linear,
        o_proj: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        window: int | None,
    ) -> None:
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = window

    def mix(
        self, qkv: Float[Array, "batch length channels"], rotary: RotaryEmbedding, cache: LayerCache | None
    ) -> tuple[Float[Array, "batch length query_channels"], LayerCache | None]:
        """From the output of `qkv_proj` to the input of `o_proj`; returns the cache with the new keys and values."""
        batch, length, _ = qkv.shape
        heads = qkv.reshape(batch, length, -1, self.head_dim)
        queries, keys, values = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = apply_rotary(queries, rotary), apply_rotary(keys, rotary)
        if cache is not None:
            cache = cache.write(rotary.positions, keys, values)
            keys, values = cache.keys, cache.values
        mixed = attend(queries, keys, values, rotary.positions, self.window)
        return mixed.reshape(batch, length, -1), cache
