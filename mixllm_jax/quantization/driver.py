"""Quantises a model folder into another: scores, allocates, sweeps, block by block, and resumes where it was killed."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mixllm_jax.checkpoint import METADATA_FILE, CheckpointReader, CheckpointWriter, check_target
from mixllm_jax.errors import CheckpointError, OptionError, StorageError
from mixllm_jax.quantization.allocation import Segment, allocate, split_by_linear
from mixllm_jax.quantization.pieces import Choice, Pieces
from mixllm_jax.quantization.progress import Progress
from mixllm_jax.quantization.report import QuantizationReport, format_size, make_report, model_segments
from mixllm_jax.quantization.runtime import Runtime, StreamedModel
from mixllm_jax.quantization.salience_file import SALIENCE_FILE, SalienceScores, model_fingerprint, tokens_fingerprint
from mixllm_jax.quantization.scheme import QuantizationScheme
from mixllm_jax.quantization.scoring import score_channels, scoring_cost
from mixllm_jax.quantization.sweep import quantize_blocks, sweep_cost

METHOD = Pieces()
"""All pieces as in the paper."""


def quantize_checkpoint(
    reader: CheckpointReader,
    out_dir: str | Path,
    scheme: QuantizationScheme,
    tokens: np.ndarray | None,
    *,
    salience: SalienceScores | None = None,
    pieces: Pieces = METHOD,
    overwrite: bool = False,
    show_progress: bool = True,
) -> QuantizationReport:
    """Quantises a float model folder.

    Never holds more than one block of the model. Everything it finds out goes to a work folder inside the unfinished
    output folder (``.NAME.partial``); called again with the same arguments after it was killed at any moment, it goes
    on with the block it was in, and the result is the same to the bit as that of an uninterrupted run.

    Args:
        reader: the float model.
        out_dir: the folder to create.
        scheme: what to quantise to, and how.
        tokens: int32 [samples, sequence_length], the calibration sequences; None where ``scheme`` needs none.
        salience: scores to use instead of computing them.
        pieces: own functions in place of the method's score, choice or rounding.
        overwrite: replace an existing model folder, or an unfinished one of other settings.
        show_progress: draw a progress bar with the time left.

    Returns:
        Bits per weight, sizes and where the 8-bit channels are; also stored in ``mixllm.json``.

    Raises:
        CheckpointError: ``reader`` is not a float model.
        OutputExistsError: the output folder exists.
        OptionError: salience of another model, tokens outside the vocabulary, or missing though needed; the output
            folder is the float model.
        StorageError: the disk has no room for the work folder.
        MixLLMError: activations or the loss are not finite.
    """
    if reader.kind != "float":
        raise CheckpointError(f"{reader.path} is quantized already; quantize needs the float model")
    check_output(reader, out_dir, overwrite=overwrite)
    config = reader.config
    segments = model_segments(config)
    channels = sum(segment.channels for segment in segments)
    source = model_fingerprint(reader)
    tokens = _checked_tokens(tokens, scheme, config.vocab_size)
    calibration = tokens_fingerprint(tokens)
    if salience is not None:
        salience.check_fits(source, channels, scheme.group_size)
    model = StreamedModel(reader, tokens, Runtime.choose(scheme.samples, scheme.sequence_length))
    metadata = {
        "kind": "quantized",
        "config": config.to_dict(),
        "quantization": scheme.to_dict(),
        "quantization_source": {
            "model": source,
            "calibration": calibration,
            "salience": None if salience is None else tokens_fingerprint(salience.scores.view(np.int32)),
            "runtime": vars(model.runtime),
            **({"replaced": pieces.replaced()} if pieces.replaced() else {}),
        },
    }
    must_score = scheme.needs_salience and salience is None
    work = sweep_cost(config.num_layers, scheme.method) + (scoring_cost(config.num_layers) if must_score else 0)
    _check_disk_space(Path(out_dir), model, scheme, must_score=must_score)
    with (
        CheckpointWriter(out_dir, metadata, overwrite, resume=True) as writer,
        Progress(work, show=show_progress) as progress,
    ):
        if must_score:
            scores = score_channels(model, scheme.group_size, writer.work_dir, progress, pieces.score)
            salience = SalienceScores(scores, source, scheme.group_size, calibration)
        scores = np.zeros(channels, np.float32) if salience is None else salience.scores
        eight_bit = _chosen(scores, segments, scheme, pieces.choose)
        masks = split_by_linear(eight_bit, segments)
        quantize_blocks(model, scheme, masks, writer, progress, pieces.quantize_weight)
        for part in ("embedding", "final"):
            if not writer.has_part(part):
                writer.write_part(part, reader.read_part(part))
        if salience is not None:
            writer.write_file(SALIENCE_FILE, salience.to_bytes())
        for file in sorted(reader.path.iterdir()):  # the tokenizer and its like go along as they came
            if file.is_file() and file.name not in (METADATA_FILE, SALIENCE_FILE):
                writer.copy_file(file)
        report = make_report(config, eight_bit, scheme.group_size)
        writer.finish({"quantization_report": report.to_dict()})
    return report


def check_output(reader: CheckpointReader, out_dir: str | Path, *, overwrite: bool) -> None:
    """Checks where the quantised folder is to be, before any work.

    Raises:
        OptionError: it would replace the float model.
        OutputExistsError: it exists.
    """
    if Path(out_dir).resolve() == reader.path.resolve():
        raise OptionError(f"--out {out_dir} is the float model itself: choose another folder, the model is kept")
    check_target(out_dir, overwrite=overwrite)


def _check_disk_space(out_dir: Path, model: StreamedModel, scheme: QuantizationScheme, *, must_score: bool) -> None:
    """The most that will be on the disk at once; better to know now that it will not fit.

    The forward pass stores the residual stream before every block; what it stored is gone when the parts are written.
    """
    folder = next(parent for parent in out_dir.absolute().parents if parent.exists())
    hidden = math.prod(model.hidden_shape()) * jnp.dtype(model.runtime.dtype).itemsize
    activations = (model.config.num_layers + 1) * hidden if must_score else 0
    channels = sum(segment.channels for segment in model_segments(model.config))
    smallest = make_report(model.config, np.zeros(channels, bool), scheme.group_size)  # all channels at 4 bits
    parts = smallest.linear_bytes + smallest.other_bytes_16bit
    needed = max(activations, parts)
    free = shutil.disk_usage(folder).free
    partial = out_dir.absolute().with_name(f".{out_dir.name}.partial")
    if free < needed and not partial.exists():  # an unfinished run holds some of it already
        reason, remedy = "the quantized model needs", ""
        if needed == activations:
            reason = f"the activations of {len(model.tokens)} calibration sequences at all blocks need"
            remedy = ", or fewer or shorter sequences (--samples, --sequence-length)"
        raise StorageError(
            f"{folder}: {reason} {format_size(needed)} of disk, {format_size(free)} are free. Free some space, or "
            f"choose an --out on another disk{remedy}"
        )


def _chosen(
    scores: np.ndarray, segments: Sequence[Segment], scheme: QuantizationScheme, choose: Choice | None
) -> np.ndarray:
    """The 8-bit channels, bool [channels]; ValueError where a function of the user's returns something else."""
    if choose is None:
        return allocate(scores, segments, scheme.eight_bit_share, scheme.allocation, scheme.seed)
    chosen = np.asarray(choose(scores, segments, round(scheme.eight_bit_share * len(scores))))
    if chosen.dtype != bool or chosen.shape != scores.shape:
        raise ValueError(
            f"choose must return bool {list(scores.shape)}, one for each channel; found {chosen.dtype} "
            f"{list(chosen.shape)}"
        )
    return chosen


def _checked_tokens(tokens: np.ndarray | None, scheme: QuantizationScheme, vocab_size: int) -> np.ndarray:
    if tokens is None:
        if scheme.needs_calibration:
            raise OptionError(f"{scheme.name} by {scheme.method} needs calibration sequences")
        return np.zeros((0, scheme.sequence_length), np.int32)
    if tokens.shape != (scheme.samples, scheme.sequence_length):
        raise OptionError(
            f"calibration sequences must be [{scheme.samples}, {scheme.sequence_length}], found {list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise OptionError(
            f"the calibration tokens lie in {tokens.min()}..{tokens.max()}, but the model has {vocab_size} tokens: "
            "they were made with the tokenizer of another model"
        )
    return tokens.astype(np.int32)
