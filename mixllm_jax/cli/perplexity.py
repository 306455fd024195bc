"""`mixllm perplexity DIR [DIR ...] --text FILE`: perplexity, and the distance from the first model."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixllm_jax.cli.options import add_execution_options, check_output_file, load_model, write_output_file
from mixllm_jax.errors import OptionError

if TYPE_CHECKING:
    from mixllm_jax.evaluation.cached import ThroughInt8Cache
    from mixllm_jax.loaded_model import LoadedModel
    from mixllm_jax.models.decoder import Decoder

DEFAULT_SEQUENCE_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="model folders; the first is the reference"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to predict (default: 39 kB of Wikipedia of the package)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="sequences to read (default: the whole text)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="tokens of a sequence (default: 1024, or the shortest context of the models)",
    )
    # `--json` is what it was called when the commands in docs/results were run.
    parser.add_argument(
        "--out", "--json", dest="out", type=Path, metavar="FILE", help="write the table here as JSON as well"
    )
    add_execution_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    names = [str(folder) for folder in arguments.folders]
    if len(set(names)) < len(names):
        raise OptionError(f"a model folder is given twice: {', '.join(names)}")
    check_output_file(arguments.out, "--out")
    text = embedded_text() if arguments.text is None else read_text(arguments.text, "--text")

    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.evaluation.accuracy import environment
    from mixllm_jax.evaluation.perplexity import cut_sequences, evaluate, format_table
    from mixllm_jax.loaded_model import load_tokenizer

    # All folders and the text are looked at before the first model is loaded.
    context = min(CheckpointReader(folder).config.max_position_embeddings for folder in arguments.folders)
    length = min(DEFAULT_SEQUENCE_LENGTH, context) if arguments.sequence_length is None else arguments.sequence_length
    if length > context:
        raise OptionError(
            f"--sequence-length {length} exceeds the context of {context} tokens that all models have: choose a "
            "shorter one"
        )
    tokens = load_tokenizer(arguments.folders[0])(text, verbose=False)["input_ids"]
    source = str(arguments.text or "the evaluation text of the package")
    sequences = cut_sequences(tokens, arguments.samples, length, source)
    loaded = {name: load_model(folder, arguments) for name, folder in zip(names, arguments.folders, strict=True)}
    rows = []
    for result in evaluate({name: _measured(model, arguments.kv_bits) for name, model in loaded.items()}, sequences):
        model = loaded[result.name]
        report = model.metadata.get("quantization_report")
        bits = {"lm_head_bits": model.table_bits.lm_head, "embedding_bits": model.table_bits.embedding}
        rows.append({**vars(result), "bits_per_weight": report["bits_per_weight"] if report else None, **bits})
    print(format_table(rows))
    if arguments.out is not None:
        settings: dict[str, Any] = {
            "text": arguments.text.name if arguments.text else "embedded",
            "samples": sequences.shape[0],
            "sequence_length": sequences.shape[1],
            "dtype": arguments.dtype,
            "kv_bits": arguments.kv_bits,
        }
        command = shlex.join(["mixllm", *sys.argv[1:]])
        content = {"command": command, **environment(), "settings": settings, "rows": rows}
        write_output_file(arguments.out, json.dumps(content, indent=1) + "\n")


def _measured(loaded: LoadedModel, kv_bits: int) -> Decoder | ThroughInt8Cache:
    from mixllm_jax.evaluation.cached import ThroughInt8Cache

    return loaded.model if kv_bits == 16 else ThroughInt8Cache(loaded.model)


def embedded_text() -> str:
    """Articles of Wikipedia, none of which is in the calibration text of the package."""
    file = importlib.resources.files("mixllm_jax") / "data" / "evaluation.txt"
    return file.read_text(encoding="utf-8")


def read_text(path: Path, option: str) -> str:
    """Reads a UTF-8 text file that a user named; `OptionError` where that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{option} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{option} {path} is not UTF-8 text (byte {error.start}).") from error
