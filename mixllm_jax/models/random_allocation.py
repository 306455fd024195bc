"""Where a model of random weights has its 8-bit channels: everywhere alike, or as the global allocation spreads them.

A real checkpoint's layers differ in their numbers of 8-bit channels: values and the last projection have many, gate
hardly any, first and last layers more than those between. Kernels are compiled for these numbers, programs are cut by
them (`generation/prefill.py`) and 8-bit columns lie where they lie, so speed may depend on them.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any, Literal

import numpy as np

from mixllm_jax.models.config import LINEAR_NAMES, ModelConfig

RandomAllocation = Literal["uniform", "realistic"]
"""`uniform`: the same share of every linear; `realistic`: shares by projection and depth as SmolLM2-135M has them."""

Channels = tuple[tuple[int, int], ...]
"""Of the parts of a linear one after the other: output channels, and how many of them have 8 bits."""

_LEAST_SHARE = 1e-4
"""A measured share of nothing or everything may become more or less where the total is another."""


def uniform_channels(out_features: int, share: float) -> Channels:
    """The same share of every linear, wherever in it."""
    return ((out_features, round(share * out_features)),)


@functools.cache
def realistic_channels(config: ModelConfig, share: float) -> tuple[dict[str, Channels], ...]:
    """8-bit channels of every linear of every layer, `share` of all in the whole model.

    The measured shares are taken at the same relative depth. Their odds are multiplied by one factor, so that the total
    comes out: shares stay between nothing and everything, and in their order.

    Args:
        config: the model.
        share: of all output channels of the quantised linears.

    Returns:
        By layer and name of the linear.
    """
    segments = [(layer, name, *part) for layer in range(config.num_layers) for name in LINEAR_NAMES
                for part in config.linear_segments(name)]  # fmt: skip
    sizes = np.asarray([channels for *_, channels in segments], np.float64)
    measured = np.asarray([_share_at(kind, layer, config.num_layers) for layer, _, kind, _ in segments])
    wanted = round(share * int(sizes.sum()))
    counts = _rounded(sizes * _with_total(measured, sizes, wanted), wanted)
    layers: list[dict[str, Channels]] = [{} for _ in range(config.num_layers)]
    for (layer, name, _, channels), count in zip(segments, counts, strict=True):
        layers[layer][name] = (*layers[layer].get(name, ()), (channels, int(count)))
    return tuple(layers)


def _share_at(kind: str, layer: int, num_layers: int) -> float:
    shares = _measured()["shares"][kind]
    depth = layer / (num_layers - 1) if num_layers > 1 else 0.5
    return float(np.interp(depth * (len(shares) - 1), np.arange(len(shares)), shares))


@functools.cache
def _measured() -> dict[str, Any]:
    file = importlib.resources.files("mixllm_jax") / "data" / "allocation_smollm2.json"
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def _with_total(shares: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """The shares with their odds multiplied by what makes `wanted` channels of them."""
    if wanted in (0, int(sizes.sum())):
        return np.full_like(shares, float(wanted > 0))
    odds = np.clip(shares, _LEAST_SHARE, 1 - _LEAST_SHARE)
    odds = odds / (1 - odds)
    low, high = -40.0, 40.0  # the logarithm of the factor
    for _ in range(100):
        middle = (low + high) / 2
        factored = odds * np.exp(middle)
        scaled = factored / (1 + factored)
        low, high = (middle, high) if (scaled * sizes).sum() < wanted else (low, middle)
    return np.asarray(scaled)


def _rounded(counts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with this sum: those with the largest remainders are rounded up."""
    whole = np.floor(counts).astype(np.int64)
    whole[np.argsort(whole - counts, kind="stable")[: total - int(whole.sum())]] += 1
    return whole
