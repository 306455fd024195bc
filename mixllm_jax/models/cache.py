"""The functional key/value cache: a pytree that every forward pass takes and returns anew."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixllm_jax.errors import OptionError
from mixllm_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, `[batch, max_length, num_kv_heads, head_dim]`; slot i holds position i."""

    keys: Float[Array, "batch max_length heads head_dim"]
    values: Float[Array, "batch max_length heads head_dim"]

    def write(
        self,
        positions: Int[Array, "batch length"],
        keys: Float[Array, "batch length heads head_dim"],
        values: Float[Array, "batch length heads head_dim"],
    ) -> "LayerCache":
        """Stores new keys and values at each row's own positions.

        Writes beyond the end are dropped: only the padding of a row can lie there (`Decoder` explains), and clamping
        them would overwrite the row's last real token.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        return LayerCache(
            self.keys.at[rows, positions].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[rows, positions].set(values.astype(self.values.dtype), mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One `LayerCache` per layer and how many tokens each row of the batch holds (int32 `[batch]`)."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]

    @property
    def max_length(self) -> int:
        """Positions each row has room for; static."""
        return self.layers[0].keys.shape[1]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, max_length: int, dtype: DTypeLike) -> "KVCache":
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        shape = (batch, max_length, config.num_kv_heads, config.head_dim)
        # Every array gets memory of its own, so that a jitted step may donate the whole cache.
        layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        return cls(layers, jnp.zeros((batch,), jnp.int32))


def require_room(prompt_lengths: Sequence[int], new_tokens: int, max_length: int) -> None:
    """Checks on the host, before any work, that prompts and the tokens to be generated fit into `max_length`.

    Raises:
        OptionError: The longest prompt leaves too little room.
    """
    longest = max(prompt_lengths, default=0)
    if longest + new_tokens > max_length:
        raise OptionError(
            f"a prompt of {longest} tokens and {new_tokens} new tokens need {longest + new_tokens} positions, but the "
            f"context has {max_length}: shorten the prompt or ask for fewer new tokens"
        )
