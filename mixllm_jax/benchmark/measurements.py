"""The measurements of one model in one scheme, with fixed inputs: decoding, the time to a first token, profiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.benchmark import roofline
from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.benchmark.profile import profile
from mixllm_jax.device import require_kernels
from mixllm_jax.generation import Engine
from mixllm_jax.generation.decode_loop import DECODE_CHUNK, DecodeState, StopRules, decode, first_token
from mixllm_jax.generation.memory import GB
from mixllm_jax.generation.sampling import Sampler, SamplingSettings
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.presets import preset
from mixllm_jax.models.random_weights import WeightFormat, fitting_group_size, random_array, random_decoder
from pallas_kernels.kv_cache import LayerCache

_PREFILL_REPEATS = 3


def build_model(plan: Plan) -> Decoder:
    """Random weights on the device, or a folder's."""
    if plan.scheme == "stored":
        from mixllm_jax.loading import load

        return load(plan.model, lm_head_bits=plan.lm_head_bits, embedding_bits=plan.embedding_bits).model
    config = preset(plan.model)
    weights = WeightFormat.from_name(
        plan.scheme,
        tied=config.tie_word_embeddings,
        lm_head_bits=plan.lm_head_bits,
        embedding_bits=plan.embedding_bits,
        allocation=plan.allocation,
    )
    if weights.eight_bit_share is not None:
        require_kernels(fitting_group_size(config), "auto")  # figures of the slow reference are no figures
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    return random_decoder(config, weights, dtype=dtype)


