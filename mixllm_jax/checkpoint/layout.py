"""Names in a model folder, and the flat arrays of a part."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import ml_dtypes  # noqa: F401  (registers the name "bfloat16" with NumPy)
import numpy as np

from pallas_kernels.packing import PackedWeight

FORMAT_VERSION = 1
METADATA_FILE = "mixllm.json"
KINDS = ("float", "quantized")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with a tokenizer has at least one of these."""

Part: TypeAlias = dict[str, "np.ndarray | PackedWeight"]

_PACKED_ARRAYS = ("codes4", "scales4", "zero_points4", "codes8", "scales8", "channel_order")


def flatten(part: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
    """Splits packed weights into arrays named `NAME.codes4` etc., and what is left to describe them."""
    arrays: dict[str, np.ndarray] = {}
    packed: dict[str, dict[str, int]] = {}
    for key, value in sorted(part.items()):
        if isinstance(value, PackedWeight):
            packed[key] = {"group_size": value.group_size}
            arrays |= {f"{key}.{field}": np.asarray(getattr(value, field)) for field in _PACKED_ARRAYS}
        else:
            arrays[key] = np.asarray(value)
    return {key: np.ascontiguousarray(value) for key, value in arrays.items()}, packed


def unflatten(arrays: dict[str, np.ndarray], packed: Mapping[str, Mapping[str, int]]) -> Part:
    """The inverse of `flatten`."""
    part: Part = dict(arrays)
    for key, settings in packed.items():
        fields = {field: part.pop(f"{key}.{field}") for field in _PACKED_ARRAYS}
        part[key] = PackedWeight(**fields, group_size=settings["group_size"])
    return part


def describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and CRC-32 of an array, as `mixllm.json` records them."""
    crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) if array.size else 0
    return {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": crc}
