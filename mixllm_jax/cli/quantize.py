"""`mixllm quantize MODEL_DIR --out DIR --bits 4.4`: a float model folder to a quantised one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mixllm_jax.errors import OptionError

if TYPE_CHECKING:
    from mixllm_jax.quantization.pieces import Pieces
    from mixllm_jax.quantization.report import QuantizationReport

DEFAULT_SAMPLES = 16
DEFAULT_SEQUENCE_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="float model folder (see convert)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to create")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=float,
        metavar="BITS",
        help="average bits per output channel, 4 to 8; 4.4 is 10 %% of the channels at 8 bits (default: 4.4)",
    )
    budget.add_argument(
        "--eight-bit-share", type=float, metavar="SHARE", help="the same as the share of 8-bit channels, 0 to 1"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="input channels per scale: 32, 64, 128 (default: largest that fits)"
    )
    parser.add_argument(
        "--method", choices=("gptq", "rtn"), default="gptq", help="gptq, or rtn: rounding to nearest (default: gptq)"
    )
    parser.add_argument(
        "--allocation",
        choices=("global", "per-layer", "random"),
        default="global",
        help="how 8-bit channels are chosen; per-layer and random are for comparison (default: global)",
    )
    parser.add_argument(
        "--activation-bits", type=int, choices=(8, 16), default=8, help="16 leaves activations float (default: 8)"
    )
    parser.add_argument(
        "--salience", type=Path, metavar="DIR", help="reuse the scores of this quantized folder (or of a salience.npz)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder already")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text file, .npy of token ids, or data set name: wikitext2, c4 (default: the text of the package)",
    )
    calibration.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, metavar="N", help=f"sequences (default: {DEFAULT_SAMPLES})"
    )
    calibration.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help=f"tokens of each (default: {DEFAULT_SEQUENCE_LENGTH}, or the model's context if shorter)",
    )
    calibration.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of sequences (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Quantises and prints the report."""
    bits, share = arguments.bits, arguments.eight_bit_share
    if share is not None:
        if not 0 <= share <= 1:
            raise OptionError(f"--eight-bit-share must be between 0 and 1, found {share}")
        bits = 4 + 4 * share
    quantize(
        arguments.model_dir,
        arguments.out,
        bits=4.4 if bits is None else bits,
        group_size=arguments.group_size,
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        method=arguments.method,
        allocation=arguments.allocation,
        activation_bits=arguments.activation_bits,
        salience=arguments.salience,
        overwrite=arguments.overwrite,
    )


def quantize(
    model_dir: str | Path,
    out: str | Path,
    *,
    bits: float = 4.4,
    group_size: int | None = None,
    calibration: str | Path | None = None,
    samples: int = DEFAULT_SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    method: str = "gptq",
    allocation: str = "global",
    activation_bits: int = 8,
    salience: str | Path | None = None,
    pieces: Pieces | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> QuantizationReport:
    """Quantises a float model folder; a killed run goes on where it was when called again with the same arguments.

    Args:
        model_dir: float model folder.
        out: model folder to create.
        bits: average bits per output channel, 4 to 8: 4.4 gives 8 bits to 10 % of the output channels.
        group_size: input channels that share a scale: 32, 64 or 128; None for the largest that divides all layers.
        calibration: text file, `.npy` of token ids, or data set name; None for the text that comes with the package.
        samples: calibration sequences.
        sequence_length: tokens of each; None for 2048, or the model's context if that is shorter.
        seed: of the choice of sequences.
        method: `gptq`, or `rtn` (rounding to nearest).
        allocation: `global`, or to compare with: `per-layer`, `random`.
        activation_bits: 8, or 16 for float activations.
        salience: quantised folder or `salience.npz` whose scores to reuse.
        pieces: own functions in place of the method's score, choice of channels or rounding (docs/research.md).
        overwrite: replace an existing model folder.
        verbose: print what is done and the report, and draw a progress bar.

    Returns:
        What the report says, see `mixllm_jax.quantization.report.QuantizationReport`.

    Raises:
        MixLLMError: an option, the model folder or the text cannot work; the message says what to change.
    """
    from mixllm_jax.calibration import calibration_sequences
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.quantization.driver import check_output, quantize_checkpoint
    from mixllm_jax.quantization.pieces import Pieces
    from mixllm_jax.quantization.report import format_report
    from mixllm_jax.quantization.salience_file import SalienceScores
    from mixllm_jax.quantization.scheme import QuantizationScheme, choose_group_size, share_of_bits

    share = share_of_bits(bits)
    reader = CheckpointReader(model_dir)
    context = reader.config.max_position_embeddings
    if sequence_length is None:
        sequence_length = min(DEFAULT_SEQUENCE_LENGTH, context)
    if sequence_length > context:
        raise OptionError(f"--sequence-length {sequence_length} exceeds the model's context of {context} tokens")
    scheme = QuantizationScheme(
        eight_bit_share=share,
        group_size=choose_group_size(reader.config, group_size),
        activation_bits=activation_bits,
        method=method,
        allocation=allocation,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    check_output(reader, out, overwrite=overwrite)  # before a data set is fetched
    scores = None if salience is None else SalienceScores.read(salience)
    tokens = None
    if scheme.needs_calibration:
        tokens = calibration_sequences(calibration, reader.path, samples, sequence_length, seed)
    if verbose:
        chosen = " (the largest that divides all layers)" if group_size is None else ""
        print(f"{scheme.name} by {method}, groups of {scheme.group_size}{chosen}", flush=True)
        if tokens is not None:
            print(
                f"calibrating on {samples} x {sequence_length} tokens of {calibration or 'the embedded text'}",
                flush=True,
            )
    try:
        report = quantize_checkpoint(
            reader,
            out,
            scheme,
            tokens,
            salience=scores,
            pieces=pieces or Pieces(),
            overwrite=overwrite,
            show_progress=verbose,
        )
    except KeyboardInterrupt:
        print("\nwhat was done is kept: the same command goes on from there", file=sys.stderr)
        raise
    if verbose:
        print(format_report(report))
        print(f"wrote {out}")
    return report
