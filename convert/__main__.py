"""`convert --from-hf PATH_OR_HUB_ID --out DIR`, `convert --from-gguf FILE --out DIR`."""

import argparse
import functools
import sys
from collections.abc import Sequence

from mixllm_jax.cli.runner import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to a parser."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from-hf",
        metavar="PATH_OR_HUB_ID",
        help="folder of a checkpoint (safetensors, or PyTorch .bin), or a hub id such as Qwen/Qwen2.5-0.5B",
    )
    source.add_argument("--from-gguf", metavar="FILE", help="a GGUF file")
    parser.add_argument("--out", metavar="DIR", required=True, help="the model folder to create")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the stored weights (auto: as in the checkpoint; de-quantized GGUF tensors become float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder already")


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints what came out."""
    from convert.converter import convert_from_gguf, convert_from_hf  # late: --help needs none of it
    from mixllm_jax.checkpoint import TOKENIZER_FILES

    options = {"dtype": arguments.dtype, "overwrite": arguments.overwrite}
    if arguments.from_hf is not None:
        done = convert_from_hf(arguments.from_hf, arguments.out, **options)
    else:
        done = convert_from_gguf(arguments.from_gguf, arguments.out, **options)
    print(
        f"{done.folder}: {done.config.architecture}, {done.config.num_layers} layers, "
        f"{done.parameters / 1e6:.1f} million parameters, {done.nbytes / 1e6:.1f} MB"
    )
    if not any((done.folder / name).is_file() for name in TOKENIZER_FILES):
        print(
            "note: the checkpoint has no tokenizer, so this model takes token ids alone; put tokenizer.json and "
            "tokenizer_config.json of the model beside its weights and convert again to give it text",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `convert` command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Convert a Hugging Face or GGUF checkpoint to a model folder that mixllm reads.",
        epilog="Afterwards: mixllm generate DIR --prompt ..., mixllm quantize DIR --out DIR4 --bits 4.4",
        allow_abbrev=False,
    )
    add_arguments(parser)
    return run_command(functools.partial(run, parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
