"""From the metadata of a GGUF file to a `ModelConfig`."""

from typing import Any

import numpy as np

from convert.gguf_reader import GGUFReader
from mixllm_jax.errors import CheckpointError, UnsupportedModelError
from mixllm_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported values of `general.architecture` (Mistral, SmolLM2 and TinyLlama files say `llama`)."""


def read_config(reader: GGUFReader) -> ModelConfig:
    """Translates a file's metadata.

    Raises:
        CheckpointError: A value is missing or cannot be right.
        UnsupportedModelError: The model is of a kind we do not run; the message lists what is supported.
    """
    architecture = reader.metadata("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{reader.path}: unsupported architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)} "
            "(Mistral, SmolLM2 and TinyLlama files are 'llama')"
        )

    def value(key: str, kind: type, default: Any = None) -> Any:
        found = reader.metadata(f"{architecture}.{key}", default)
        if kind is float and isinstance(found, int):
            found = float(found)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise CheckpointError(
                f"{reader.path}: metadata {architecture}.{key} must be a single {kind.__name__}, found {found!r}"
            )
        return found

    if value("expert_count", int, 0):
        raise UnsupportedModelError(f"{reader.path}: mixture-of-experts models are not supported")
    hidden_size, num_heads = value("embedding_length", int), value("attention.head_count", int)
    if num_heads < 1:
        raise CheckpointError(f"{reader.path}: metadata {architecture}.attention.head_count must be positive")
    head_dim = value("attention.key_length", int, hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, int, head_dim) != head_dim:
            raise UnsupportedModelError(f"{reader.path}: {key} {value(key, int)} differs from the head size {head_dim}")
    embedding = reader.shapes.get("token_embd.weight", (0,))
    theta = value("rope.freq_base", float, 10000.0)
    window = value("attention.sliding_window", int, 0)
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=value("vocab_size", int, embedding[0]),
            hidden_size=hidden_size,
            intermediate_size=value("feed_forward_length", int),
            num_layers=value("block_count", int),
            num_heads=num_heads,
            num_kv_heads=value("attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            max_position_embeddings=value("context_length", int),
            norm_epsilon=value("attention.layer_norm_rms_epsilon", float),
            rope_theta=theta,
            rope_scaling=_rope_scaling(reader, architecture, theta, head_dim),
            tie_word_embeddings="output.weight" not in reader.shapes,
            # Which biases there are is a property of the tensors alone in this format.
            qkv_bias="blk.0.attn_q.bias" in reader.shapes,
            o_bias="blk.0.attn_output.bias" in reader.shapes,
            mlp_bias="blk.0.ffn_down.bias" in reader.shapes,
            qk_norm="blk.0.attn_q_norm.weight" in reader.shapes,
            sliding_window=window or None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{reader.path}: {error}") from error


def _rope_scaling(reader: GGUFReader, architecture: str, theta: float, head_dim: int) -> RopeScaling | None:
    """Scaling from the metadata (linear) or from the tensor of factors that llama3 scaling is stored as."""
    kind = reader.metadata(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in reader.shapes:
        return _llama3_scaling(reader, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        factor = reader.metadata(f"{architecture}.rope.scaling.factor", 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise CheckpointError(
                f"metadata {architecture}.rope.scaling.factor must be a positive number, found {factor!r}"
            )
        return RopeScaling("linear", float(factor))
    raise UnsupportedModelError(f"{reader.path}: unsupported rope scaling {kind!r}; supported are linear and llama3")


def _llama3_scaling(reader: GGUFReader, theta: float, head_dim: int) -> RopeScaling:
    """Recovers the settings of llama3 scaling, which the file holds only as a divisor of each frequency.

    All published models use 1, 4 and 8192 beside the factor; the divisors that follow from them are compared.
    """
    divisors = reader.read("rope_freqs.weight").astype(np.float64)
    scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    kept = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / (kept + (1 - kept) / scaling.factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{reader.path}: the rope factors in rope_freqs.weight are not those of Llama 3.1 and 3.2; other rope "
            "scaling is not supported"
        )
    return scaling
