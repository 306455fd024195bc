"""Finds the fastest configuration of each implementation of the matmul for each case; writes the device's table.

python -m pallas_kernels.tune --models llama-3.1-8b --tokens 1 16 64

Compiling takes most of the time, so cases are tuned in as many processes as there are processors, which time their
candidates one at a time. The table is written whenever a case is done.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from pallas_kernels import registry
from pallas_kernels.activations import Layout
from pallas_kernels.benchmark_data import bfloat16_array, copies_for, packed_weight
from pallas_kernels.benchmark_report import first_line
from pallas_kernels.device_time import kernel_times, repeats_for
from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu, pallas_triton, tuned_table
from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.split import config as mosaic_gpu_split_config
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.packing import PackedWeight
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.shapes import MODELS, parse_shape, unique_shapes

TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
EXECUTIONS = 24
"""Timed executions of a configuration; the median counts."""


# Rows, tokens, warps, groups, splits, prefetch: what came out best or nearly so in searches over some hundred
# configurations of each case on an H100.
_UP_TO_8_TOKENS = (
    FewTokensConfig(16, 8, 8, 1, 1, "none"),
    FewTokensConfig(16, 8, 8, 1, 1, "weights"),
    FewTokensConfig(16, 8, 4, 2, 1, "weights"),
    FewTokensConfig(16, 8, 4, 1, 1, "weights"),
    FewTokensConfig(32, 8, 2, 1, 1, "none"),
    FewTokensConfig(32, 8, 2, 1, 1, "weights"),
    FewTokensConfig(32, 8, 4, 1, 1, "weights"),
)
_UP_TO_32_TOKENS = (
    FewTokensConfig(16, 16, 8, 1, 1, "none"),
    FewTokensConfig(16, 16, 8, 1, 1, "weights"),
    FewTokensConfig(16, 16, 4, 1, 1, "weights"),
    FewTokensConfig(32, 16, 2, 1, 1, "weights"),
    FewTokensConfig(32, 16, 2, 1, 4, "none"),
    FewTokensConfig(32, 16, 4, 1, 2, "all"),
    FewTokensConfig(32, 16, 4, 1, 3, "all"),
    FewTokensConfig(64, 16, 2, 1, 1, "none"),
    FewTokensConfig(64, 16, 2, 1, 1, "weights"),
)


MATMULS: dict[str, Callable[..., jax.Array]] = {
    "triton": pallas_triton.mixed_matmul,
    "mosaic_gpu": pallas_mosaic_gpu.mixed_matmul,
    configs.QUANTIZING: pallas_mosaic_gpu.quantized_linear,
}


def candidates(implementation: str, tokens: int) -> Iterator[configs.Config | configs.MosaicConfig]:
    """The configurations to try for a number of tokens; `implementation` is one of `MATMULS`."""
    if implementation == configs.QUANTIZING:
        yield from mosaic_gpu_split_config.quantizing_candidates(tokens)
        return
    if implementation == "mosaic_gpu":
        yield from mosaic_gpu_config.candidates(tokens)
        yield from mosaic_gpu_split_config.candidates(tokens)
        return
    if tokens <= 32:
        yield from _UP_TO_8_TOKENS if tokens <= 8 else _UP_TO_32_TOKENS
    if tokens > 16:
        token_tiles = [tile for tile in (32, 64, 128) if tile // 2 < tokens]
        for token_tile, (rows, warps), stages in itertools.product(token_tiles, ((64, 4), (128, 8)), (3, 4)):
            yield ManyTokensConfig(rows, token_tile, warps, stages)


@dataclasses.dataclass(frozen=True)
class Case:
    """What to find the fastest configuration for."""

    implementation: str
    tokens: int
    n: int
    k: int
    group_size: int
    share_8bit: float


def tune(case: Case, shown: int, timing: contextlib.AbstractContextManager[Any]) -> tuple[list[configs.Entry], str]:
    """Time the candidates of a case.

    Args:
        case: The case.
        shown: Configurations to report, from the fastest on.
        timing: Held while the device is used.

    Returns:
        The fastest, if any runs, and a report: the fastest ones with their microseconds, and why others do not run.
    """
    first, weights = _weights(case.n, case.k, case.group_size, case.share_8bit)
    x = bfloat16_array((case.tokens, case.k), case.tokens)
    todo = list(candidates(case.implementation, case.tokens))
    layouts = [_layout(case, first, config) for config in todo]
    # Each candidate gets the layout that it wants: quantising costs the same for either, a pass from one to the other
    # would not.
    activations = {
        layout: x if layout is None else quantize_activations(x, case.group_size, layout=layout)
        for layout in set(layouts)
    }
    functions = [
        _compile(MATMULS[case.implementation], activations[layout], first, config)
        for layout, config in zip(layouts, todo, strict=True)
    ]
    rows, lines = [], []
    for layout, config, function in zip(layouts, todo, functions, strict=True):
        if isinstance(function, Exception):
            lines.append(f"\n  {config}: {first_line(function)[:150]}")
            continue
        argument_sets = [(activations[layout], weight) for weight in weights]
        try:
            jax.block_until_ready(function(*argument_sets[0]))  # Mosaic GPU compiles at the first call
            with timing:
                times = kernel_times(function, argument_sets, repeats_for(len(weights), EXECUTIONS))
        except Exception as error:  # the other candidates are still worth their time
            lines.append(f"\n  {config}: {first_line(error)[:150]}")
            continue
        rows.append((sum(times.values()), config))
    rows.sort(key=lambda row: row[0])
    lines += [f"\n  {us:.2f} {config}" for us, config in rows[:shown]]
    settings = (case.tokens, case.n, case.k, case.group_size, case.share_8bit)
    return [configs.Entry(*settings, config, round(us, 2)) for us, config in rows[:1]], f"{case}{''.join(lines)}"


def _layout(case: Case, weight: PackedWeight, config: configs.Config | configs.MosaicConfig) -> Layout | None:
    """Of the activations that a configuration wants; None where it quantises them itself."""
    if case.implementation == configs.QUANTIZING:
        return None
    if isinstance(config, configs.MosaicConfig):
        return pallas_mosaic_gpu.activation_layout(case.tokens, weight, config)
    return "signed"


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int, group_size: int, share_8bit: float) -> tuple[PackedWeight, list[PackedWeight]]:
    """A weight of these sizes, and as many (itself among them) as the cache does not hold."""
    first = packed_weight(n, k, group_size, share_8bit, 0)
    return first, [first, *(packed_weight(n, k, group_size, share_8bit, i) for i in range(1, copies_for(first.nbytes)))]


_lock: Any = None
"""In a worker: held by the one that times."""


def _start_worker(lock: Any) -> None:
    global _lock
    _lock = lock


def _tune_in_worker(case: Case, shown: int) -> tuple[list[configs.Entry], str, str]:
    return *tune(case, shown, _lock), registry.device_kind()


def tune_all(cases: list[Case], workers: int, shown: int, out: Path | None, log: Callable[[str], None]) -> Path | None:
    """Tune the cases in processes of their own; write the table whenever one is done.

    A case that fails is logged and left out.

    Args:
        cases: To tune, in this order.
        workers: Processes.
        shown: Configurations of each case to report, from the fastest on.
        out: File of the table; None: that of the device.
        log: Takes the report of each case.

    Returns:
        The table's path, or None where no case gave an entry.
    """
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers share the device's memory
    context = multiprocessing.get_context("spawn")
    path = None
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Lock(),)) as pool:
        futures = {pool.submit(_tune_in_worker, case, shown): case for case in cases}
        for done in as_completed(futures):
            try:
                entries, report, device_kind = done.result()
            except Exception as error:  # one bad case is no reason to lose the others
                log(f"FAILED, left out: {futures[done]}: {first_line(error)[:300]}")
                continue
            log(report)
            if entries:
                path = tuned_table.write_table(device_kind, entries, versions, out)
    return path


def _compile(matmul: Callable[..., jax.Array], activations: Any, weight: Any, config: Any) -> Any:
    """The compiled matmul, or why this configuration does not compile: then it is no candidate on this device."""

    def case(activations: Any, weight: Any) -> jax.Array:
        return matmul(activations, weight, None, out_dtype=jnp.bfloat16, config=config)

    try:
        return jax.jit(case).lower(activations, weight).compile()
    except Exception as error:
        return error


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=list(MATMULS), choices=list(MATMULS))
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b"], choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="instead of the models' shapes")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1], help="shares of 8-bit channels")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--show", type=int, default=4, help="configurations to print for each case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile at once")
    parser.add_argument("--out", type=Path, help="table to write instead of the one that is shipped for the device")
    options = parser.parse_args(arguments)
    shapes = options.shapes or unique_shapes(options.models)
    cases = [
        Case(implementation, tokens, n, k, options.group_size, share)
        for (n, k), share, tokens, implementation in itertools.product(
            shapes, options.shares, options.tokens, options.implementations
        )
    ]
    cases.sort(key=lambda case: case.n * case.k, reverse=True)  # the long ones first
    # Asked in a process of its own: one that holds the device's memory would leave none to the workers.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        if pool.submit(registry.compute_capability).result() is None:
            print("tuning needs an NVIDIA GPU that JAX sees", file=sys.stderr)
            return 1
    path = tune_all(cases, options.workers, options.show, options.out, lambda line: print(line, flush=True))
    if path is None:
        print("no case has a configuration that runs, see above: no table was written", file=sys.stderr)
        return 1
    print("wrote", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
