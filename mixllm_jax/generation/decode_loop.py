"""The decode loop on the device: model, sampling and stopping, several steps without a look of the host.

The loop has a fixed number of steps: XLA then runs it without asking the device after each step whether to go on, and
replays one CUDA graph a step. A chunk that outlasts its rows costs a few idle steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mixllm_jax.generation.flat import Flat
from mixllm_jax.generation.requests import MAX_STOP_TOKENS
from mixllm_jax.generation.sampling import Sampler
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder

DECODE_CHUNK = 16
"""Decode steps between two looks of the host at the result."""
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

    @classmethod
    def of(cls, tokens: Sequence[int], max_tokens: int) -> StopRules:
        """Puts the rules on the device; at most `MAX_STOP_TOKENS` tokens."""
        padding = [NO_TOKEN] * (MAX_STOP_TOKENS - len(tokens))
        return cls(jnp.asarray([*tokens, *padding], jnp.int32), jnp.int32(max_tokens))


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

    def decode_step(step: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, tokens = carry
        flat, last_token = _weights_of_step(flat_model, state.token)
        model, state = flat.tree(), dataclasses.replace(state, token=last_token)
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


def _weights_of_step(flat_model: Flat[Decoder], token: Array) -> tuple[Flat[Decoder], Array]:
    """The model and the last token as they are; on a CPU, the weights for this step alone.

    The CPU compiler would unpack all weights before the loop, since they are the same in every step: four bytes a
    weight (400 MB for 135 million), which every step then reads, and three to ten times as long to compile.
    """
    if jax.default_backend() != "cpu":
        return flat_model, token
    tied: tuple[Flat[Decoder], Array] = jax.lax.optimization_barrier((flat_model, token))
    return tied


def row_keys(seed: int, batch: int) -> Key[Array, " batch"]:
    """A key for each row, by seed and row alone: its text does not depend on the other rows."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def _step_keys(row_keys: Key[Array, " batch"], generated: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Keys by row and position in the row's text: how the steps are cut into chunks changes nothing."""
    return jax.vmap(jax.random.fold_in)(row_keys, generated)


def _is_finished(
    stop: StopRules, token: Int[Array, " batch"], generated: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    return (token[:, None] == stop.tokens).any(-1) | (generated >= stop.max_tokens)


def steps_within(interval: float, seconds_per_step: float) -> int:
    """A whole chunk of decode steps, or a single one where a chunk takes longer than `interval` seconds.

    Only these two, since each number of steps is a program of its own.
    """
    if seconds_per_step == 0.0:  # not known yet: a GPU is fast
        return DECODE_CHUNK if interval == float("inf") or jax.default_backend() == "gpu" else 1
    return DECODE_CHUNK if DECODE_CHUNK * seconds_per_step <= interval else 1
