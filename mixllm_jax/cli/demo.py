"""`mixllm demo`: the whole way on a small real model, by the commands that a user would type."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

DEFAULT_FOLDER = Path("mixllm-demo")
DEFAULT_PROMPT = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help=f"where to work (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help=f"what to ask (default: {DEFAULT_PROMPT!r})"
    )


def run(arguments: argparse.Namespace) -> None:
    """Fetches, converts, quantizes, measures and asks; what an earlier run finished is not done again."""
    from mixllm_jax.demo_model import NAME, fetch_smollm2

    start = time.monotonic()
    print(f"fetching {NAME} (93 MB, once)", flush=True)
    gguf = fetch_smollm2()
    folder: Path = arguments.folder
    original, rounded, mixed = folder / "float", folder / "rtn-w4a8", folder / "mixllm-w4.4a8"
    calibration = ["--samples", "16", "--sequence-length", "256"]
    for out, command in (
        (original, ["convert", "--from-gguf", str(gguf)]),
        (rounded, ["quantize", str(original), "--bits", "4", "--method", "rtn"]),
        (mixed, ["quantize", str(original), "--bits", "4.4", *calibration]),
    ):
        if out.exists():
            print(f"\n{out} is there from an earlier run; delete it to make it again", flush=True)
        else:
            _run_verb([*command, "--out", str(out)])
    sizes = ["--samples", "8", "--sequence-length", "512"]
    _run_verb(["perplexity", str(original), str(rounded), str(mixed), *sizes])
    for model in (original, mixed):
        _run_verb(["generate", str(model), "--chat", "--max-tokens", "64", "--prompt", arguments.prompt])
    print(f"\ndone in {(time.monotonic() - start) / 60:.1f} minutes; go on with: mixllm chat {mixed}")


def _run_verb(command: list[str]) -> None:
    """Shows a command and runs it in this process; its errors are ours."""
    from mixllm_jax.cli.main import build_parser

    print(f"\n$ mixllm {shlex.join(command)}", flush=True)
    parsed = build_parser(command[0]).parse_args(command)
    parsed.run(parsed)
