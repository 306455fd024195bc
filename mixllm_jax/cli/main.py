"""`mixllm VERB ...`: picks the verb's module, and imports no other."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

from mixllm_jax.cli.runner import keep_compiled_programs, run_command

VERBS = {
    "convert": ("convert.__main__", "convert a Hugging Face or GGUF checkpoint to a model folder"),
    "quantize": ("mixllm_jax.cli.quantize", "quantize a model folder to mixed 4/8-bit weights"),
    "generate": ("mixllm_jax.cli.generate", "generate text"),
    "chat": ("mixllm_jax.cli.chat", "talk to a model"),
    "perplexity": ("mixllm_jax.cli.perplexity", "perplexity of models, and how far they are from the first"),
    "inspect": ("mixllm_jax.cli.inspect", "bits per weight, sizes and 8-bit shares of a model folder"),
    "accuracy": ("mixllm_jax.cli.accuracy", "table of perplexity over schemes and allocations"),
    "benchmark": ("mixllm_jax.cli.benchmark", "speed and memory of generation, with random weights or a model folder"),
    "demo": ("mixllm_jax.cli.demo", "fetch SmolLM2-135M, quantize it, and compare"),
}


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The parser with the arguments of one verb, if it is one; the other verbs are there by name alone."""
    parser = argparse.ArgumentParser(
        prog="mixllm", description="Mixed 4/8-bit quantization of language models in JAX (MixLLM, arXiv 2412.14590)."
    )
    parser.add_argument("--version", action="version", version=f"mixllm {_version()}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, help_text) in VERBS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", allow_abbrev=False
        )
        if name == verb:
            verb_module = importlib.import_module(module)
            verb_module.add_arguments(subparser)
            subparser.set_defaults(run=verb_module.run, parser=subparser)
    return parser


def _version() -> str:
    import importlib.metadata  # slow: an interrupt that comes meanwhile has its message in here

    try:
        return importlib.metadata.version("mixllm-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `mixllm` command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_command(functools.partial(_run_verb, words))


def _run_verb(words: list[str]) -> None:
    keep_compiled_programs()
    verb = next((word for word in words if word in VERBS), "")  # an option that is not ours may come before it
    parser = build_parser(verb)
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:  # by the verb's own parser, which shows the verb's usage
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
