"""The key/value cache of a conversation, kept from one turn to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder


class PromptCache:
    """Keeps the key/value cache of a conversation with one model, so that the next turn runs only what is new."""

    def __init__(self) -> None:
        self._model: Decoder | None = None
        self._cache: KVCache | None = None
        self._tokens: list[int] = []

    def take(self, model: Decoder, dtype: DTypeLike, prompt: Sequence[int], size: int) -> tuple[KVCache, int] | None:
        """Hands the cache out, grown to at least `size` positions and cut to the part that agrees with `prompt`.

        Args:
            model: what is going to use it.
            dtype: in which this stores keys and values.
            prompt: token ids; the last of them must run in any case, since it gives the logits.
            size: positions needed.

        Returns:
            The cache and how many tokens of the prompt it holds; None where there is nothing yet.

        Raises:
            ValueError: another model, or one with other bits, filled it: its keys and values mean something else.
        """
        if self._cache is None:
            return None
        if self._model is not model or self._cache.layers[0].keys.dtype != dtype:
            raise ValueError("a PromptCache belongs to the model that filled it: use a new one for another model")
        cache, self._cache = self._cache, None
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        agreeing = next((i for i, (held, wanted) in enumerate(pairs) if held != wanted), None)
        if agreeing is None:
            agreeing = min(len(self._tokens), len(prompt) - 1)
        if size > cache.max_length:
            cache = cache.grown(size)
        return dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, agreeing)), agreeing

    def put(self, model: Decoder, cache: KVCache, tokens: list[int]) -> None:
        """Keeps the cache of these tokens, unless a call that was broken off has it already (donation)."""
        if not any(array.is_deleted() for array in jax.tree.leaves(cache)):
            self._model, self._cache, self._tokens = model, cache, tokens
