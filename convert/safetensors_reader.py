"""Reads safetensors checkpoints, one file or shards with an index, without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.tensors import FLOAT_DTYPES, Shape
from mixllm_jax.errors import CheckpointError, UnsupportedModelError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsReader:
    """The tensors of one or several safetensors files.

    Opening checks every file's header against its size, so that damage shows before any work; the library rejects
    headers that are too long, that do not parse, or whose offsets overlap, leave gaps or lead beyond the file.

    Attributes:
        shapes: Every tensor's shape.

    Raises:
        CheckpointError: A file is damaged, or a tensor is in two files.
        UnsupportedModelError: A tensor is not float32, bfloat16 or float16.
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, Path] = {}
        wrong_dtypes = []
        for file in files:
            for name, shape, dtype in _read_header(file):
                if name in self._file_of:
                    raise CheckpointError(f"tensor {name} is both in {self._file_of[name]} and in {file}")
                if dtype not in _DTYPES:
                    wrong_dtypes.append(f"{name} ({dtype})")
                self.shapes[name] = shape
                self._file_of[name] = file
        if wrong_dtypes:
            raise UnsupportedModelError(
                f"{files[0].parent}: tensors of unsupported type: {', '.join(wrong_dtypes[:20])}"
                f"{' ...' if len(wrong_dtypes) > 20 else ''}; supported are {', '.join(FLOAT_DTYPES)}"
            )

    def read(self, name: str) -> np.ndarray:
        """One tensor; `CheckpointError` where the file cannot be read any more."""
        file = self._file_of[name]
        try:
            # Opened anew each time: what was read of a file stays mapped, and counts as memory, until it is closed.
            with safe_open(file, framework="numpy") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from error


def _read_header(file: Path) -> Iterator[tuple[str, Shape, str]]:
    """Name, shape and safetensors dtype of every tensor of a file."""
    try:
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
                view = handle.get_slice(name)
                yield name, tuple(view.get_shape()), view.get_dtype()
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file} ({size} bytes) is not a whole safetensors file: {error}. It was probably cut short or damaged on "
            "the way: download it again"
        ) from error


def read_index(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The shard files that an index lists, in order, and its map from tensor to file name.

    Raises:
        CheckpointError: The index is malformed, or shards are missing (all of them are listed).
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards: {error!r}") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: weight_map must map tensors to file names in the same folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}; download them"
        )
    return [index.parent / name for name in names], weight_map
