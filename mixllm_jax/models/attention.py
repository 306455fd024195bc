"""Grouped-query causal attention with optional sliding window, q/k norm and key/value cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.norm import RMSNorm
from mixllm_jax.models.rope import RotaryEmbedding
from pallas_kernels import QuantizedActivations, decode_attention
from pallas_kernels.decode_attention.xla import masked_attention, visible_slots
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.registry import compute_capability, default_platform
from pallas_kernels.rotary import rotate


def attend(
    heads: Float[Array, "batch length heads_and_2_kv_heads head_dim"],
    num_kv_heads: int,
    rotary: RotaryEmbedding,
    cache: LayerCache | None,
    window: int | None,
    *,
    history: int | None = None,
    quantize_group_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Array | QuantizedActivations, LayerCache | None]:
    """Rotates queries and keys, stores keys and values, attends: the one place that chooses an attention.

    A query at position p sees positions p - window + 1 .. p. Nothing else needs masking: rows are right-padded, so
    padding and slots never written lie behind every real query.

    One token a row against a cache is a decode step: `pallas_kernels.decode_attention`, a flash decoding kernel on the
    GPU. Longer inputs are prefill: cuDNN's flash attention on the GPU where it takes the dtype and head size, XLA
    elsewhere.

    Args:
        heads: Queries, keys and values, after the q/k norm.
        num_kv_heads: Heads of the keys, and of the values.
        rotary: Positions of the tokens and their rotation.
        cache: Keys and values before these tokens.
        window: Sliding window in positions, None for everything before.
        history: Most tokens that any row of the cache holds before these, where the caller knows a bound (static); with
            0, attention is to the new tokens alone.
        quantize_group_size: A decode step may return its result quantised in groups of this many channels.
        implementation: `xla` keeps to XLA everywhere.

    Returns:
        The input of the output projection, `[batch, length, query_channels]` or quantised, and the cache with the new
        keys and values.
    """
    batch, length, channels, _ = heads.shape
    if cache is not None and length == 1:
        mixed, cache = decode_attention(
            heads[:, 0],
            rotary.cos[:, 0],
            rotary.sin[:, 0],
            rotary.positions[:, 0],
            cache,
            window=window,
            quantize_group_size=quantize_group_size,
            implementation="xla" if implementation == "xla" else "auto",
        )
        return (mixed if isinstance(mixed, QuantizedActivations) else mixed[:, None]), cache

    num_heads = channels - 2 * num_kv_heads
    queries, keys, values = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=2)
    queries, keys = rotate(queries, rotary.cos, rotary.sin), rotate(keys, rotary.cos, rotary.sin)
    from_zero = cache is None or history == 0
    if cache is not None and from_zero:
        cache = cache.write_first(keys, values)
        # Another cut of the prompt into chunks must not change the result: see what later chunks will read.
        keys, values = cache.as_stored(keys), cache.as_stored(values)
    elif cache is not None:
        cache = cache.write(rotary.positions, keys, values)
        slots = cache.max_length if history is None else min(history + length, cache.max_length)
        keys, values = cache.first_slots(slots).read(queries.dtype)

    if implementation == "xla" or not has_flash_attention(queries.dtype, queries.shape[-1]):
        mixed = masked_attention(queries, keys, values, rotary.positions, window)
    elif from_zero:
        mixed = jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    else:
        # cuDNN's causal mask knows no offset, so a later chunk passes its mask.
        visible = visible_slots(keys.shape[1], rotary.positions, window)
        mixed = jax.nn.dot_product_attention(queries, keys, values, mask=visible[:, None], implementation="cudnn")
    return mixed.reshape(batch, length, -1), cache


def has_flash_attention(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether prefill runs in cuDNN's flash attention here: its memory does not grow with the length squared."""
    capability = compute_capability() if default_platform() == "gpu" else None
    return capability is not None and capability >= (8, 0) and flash_attention_takes(dtype, head_dim)


def flash_attention_takes(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether cuDNN's flash attention takes these heads, on a GPU that has it."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


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
        self,
        qkv: Float[Array, "batch length channels"],
        rotary: RotaryEmbedding,
        cache: LayerCache | None,
        *,
        history: int | None = None,
        may_quantize: bool = True,
    ) -> tuple[Array | QuantizedActivations, LayerCache | None]:
        """From the output of `qkv_proj` to the input of `o_proj`; returns the cache with the new keys and values.

        `may_quantize` (static): a decode step may return the input of `o_proj` quantised as that takes it.
        """
        batch, length, _ = qkv.shape
        heads = qkv.reshape(batch, length, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
            heads = jnp.concatenate([self.q_norm(queries), self.k_norm(keys), values], axis=2)
        return attend(
            heads,
            self.num_kv_heads,
            rotary,
            cache,
            self.window,
            history=history,
            quantize_group_size=self.o_proj.group_size if may_quantize else None,
            implementation=self.qkv_proj.implementation,
        )
