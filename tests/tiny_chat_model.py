"""A tiny random chat model as `transformers` saves one: weights, tokenizer, chat template."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token a byte, as byte-level vocabularies fall back to; id 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)


def save_tiny_chat_model(folder: Path, seed: int = 0) -> None:
    """Saves a random float32 Llama model with its tokenizer; needs no torch."""
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    hidden, intermediate, kv, vocab = 64, 96, 32, 257
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    ).save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "o")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (kv, hidden) for name in ("k", "v")}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    generator = np.random.default_rng(seed)
    weights = {
        name: (generator.normal(1.0 if "norm" in name else 0.0, 0.1, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)


def reference_model(folder: Path) -> Any:
    """The saved model as `transformers` runs it."""
    pytest.importorskip("torch", reason="the reference model needs torch")
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()