class Bench:
    """The engine with the fixed inputs of the measurements."""

    def __init__(self, model: Decoder, plan: Plan, programs: dict[tuple[int, int], jax.stages.Compiled]) -> None:
        self.programs = programs
        self.engine = Engine(model, kv_bits=plan.kv_bits)
        self.plan = plan
        self.sampler = Sampler.from_settings(SamplingSettings())
        # Random weights may well sample a stop token, so there is none.
        self.stop = StopRules.of((), 1 << 30)

    def row_keys(self, batch: int) -> jax.Array:
        """Keys that greedy decoding does not use."""
        return jax.random.split(jax.random.key(0), batch)

    def abstract_state(self, batch: int, context: int) -> DecodeState:
        """Shapes of a decode case."""
        cache = jax.eval_shape(lambda: KVCache.zeros(self.engine.model.config, batch, context, self.engine.cache_dtype))
        ints: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
        active: Any = jax.ShapeDtypeStruct((batch,), jnp.bool_)
        return DecodeState(cache, ints, ints, active)

    def lower_decode(self, batch: int, context: int) -> jax.stages.Lowered:
        """The program of a decode case."""
        state = self.abstract_state(batch, context)
        keys = jax.eval_shape(lambda: self.row_keys(batch))
        return decode.lower(self.engine.flat_model, state, self.sampler, self.stop, keys, DECODE_CHUNK)

    def lower_prefill(self, prompt: int, context: int) -> Iterator[jax.stages.Lowered]:
        """The programs of a prompt."""
        return self.engine.prefill.lower(self.abstract_state(1, context).cache, prompt)

    def filled_state(self, batch: int, context: int, length: int) -> DecodeState:
        """A decode state whose cache holds `length` random positions of each row."""
        cache = self.abstract_state(batch, context).cache
        layers = tuple(_random_layer(layer, np.uint32(index)) for index, layer in enumerate(cache.layers))
        token = jnp.asarray(np.random.default_rng(0).integers(0, self.engine.model.config.vocab_size, batch), jnp.int32)
        lengths = jnp.full((batch,), length, jnp.int32)
        return DecodeState(KVCache(layers, lengths), token, jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool))

    def run_decode(self, state: DecodeState, chunks: int) -> DecodeState:
        """Decodes `chunks * DECODE_CHUNK` steps as the engine does, and waits for the end."""
        batch = state.token.shape[0]
        keys = self.row_keys(batch)
        if (batch, state.cache.max_length) not in self.programs:
            self.programs[batch, state.cache.max_length] = self.lower_decode(batch, state.cache.max_length).compile()
        program = self.programs[batch, state.cache.max_length]
        for _ in range(chunks):
            state, tokens = program(self.engine.flat_model, state, self.sampler, self.stop, keys)
        tokens.block_until_ready()
        return state

    def decode_chunks(self, context: int) -> int:
        """Timed chunks of a decode case."""
        return max(1, min(self.plan.decode_steps, context // 2) // DECODE_CHUNK)

    def decode_start(self, context: int) -> int:
        """Positions that are there before a decode case: it ends, after a chunk to warm up, where the cache is full."""
        return context - (self.decode_chunks(context) + 1) * DECODE_CHUNK

    def prompt_before(self, context: int) -> int:
        """The longest of the plan's prompts that fits into a context; a prompt of its own would be more programs."""
        return max((prompt for prompt in self.plan.prompts if prompt < context), default=0)

    def context_of(self, prompt: int) -> int:
        """The cache in which a prompt is timed: that of a decode case, where one is large enough, has its program."""
        return min(
            (context for context in self.plan.contexts if context > prompt),
            default=self.engine.sizes.cache_length(prompt + 1),
        )

    def decode_case(self, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
        """Speed of the last steps before `context`; with one row, a prefill may run first, for the peak of memory."""
        chunks, start = self.decode_chunks(context), self.decode_start(context)
        if batch == 1 and (prompt := self.prompt_before(context)):
            self.time_to_first_token(prompt, context)
        state = self.run_decode(self.filled_state(batch, context, start), 1)
        began = time.perf_counter()
        state = self.run_decode(state, chunks)
        seconds = (time.perf_counter() - began) / (chunks * DECODE_CHUNK)
        assert int(state.cache.lengths[0]) == context
        average = context - chunks * DECODE_CHUNK / 2
        floor = roofline.bytes_per_step(self.engine.model, batch, average, self.engine.cache_dtype) / bandwidth
        return {
            "decode_tokens_per_s": round(batch / seconds, 1),
            "roofline_share": round(floor / seconds, 4),
            "peak_memory_gb": _peak_memory(),
        }

    def time_to_first_token(self, prompt: int, context: int) -> float:
        """Milliseconds from a prompt on the host to its first token on the host, median."""
        times = []
        for _ in range(_PREFILL_REPEATS + 1):
            cache = self.empty_cache(context)
            began = time.perf_counter()
            self.first_token(prompt, cache)
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[1:])

    def empty_cache(self, context: int) -> KVCache:
        """A cache for one row."""
        return jax.block_until_ready(KVCache.zeros(self.engine.model.config, 1, context, self.engine.cache_dtype))

    def first_token(self, prompt: int, cache: KVCache) -> np.ndarray[Any, Any]:
        """The token after a random prompt, on the host."""
        tokens = np.random.default_rng(1).integers(0, self.engine.model.config.vocab_size, prompt).tolist()
        _, logits = self.engine.prefill.run(cache, [tokens], held=0)
        token, *_ = first_token(self.sampler, self.stop, self.row_keys(1), logits)
        token.copy_to_host_async()
        return np.asarray(token)

    def profile_decode(self, batch: int, context: int) -> dict[str, Any]:
        """Where the time of a step goes."""
        state = self.run_decode(self.filled_state(batch, context, context - 4 * DECODE_CHUNK), 1)
        return profile(lambda: self.run_decode(state, 2).token, 2 * DECODE_CHUNK)

    def profile_prefill(self, prompt: int, context: int) -> dict[str, Any]:
        """Where the time to the first token goes."""
        cache = self.empty_cache(context)
        return profile(lambda: self.first_token(prompt, cache), 1)


def _random_layer(layer: LayerCache, seed: np.uint32) -> LayerCache:
    def fill(array: Any, stream: int) -> Any:
        if array is None:
            return None
        if array.dtype == jnp.int8:
            return random_array(seed + np.uint32(stream << 16), array.shape, 30.0, jnp.int8)
        return (
            jnp.abs(random_array(seed + np.uint32(stream << 16), array.shape, 0.02, jnp.float32))
            if (array.dtype == jnp.float32 and layer.quantized)
            else random_array(seed + np.uint32(stream << 16), array.shape, 1.0, array.dtype)
        )

    return LayerCache(
        *(
            fill(getattr(layer, name), stream)
            for stream, name in enumerate(("keys", "values", "key_scales", "value_scales"), start=1)
        )
    )


def _peak_memory() -> float | None:
    statistics_ = jax.devices()[0].memory_stats()
    return None if statistics_ is None else round(statistics_["peak_bytes_in_use"] / GB, 3)
