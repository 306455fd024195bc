"""From a Hugging Face `config.json` to a `ModelConfig`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixllm_jax.errors import CheckpointError, UnsupportedModelError
from mixllm_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Supported classes of `transformers` and their `model_type`."""

_SUPPORTED = (
    "supported are "
    + ", ".join(ARCHITECTURES)
    + " (Llama 2 to 3.2, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5, Qwen3)"
)
_ROPE_TYPES = ("default", "linear", "llama3")


def read_config(folder: Path) -> ModelConfig:
    """Reads and translates `config.json`.

    Raises:
        CheckpointError: There is none, it is no JSON object, or its values cannot be right.
        UnsupportedModelError: The model is of a kind we do not run; the message lists what is supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is no Hugging Face checkpoint: it has no config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(values).__name__}")
    try:
        return translate_config(values)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def translate_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translates the content of a `config.json`; for the errors see `read_config`."""
    model_type = _require_supported(values)
    hidden_size, num_heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    num_layers = _integer(values, "num_hidden_layers")
    # transformers' configurations of Qwen3 set the head size apart from hidden_size / heads.
    default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    max_positions = _integer(values, "max_position_embeddings", 2048 if model_type == "llama" else 32768)
    theta, scaling = _rope(values, max_positions)
    window, full_attention_layers = _sliding_window(values, model_type, num_layers)
    attention_bias = _boolean(values, "attention_bias") and model_type in ("llama", "qwen3")
    return ModelConfig(
        architecture=model_type,
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(values, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_integer(values, "num_key_value_heads", 8 if model_type == "mistral" else num_heads),
        head_dim=_integer(values, "head_dim", default_head_dim),
        max_position_embeddings=max_positions,
        norm_epsilon=_number(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_boolean(values, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=_boolean(values, "mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
        sliding_window=window,
        full_attention_layers=full_attention_layers,
    )


def _require_supported(values: Mapping[str, Any]) -> str:
    """Checks everything that would change the arithmetic in a way we do not have; returns the model type."""
    model_type, classes = values.get("model_type"), values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"architectures must be a list of names, found {classes!r}")
    known_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
    name = classes[0] if classes else known_type.get(str(model_type))
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"unsupported architecture {name or model_type!r}; {_SUPPORTED}")
    if model_type not in (None, ARCHITECTURES[name]):
        raise UnsupportedModelError(f"unsupported model_type {model_type!r} of architecture {name!r}; {_SUPPORTED}")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModelError(
            f"the checkpoint is already quantized (quant_method {method!r}); start from the float16 or bfloat16 model"
        )
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"unsupported activation function {activation!r}; supported is silu")
    return ARCHITECTURES[name]


def _rope(values: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Rope base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(f"unsupported rope parameters {rope!r}: one set for all layers is expected")
    theta = _number({"rope_theta": 10000.0, **values, **rope}, "rope_theta")
    if not theta > 0:
        raise CheckpointError(f"rope_theta must be a positive number, found {theta!r}")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"unsupported partial_rotary_factor {partial}: only 1.0 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(f"unsupported rope type {kind!r}; supported are {', '.join(_ROPE_TYPES)}")
    factor = _number(rope, "factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    return theta, RopeScaling(
        "llama3",
        factor,
        low_frequency_factor=_number(rope, "low_freq_factor"),
        high_frequency_factor=_number(rope, "high_freq_factor"),
        original_max_positions=_integer(rope, "original_max_position_embeddings", max_positions),
    )


def _sliding_window(values: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers that ignore it.

    Mistral uses the window everywhere; Qwen only where `use_sliding_window` is set, and then from layer
    `max_window_layers` on, unless `layer_types` says otherwise.
    """
    if model_type == "mistral":
        return (None if values.get("sliding_window", 4096) is None else _integer(values, "sliding_window", 4096)), ()
    if model_type == "llama" or not _boolean(values, "use_sliding_window"):
        return None, ()
    if values.get("sliding_window", 4096) is None:
        return None, ()
    window = _integer(values, "sliding_window", 4096)
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = _integer(values, "max_window_layers", 28, least=0)
        return window, tuple(range(min(first, num_layers)))
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or any(k not in kinds for k in layer_types):
        raise CheckpointError(
            f"layer_types must name full_attention or sliding_attention for each of {num_layers} layers, "
            f"found {layer_types}"
        )
    return window, tuple(i for i, kind in enumerate(layer_types) if kind == "full_attention")


def _integer(values: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise CheckpointError(f"{key} must be {kind}, found {'nothing' if value is None else repr(value)}")
    return value


def _boolean(values: Mapping[str, Any], key: str) -> bool:
    """Whether a setting is on; absent and null are off."""
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key} must be true or false, found {value!r}")
    return bool(value)


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{key} must be a number, found {'nothing' if value is None else repr(value)}")
    return float(value)
