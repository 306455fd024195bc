"""Reads PyTorch `.bin` checkpoints; needs torch (the `torch` extra)."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from convert.tensors import FLOAT_DTYPES, Shape
from mixllm_jax.errors import CheckpointError, UnsupportedModelError


class TorchReader:
    """The tensors of one or several `pytorch_model*.bin` files, mapped into memory rather than read.

    Files are opened with `weights_only`, so a hostile pickle cannot run code.

    Attributes:
        shapes: Every tensor's shape.

    Raises:
        CheckpointError: torch is not installed, or a file is damaged or no plain dictionary of tensors.
        UnsupportedModelError: A tensor is not float32, bfloat16 or float16.
    """

    def __init__(self, files: list[Path]) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{files[0].parent} holds PyTorch .bin files only; reading them needs torch: "
                "pip install 'mixllm-jax[torch]', or use a checkpoint in safetensors format"
            ) from error
        self._torch = torch
        self._tensors: dict[str, Any] = {}
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"tensor {name} is in two files, the second is {file}")
                self._tensors[name] = tensor
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        tensor = self._tensors[name].contiguous()
        if tensor.dtype == self._torch.bfloat16:  # NumPy has no bfloat16 of its own: carry the bits over
            return tensor.view(self._torch.int16).numpy().view(FLOAT_DTYPES["bfloat16"])
        return tensor.numpy()

    def _load(self, file: Path) -> dict[str, Any]:
        torch = self._torch
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{file} is not a whole PyTorch weight file: {reason}. Download it again, or use a checkpoint in "
                "safetensors format"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"{file} does not hold a plain dictionary of tensors")
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in allowed]
        if wrong:
            raise UnsupportedModelError(
                f"{file}: tensors of unsupported type: {', '.join(wrong[:20])}; supported are {', '.join(FLOAT_DTYPES)}"
            )
        return tensors
