"""Activations of the calibration sequences in files of the work folder, written so that a file is whole or absent."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mixllm_jax.errors import StorageError


class ActivationStore:
    """Arrays ``[sequences, ...]`` by name, written and read in batches of sequences.

    Files are NumPy's ``.npy``; bfloat16, which that format does not know, is stored as its bits.

    Writing raises StorageError where the disk is full or cannot be written.

    Args:
        folder: where the files are; it must exist.
        dtype: NumPy dtype of all arrays.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._stored_dtype = np.dtype(np.uint16) if self._dtype.name == "bfloat16" else self._dtype

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self._folder / f"{name}.npy"

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def write(self, name: str, shape: tuple[int, ...], batches: Iterable[np.ndarray]) -> None:
        """Writes an array of ``shape`` from consecutive batches along its first axis, replacing one of that name."""
        partial = self.path(name).with_suffix(".partial")
        with _readable_errors(partial), partial.open("wb") as file:
            header = {"descr": self._stored_dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(np.ascontiguousarray(batch, dtype=self._dtype).view(self._stored_dtype).data)
            file.flush()
            os.fsync(file.fileno())
            partial.rename(self.path(name))

    def read(self, name: str, batch: int) -> Iterator[np.ndarray]:
        """Yields the array in batches of ``batch`` sequences, each read from the file when asked for."""
        array = np.load(self.path(name), mmap_mode="r")
        for start in range(0, len(array), batch):
            yield np.array(array[start : start + batch]).view(self._dtype)

    def delete(self, name: str) -> None:
        """Deletes an array, if it is there."""
        self.path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}. The work folder needs room for the activations of all calibration "
            "sequences at every block: free some space, or choose fewer --samples or an --out on another disk. "
            "The same command goes on where it stopped"
        ) from error
