"""`mixllm inspect DIR`: what a model folder holds, and where its 8-bit channels are."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixllm_jax.cli.memory import format_memory, memory_facts
from mixllm_jax.cli.options import add_table_options
from mixllm_jax.errors import OptionError

if TYPE_CHECKING:
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.quantization.report import QuantizationReport

_MEMORY_OPTIONS = ("batch", "context", "dtype", "kv_bits", "lm_head_bits", "embedding_bits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="model folder, float or quantized")
    parser.add_argument("--layers", action="store_true", help="the 8-bit share of every layer as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the 8-bit share per layer (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="estimate the device memory of generation; loads nothing")
    memory.add_argument("--batch", type=int, metavar="N", help="rows (default: 1)")
    memory.add_argument("--context", type=int, metavar="N", help="prompt and new tokens of a row (default: 4096)")
    memory.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16)")
    memory.add_argument("--kv-bits", type=int, choices=(8, 16), help="of keys and values (default: 16)")
    add_table_options(memory)


def run(arguments: argparse.Namespace) -> None:
    """Prints what `mixllm.json` says; reads no weights."""
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.quantization.report import QuantizationReport, format_report

    given = [option for option in _MEMORY_OPTIONS if getattr(arguments, option) is not None]
    if given and not arguments.memory:
        raise OptionError(f"--{given[0].replace('_', '-')} is for the estimate of memory: add --memory")
    reader = CheckpointReader(arguments.folder)
    values = reader.metadata.get("quantization_report")
    report = None if values is None else QuantizationReport.from_dict(values)
    if report is None and (arguments.layers or arguments.plot):
        raise OptionError(f"{arguments.folder} is a {reader.kind} model: it has no 8-bit shares to show.")
    memory = _memory(reader, arguments) if arguments.memory else None
    if arguments.json:
        facts = _facts(reader) if memory is None else _facts(reader) | {"memory": memory}
        print(json.dumps(facts, indent=1))
    else:
        print(_describe_model(reader))
        if report is not None:
            print(_describe_settings(reader.metadata["quantization"]))
            print(format_report(report))
        if report is not None and arguments.layers:
            print(f"\n{_layer_table(report)}")
        if memory is not None:
            print(f"\n{format_memory(memory)}")
    if report is not None and arguments.plot:
        plot_shares(report, reader, arguments.plot)
        print(f"wrote {arguments.plot}")


def _memory(reader: CheckpointReader, arguments: argparse.Namespace) -> dict[str, Any]:
    return memory_facts(
        reader,
        batch=1 if arguments.batch is None else arguments.batch,
        context=arguments.context,
        dtype=arguments.dtype or "bfloat16",
        kv_bits=arguments.kv_bits or 16,
        lm_head_bits=arguments.lm_head_bits,
        embedding_bits=arguments.embedding_bits,
    )


def _facts(reader: CheckpointReader) -> dict[str, Any]:
    keys = ("format_version", "kind", "config", "quantization", "quantization_report", "tool_versions")
    return {key: reader.metadata[key] for key in keys if key in reader.metadata} | {
        "stored_bytes": _stored_bytes(reader)
    }


def _describe_model(reader: CheckpointReader) -> str:
    config = reader.config
    shapes = (shape for part in config.part_names() for shape in config.part_shapes(part).values())
    parameters = sum(math.prod(shape) for shape in shapes)
    version = reader.metadata["format_version"]
    lines = [
        f"{reader.path.name}: {reader.kind} {config.architecture} model, format version {version}",
        f"parameters           {parameters / 1e6:.1f} million, {config.num_layers} layers, width {config.hidden_size}",
        f"context              {config.max_position_embeddings} tokens",
        f"stored arrays        {_stored_bytes(reader) / 1e6:.1f} MB",
    ]
    return "\n".join(lines)


def _stored_bytes(reader: CheckpointReader) -> int:
    import ml_dtypes  # noqa: F401  (registers the name "bfloat16" with NumPy)
    import numpy as np

    arrays = [array for part in reader.metadata["parts"].values() for array in part["arrays"].values()]
    return sum(math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize for array in arrays)


def _describe_settings(settings: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)
    return f"settings             {shown}"


def _layer_table(report: QuantizationReport) -> str:
    kinds = list(report.share_by_kind)
    lines = ["8-bit channels in %", "layer  " + "".join(f"{kind:>7}" for kind in kinds)]
    for index, shares in enumerate(report.share_by_layer):
        lines.append(f"{index:>5}  " + "".join(f"{100 * shares[kind]:7.1f}" for kind in kinds))
    return "\n".join(lines)


def plot_shares(report: QuantizationReport, reader: CheckpointReader, file: Path) -> None:
    """Draws the 8-bit share of each projection over the layers, as the paper's Figure 2 does.

    Raises:
        OptionError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install 'mixllm-jax[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(report.share_by_kind)
    figure, axes_of_kinds = pyplot.subplots(len(kinds), 1, sharex=True, figsize=(8, 1.3 * len(kinds) + 1))
    layers = range(len(report.share_by_layer))
    for axes, kind in zip(axes_of_kinds, kinds, strict=True):
        axes.bar(layers, [100 * shares[kind] for shares in report.share_by_layer], color="#3b6ea5")
        axes.set_ylim(0, 100)
        axes.set_ylabel(kind)
        axes.grid(axis="y", alpha=0.3)
    axes_of_kinds[-1].set_xlabel("layer")
    figure.suptitle(f"Output channels at 8 bits, in % ({reader.path.name}, {100 * report.channel_share:.1f} % of all)")
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot {file} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
