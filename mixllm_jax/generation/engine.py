"""Generation with one model: token ids in, token ids out.

A prefill (`chunked_prefill`) takes the prompts into a key/value cache, a loop on the device (`decode_loop`) takes it
from there. Both give their cache buffers up (donation). Lengths are rounded up to a few sizes (`sizes`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mixllm_jax.errors import OptionError
from mixllm_jax.generation.chunked_prefill import ChunkedPrefill
from mixllm_jax.generation.decode_loop import (
    NO_TOKEN,
    DecodeState,
    StopRules,
    decode,
    first_token,
    row_keys,
    steps_within,
)
from mixllm_jax.generation.flat import Flat
from mixllm_jax.generation.memory import (
    MemoryEstimate,
    device_memory,
    estimate_memory,
    explain_shortage,
    require_memory,
    weight_bytes,
)
from mixllm_jax.generation.prompt_cache import PromptCache
from mixllm_jax.generation.requests import Generation, Request
from mixllm_jax.generation.sampling import Sampler, SamplingSettings
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.attention import has_flash_attention
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder

_STREAM_INTERVAL = 0.05
"""Seconds of text that a stream collects on the device; well below what a reader notices."""


class Engine:
    """Generates tokens with one model.

    Attributes:
        model: the decoder.
        flat_model: its arrays when the engine was made, for decoding.
        sizes: of caches and prefill steps.
        prefill: what takes prompts into a cache.
        cache_dtype: dtype of the key/value cache: the model's compute dtype, or int8.
    """

    def __init__(self, model: Decoder, *, kv_bits: int = 16, flash_attention: bool | None = None) -> None:
        """Prepares to generate with `model`.

        Args:
            model: the decoder; one of shapes alone is enough to estimate memory.
            kv_bits: 8 stores keys and values as int8, one scale a token and head.
            flash_attention: what to assume of the device for an estimate of memory; None for what it has.

        Raises:
            OptionError: `kv_bits` is neither 8 nor 16.
        """
        if kv_bits not in (8, 16):
            raise OptionError(f"kv-bits must be 8 or 16, found {kv_bits!r}")
        self.model = model
        self.flat_model = Flat.of(model)
        compute_dtype = model.embedding.dtype
        if flash_attention is None:
            flash_attention = has_flash_attention(compute_dtype, model.config.head_dim)
        self.sizes = Sizes(model.config.max_position_embeddings, flash_attention)
        self.prefill = ChunkedPrefill(model, self.sizes)
        self.cache_dtype = jnp.dtype(jnp.int8) if kv_bits == 8 else compute_dtype
        self._weight_bytes = weight_bytes(model)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingSettings | None = None,
        stop_tokens: Sequence[int] = (),
        interval: float = _STREAM_INTERVAL,
        prompt_cache: PromptCache | None = None,
    ) -> Generator[list[list[int]], None, None]:
        """Yields the new tokens of every row as they come, about every `interval` seconds.

        The device works on the next tokens while the caller handles these. A row's stop token is among its tokens.
        Closing the generator ends the work; the device may be a chunk of steps ahead.

        Args:
            prompts: token ids, one list or array a row; their lengths may differ.
            max_tokens: most tokens to generate for each row.
            sampling: how to choose tokens; greedy by default.
            stop_tokens: a row ends after any of these.
            interval: seconds between two yields; `inf` for as few as possible.
            prompt_cache: keeps the context of a single row from one call to the next.

        Raises:
            OptionError: a request that cannot work (see `Request.of`); raised here, before any work, and not at the
                first token.
            OutOfDeviceMemoryError: with the first token, or on the way: the batch does not fit.
        """
        request = self._request(prompts, max_tokens, sampling, stop_tokens)
        if prompt_cache is not None and len(prompts) != 1:
            raise ValueError(f"a prompt cache serves one prompt at a time, got {len(prompts)}")
        return self._stream(request, interval, prompt_cache)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingSettings | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> list[Generation]:
        """Generates for all prompts in one batch; see `stream` for the arguments."""
        request = self._request(prompts, max_tokens, sampling, stop_tokens)
        tokens: list[list[int]] = [[] for _ in request.prompts]
        for chunk in self._stream(request, float("inf"), None):
            for row, new in zip(tokens, chunk, strict=True):
                row.extend(new)
        return [request.finish(row) for row in tokens]

    def estimate_memory(self, batch: int, context: int) -> MemoryEstimate:
        """Device memory for `batch` rows of `context` positions."""
        return estimate_memory(
            self.model.config,
            self._weight_bytes,
            batch=batch,
            context=context,
            cache_dtype=self.cache_dtype,
            compute_dtype=self.model.embedding.dtype,
            prefill_tokens=batch * self.sizes.prefill_chunk(batch),
        )

    def _estimate_request(self, batch: int, positions: int) -> MemoryEstimate:
        """The same in the cache that the positions of a request are given."""
        return self.estimate_memory(batch, self.sizes.cache_length(positions))

    def _request(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: SamplingSettings | None,
        stop_tokens: Sequence[int],
    ) -> Request:
        return Request.of(
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            vocab_size=self.model.config.vocab_size,
            max_length=self.sizes.max_length,
        )

    def _stream(
        self, request: Request, interval: float, prompt_cache: PromptCache | None
    ) -> Generator[list[list[int]], None, None]:
        """`stream` of a request; where the device runs out of memory on the way, the error says what would fit."""
        batch, positions = len(request.prompts), self.sizes.cache_length(request.positions)
        require_memory(self._estimate_request, batch, positions, device_memory())
        with explain_shortage(self._estimate_request, batch, positions):
            state, sampler, stop, keys = self._start(request, positions, prompt_cache)
            first_row: list[int] = []
            try:
                pending, pending_steps, steps = state.token[:, None], 1, steps_within(interval, 0.0)
                began = time.monotonic()
                while True:
                    pending.copy_to_host_async()  # as soon as it is there, not only when the host asks
                    # The next chunk is under way before the host waits for this one; without active rows it is empty.
                    state, following = decode(self.flat_model, state, sampler, stop, keys, steps)
                    rows = [[int(t) for t in row if t != NO_TOKEN] for row in np.asarray(pending)]
                    if not any(rows):
                        break
                    first_row += rows[0]
                    yield rows
                    now = time.monotonic()
                    seconds_per_step, began = (now - began) / pending_steps, now
                    pending, pending_steps, steps = following, steps, steps_within(interval, seconds_per_step)
            except (GeneratorExit, KeyboardInterrupt):  # the caller or the user has read enough: the cache is sound
                self._keep(prompt_cache, state, request, first_row)
                raise
            self._keep(prompt_cache, state, request, first_row)

    def _start(
        self, request: Request, positions: int, prompt_cache: PromptCache | None
    ) -> tuple[DecodeState, Sampler, StopRules, Key[Array, " batch"]]:
        """Runs the prompts and samples the first tokens; what the decode loop wants to go on."""
        prompts = request.prompts
        kept = None if prompt_cache is None else prompt_cache.take(self.model, self.cache_dtype, prompts[0], positions)
        if kept is None:
            kept = KVCache.zeros(self.model.config, len(prompts), positions, self.cache_dtype), 0
        cache, logits = self.prefill.run(kept[0], [prompt[kept[1] :] for prompt in prompts], kept[1])

        # While the device works on the prompts:
        sampler = Sampler.from_settings(request.sampling)
        stop = StopRules.of(request.stop_tokens, request.max_tokens)
        keys = row_keys(request.sampling.seed, len(prompts))
        token, generated, active = first_token(sampler, stop, keys, logits)
        return DecodeState(cache, token, generated, active), sampler, stop, keys

    def _keep(
        self, prompt_cache: PromptCache | None, state: DecodeState, request: Request, generated: list[int]
    ) -> None:
        if prompt_cache is not None:
            # The last sampled token has not been through the model.
            prompt_cache.put(self.model, state.cache, [*request.prompts[0], *generated][:-1])
