"""How a quantisation computes, as opposed to what: dtype, batch, and reading blocks one at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.models.block import Block
from mixllm_jax.models.config import ModelConfig, layer_part_name
from mixllm_jax.models.decoder import Embedding, Head
from mixllm_jax.models.parameters import Execution, Parameters
from mixllm_jax.models.rope import RotaryEmbedding, rotary_embedding

_TOKENS_AT_ONCE = {"cpu": 4096}
_TOKENS_AT_ONCE_ON_ACCELERATOR = 16384


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Static choices that can change the last bits of a result, so they belong to what a resumed run must repeat.

    Attributes:
        dtype: compute dtype of the model, ``float32`` or ``bfloat16``.
        batch: sequences that go through a block at once.
        backend: JAX's name of the platform.
    """

    dtype: str
    batch: int
    backend: str

    @classmethod
    def choose(cls, samples: int, sequence_length: int) -> "Runtime":
        """bfloat16 and large batches on an accelerator, float32 and small ones on a CPU; batches of equal size."""
        backend = jax.default_backend()
        limit = max(1, _TOKENS_AT_ONCE.get(backend, _TOKENS_AT_ONCE_ON_ACCELERATOR) // sequence_length)
        batch = max(size for size in range(1, min(limit, samples) + 1) if samples % size == 0)
        return cls("float32" if backend == "cpu" else "bfloat16", batch, backend)

    def execution(self, activation_bits: int = 8) -> Execution:
        """The same for the model."""
        return Execution(dtype=jnp.dtype(self.dtype), activation_bits=8 if activation_bits == 8 else 16)


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """A float model folder of which one block at a time is in memory, with the calibration sequences.

    Attributes:
        reader: the folder.
        tokens: int32 [samples, sequence_length].
        runtime: how to compute.
    """

    reader: CheckpointReader
    tokens: np.ndarray
    runtime: Runtime

    @property
    def config(self) -> ModelConfig:
        """The model configuration."""
        return self.reader.config

    def hidden_shape(self) -> tuple[int, int, int]:
        """Shape of the residual stream of all sequences."""
        return (*self.tokens.shape, self.config.hidden_size)

    def rotary(self) -> RotaryEmbedding:
        """Positions 0, 1, ... for one batch."""
        length = self.tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (self.runtime.batch, length))
        return rotary_embedding(self.config, positions)

    def token_batches(self) -> Iterator[np.ndarray]:
        """The sequences, ``batch`` at a time."""
        for start in range(0, len(self.tokens), self.runtime.batch):
            yield self.tokens[start : start + self.runtime.batch]

    def read_layer(self, layer: int) -> dict[str, Any]:
        """The parameters of a block as stored."""
        return self.reader.read_part(layer_part_name(layer))

    def block(self, layer: int, parameters: Parameters, activation_bits: int = 8) -> Block:
        """A block of these parameters, float or packed."""
        return Block.from_parameters(self.config, layer, parameters, self.runtime.execution(activation_bits))

    def embedding(self) -> Embedding:
        """The token embedding."""
        return Embedding.from_parameters(self.config, self.reader.read_part("embedding"), self.runtime.execution())

    def head(self) -> Head:
        """Final norm and output projection."""
        return Head.from_parameters(self.config, self.reader.read_part("final"), self.runtime.execution())
