"""`mixllm benchmark`: decoding speed, time to the first token and peak memory, of random weights or a folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mixllm_jax.cli.options import add_random_allocation, add_table_options
from mixllm_jax.errors import MixLLMError, OptionError

if TYPE_CHECKING:
    from mixllm_jax.models.eight_bit_table import TableBits

SCHEMES = "bf16,W4A8,W4.4A8,W8A8"
CONTEXTS = (512, 4096)
PROMPTS = (128, 512, 2048, 8192)


def _integers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(value) for value in text.split(",") if value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from error
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected positive numbers, found {text!r}")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="model folder; or give --random-weights")
    parser.add_argument(
        "--random-weights", metavar="NAME", help="shapes of a known model with random weights, such as llama-3.1-8b"
    )
    parser.add_argument("--schemes", metavar="LIST", help=f"formats of --random-weights (default: {SCHEMES})")
    add_random_allocation(parser)
    parser.add_argument(
        "--batches", type=_integers, default=(1, 4, 16, 64), metavar="LIST", help="(default: 1,4,16,64)"
    )
    parser.add_argument(
        "--contexts", type=_integers, metavar="LIST", help="positions (default: 512,4096, as far as the model goes)"
    )
    parser.add_argument(
        "--prompts",
        type=_integers,
        metavar="LIST",
        help="prompt lengths for the time to the first token (default: 128,512,2048,8192, as far as the model goes)",
    )
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), default=16, help="bits of the key/value cache")
    add_table_options(parser)
    parser.add_argument("--profile", action="store_true", help="also profile decode steps and a prefill")
    parser.add_argument(
        "--compare-transformers",
        action="store_true",
        help="also measure transformers in bf16 on the same shapes, within 220 s (needs torch with CUDA)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark.json"),
        metavar="FILE",
        help="results; rows of the same case are replaced (default: benchmark.json)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, stores the rows."""
    from mixllm_jax.benchmark.cases import Plan, format_table
    from mixllm_jax.benchmark.runner import open_results, run_plans
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.loading import table_bits
    from mixllm_jax.models.presets import preset

    if (arguments.folder is None) == (arguments.random_weights is None):
        raise OptionError("give either a model folder or --random-weights NAME")
    if arguments.folder is not None and arguments.schemes is not None:
        raise OptionError(f"--schemes is for --random-weights: {arguments.folder} has its format, leave --schemes out")
    if arguments.folder is not None and arguments.random_allocation is not None:
        raise OptionError(f"--random-allocation is for --random-weights: {arguments.folder} has its own allocation")
    if arguments.compare_transformers:
        from mixllm_jax.benchmark.transformers_baseline import require_torch

        if arguments.random_weights is None:
            raise OptionError("--compare-transformers runs on random weights: give --random-weights NAME")
        require_torch()
    if arguments.random_weights is not None:
        model = arguments.random_weights
        config = preset(model)
        schemes = _random_schemes(arguments)
    else:
        model = str(arguments.folder)
        reader = CheckpointReader(model)
        config = reader.config
        schemes = {"stored": table_bits(reader, arguments.lm_head_bits, arguments.embedding_bits)}
    longest = config.max_position_embeddings
    contexts = _lengths(arguments.contexts, CONTEXTS, "--contexts", longest)
    prompts = _lengths(arguments.prompts, PROMPTS, "--prompts", longest)
    plans = [
        Plan(
            model,
            scheme,
            arguments.batches,
            contexts,
            prompts,
            kv_bits=arguments.kv_bits,
            lm_head_bits=tables.lm_head,
            embedding_bits=tables.embedding,
            allocation="uniform" if scheme in ("bf16", "stored") else arguments.random_allocation or "uniform",
            profile=arguments.profile,
        )
        for scheme, tables in schemes.items()
    ]
    results = open_results(arguments.out, shlex.join(["mixllm", *sys.argv[1:]]))
    compared = arguments.batches if arguments.compare_transformers else ()
    failures = run_plans(plans, results, transformers_batches=compared)
    print(format_table([row for row in results.rows if row["model"] == Path(model).name]))
    print(f"stored in {arguments.out}")
    if failures:
        raise MixLLMError(f"{failures} of the processes failed: see above; what they had measured is stored")


def _lengths(asked: tuple[int, ...] | None, defaults: tuple[int, ...], option: str, longest: int) -> tuple[int, ...]:
    """What was asked for, by default those of the defaults that the model takes.

    Raises:
        OptionError: Longer than the model takes: it would be no speed of this model.
    """
    if asked is None:
        return tuple(length for length in defaults if length <= longest) or (longest,)
    if too_long := [str(length) for length in asked if length > longest]:
        raise OptionError(
            f"{option} {','.join(too_long)}: this model takes up to {longest} positions, give shorter ones"
        )
    return asked


def _random_schemes(arguments: argparse.Namespace) -> dict[str, TableBits]:
    """The schemes asked for by the name they have in the results, with the bits of their output head and embedding.

    Float weights are what the others are compared with: they stay whole, and have one name, whatever they were called.

    Raises:
        OptionError: No scheme, an unknown one, or float weights alone with an option that is not for them.
    """
    from mixllm_jax.models.eight_bit_table import choose_bits
    from mixllm_jax.models.presets import preset
    from mixllm_jax.models.random_weights import WeightFormat

    tied = preset(arguments.random_weights).tie_word_embeddings
    schemes: dict[str, TableBits] = {}
    for name in filter(None, (SCHEMES if arguments.schemes is None else arguments.schemes).split(",")):
        if WeightFormat.from_name(name, tied=tied).eight_bit_share is None:
            schemes["bf16"] = choose_bits(None, None, quantized=False, tied=tied)
        else:
            schemes[name] = choose_bits(arguments.lm_head_bits, arguments.embedding_bits, quantized=True, tied=tied)
    if not schemes:
        raise OptionError(f"--schemes needs at least one of bf16 and W4A8 to W8A8, found {arguments.schemes!r}")
    if [*schemes] == ["bf16"]:
        for option in ("random_allocation", "lm_head_bits", "embedding_bits"):
            if getattr(arguments, option) not in (None, 16):
                raise OptionError(
                    f"--{option.replace('_', '-')} {getattr(arguments, option)} is for quantized weights: bf16 is "
                    "measured as it is, without 8-bit channels or tables"
                )
    return schemes
