"""Checks that the parameters of a checkpoint part are those its model configuration asks for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from mixllm_jax.errors import CheckpointError
from mixllm_jax.models.config import ModelConfig

Parameters = Mapping[str, Any]
"""A checkpoint part: parameter path to a NumPy or JAX array or a `PackedWeight`."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model computes, as opposed to what (static).

    Attributes:
        dtype: Compute dtype; float weights are cast to it when a model is built (norm weights stay float32).
        activation_bits: Activations of packed linears: 8 (the format) or 16 (weights de-quantised, for comparison).
        implementation: Which implementation of the operations in `pallas_kernels` to use.
        lm_head_bits: 8 rounds the weights of the output head to 8 bits as the model is built, and runs it with int8
            activations in two terms; a tied one becomes a weight of its own, or shares that of an 8-bit embedding.
        embedding_bits: 8 rounds the embedding to 8 bits as the model is built.
    """

    dtype: DTypeLike = jnp.float32
    activation_bits: Literal[8, 16] = 8
    implementation: str = "auto"
    lm_head_bits: Literal[8, 16] = 16
    embedding_bits: Literal[8, 16] = 16


def check_parameters(config: ModelConfig, part: str, parameters: Parameters) -> None:
    """Checks names and shapes of one part against the configuration.

    A `final` part may carry a `lm_head.weight` although embeddings are tied: a quantised head of its own.

    Raises:
        CheckpointError: Lists all missing, unexpected and mis-shaped parameters at once.
    """
    expected = config.part_shapes(part)
    problems = [f"missing {path} {shape}" for path, shape in expected.items() if path not in parameters]
    if part == "final":
        expected.setdefault("lm_head.weight", (config.vocab_size, config.hidden_size))
    for path, value in parameters.items():
        if path not in expected:
            problems.append(f"unexpected {path} {tuple(value.shape)}")
        elif tuple(value.shape) != expected[path]:
            problems.append(f"{path} has shape {tuple(value.shape)}, expected {expected[path]}")
    if problems:
        raise CheckpointError(f"part {part!r} does not fit the model configuration: " + "; ".join(problems))
