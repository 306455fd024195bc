"""Configurations of well-known models by name, for random weights and benchmarks where no checkpoint is at hand."""

from mixllm_jax.errors import OptionError
from mixllm_jax.models.config import ModelConfig, RopeScaling


def _llama3(
    hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, factor: float, *, tied: bool
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor),
        tie_word_embeddings=tied,
    )


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, *, tied: bool
) -> ModelConfig:
    return ModelConfig(
        architecture="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
        norm_epsilon=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        qkv_bias=True,
    )


PRESETS: dict[str, ModelConfig] = {
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, 8.0, tied=False),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 128, 8.0, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, 32.0, tied=True),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "qwen3-8b": ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        qk_norm=True,
    ),
    "mistral-7b": ModelConfig(
        architecture="mistral",
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        norm_epsilon=1e-5,
        rope_theta=1000000.0,
    ),
    "smollm2-135m": ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        norm_epsilon=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration of a model by name.

    Raises:
        OptionError: No model of this name; the message lists those there are.
    """
    if name not in PRESETS:
        raise OptionError(f"no model {name!r} is known by name; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
