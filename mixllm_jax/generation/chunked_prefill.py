"""Prompts into the key/value cache, chunk by chunk, so that the activations of long ones are bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixllm_jax.generation.prefill import PrefillModel
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder


class ChunkedPrefill:
    """Prefill of one model.

    Attributes:
        programs: what runs a chunk.
        sizes: of the chunks.
    """

    def __init__(self, model: Decoder, sizes: Sizes) -> None:
        self.programs = PrefillModel(model)
        self.sizes = sizes

    def run(
        self, cache: KVCache, prompts: Sequence[Sequence[int]], held: int
    ) -> tuple[KVCache, Float[Array, "batch vocab"]]:
        """Runs the prompts through the model.

        Args:
            cache: Holds `held` tokens of every row already; given up.
            prompts: Token ids after those, one list a row.
            held: The same for all rows.

        Returns:
            The cache, and the float32 logits after each row's last token.
        """
        last: Array | None = None
        chunk = self.sizes.prefill_chunk(len(prompts))
        for offset, bucket in self.sizes.prefill_steps(max(map(len, prompts)), len(prompts), cache.max_length):
            tokens = np.zeros((len(prompts), bucket), np.int32)
            lengths = np.zeros(len(prompts), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[offset : offset + chunk]
                tokens[row, : len(part)] = part
                lengths[row] = len(part)
            cache, logits = self.programs.step(cache, tokens, lengths, self.sizes.history(held + offset))
            last = logits if last is None else _keep_logits(lengths, logits, last)
        assert last is not None
        return cache, last

    def lower(self, cache: KVCache, length: int) -> Iterator[jax.stages.Lowered]:
        """The programs that prompts of `length` tokens in an empty cache of this shape run, to compile ahead."""
        batch = cache.lengths.shape[0]
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        for offset, bucket in self.sizes.prefill_steps(length, batch, cache.max_length):
            tokens = jax.ShapeDtypeStruct((batch, bucket), jnp.int32)
            yield from self.programs.lower(cache, tokens, lengths, self.sizes.history(offset))


@jax.jit
def _keep_logits(
    lengths: Int[Array, " batch"], logits: Float[Array, "batch vocab"], last: Float[Array, "batch vocab"]
) -> Array:
    """Rows without tokens in a chunk keep the logits that they have."""
    return jnp.where((lengths > 0)[:, None], logits, last)
