"""``salience.npz``: the scores of a model, kept so that another bit budget needs no new scoring."""

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import CheckpointError, OptionError

SALIENCE_FILE = "salience.npz"


@dataclasses.dataclass(frozen=True)
class SalienceScores:
    """Scores with what they depend on.

    Attributes:
        scores: float32 [channels], by layer, linear, channel.
        model: :func:`model_fingerprint` of the float model.
        group_size: of the rounding whose effect they estimate.
        calibration: fingerprint of the calibration sequences.
    """

    scores: np.ndarray
    model: str
    group_size: int
    calibration: str

    def to_bytes(self) -> bytes:
        """The content of the file; equal scores give equal bytes."""
        content = io.BytesIO()
        np.savez(
            content,
            scores=self.scores,
            model=np.array(self.model),
            group_size=np.array(self.group_size),
            calibration=np.array(self.calibration),
        )
        return content.getvalue()

    @classmethod
    def read(cls, path: str | Path) -> "SalienceScores":
        """Reads a file, or the file in a quantised model folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = Path(path)
        file = path / SALIENCE_FILE if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file. Salience is saved where a model was quantized to between 4 and 8 bits with "
                "global or per-layer allocation; without --salience it is computed"
            )
        try:
            with np.load(file) as arrays:
                return cls(
                    arrays["scores"].astype(np.float32),
                    str(arrays["model"]),
                    int(arrays["group_size"]),
                    str(arrays["calibration"]),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(
                f"{file} is damaged, or not the salience file of a quantized model; leave --salience out to compute it"
            ) from error

    def check_fits(self, model: str, channels: int, group_size: int) -> None:
        """Checks that the scores are those of this model and group size.

        Raises:
            OptionError: they are not.
        """
        if self.model != model or len(self.scores) != channels:
            raise OptionError("--salience: these scores were computed on another model; leave the option out")
        if self.group_size != group_size:
            raise OptionError(
                f"--salience: these scores are for groups of {self.group_size}, not {group_size}; "
                f"use --group-size {self.group_size} or leave --salience out"
            )
        if not np.isfinite(self.scores).all():
            raise CheckpointError("--salience: the scores are not finite; compute them again")


def model_fingerprint(reader: CheckpointReader) -> str:
    """Identifies a model folder by its configuration and the checksums of all its arrays."""
    content = {"config": reader.metadata["config"], "parts": reader.metadata["parts"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokens_fingerprint(tokens: np.ndarray) -> str:
    """Identifies calibration sequences, int32 [samples, sequence_length]."""
    return hashlib.sha256(repr(tokens.shape).encode() + np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()
