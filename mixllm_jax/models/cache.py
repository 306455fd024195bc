"""The functional key/value cache: a pytree that every forward pass takes and returns anew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from mixllm_jax.models.config import ModelConfig
from pallas_kernels.kv_cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One `LayerCache` per layer and how many tokens each row of the batch holds (int32 `[batch]`)."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]

    @property
    def max_length(self) -> int:
        """Positions each row has room for; static."""
        return self.layers[0].max_length

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, max_length: int, dtype: DTypeLike) -> "KVCache":
        """An empty cache for `batch` rows of at most `max_length` tokens; dtype int8 stores codes and scales."""
        return _zeros(config, batch, max_length, jnp.dtype(dtype))

    def grown(self, max_length: int) -> "KVCache":
        """The same content with room for `max_length` positions a row."""
        return KVCache(tuple(layer.grown(max_length) for layer in self.layers), self.lengths)


@functools.partial(jax.jit, static_argnames=("config", "batch", "max_length", "dtype"))
def _zeros(config: ModelConfig, batch: int, max_length: int, dtype: jnp.dtype) -> KVCache:
    """One program for all layers: array by array, the host would take milliseconds before a prompt can begin."""
    layers = tuple(
        LayerCache.zeros(batch, max_length, config.num_kv_heads, config.head_dim, dtype)
        for _ in range(config.num_layers)
    )
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))
