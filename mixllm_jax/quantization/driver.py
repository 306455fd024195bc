"""Quantises a model folder into another: scores, allocates, sweeps, block by block, and resumes where it was killed."""

import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mixllm_jax.checkpoint import METADATA_FILE, CheckpointReader, CheckpointWriter
from mixllm_jax.errors import CheckpointError, OptionError, StorageError
from mixllm_jax.quantization.allocation import allocate, split_by_linear
from mixllm_jax.quantization.progress import Progress
from mixllm_jax.quantization.report import QuantizationReport, make_report, model_segments
from mixllm_jax.quantization.runtime import Runtime, StreamedModel
from mixllm_jax.quantization.salience_file import SALIENCE_FILE, SalienceScores, model_fingerprint, tokens_fingerprint
from mixllm_jax.quantization.scheme import QuantizationScheme
from mixllm_jax.quantization.scoring import score_channels, scoring_cost
from mixllm_jax.quantization.sweep import quantize_blocks, sweep_cost


def quantize_checkpoint(
    reader: CheckpointReader,
    out_dir: str | Path,
    scheme: QuantizationScheme,
    tokens: np.ndarray | None,
    *,
    salience: SalienceScores | None = None,
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
        overwrite: replace an existing model folder, or an unfinished one of other settings.
        show_progress: draw a progress bar with the time left.

    Returns:
        Bits per weight, sizes and where the 8-bit channels are; also stored in ``mixllm.json``.

    Raises:
        CheckpointError: ``reader`` is not a float model, or the output folder exists.
        OptionError: salience of another model, tokens outside the vocabulary, or missing though needed.
        StorageError: the disk has no room for the work folder.
        MixLLMError: activations or the loss are not finite.
    """
    if reader.kind != "float":
        raise CheckpointError(f"{reader.path} is quantised already; quantize needs the float model")
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
        },
    }
    must_score = scheme.needs_salience and salience is None
    work = sweep_cost(config.num_layers, scheme.method) + (scoring_cost(config.num_layers) if must_score else 0)
    if must_score:
        _check_disk_space(Path(out_dir), model)
    with (
        CheckpointWriter(out_dir, metadata, overwrite, resume=True) as writer,
        Progress(work, show=show_progress) as progress,
    ):
        if must_score:
            scores = score_channels(model, scheme.group_size, writer.work_dir, progress)
            salience = SalienceScores(scores, source, scheme.group_size, calibration)
        scores = np.zeros(channels, np.float32) if salience is None else salience.scores
        eight_bit = allocate(scores, segments, scheme.eight_bit_share, scheme.allocation, scheme.seed)
        quantize_blocks(model, scheme, split_by_linear(eight_bit, segments), writer, progress)
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


def _check_disk_space(out_dir: Path, model: StreamedModel) -> None:
    """The forward pass stores the residual stream before every block; better to know now that it will not fit."""
    folder = next(parent for parent in out_dir.absolute().parents if parent.exists())
    needed = (model.config.num_layers + 1) * math.prod(model.hidden_shape()) * jnp.dtype(model.runtime.dtype).itemsize
    partial = out_dir.absolute().with_name(f".{out_dir.name}.partial")
    free = shutil.disk_usage(folder).free
    if free < needed and not partial.exists():  # an unfinished run holds some of it already
        raise StorageError(
            f"{folder}: the activations of {len(model.tokens)} calibration sequences at all blocks need "
            f"{needed / 1e9:.1f} GB of disk while the salience is computed, {free / 1e9:.1f} GB are free. Free some "
            "space, choose an --out on another disk, or fewer or shorter sequences (--samples, --sequence-length)"
        )


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
