"""A model that attends through an int8 key/value cache, so that its cost in perplexity can be measured."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThroughInt8Cache:
    """Calls `model` with every key and value rounded to int8 and back, as decoding with `--kv-bits 8` does."""

    model: Decoder

    @property
    def config(self) -> ModelConfig:
        """That of the model."""
        return self.model.config

    def __call__(self, tokens: Int[Array, "batch length"]) -> tuple[Float[Array, "batch length vocab"], None]:
        """Logits of all tokens; like the model's, without a cache to go on with."""
        batch, length = tokens.shape
        cache = KVCache.zeros(self.config, batch, length, jnp.int8)
        logits, _ = self.model(tokens, cache, history=0)
        return logits, None
