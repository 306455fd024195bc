"""Reads GGUF files: metadata and tensors, de-quantised one at a time."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.tensors import FLOAT_DTYPES, Shape
from mixllm_jax.errors import CheckpointError, UnsupportedModelError

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""Tensor types this reader takes."""


class GGUFReader:
    """One GGUF file.

    Attributes:
        path: The file.
        shapes: Every tensor's shape.

    Raises:
        CheckpointError: The file is not a whole GGUF file.
        UnsupportedModelError: A tensor has a type that is not in `TENSOR_TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # NumPy warns of overflowing sizes in damaged headers; they end in errors
                self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader trusts the file: damage shows as whatever NumPy raises
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF") from error
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} ({size} bytes) is not a whole GGUF file: {str(error) or type(error).__name__}. It was "
                "probably cut short or damaged on the way: download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        _check_extents(path, self._reader)
        wrong = [
            f"{t.name} ({t.tensor_type.name})" for t in self._reader.tensors if t.tensor_type.name not in TENSOR_TYPES
        ]
        if wrong:
            raise UnsupportedModelError(
                f"{path}: tensors of unsupported type: {', '.join(wrong[:20])}{' ...' if len(wrong) > 20 else ''}; "
                f"supported are {', '.join(TENSOR_TYPES)}"
            )
        # GGUF counts dimensions from the fastest one.
        self.shapes: dict[str, Shape] = {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()
        }
        # llama.cpp reorders the rows of q and k in files of this architecture (`_restore_rows`).
        self._heads = {}
        if self.metadata("general.architecture") == "llama":
            heads = self.metadata("llama.attention.head_count")
            self._heads = {"attn_q": heads, "attn_k": self.metadata("llama.attention.head_count_kv", heads)}

    def metadata(self, key: str, default: Any = None) -> Any:
        """A metadata value in Python types, `default` where there is none; `CheckpointError` where it is damaged."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        try:
            return field.contents()
        except Exception as error:
            raise CheckpointError(f"{self.path}: metadata {key} cannot be read: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor: float16 and bfloat16 as they are, everything else as float32 (which loses nothing)."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        # Read rather than taken from the library's memory map, which would grow to the size of the file.
        data = np.fromfile(self.path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
        data = data.view(tensor.data.dtype).reshape(tensor.data.shape)
        if kind == "F16":
            values = data
        elif kind == "BF16":
            values = data.view(FLOAT_DTYPES["bfloat16"])
        else:
            values = gguf.quants.dequantize(data, tensor.tensor_type)
        values = values.reshape(self.shapes[name])
        heads = self._heads.get(name.split(".")[2]) if name.startswith("blk.") else None
        return values if heads is None else _restore_rows(values, heads)


def _check_extents(path: Path, reader: gguf.GGUFReader) -> None:
    """Checks that the tensors' bytes lie behind the header and apart from each other, which the library does not."""
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise CheckpointError(
                f"{path}: the bytes of tensor {tensor.name} overlap another one's: the file is damaged"
            )
        end = tensor.data_offset + tensor.n_bytes


def _restore_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of llama.cpp, which pairs neighbouring rows of a head for its rotary embedding.

    Its row 2 i + j of a head is row i + j * head_dim / 2 of ours.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
