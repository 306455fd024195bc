"""Linear layers of well-known models, as the kernels see them: shared by the tuner, the benchmarks and the engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """Shapes `(out_features, in_features)` of the four linear layers of a decoder block."""

    qkv_proj: tuple[int, int]
    o_proj: tuple[int, int]
    gate_up_proj: tuple[int, int]
    down_proj: tuple[int, int]

    def as_dict(self) -> dict[str, tuple[int, int]]:
        """By layer name."""
        return dataclasses.asdict(self)


def decoder_shapes(
    hidden_size: int, intermediate_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
) -> LayerShapes:
    """The shapes that a Llama-like configuration gives; the names are those of Hugging Face."""
    return LayerShapes(
        qkv_proj=((num_heads + 2 * num_key_value_heads) * head_dim, hidden_size),
        o_proj=(hidden_size, num_heads * head_dim),
        gate_up_proj=(2 * intermediate_size, hidden_size),
        down_proj=(hidden_size, intermediate_size),
    )


MODELS: dict[str, LayerShapes] = {
    "llama-3.1-8b": decoder_shapes(4096, 14336, 32, 8, 128),
    "llama-3.1-70b": decoder_shapes(8192, 28672, 64, 8, 128),
    "qwen2.5-7b": decoder_shapes(3584, 18944, 28, 4, 128),
}


def parse_shape(text: str) -> tuple[int, int]:
    """`NxK` of a command line to `(out_features, in_features)`.

    Raises:
        ValueError: Something else.
    """
    n, cross, k = text.partition("x")
    if not (cross and n.isdigit() and k.isdigit()):
        raise ValueError(f"a shape is written NxK, such as 4096x14336; found {text!r}")
    return int(n), int(k)


def unique_shapes(models: list[str]) -> list[tuple[int, int]]:
    """The distinct shapes of these models, in order.

    Raises:
        ValueError: A model that is not in `MODELS`.
    """
    for model in models:
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}; choose from {', '.join(MODELS)}")
    return list(dict.fromkeys(shape for model in models for shape in MODELS[model].as_dict().values()))
