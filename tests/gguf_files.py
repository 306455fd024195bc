"""Writes small GGUF files for tests, the way llama.cpp's converter does."""

import gguf
import numpy as np

from convert import names

KEYS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """`model.layers.0.mlp.up_proj.weight` as `blk.0.ffn_up.weight`."""
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"blk.{layer}."
    return f"{prefix}{KEYS[module]}.{kind}"


def interleave(rows, heads):
    """llama.cpp's row order for its rotary embedding: the two halves of each head alternate."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, config, tensors, architecture="llama", kind="F32", metadata=None, tokens=None):
    """Writes Hugging Face tensors of a model as a GGUF file.

    Args:
        config: our ModelConfig.
        tensors: Hugging Face names to float32 arrays.
        architecture: llama, qwen2 or qwen3.
        kind: type of the matrices; vectors are float32.
        metadata: keys (without the architecture) to change; None removes one.
        tokens: a function that adds the tokenizer to the writer; by default a vocabulary of numbers.
    """
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{architecture}.{key}", value)
    (tokens or number_tokens(config.vocab_size))(writer)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        if architecture == "llama" and ".q_proj." in name:
            tensor = interleave(tensor, config.num_heads)
        if architecture == "llama" and ".k_proj." in name:
            tensor = interleave(tensor, config.num_kv_heads)
        if tensor.ndim == 2 and kind != "F32":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(names_or_same(name), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def names_or_same(name):
    """The GGUF name of a Hugging Face tensor; a name that is GGUF's already stays."""
    return name if name == "rope_freqs.weight" else gguf_name(name)


def number_tokens(count):
    """A byte-level vocabulary of numbers with a single merge."""

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([str(i) for i in range(count)])
        writer.add_token_types([gguf.TokenType.NORMAL] * count)
        writer.add_token_merges(["1 2"])

    return add


def random_tensors(config, seed=0):
    """Float32 tensors of a model under their Hugging Face names."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in names.expected_tensors(names.HUGGING_FACE, config).items()
    }
