"""The accuracy table: one float model, quantised in all the ways that the method is compared with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import OptionError
from mixllm_jax.evaluation.perplexity import evaluate
from mixllm_jax.loading import load
from mixllm_jax.quantization.driver import quantize_checkpoint
from mixllm_jax.quantization.salience_file import SALIENCE_FILE, SalienceScores, model_fingerprint, tokens_fingerprint
from mixllm_jax.quantization.scheme import QuantizationScheme, share_of_bits

FLOAT_ROW = "float"
_TOOLS = ("mixllm-jax", "jax", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class AccuracyRow:
    """One way to quantise.

    Attributes:
        name: of the row.
        settings: fields of `QuantizationScheme` that are not the table's own.
    """

    name: str
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """Name of the row's model folder."""
        return self.name.lower().replace(" ", "_").replace(",", "")


ROWS = (
    AccuracyRow("RTN W4A16", {"eight_bit_share": 0.0, "method": "rtn", "activation_bits": 16}),
    AccuracyRow("RTN W4A8", {"eight_bit_share": 0.0, "method": "rtn"}),
    AccuracyRow("MixLLM W4A8", {"eight_bit_share": 0.0}),
    AccuracyRow("MixLLM W4.4A8", {"eight_bit_share": 0.1}),
    AccuracyRow("MixLLM W4.8A8", {"eight_bit_share": 0.2}),
    AccuracyRow("MixLLM W8A8", {"eight_bit_share": 1.0}),
    AccuracyRow("W4.4A8, per-layer allocation", {"eight_bit_share": 0.1, "allocation": "per-layer"}),
    AccuracyRow("W4.4A8, random allocation", {"eight_bit_share": 0.1, "allocation": "random"}),
    AccuracyRow("W4.4A8, rounding", {"eight_bit_share": 0.1, "method": "rtn"}),
)
"""The rows below `float`, in the order of the table."""


def rows_of_bits(bits: Sequence[float]) -> tuple[AccuracyRow, ...]:
    """The method at several budgets, each once, in rising order: a curve of perplexity over bits.

    Raises:
        OptionError: bits outside 4 to 8.
    """
    shares = sorted({share_of_bits(value) for value in bits})
    return tuple(AccuracyRow(f"MixLLM W{4 + 4 * share:g}A8", {"eight_bit_share": share}) for share in shares)


def quantize_rows(
    reader: CheckpointReader,
    base: QuantizationScheme,
    calibration: np.ndarray,
    work_dir: Path,
    rows: Sequence[AccuracyRow],
    announce: Callable[[str], None],
) -> None:
    """Quantises the model in every way that `work_dir` does not hold yet; the scores are computed once.

    Args:
        reader: the float model.
        base: settings that all rows share.
        calibration: int32 [samples, sequence_length].
        work_dir: gets one model folder for each row.
        rows: what to quantise to.
        announce: is told what begins.

    Raises:
        OptionError: a folder in `work_dir` holds the row of another model, calibration text or setting.
    """
    scores: SalienceScores | None = None
    # Rows that compute the scores come first: rows quantised before them could not reuse any.
    ordered = sorted(rows, key=lambda row: not dataclasses.replace(base, **row.settings).needs_salience)
    for number, row in enumerate(ordered, 1):
        scheme = dataclasses.replace(base, **row.settings)
        out = work_dir / row.folder
        tokens = calibration if scheme.needs_calibration else None
        if out.exists():
            _check_row(out, reader, scheme, tokens)
        else:
            announce(f"{row.name} ({number} of {len(rows)})")
            quantize_checkpoint(reader, out, scheme, tokens, salience=scores if scheme.needs_salience else None)
        if scores is None and (out / SALIENCE_FILE).exists():
            scores = SalienceScores.read(out)


def _check_row(out: Path, reader: CheckpointReader, scheme: QuantizationScheme, tokens: np.ndarray | None) -> None:
    """Checks that an earlier run made this row from the same things."""
    metadata = CheckpointReader(out).metadata
    source = metadata.get("quantization_source", {})
    same = metadata.get("quantization") == scheme.to_dict() and source.get("model") == model_fingerprint(reader)
    if not same or (tokens is not None and source.get("calibration") != tokens_fingerprint(tokens)):
        raise OptionError(
            f"{out} was made from another model, calibration text or settings: delete {out.parent}, or name another "
            "--work"
        )


def measure_rows(
    reader: CheckpointReader, work_dir: Path, rows: Sequence[AccuracyRow], sequences: np.ndarray
) -> list[dict[str, Any]]:
    """Measures all rows and the float model side by side.

    Args:
        reader: the float model.
        work_dir: holds the model folder of each row.
        rows: the rows to measure.
        sequences: int32 [samples, length] to predict.

    Returns:
        For the float model and each row: `name`, `perplexity`, `perplexity_ratio` to float, `kl`, `top1_agreement`,
        `bits_per_weight` of the quantised linears with scales and zero points, and `settings`; the last two are None
        for the float model.
    """
    # The table is about the quantised linears: output head and embedding stay as they are.
    whole: Any = {"lm_head_bits": 16, "embedding_bits": 16}
    loaded = {FLOAT_ROW: load(reader.path, **whole)}
    loaded |= {row.name: load(work_dir / row.folder, **whole) for row in rows}
    results = evaluate({name: model.model for name, model in loaded.items()}, sequences)
    table = []
    for result in results:
        metadata = loaded[result.name].metadata
        table.append(
            {
                **dataclasses.asdict(result),
                "perplexity_ratio": result.perplexity / results[0].perplexity,
                "bits_per_weight": metadata.get("quantization_report", {}).get("bits_per_weight"),
                "settings": metadata.get("quantization"),
            }
        )
    return table


def environment() -> dict[str, Any]:
    """Device and versions that a table was made with."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _TOOLS},
    }
