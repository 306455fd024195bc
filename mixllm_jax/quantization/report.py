"""What a quantised model came to: bits per weight, sizes, and where the 8-bit channels are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mixllm_jax.models.config import LINEAR_NAMES, ModelConfig
from mixllm_jax.quantization.allocation import Segment

_SCALE_BITS = 16
_ZERO_POINT_BITS = 8


def model_segments(config: ModelConfig) -> list[Segment]:
    """The projections of all blocks in the order of the score vector: by layer, linear, segment."""
    return [
        Segment(layer, name, kind, channels, config.linear_shape(name)[1])
        for layer in range(config.num_layers)
        for name in LINEAR_NAMES
        for kind, channels in config.linear_segments(name)
    ]


@dataclass(frozen=True)
class QuantizationReport:
    """Facts about a quantised model; shares are of 8-bit channels or weights among the quantised linears'.

    Attributes:
        bits_per_weight: stored bits per weight of the quantised linears, scales and zero points included.
        channel_share: 8-bit share of the output channels (the budget that was asked for).
        weight_share: 8-bit share of the weights; channels of long rows count more here.
        share_by_kind: 8-bit share of the channels of each projection (q, k, v, o, gate, up, down) over all layers.
        share_by_layer: the same for each layer.
        linear_bytes: stored bytes of the quantised linears.
        linear_bytes_16bit: their bytes at 16 bits per weight.
        other_bytes_16bit: embedding, head and norms at 16 bits per weight; they are not quantised.
    """

    bits_per_weight: float
    channel_share: float
    weight_share: float
    share_by_kind: Mapping[str, float]
    share_by_layer: Sequence[Mapping[str, float]]
    linear_bytes: int
    linear_bytes_16bit: int
    other_bytes_16bit: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in ``mixllm.json`` under ``quantization_report``."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationReport":
        """Inverse of :meth:`to_dict`."""
        return cls(**values)


def make_report(config: ModelConfig, eight_bit: np.ndarray, group_size: int) -> QuantizationReport:
    """Counts.

    Args:
        config: model configuration.
        eight_bit: bool [channels], in the order of :func:`model_segments`.
        group_size: input channels that share a scale.
    """
    segments = model_segments(config)
    bounds = np.cumsum([0] + [segment.channels for segment in segments])
    chosen = [int(eight_bit[a:b].sum()) for a, b in pairwise(bounds)]
    kinds = list(dict.fromkeys(segment.kind for segment in segments))
    by_layer: list[dict[str, float]] = [{} for _ in range(config.num_layers)]
    total_of_kind, chosen_of_kind = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    weights = eight_bit_weights = bits = 0
    for segment, count in zip(segments, chosen, strict=True):
        by_layer[segment.layer][segment.kind] = count / segment.channels
        total_of_kind[segment.kind] += segment.channels
        chosen_of_kind[segment.kind] += count
        weights += segment.channels * segment.in_features
        eight_bit_weights += count * segment.in_features
        groups = segment.in_features // group_size
        bits += (segment.channels - count) * (4 * segment.in_features + groups * (_SCALE_BITS + _ZERO_POINT_BITS))
        bits += count * (8 * segment.in_features + groups * _SCALE_BITS)
    all_parameters = sum(
        int(np.prod(shape)) for part in config.part_names() for shape in config.part_shapes(part).values()
    )
    return QuantizationReport(
        bits_per_weight=bits / weights,
        channel_share=sum(chosen) / int(bounds[-1]),
        weight_share=eight_bit_weights / weights,
        share_by_kind={kind: chosen_of_kind[kind] / total_of_kind[kind] for kind in kinds},
        share_by_layer=by_layer,
        linear_bytes=bits // 8,
        linear_bytes_16bit=2 * weights,
        other_bytes_16bit=2 * (all_parameters - weights),
    )


def format_report(report: QuantizationReport) -> str:
    """A few lines for a terminal."""
    shares = "  ".join(f"{kind} {100 * share:.1f}" for kind, share in report.share_by_kind.items())
    linears, linears16 = report.linear_bytes, report.linear_bytes_16bit
    whole, whole16 = linears + report.other_bytes_16bit, linears16 + report.other_bytes_16bit
    rest = "embedding, head and norms at 16 bits"
    return "\n".join(
        [
            f"bits per weight      {report.bits_per_weight:.3f} (with scales and zero points)",
            f"8-bit share          {100 * report.channel_share:.2f} % of the output channels, "
            f"{100 * report.weight_share:.2f} % of the weights",
            f"8-bit channels in %  {shares}",
            f"quantized linears    {format_size(linears)}, at 16 bits {format_size(linears16)}",
            f"whole model          {format_size(whole)}, at 16 bits {format_size(whole16)} ({rest})",
        ]
    )


def format_size(count: int) -> str:
    """Bytes for a person: ``4.92 GB``, ``538.1 MB``, ``83.4 kB``."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1)):
        if count >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count / 1e3:.1f} kB"
