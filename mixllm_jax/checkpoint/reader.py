"""Reads a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixllm_jax.checkpoint.layout import FORMAT_VERSION, KINDS, METADATA_FILE, Part, describe, unflatten
from mixllm_jax.checkpoint.storage import load_arrays
from mixllm_jax.errors import CheckpointError
from mixllm_jax.models.config import ModelConfig


class CheckpointReader:
    """Reads a model folder, float or quantised.

    Attributes:
        path: the folder.
        metadata: the content of `mixllm.json`.
        config: the model configuration.

    Raises:
        CheckpointError: not a model folder, a newer format version, or parts are missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.metadata = _read_metadata(self.path)
        try:
            self.config = ModelConfig.from_dict(self.metadata["config"])
        except CheckpointError as error:
            raise CheckpointError(f"{self.path / METADATA_FILE}: {error}") from error
        parts = self.metadata["parts"]
        if self.config.num_layers > len(parts):  # before as many names are made as the number says
            raise CheckpointError(
                f"{self.path}: {METADATA_FILE} says {self.config.num_layers} layers and lists {len(parts)} parts. "
                "The folder is damaged: copy it again, or convert or quantize the model again."
            )
        expected = self.config.part_names()
        missing = [n for n in expected if n not in parts or not (self.path / "parts" / n).is_dir()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(expected)} parts are missing: {', '.join(missing)}. "
                "The folder is incomplete: copy it again, or convert or quantize the model again."
            )

    @property
    def kind(self) -> str:
        """`float` or `quantized`."""
        return str(self.metadata["kind"])

    def read_part(self, name: str) -> Part:
        """Reads one part, and checks every array against `mixllm.json`.

        Raises:
            CheckpointError: an array is missing, cut short, or not the one that was written with this folder.
        """
        entry = self.metadata["parts"][name]
        descriptions = entry["arrays"]
        where = self.path / "parts" / name
        empty = {k: np.zeros(d["shape"], d["dtype"]) for k, d in descriptions.items()}
        try:
            arrays = load_arrays(where, {key: value for key, value in empty.items() if value.size})
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            culprit = next((f"array {k!r}" for k in descriptions if f"/{k}/" in str(error)), "an array")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{where}: {culprit} cannot be read; the file is missing or damaged. Copy the folder again, or "
                f"convert or quantize the model again. ({reason})"
            ) from error
        arrays = {key: arrays.get(key, value) for key, value in empty.items()}
        for key, value in arrays.items():
            if (found := describe(value)) != descriptions[key]:
                raise CheckpointError(
                    f"{where}: array {key!r} is not the one written with this folder: {METADATA_FILE} says "
                    f"{descriptions[key]}, the file has {found}. Parts of two models are mixed, or the file is "
                    "damaged: copy the folder again, or convert or quantize the model again."
                )
        return unflatten(arrays, entry["packed"])

    def read_parts(self, workers: int = 4) -> Iterator[tuple[str, Part]]:
        """Reads all parts in the order of the forward pass, a few ahead of the caller."""
        names = self.config.part_names()
        with ThreadPoolExecutor(workers) as pool:
            pending = {name: pool.submit(self.read_part, name) for name in names[:workers]}
            for i, name in enumerate(names):
                part = pending.pop(name).result()
                if i + workers < len(names):  # at most `workers` parts wait in memory
                    pending[names[i + workers]] = pool.submit(self.read_part, names[i + workers])
                yield name, part


def _read_metadata(path: Path) -> dict[str, Any]:
    """Reads and checks `mixllm.json`."""
    file = path / METADATA_FILE
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder. Give the folder of a converted or quantized model.")
    if not file.is_file():
        remedy = "Give the folder of a converted or quantized model."
        if (path / "config.json").is_file():
            remedy = f"It looks like a Hugging Face checkpoint: run `convert --from-hf {path} --out DIR` first."
        raise CheckpointError(f"{path} is not a model folder: it has no {METADATA_FILE}. {remedy}")
    try:
        metadata = json.loads(file.read_bytes())
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Copy the folder again.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads version {FORMAT_VERSION}. "
            "Update mixllm-jax (pip install -U mixllm-jax), or convert the model again with this version."
        )
    if metadata.get("kind") not in KINDS:
        raise CheckpointError(f"{file}: kind is {metadata.get('kind')!r}, expected one of {', '.join(KINDS)}.")
    well_formed = isinstance(metadata.get("parts"), dict) and isinstance(metadata.get("config"), dict)
    if not well_formed:
        raise CheckpointError(
            f"{file} is damaged: 'parts' or 'config' (with 'num_layers') is missing. Copy the folder again."
        )
    return metadata
