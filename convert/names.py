"""Names of tensors in foreign checkpoints; the one place that knows them.

A parameter of ours may be several of theirs, concatenated along the output channels (q, k, v; gate, up).
"""

import dataclasses
from collections.abc import Mapping

from convert.tensors import Shape
from mixllm_jax.models.config import LINEAR_PATHS, ModelConfig


@dataclasses.dataclass(frozen=True)
class Naming:
    """The naming scheme of one kind of checkpoint.

    Attributes:
        layer_prefix: Prefix of a layer's tensors, with `{layer}` for its number.
        modules: From the module paths of a checkpoint part to the foreign modules that make it up, in order.
        ignored: Regular expressions of tensors that carry no information of their own.
        ignored_when_tied: The same, for models with tied embeddings.
    """

    layer_prefix: str
    modules: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    ignored_when_tied: tuple[str, ...]


HUGGING_FACE = Naming(
    layer_prefix="model.layers.{layer}.",
    modules={
        "embed": ("model.embed_tokens",),
        "norm": ("model.norm",),
        "lm_head": ("lm_head",),
        "attention_norm": ("input_layernorm",),
        "mlp_norm": ("post_attention_layernorm",),
        "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.o_proj": ("self_attn.o_proj",),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
    # Old checkpoints store the rotary frequencies, which follow from the configuration.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    ignored_when_tied=(r"lm_head\.weight",),
)

GGUF = Naming(
    layer_prefix="blk.{layer}.",
    modules={
        "embed": ("token_embd",),
        "norm": ("output_norm",),
        "lm_head": ("output",),
        "attention_norm": ("attn_norm",),
        "mlp_norm": ("ffn_norm",),
        "attention.qkv_proj": ("attn_q", "attn_k", "attn_v"),
        "attention.o_proj": ("attn_output",),
        "attention.q_norm": ("attn_q_norm",),
        "attention.k_norm": ("attn_k_norm",),
        "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
        "mlp.down_proj": ("ffn_down",),
    },
    # The rope factors have become part of the configuration (`gguf_config`).
    ignored=(r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd"),
    ignored_when_tied=(),
)


def part_sources(naming: Naming, config: ModelConfig, part: str) -> dict[str, tuple[tuple[str, Shape], ...]]:
    """For every parameter of a checkpoint part, the foreign tensors (name, shape) to concatenate along axis 0."""
    prefix = naming.layer_prefix.format(layer=int(part.removeprefix("layer_"))) if part.startswith("layer_") else ""
    linear_of_path = {path: name for name, path in LINEAR_PATHS.items()}
    sources = {}
    for path, shape in config.part_shapes(part).items():
        module, kind = path.rsplit(".", 1)
        names = [f"{prefix}{foreign}.{kind}" for foreign in naming.modules[module]]
        rows = [shape[0]]
        if module in linear_of_path:
            rows = [channels for _, channels in config.linear_segments(linear_of_path[module])]
        sources[path] = tuple((name, (count, *shape[1:])) for name, count in zip(names, rows, strict=True))
    return sources


def expected_tensors(naming: Naming, config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    return {
        name: shape
        for part in config.part_names()
        for sources in part_sources(naming, config, part).values()
        for name, shape in sources
    }


def ignored_tensors(naming: Naming, config: ModelConfig) -> tuple[str, ...]:
    """Regular expressions of the tensors that may be there and are not needed."""
    return naming.ignored + (naming.ignored_when_tied if config.tie_word_embeddings else ())
