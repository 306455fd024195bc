"""Is the text that a device generates the model's own? `python -m mixllm_jax.evaluation.same_text`.

    python -m mixllm_jax.evaluation.same_text write MODEL_DIR TEXTS.json      # on the device under test
    python -m mixllm_jax.evaluation.same_text judge MODEL_DIR TEXTS.json      # on the reference: JAX_PLATFORMS=cpu

`judge` goes along the texts and ends with an error where a token is not the reference's own choice by more than a
near-tie; `text_judgement` says what that is, and how the criterion can fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from mixllm_jax.benchmark.runner import versions
from mixllm_jax.cli.runner import run_command
from mixllm_jax.errors import OptionError
from mixllm_jax.evaluation.text_judgement import Text, judge
from mixllm_jax.loaded_model import LoadedModel
from mixllm_jax.loading import load

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first human",
    "A list of planets in the solar system:",
    "def fibonacci(n):",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "My favourite recipe begins with",
    "The theory of relativity says that",
    "Dear Sir or Madam,",
    "To install the package, run",
    "The largest ocean on Earth is",
    "Shakespeare wrote many plays, such as",
    "If it rains tomorrow, we will",
    "The difference between a virus and a bacterium is",
    "One plus one equals",
    "The heart pumps blood through",
    "At the end of the day, the most important thing is",
)
MODEL_BITS = ("kv_bits", "lm_head_bits", "embedding_bits")
"""Options that make another model, so that the reference must have them too."""


def write(loaded: LoadedModel, length: int) -> list[Text]:
    """`length` greedy tokens of this device for each of `PROMPTS`, without stopping."""
    results = loaded.engine.generate([loaded.encode(prompt) for prompt in PROMPTS], max_tokens=length)
    return [Text(prompt, result.tokens) for prompt, result in zip(PROMPTS, results, strict=True)]


def read_texts(path: Path) -> tuple[dict[str, Any], list[Text]]:
    """What `write` wrote: how the texts were made, and the texts.

    Raises:
        OptionError: the file is not one of `write`.
    """
    try:
        made = json.loads(path.read_text())
        texts = [Text(**text) for text in made.pop("texts")]
        if missing := [name for name in MODEL_BITS if name not in made]:
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"{path} has no texts of `same_text write`: {error!r}") from error
    return made, texts


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Adds a result to a JSON list of them, one line a value and a prompt."""
    results = json.loads(path.read_text()) if path.is_file() else []
    path.write_text("[\n" + ",\n".join(map(_lines, [*results, result])) + "\n]\n")


def _lines(result: dict[str, Any]) -> str:
    values = {name: json.dumps(value) for name, value in result.items()}
    values["prompts"] = "[\n   " + ",\n   ".join(json.dumps(row) for row in result["prompts"]) + "\n  ]"
    return " {\n" + ",\n".join(f'  "{name}": {value}' for name, value in values.items()) + "\n }"


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """On what, with what and how this command runs."""
    return {
        "model": loaded.path.name,
        "device": jax.devices()[0].device_kind,
        "dtype": str(loaded.model.embedding.dtype),
        "matmul_precision": os.environ.get("JAX_DEFAULT_MATMUL_PRECISION"),
        "kv_bits": loaded.kv_bits,
        "lm_head_bits": loaded.table_bits.lm_head,
        "embedding_bits": loaded.table_bits.embedding,
        "versions": versions(),
        "command": shlex.join(["python", "-m", "mixllm_jax.evaluation.same_text", *sys.argv[1:]]),
    }


def run_write(arguments: argparse.Namespace) -> None:
    """Generates, and writes the texts with how they were made."""
    bits: Any = {name: getattr(arguments, name) for name in MODEL_BITS}
    loaded = load(arguments.folder, dtype=arguments.dtype, **bits)
    texts = write(loaded, arguments.length)
    arguments.texts.write_text(json.dumps({**describe(loaded), "texts": [dataclasses.asdict(t) for t in texts]}) + "\n")


def run_judge(arguments: argparse.Namespace) -> None:
    """Judges, prints and stores what was found; a `DifferentTextError` where a gap is more than a near-tie."""
    made, texts = read_texts(arguments.texts)
    bits: Any = {name: made[name] for name in MODEL_BITS}
    loaded = load(arguments.folder, dtype=arguments.dtype, **bits)
    judgement = judge(loaded, texts)
    rows = []
    for text, differences in zip(texts, judgement.differences, strict=True):
        rounded = [dataclasses.asdict(d) | {"gap": round(d.gap, 5)} for d in differences]
        rows.append({"prompt": text.prompt, "differences": rounded, "tokens": text.tokens})
        first = f"the first: {rounded[0]}" if rounded else ""
        print(f"{text.prompt!r}: {len(rounded)} of {len(text.tokens)} tokens differ {first}".rstrip())
    print(json.dumps(judgement.summary()))
    if arguments.out is not None:
        append_result(arguments.out, {**made, "reference": describe(loaded), **judgement.summary(), "prompts": rows})
    judgement.check()


def main() -> int:
    """Runs the command; returns its exit code, 1 where a text is different."""
    parser = argparse.ArgumentParser(description="Is the greedy text of one device what another would generate?")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    writer = actions.add_parser("write", help="generate texts on the device under test")
    writer.add_argument("--length", type=int, default=64, metavar="N", help="tokens a prompt (default: 64)")
    for name in MODEL_BITS:
        writer.add_argument(f"--{name.replace('_', '-')}", type=int, default=16)
    judging = actions.add_parser("judge", help="go along the texts on the reference device")
    judging.add_argument("--out", type=Path, metavar="FILE", help="add the result to this JSON file")
    for action, run, dtype in ((writer, run_write, "auto"), (judging, run_judge, "float32")):
        action.add_argument("folder", type=Path, metavar="DIR", help="the model folder")
        action.add_argument("texts", type=Path, metavar="TEXTS.json")
        action.add_argument("--dtype", default=dtype, help=f"compute dtype (default: {dtype})")
        action.set_defaults(run=run)
    arguments = parser.parse_args()
    return run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
