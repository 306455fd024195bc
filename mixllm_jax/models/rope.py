"""Rotary position embedding (arXiv 2104.09864) in the half-split layout, with `linear` and `llama3` scaling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixllm_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """The rotation of each token of a batch; computed once a forward pass and shared by all layers.

    Attributes:
        positions: int32 `[batch, length]`.
        cos, sin: float32 `[batch, length, head_dim / 2]`.
    """

    positions: Int[Array, "batch length"]
    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of channels: float32 `[head_dim / 2]`, computed in float64."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # How often a channel pair turns within the original context decides: few turns, scaled; many turns, kept.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotary_embedding(config: ModelConfig, positions: Int[Array, "batch length"]) -> RotaryEmbedding:
    """Tables for int32 `positions`; the angles are float32 whatever the compute dtype."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return RotaryEmbedding(positions, jnp.cos(angles), jnp.sin(angles))
