"""`mixllm generate DIR --prompt TEXT`: streams text for one prompt, or answers several in a batch."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mixllm_jax.cli.options import add_execution_options, add_sampling_options, load_model, sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="model folder, float or quantized")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue, or with --chat the question; - reads it from standard input; repeat it for a batch",
    )
    parser.add_argument("--chat", action="store_true", help="ask under the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message (with --chat)")
    add_sampling_options(parser, temperature=0.0, top_p=1.0)
    add_execution_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the text; what it took goes to standard error."""
    options = {**sampling_options(arguments), "chat": arguments.chat, "system": arguments.system}
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompt]
    model = load_model(arguments.folder, arguments)
    if len(prompts) == 1:
        start = time.monotonic()
        for piece in model.stream(prompts[0], **options):
            print(piece, end="", flush=True)
        print()
        if sys.stderr.isatty():
            print(f"({time.monotonic() - start:.1f} s)", file=sys.stderr)
        return
    for prompt, answer in zip(prompts, model.generate(prompts, **options), strict=True):
        print(f"=== {prompt}\n{answer}\n")
