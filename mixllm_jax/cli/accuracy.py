"""`mixllm accuracy MODEL_DIR --text FILE`: the table of what each part of the method is worth on a model."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from mixllm_jax.cli.options import check_output_file, write_output_file
from mixllm_jax.errors import CheckpointError, OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="float model folder")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to predict (default: 39 kB of Wikipedia of the package)"
    )
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        metavar="BITS",
        help="the method at these average bits per output channel instead of the table's rows: 4 4.1 4.2 4.4 4.8 8",
    )
    parser.add_argument(
        "--calibration", metavar="TEXT", help="text to calibrate on (default: the text of the package); see quantize"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table here as JSON as well")
    parser.add_argument(
        "--samples", type=int, default=16, metavar="N", help="sequences, of calibration and of the text (default: 16)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens of a sequence (default: 1024, or the model's context if shorter)",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="input channels per scale: 32, 64, 128 (default: largest that fits)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the calibration sequences and the random row (default: 0)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keeps the quantized models for other rows and for a run that was stopped "
        "(default: MODEL_DIR.accuracy, then removed)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Quantises the rows, measures them, prints the table."""
    from mixllm_jax.calibration import calibration_sequences
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.cli.perplexity import DEFAULT_SEQUENCE_LENGTH, embedded_text, read_text
    from mixllm_jax.evaluation.accuracy import ROWS, environment, measure_rows, quantize_rows, rows_of_bits
    from mixllm_jax.evaluation.perplexity import cut_sequences, format_table
    from mixllm_jax.loaded_model import load_tokenizer
    from mixllm_jax.quantization.scheme import QuantizationScheme, choose_group_size

    check_output_file(arguments.out, "--out")
    reader = CheckpointReader(arguments.model_dir)
    if reader.kind != "float":
        raise CheckpointError(f"{reader.path} is quantized already; accuracy needs the float model")
    rows_wanted = ROWS if arguments.bits is None else rows_of_bits(arguments.bits)
    context = reader.config.max_position_embeddings
    samples, length = arguments.samples, arguments.sequence_length
    if length is None:
        length = min(DEFAULT_SEQUENCE_LENGTH, context)
    if length > context:
        raise OptionError(f"--sequence-length {length} exceeds the model's context of {context} tokens")
    base = QuantizationScheme(
        group_size=choose_group_size(reader.config, arguments.group_size),
        samples=samples,
        sequence_length=length,
        seed=arguments.seed,
    )
    text = embedded_text() if arguments.text is None else read_text(arguments.text, "--text")
    source = str(arguments.text or "the evaluation text of the package")
    tokens = load_tokenizer(reader.path)(text, add_special_tokens=False, verbose=False)["input_ids"]
    sequences = cut_sequences(tokens, samples, length, source)
    calibration = calibration_sequences(arguments.calibration, reader.path, samples, length, arguments.seed)

    work = arguments.work or reader.path.with_name(f"{reader.path.name}.accuracy")
    if work.exists() and not work.is_dir():
        raise OptionError(f"--work {work} is not a folder")
    work.mkdir(parents=True, exist_ok=True)
    quantize_rows(reader, base, calibration, work, rows_wanted, lambda row: print(f"quantizing {row}", file=sys.stderr))
    rows = measure_rows(reader, work, rows_wanted, sequences)
    print(format_table(rows))
    if arguments.out is not None:
        calibration_name = Path(arguments.calibration).name if arguments.calibration else "embedded"
        settings = {
            "model": reader.path.name,
            "calibration": calibration_name,
            "text": arguments.text.name if arguments.text else "embedded",
            "samples": samples,
            "sequence_length": length,
            "group_size": base.group_size,
            "seed": arguments.seed,
            "lm_head_bits": 16,
            "embedding_bits": 16,
        }
        options = {"calibration": arguments.calibration and calibration_name}
        options |= {"text": arguments.text and arguments.text.name, "group-size": arguments.group_size}
        options |= {"samples": samples, "sequence-length": length, "seed": arguments.seed}
        given = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
        if arguments.bits is not None:
            given += ["--bits", *(f"{bits:g}" for bits in arguments.bits)]
        command = shlex.join(["mixllm", "accuracy", reader.path.name, *given])
        content = {"command": command, "settings": settings, **environment(), "rows": rows}
        write_output_file(arguments.out, json.dumps(content, indent=1) + "\n")
        print(f"wrote {arguments.out}")
    if arguments.work is None:
        for row in rows_wanted:
            shutil.rmtree(work / row.folder)
        if not any(work.iterdir()):  # what somebody else put there stays
            work.rmdir()
