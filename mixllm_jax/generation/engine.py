"""Prefill and decoding, on token ids.

`prefill.PrefillModel` runs one chunk of the prompts through the model into the key/value cache; the jitted function
`decode` runs a loop of decode steps on the device, sampling included. Both give their cache buffers up (donation).
Lengths are rounded up to a few sizes (`round_up_length`), so that prompts of any length meet programs that are compiled
already.

The decode loop has a fixed number of steps: XLA then runs it without asking the device after each step whether to go
on, and replays one CUDA graph a step. A chunk that outlasts its rows costs a few idle steps.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mixllm_jax.errors import OptionError
from mixllm_jax.generation.flat import Flat
from mixllm_jax.generation.memory import (
    MemoryEstimate,
    OutOfDeviceMemoryError,
    describe_shortage,
    device_memory,
    estimate_memory,
    require_memory,
    weight_bytes,
)
from mixllm_jax.generation.prefill import PrefillModel
from mixllm_jax.generation.sampling import Sampler, SamplingSettings
from mixllm_jax.models.attention import has_flash_attention
from mixllm_jax.models.cache import KVCache, require_room
from mixllm_jax.models.decoder import Decoder

PREFILL_TOKENS = 4096
"""Most tokens of the whole batch in one prefill step: bounds the activations of long prompts and large batches."""
_PREFILL_TOKENS_OF_A_ROW = 512
"""The same for a row where attention makes the whole matrix of scores (no flash attention)."""
_SMALLEST_BUCKET = 16
_SMALLEST_CACHE = 128
_SMALLEST_HISTORY = 512
DECODE_CHUNK = 16
"""Decode steps between two looks of the host at the result."""
_MAX_STOP_TOKENS = 16
_STREAM_INTERVAL = 0.05
"""Seconds of text that a stream collects on the device; well below what a reader notices."""
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step needs and renews.

    Attributes:
        cache: keys and values of every token but the last sampled one.
        token: int32 `[batch]`, the last sampled token.
        generated: int32 `[batch]`, tokens sampled so far.
        active: bool `[batch]`, rows that go on.
    """

    cache: KVCache
    token: Int[Array, " batch"]
    generated: Int[Array, " batch"]
    active: Bool[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopRules:
    """When a row is finished: after any of `tokens` (int32, padded with -1), or after `max_tokens` (int32)."""

    tokens: Int[Array, " stops"]
    max_tokens: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The generated tokens of one prompt (a stop token not included), and why they ended."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


@jax.jit
def _keep_logits(
    lengths: Int[Array, " batch"], logits: Float[Array, "batch vocab"], last: Float[Array, "batch vocab"]
) -> Array:
    """Rows without tokens in a chunk keep the logits that they have."""
    return jnp.where((lengths > 0)[:, None], logits, last)


@jax.jit
def first_token(
    sampler: Sampler, stop: StopRules, row_keys: Key[Array, " batch"], logits: Float[Array, "batch vocab"]
) -> tuple[Array, Array, Array]:
    """Samples the token after the prompts; returns it, the number of tokens generated, and which rows go on."""
    generated = jnp.zeros(logits.shape[0], jnp.int32)
    token = sampler.sample(_step_keys(row_keys, generated), logits)
    generated += 1
    return token, generated, ~_is_finished(stop, token, generated)


@functools.partial(jax.jit, static_argnames=("steps",), donate_argnames=("state",))
def decode(
    flat_model: Flat[Decoder],
    state: DecodeState,
    sampler: Sampler,
    stop: StopRules,
    row_keys: Key[Array, " batch"],
    steps: int,
) -> tuple[DecodeState, Int[Array, "batch steps"]]:
    """Runs `steps` decode steps; `NO_TOKEN` where a row was finished already."""
    model = flat_model.tree()

    def decode_step(step: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, tokens = carry
        # A finished row feeds its last token again and again, but its cache does not grow.
        logits, cache = model(state.token[:, None], state.cache, lengths=state.active.astype(jnp.int32), last_only=True)
        assert cache is not None
        token = sampler.sample(_step_keys(row_keys, state.generated), logits)
        generated = state.generated + state.active
        emitted = jnp.where(state.active, token, NO_TOKEN)
        active = state.active & ~_is_finished(stop, token, generated)
        token = jnp.where(state.active, token, state.token)
        return DecodeState(cache, token, generated, active), tokens.at[:, step].set(emitted)

    empty = jnp.full((state.token.shape[0], steps), NO_TOKEN, jnp.int32)
    return jax.lax.fori_loop(0, steps, decode_step, (state, empty))


def _step_keys(row_keys: Key[Array, " batch"], generated: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Keys by row and position in the row's text: how the steps are cut into chunks changes nothing."""
    return jax.vmap(jax.random.fold_in)(row_keys, generated)


def _is_finished(
    stop: StopRules, token: Int[Array, " batch"], generated: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    return (token[:, None] == stop.tokens).any(-1) | (generated >= stop.max_tokens)


def round_up_length(length: int, smallest: int, largest: int) -> int:
    """The next of 2^i and 1.5 * 2^i from `smallest` on, at most `largest`: few shapes, at most a third of it unused."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, largest)


class Engine:
    """Generates tokens with one model.

    Attributes:
        model: the decoder.
        flat_model: its arrays when the engine was made, for decoding.
        prefill_model: the same, for prefill.
        max_length: the longest context, prompt and generated tokens together.
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
            raise OptionError(f"kv-bits must be 8 or 16, found {kv_bits}")
        self.model = model
        self.flat_model = Flat.of(model)
        self.prefill_model = PrefillModel(model)
        self.max_length = model.config.max_position_embeddings
        compute_dtype = model.embedding.dtype
        self.cache_dtype = jnp.dtype(jnp.int8) if kv_bits == 8 else compute_dtype
        self._compute_dtype = compute_dtype
        self._weight_bytes = weight_bytes(model)
        if flash_attention is None:
            flash_attention = has_flash_attention(compute_dtype, model.config.head_dim)
        self._flash_attention = flash_attention

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

        Args:
            prompts: token ids, one list a row; their lengths may differ.
            max_tokens: most tokens to generate for each row.
            sampling: how to choose tokens; greedy by default.
            stop_tokens: a row ends after any of these.
            interval: seconds between two yields; `inf` for as few as possible.
            prompt_cache: keeps the context of a single row from one call to the next.

        Raises:
            OptionError: an empty prompt, a token outside the vocabulary, or a prompt that leaves too little room for
                `max_tokens` in the context; raised here, before any work, and not at the first token.
        """
        sampling = sampling or SamplingSettings()
        self._check(prompts, max_tokens, stop_tokens)
        if prompt_cache is not None and len(prompts) != 1:
            raise ValueError(f"a prompt cache serves one prompt at a time, got {len(prompts)}")
        chunks = self._stream(prompts, max_tokens, sampling, stop_tokens, interval, prompt_cache)
        return self._explain_shortage(chunks, len(prompts), max(map(len, prompts)) + max_tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingSettings | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> list[Generation]:
        """Generates for all prompts in one batch; see `stream` for the arguments."""
        tokens: list[list[int]] = [[] for _ in prompts]
        chunks = self.stream(
            prompts, max_tokens=max_tokens, sampling=sampling, stop_tokens=stop_tokens, interval=float("inf")
        )
        for chunk in chunks:
            for row, new in zip(tokens, chunk, strict=True):
                row.extend(new)
        return [finish(row, stop_tokens) for row in tokens]

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: SamplingSettings,
        stop_tokens: Sequence[int],
        interval: float,
        prompt_cache: PromptCache | None,
    ) -> Generator[list[list[int]], None, None]:
        cache, held = self._cache_for(prompts, max(map(len, prompts)) + max_tokens, prompt_cache)
        cache, logits = self.prefill(cache, [prompt[held:] for prompt in prompts], held)

        # While the device works on the prompts:
        sampler = Sampler.from_settings(sampling)
        padding = [NO_TOKEN] * (_MAX_STOP_TOKENS - len(stop_tokens))
        stop = StopRules(jnp.asarray([*stop_tokens, *padding], jnp.int32), jnp.int32(max_tokens))
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(len(prompts)))
        token, generated, active = first_token(sampler, stop, row_keys, logits)
        state = DecodeState(cache, token, generated, active)

        first_row: list[int] = []
        try:
            pending, pending_steps, steps = token[:, None], 1, _steps_within(interval, 0.0)
            began = time.monotonic()
            while True:
                pending.copy_to_host_async()  # as soon as it is there, not only when the host asks
                # The next chunk is under way before the host waits for this one; without active rows it is empty.
                state, following = decode(self.flat_model, state, sampler, stop, row_keys, steps)
                rows = [[int(t) for t in row if t != NO_TOKEN] for row in np.asarray(pending)]
                if not any(rows):
                    break
                first_row += rows[0]
                yield rows
                now = time.monotonic()
                seconds_per_step, began = (now - began) / pending_steps, now
                pending, pending_steps, steps = following, steps, _steps_within(interval, seconds_per_step)
        except GeneratorExit:
            pass  # the caller has read enough; the cache is sound
        if prompt_cache is not None:
            # The last sampled token has not been through the model.
            prompt_cache.put(state.cache, [*prompts[0], *first_row][:-1])

    def _explain_shortage(
        self, chunks: Generator[list[list[int]], None, None], batch: int, positions: int
    ) -> Generator[list[list[int]], None, None]:
        """Passes `chunks` on; where the device runs out of memory on the way, the error says what would fit."""
        try:
            yield from chunks
        except jax.errors.JaxRuntimeError as error:
            available = device_memory()
            if "RESOURCE_EXHAUSTED" not in str(error) or available is None:
                raise
            context = self.cache_length(positions)
            # The estimate was too low, or the memory is cut up: leave a margin in what is said to fit.
            available = min(available, int(0.9 * self.estimate_memory(batch, context).peak))
            shortage = describe_shortage(self.estimate_memory, batch, context, available)
            raise OutOfDeviceMemoryError(f"the device ran out of memory; {shortage}") from error

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_tokens: Sequence[int]) -> None:
        if max_tokens < 1:
            raise OptionError(f"max-tokens must be at least 1, found {max_tokens}")
        if not prompts:
            raise OptionError("no prompt was given")
        if len(stop_tokens) > _MAX_STOP_TOKENS:
            raise OptionError(f"at most {_MAX_STOP_TOKENS} stop tokens are possible, got {len(stop_tokens)}")
        vocab_size = self.model.config.vocab_size
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise OptionError(f"prompt {index + 1} of {len(prompts)} is empty: it must have at least one token")
            if not all(0 <= token < vocab_size for token in prompt):
                raise OptionError(
                    f"prompt {index + 1} of {len(prompts)} has tokens outside the model's vocabulary of {vocab_size}: "
                    "the tokenizer belongs to another model"
                )
        require_room([len(prompt) for prompt in prompts], max_tokens, self.max_length)

    def _cache_for(
        self, prompts: Sequence[Sequence[int]], positions: int, prompt_cache: PromptCache | None
    ) -> tuple[KVCache, int]:
        """A cache with room for `positions`, and how many tokens of the prompts are in it already."""
        size = self.cache_length(positions)
        require_memory(self.estimate_memory, len(prompts), size, device_memory())
        if prompt_cache is not None and (held := prompt_cache.take(prompts[0], size)) is not None:
            return held
        return KVCache.zeros(self.model.config, len(prompts), size, self.cache_dtype), 0

    def prefill(self, cache: KVCache, prompts: Sequence[Sequence[int]], held: int) -> tuple[KVCache, Array]:
        """Runs the prompts through the model chunk by chunk.

        Args:
            cache: Holds `held` tokens of every row already; given up.
            prompts: Token ids after those, one list a row.
            held: The same for all rows.

        Returns:
            The cache, and the float32 logits `[batch, vocab]` after each row's last token.
        """
        last: Array | None = None
        chunk = self.prefill_chunk(len(prompts))
        for offset, bucket in self._prefill_steps(max(map(len, prompts)), len(prompts), cache.max_length):
            tokens = np.zeros((len(prompts), bucket), np.int32)
            lengths = np.zeros(len(prompts), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[offset : offset + chunk]
                tokens[row, : len(part)] = part
                lengths[row] = len(part)
            cache, logits = self.prefill_model.step(cache, tokens, lengths, self._history(held + offset))
            last = logits if last is None else _keep_logits(lengths, logits, last)
        assert last is not None
        return cache, last

    def lower_prefill(self, cache: KVCache, length: int) -> Iterator[jax.stages.Lowered]:
        """The programs that a prefill of `length` tokens into an empty cache of this shape runs, to compile ahead."""
        batch = cache.lengths.shape[0]
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        for offset, bucket in self._prefill_steps(length, batch, cache.max_length):
            tokens = jax.ShapeDtypeStruct((batch, bucket), jnp.int32)
            yield from self.prefill_model.lower(cache, tokens, lengths, self._history(offset))

    def _prefill_steps(self, length: int, batch: int, max_length: int) -> Iterator[tuple[int, int]]:
        """First token and padded size of each chunk of the longest prompt."""
        chunk = self.prefill_chunk(batch)
        for offset in range(0, length, chunk):
            yield offset, round_up_length(min(length - offset, chunk), _SMALLEST_BUCKET, max_length)

    def cache_length(self, positions: int) -> int:
        """Size of the cache in which `positions` tokens of a row are kept."""
        return round_up_length(positions, _SMALLEST_CACHE, self.max_length)

    def estimate_memory(self, batch: int, context: int) -> MemoryEstimate:
        """Device memory for `batch` rows of `context` positions."""
        return estimate_memory(
            self.model.config,
            self._weight_bytes,
            batch=batch,
            context=context,
            cache_dtype=self.cache_dtype,
            compute_dtype=self._compute_dtype,
            prefill_tokens=batch * self.prefill_chunk(batch),
        )

    def prefill_chunk(self, batch: int) -> int:
        """Tokens of each row in one prefill step: a power of two."""
        chunk = PREFILL_TOKENS >> (batch - 1).bit_length()
        return max(_SMALLEST_BUCKET, chunk if self._flash_attention else min(chunk, _PREFILL_TOKENS_OF_A_ROW))

    def _history(self, held: int) -> int | None:
        """A bound of the tokens in the cache, from a short list; None where it would save nothing."""
        if not self._flash_attention:
            return None
        return 0 if held == 0 else max(_SMALLEST_HISTORY, 1 << (held - 1).bit_length())


class PromptCache:
    """Keeps the key/value cache of a conversation, so that the next turn runs only what is new."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._tokens: list[int] = []

    def take(self, prompt: Sequence[int], size: int) -> tuple[KVCache, int] | None:
        """Hands the cache out, grown to at least `size` positions and cut to the part that agrees with `prompt`."""
        cache, self._cache = self._cache, None
        if cache is None:
            return None
        agreeing = 0
        for held, wanted in zip(
            self._tokens, prompt[:-1], strict=False
        ):  # the last token must run: it gives the logits
            if held != wanted:
                break
            agreeing += 1
        if size > cache.max_length:
            cache = cache.grown(size)
        return dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, agreeing)), agreeing

    def put(self, cache: KVCache, tokens: list[int]) -> None:
        """Keeps the cache of these tokens."""
        self._cache, self._tokens = cache, tokens


def finish(tokens: Sequence[int], stop_tokens: Sequence[int]) -> Generation:
    """Takes the stop token off a finished row."""
    if tokens and tokens[-1] in stop_tokens:
        return Generation(list(tokens[:-1]), "stop")
    return Generation(list(tokens), "length")


def _steps_within(interval: float, seconds_per_step: float) -> int:
    """A whole chunk of decode steps, or a single one where a chunk takes longer than `interval` seconds.

    Only these two, since each number of steps is a program of its own.
    """
    if seconds_per_step == 0.0:  # not known yet: a GPU is fast
        return DECODE_CHUNK if interval == float("inf") or jax.default_backend() == "gpu" else 1
    return DECODE_CHUNK if DECODE_CHUNK * seconds_per_step <= interval else 1
