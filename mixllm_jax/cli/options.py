"""Options that several verbs share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixllm_jax.errors import OptionError

if TYPE_CHECKING:
    from mixllm_jax.generation.completion import GenerationOptions
    from mixllm_jax.loaded_model import LoadedModel


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """How to compute."""
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute dtype; auto is bfloat16 on a GPU and float32 on a CPU (default: auto)",
    )
    group.add_argument(
        "--implementation",
        choices=("auto", "xla", "triton", "mosaic_gpu"),
        default="auto",
        help="of the quantized operations (default: auto)",
    )
    group.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="8 stores keys and values as int8, one scale a token and head; 16 as the compute dtype (default: 16)",
    )
    add_table_options(group)


def add_table_options(parser: argparse._ActionsContainer) -> None:
    """Bits of the output head and the embedding; what is not given is None and depends on the model."""
    parser.add_argument(
        "--lm-head-bits",
        type=int,
        choices=(8, 16),
        help="8 rounds the output head to 8 bits, 16 leaves it as it is (default: 8 for a quantized model)",
    )
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=(8, 16),
        help="8 rounds the embedding to 8 bits, 16 leaves it as it is (default: 8 for a quantized model)",
    )


def add_random_allocation(parser: argparse.ArgumentParser) -> None:
    """Where random weights have their 8-bit channels."""
    parser.add_argument(
        "--random-allocation",
        choices=("uniform", "realistic"),
        help="8-bit channels of --random-weights: uniform, the same share of every linear (default); realistic, shares "
        "by projection and depth as the global allocation gave SmolLM2-135M",
    )


def check_output_file(path: Path | None, option: str) -> None:
    """Checks, before work that it would be a pity to lose, that a file can be written there; None is no file.

    Raises:
        OptionError: the path is a folder, or its folder does not exist or cannot be written.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise OptionError(f"{option} {path} is a folder; give the name of a file in it.")
    if not folder.is_dir():
        raise OptionError(f"{option} {path}: the folder {folder} does not exist.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(f"{option} {path} cannot be written: no permission, or a read-only disk.")


def write_output_file(path: Path, text: str) -> None:
    """Writes a file aside and renames it, so that what was there stays until all of the new text is."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float, top_p: float) -> None:
    """How to choose tokens."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="most new tokens (default: 256, or what the context has room for)"
    )
    group.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help=f"0 is greedy (default: {temperature:g})"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: all)")
    group.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help=f"only the likeliest tokens that sum to this probability (default: {top_p:g})",
    )
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")


def sampling_options(arguments: argparse.Namespace) -> GenerationOptions:
    """What `add_sampling_options` collected, checked, as options of `LoadedModel.generate`."""
    from mixllm_jax.generation import SamplingSettings
    from mixllm_jax.generation.requests import require_max_tokens

    options: Any = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    SamplingSettings(**options)  # complains before a model is loaded
    if arguments.max_tokens is None:
        return options
    require_max_tokens(arguments.max_tokens)
    return {**options, "max_tokens": arguments.max_tokens}


def load_model(folder: Path, arguments: argparse.Namespace) -> LoadedModel:
    """Loads a model, and says so where someone is watching."""
    from mixllm_jax.loading import load

    watched = sys.stderr.isatty()
    if watched:
        print(f"loading {folder} ...", end="", file=sys.stderr, flush=True)
    try:
        return load(
            folder,
            dtype=arguments.dtype,
            implementation=arguments.implementation,
            kv_bits=arguments.kv_bits,
            lm_head_bits=arguments.lm_head_bits,
            embedding_bits=arguments.embedding_bits,
        )
    finally:
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
