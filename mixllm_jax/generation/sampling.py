"""Choosing the next token from logits: greedy, or random with temperature, top-k and top-p.

Pure functions of arrays, jitted with the decode step. The values of the settings are operands and not constants, so
that another temperature does not compile another program; only whether there is anything to sample or to filter is
static.
"""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mixllm_jax.errors import OptionError

_SMALLEST_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to choose tokens.

    Attributes:
        temperature: divides the logits; 0 is greedy (the most likely token, the lowest id on ties), and so is anything
            below 1e-5, over which logits would leave float32.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the smallest set of most likely tokens whose probabilities sum to at least this; 1 for all.
        seed: the same seed, prompts and settings give the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature must be 0 (greedy) or a positive number, found {self.temperature}")
        if not isinstance(self.top_k, numbers.Integral) or self.top_k < 0:
            raise OptionError(f"top-k must be 0 (off) or a positive number of tokens, found {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top-p must lie in (0, 1], found {self.top_p}")
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**32:
            raise OptionError(f"seed must be a whole number in [0, 2**32), found {self.seed!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """`SamplingSettings` as operands of a jitted step; `greedy` and `filtered` are static."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_settings(cls, settings: SamplingSettings) -> Sampler:
        """Puts the settings on the device."""
        return cls(
            temperature=jnp.float32(settings.temperature),
            top_k=jnp.int32(settings.top_k),
            top_p=jnp.float32(settings.top_p),
            greedy=settings.temperature < _SMALLEST_TEMPERATURE,
            filtered=settings.top_k > 0 or settings.top_p < 1,
        )

    def sample(self, keys: Key[Array, " batch"], logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        """Next tokens, int32; row i uses `keys[i]` alone, so that a row does not depend on its neighbours."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if self.filtered:
            logits = jnp.where(keep_likely(logits, self.top_k, self.top_p), logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Bool[Array, "batch vocab"]:
    """Which tokens top-k and then top-p (on the probabilities renormalised after top-k) leave to choose from.

    The most likely token always stays; tokens that tie with the last one kept stay too.
    """
    vocab = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab)
    within_k = (rank < top_k) | (top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(within_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = within_k & ((before < top_p) | (rank == 0))
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return logits >= threshold
