"""`mixllm generate DIR --prompt TEXT`: streams text for one prompt, or answers several in a batch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixllm_jax.cli.options import (
    add_execution_options,
    add_random_allocation,
    add_sampling_options,
    load_model,
    sampling_options,
)
from mixllm_jax.errors import OptionError

if TYPE_CHECKING:
    from mixllm_jax.generation.completion import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help="model folder, float or quantized; or give --random-weights"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue, or with --chat the question; - reads it from standard input; repeat it for a batch",
    )
    parser.add_argument("--chat", action="store_true", help="ask under the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message (with --chat)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeat it for several"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument(
        "--random-weights",
        metavar="NAME",
        help="shapes of a known model, such as llama-3.1-8b, made on the device: a prompt's bytes are its tokens, "
        "and token ids are printed",
    )
    parser.add_argument(
        "--scheme", metavar="NAME", help="format of --random-weights: W4A8 to W8A8, or bf16 (default: W4.4A8)"
    )
    add_random_allocation(parser)
    add_sampling_options(parser, temperature=0.0, top_p=1.0)
    add_execution_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the text; what it took goes to standard error, where someone is watching."""
    if (arguments.folder is None) == (arguments.random_weights is None):
        raise OptionError("give either a model folder or --random-weights NAME")
    if arguments.folder is not None and arguments.scheme is not None:
        raise OptionError(f"--scheme is for --random-weights: {arguments.folder} has its format, leave --scheme out")
    if arguments.folder is not None and arguments.random_allocation is not None:
        raise OptionError(f"--random-allocation is for --random-weights: {arguments.folder} has its own allocation")
    options: dict[str, Any] = {**sampling_options(arguments)}
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompt]
    if arguments.random_weights is not None:
        _generate_tokens(arguments, prompts, options)
    else:
        _generate_text(arguments, prompts, options)


def _generate_text(arguments: argparse.Namespace, prompts: list[str], options: dict[str, Any]) -> None:
    from mixllm_jax.generation.completion import checked_options

    own: Any = {name: getattr(arguments, name) for name in ("chat", "system", "stop", "echo")}
    settings: Any = {**options, **own}
    checked_options(settings, prompts)  # complains before a model is loaded
    model = load_model(arguments.folder, arguments)
    if len(prompts) == 1:
        completions = [_print_pieces(model.stream(prompts[0], **settings))]
    else:
        completions = model.complete(prompts, **settings)
        for prompt, completion in zip(prompts, completions, strict=True):
            print(f"=== {prompt}\n{completion.text}\n")
    if sys.stderr.isatty():
        print(_describe(completions), file=sys.stderr)


def _print_pieces(pieces: Generator[str, None, Completion]) -> Completion:
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            completion: Completion = end.value
            return completion


def _describe(completions: list[Completion]) -> str:
    """How much text it was, and how fast it came."""
    prompt_tokens, tokens = sum(c.prompt_tokens for c in completions), sum(len(c.tokens) for c in completions)
    first = completions[0].first_token_seconds
    text = f"({prompt_tokens} tokens of prompt, first token after {first:.2f} s; {tokens} new tokens"
    speed = sum(completion.tokens_per_second or 0.0 for completion in completions)
    return text + (f", {speed:.1f} a second)" if speed else ")")


def _generate_tokens(arguments: argparse.Namespace, prompts: list[str], options: dict[str, Any]) -> None:
    """Generates with random weights: there is no tokenizer, and nothing that would end the text."""
    import jax

    from mixllm_jax.device import require_kernels
    from mixllm_jax.generation import Engine, SamplingSettings
    from mixllm_jax.generation.completion import default_max_tokens
    from mixllm_jax.generation.memory import explain_shortage_of_weights
    from mixllm_jax.loading import compute_dtype
    from mixllm_jax.models.presets import preset
    from mixllm_jax.models.random_weights import WeightFormat, fitting_group_size, random_decoder

    if arguments.chat or arguments.system is not None:
        raise OptionError("random weights have no chat template: give the prompt without --chat and --system")
    if arguments.stop or arguments.echo:
        raise OptionError("random weights make no text: leave out --stop and --echo")
    config = preset(arguments.random_weights)
    weights = WeightFormat.from_name(
        arguments.scheme or "W4.4A8",
        tied=config.tie_word_embeddings,
        lm_head_bits=arguments.lm_head_bits,
        embedding_bits=arguments.embedding_bits,
        allocation=arguments.random_allocation or "uniform",
    )
    if weights.eight_bit_share is None and arguments.random_allocation is not None:
        raise OptionError("--random-allocation is for quantized weights: --scheme bf16 has no 8-bit channels")
    if weights.eight_bit_share is not None or weights.lm_head_bits == 8:
        require_kernels(fitting_group_size(config), arguments.implementation)
    dtype = compute_dtype(arguments.dtype)
    with explain_shortage_of_weights(arguments.random_weights):
        model = random_decoder(config, weights, dtype=dtype, implementation=arguments.implementation)
        jax.block_until_ready(model)
    tokens = [[byte % config.vocab_size for byte in prompt.encode()] for prompt in prompts]
    max_tokens = options.pop("max_tokens", default_max_tokens(tokens, config.max_position_embeddings))
    stream = Engine(model, kv_bits=arguments.kv_bits).stream(
        tokens,
        max_tokens=max_tokens,
        sampling=SamplingSettings(**options),
    )
    for chunk in stream:
        for row, new in enumerate(chunk):
            print(*([f"{row + 1}:"] if len(prompts) > 1 else []), *new, flush=True)
