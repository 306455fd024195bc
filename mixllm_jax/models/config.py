"""The configuration of a Llama-family decoder, independent of where its checkpoint came from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mixllm_jax.errors import CheckpointError

LINEAR_NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linears of a block, in the order in which the block calls them."""

LINEAR_PATHS = {
    "qkv_proj": "attention.qkv_proj",
    "o_proj": "attention.o_proj",
    "gate_up_proj": "mlp.gate_up_proj",
    "down_proj": "mlp.down_proj",
}
"""Path of each linear within a block's checkpoint part."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies for contexts longer than the pre-training one.

    `linear` divides every frequency by `factor`; `llama3` divides the low ones, keeps the high ones and interpolates
    between (Llama 3.1's published scheme; the other three fields matter to it alone).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise CheckpointError(f"rope scaling kind must be 'linear' or 'llama3', found {self.kind!r}")
        if self.factor <= 0:
            raise CheckpointError(f"rope scaling factor must be positive, found {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise CheckpointError(
                "llama3 rope scaling needs 0 < low_frequency_factor < high_frequency_factor, found "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )
        if self.kind == "llama3" and self.original_max_positions < 1:
            raise CheckpointError(
                f"llama3 rope scaling needs original_max_positions >= 1, found {self.original_max_positions}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of a decoder.

    Attributes:
        architecture: Name of the family the checkpoint came from; informative only, the other fields decide.
        head_dim: Size of one attention head; need not be `hidden_size / num_heads`.
        max_position_embeddings: The longest context in tokens.
        qkv_bias, o_bias, mlp_bias: Whether these linears have a bias.
        qk_norm: Whether queries and keys go through an RMSNorm per head before the rotary embedding.
        sliding_window: A query sees the last this many positions, itself included; None for all.
        full_attention_layers: Layers that ignore the sliding window.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"model configuration: {field} must be a positive integer, found {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model configuration: num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"model configuration: head_dim must be even for rope, found {self.head_dim}")
        for field in ("norm_epsilon", "rope_theta"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not value > 0:
                raise CheckpointError(f"model configuration: {field} must be a positive number, found {value!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(
                f"model configuration: sliding_window must be at least 1, found {self.sliding_window}"
            )

    @property
    def query_size(self) -> int:
        """Output features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output features of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def linear_segments(self, name: str) -> tuple[tuple[str, int], ...]:
        """The parts that are concatenated along a linear's output channels: (segment name, channels), in order."""
        segments: dict[str, tuple[tuple[str, int], ...]] = {
            "qkv_proj": (("q", self.query_size), ("k", self.kv_size), ("v", self.kv_size)),
            "o_proj": (("o", self.hidden_size),),
            "gate_up_proj": (("gate", self.intermediate_size), ("up", self.intermediate_size)),
            "down_proj": (("down", self.hidden_size),),
        }
        return segments[name]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """`(out_features, in_features)` of one of `LINEAR_NAMES`."""
        in_features = {
            "qkv_proj": self.hidden_size,
            "o_proj": self.query_size,
            "gate_up_proj": self.hidden_size,
            "down_proj": self.intermediate_size,
        }[name]
        return sum(channels for _, channels in self.linear_segments(name)), in_features

    def linear_has_bias(self, name: str) -> bool:
        """Whether one of `LINEAR_NAMES` has a bias."""
        return {"qkv_proj": self.qkv_bias, "o_proj": self.o_bias}.get(name, self.mlp_bias)

    def window_of_layer(self, layer: int) -> int | None:
        """The sliding window of a layer in positions, None where it sees everything before."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def part_names(self) -> tuple[str, ...]:
        """The parts of a checkpoint in order: `embedding`, one per layer, `final`."""
        return ("embedding", *(layer_part_name(layer) for layer in range(self.num_layers)), "final")

    def part_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter of a checkpoint part (linears as float weights)."""
        if part == "embedding":
            return {"embed.weight": (self.vocab_size, self.hidden_size)}
        if part == "final":
            shapes: dict[str, tuple[int, ...]] = {"norm.weight": (self.hidden_size,)}
            if not self.tie_word_embeddings:
                shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
            return shapes
        shapes = {"attention_norm.weight": (self.hidden_size,), "mlp_norm.weight": (self.hidden_size,)}
        for name, path in LINEAR_PATHS.items():
            out_features, in_features = self.linear_shape(name)
            shapes[f"{path}.weight"] = (out_features, in_features)
            if self.linear_has_bias(name):
                shapes[f"{path}.bias"] = (out_features,)
        if self.qk_norm:
            shapes["attention.q_norm.weight"] = (self.head_dim,)
            shapes["attention.k_norm.weight"] = (self.head_dim,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives an equal configuration back."""
        return dataclasses.asdict(self) | {"full_attention_layers": list(self.full_attention_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: Keys are missing or unknown, or a value cannot be right.
        """
        values = dict(values)
        _require_fields(cls, values, "model configuration")
        if values.get("rope_scaling") is not None:
            scaling = dict(values["rope_scaling"])
            _require_fields(RopeScaling, scaling, "rope scaling")
            values["rope_scaling"] = RopeScaling(**scaling)
        values["full_attention_layers"] = tuple(values.get("full_attention_layers", ()))
        return cls(**values)


def layer_part_name(layer: int) -> str:
    """Name of the checkpoint part of a decoder layer, such as `layer_0003`."""
    return f"layer_{layer:04d}"


def _require_fields(kind: type, values: Mapping[str, Any], what: str) -> None:
    fields = dataclasses.fields(kind)
    unknown = sorted(set(values) - {field.name for field in fields})
    missing = sorted(
        field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values
    )
    if unknown or missing:
        raise CheckpointError(f"{what}: missing keys {missing}, unknown keys {unknown}")
