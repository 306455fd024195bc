"""Small `transformers` models with random weights: the models we did not write, to hold ours against."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,  # so low that the six frequencies spread over all three ranges of the scheme
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: `transformers` configuration class and the settings that make it what it is."""

    config_class: str
    settings: dict[str, Any]

    def build(self, seed: int = 0) -> Any:
        """A float32 torch model; every parameter is random, biases and norm weights too."""
        torch = pytest.importorskip("torch", reason="the reference models need torch")
        import transformers

        config = getattr(transformers, self.config_class)(**(COMMON | self.settings))
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        return model.eval()


FAMILIES = {
    "llama2": Family("LlamaConfig", {}),
    "llama3.1": Family("LlamaConfig", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama3.2": Family(
        "LlamaConfig",
        {"num_key_value_heads": 3, "head_dim": 20, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-linear-rope": Family(
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}
    ),
    "llama-biases": Family("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "smollm2": Family(
        "LlamaConfig",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": Family("MistralConfig", {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5}),
    "mistral-full": Family("MistralConfig", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": Family("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-sliding": Family(
        "Qwen2Config",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": Family("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-biases": Family("Qwen3Config", {"num_key_value_heads": 6, "head_dim": 10, "attention_bias": True}),
}


@functools.cache
def saved_model(family: str) -> tuple[Any, Path]:
    """The reference model of a family and the folder that `save_pretrained` wrote; built once a test run."""
    model = FAMILIES[family].build()
    folder = Path(tempfile.mkdtemp(prefix=f"mixllm-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    return model, folder


def reference_logits(model: Any, tokens: list[int]) -> Any:
    """Logits `[length, vocab]` of one unpadded prompt, without a cache, as a NumPy array."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()
