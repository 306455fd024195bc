"""The least time of a decode step: the bytes it must read, at the bandwidth the device was measured to have."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.random_weights import random_array
from pallas_kernels.kv_cache import bytes_per_position
from pallas_kernels.packing import PackedWeight


def read_bandwidth(size: int = 2 << 30, repeats: int = 20) -> float:
    """Bytes per second of reading device memory: the fastest of some sums over `size` bytes."""
    # One buffer of this size and no other: what this takes must stay below the peak of the models measured later.
    data = random_array(jnp.uint32(1), (size // (4 << 14), 1 << 14), 1.0, jnp.float32)
    total = jax.jit(lambda x: jnp.max(x, axis=1))
    total(data).block_until_ready()
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(repeats):
            result = total(data)
        result.block_until_ready()
        best = min(best, (time.perf_counter() - start) / repeats)
    return size / best


def bytes_per_step(model: Decoder, batch: int, context: float, cache_dtype: jax.typing.DTypeLike) -> int:
    """Bytes that a decode step of `batch` rows of `context` positions must read: weights, and keys and values.

    Of the embedding, it reads one row a token; a tied one is read whole as the output head. The sums of codes, which
    serve products with many tokens, do not count.
    """
    config = model.config
    read = (model.layers, model.final, model.embedding if model.final.lm_head is None else None)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read, is_leaf=lambda leaf: isinstance(leaf, PackedWeight)))
    position = bytes_per_position(config.num_kv_heads, config.head_dim, cache_dtype)
    return weights + int(batch * context * config.num_layers * position)
