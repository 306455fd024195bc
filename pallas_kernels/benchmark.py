"""Times the quantised linear against the bf16 one on the shapes of real models, and stores a table and a plot.

python -m pallas_kernels.benchmark --out docs/results/kernels_h100.json

For each shape, number of tokens M and share of 8-bit channels: (a) quantising the activations and the matmul, (b) the
matmul alone (the same time where it quantises its activations itself), (c) a bf16 `jnp` dot, all as device time in one
run, with weights that come from memory. The floor is the larger of the weight's bytes at the measured copy bandwidth
and the operations at the measured int8 rate.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

# The baseline is cuBLAS; without Triton candidates for bf16 dots, compiling all of them takes a minute instead of ten.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.benchmark_data import bfloat16_array, copies_for, packed_weight
from pallas_kernels.benchmark_report import HEADER, Ceilings, Row, first_line, format_row, plot, write_json
from pallas_kernels.device_time import kernel_times, repeats_for
from pallas_kernels.mixed_matmul.api import OPERATION, quantized_linear
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.shapes import MODELS, parse_shape, unique_shapes

TOKENS = tuple(2**power for power in range(13))
SHARES = (0.0, 0.1, 1.0)
GROUP_SIZE = 128
QUICK_SHAPES = ((4096, 4096), (28672, 4096))
QUICK_TOKENS = (1, 16, 128, 1024)


Compiled = Callable[..., Any]


def compile_all(jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Compiled]:
    """Compile functions for their arguments, on all processors; one that does not compile raises when it is called."""

    def compile_one(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Compiled:
        function, arguments = job
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            return functools.partial(_raise, error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, jobs))


def _raise(error: Exception, *arguments: Any) -> Any:
    raise error


def total_us(times: Mapping[str, float], *, without: str | None = None) -> float:
    """Time of all kernels, or of those whose name does not contain `without`.

    Raises:
        RuntimeError: There is no such kernel.
    """
    counted = [time for name, time in times.items() if without is None or without not in name]
    if not counted:
        raise RuntimeError(f"no kernel but {', '.join(times)}")
    return sum(counted)


def measure_ceilings() -> Ceilings:
    """Bandwidth of a large copy, bytes read plus bytes written, and rate of a large int8 product."""
    source = jnp.zeros(1 << 29, jnp.int32) + jnp.arange(1 << 29, dtype=jnp.int32)
    [copy] = compile_all([(lambda x: x ^ 1, (source,))])
    copy_us = total_us(kernel_times(copy, [(source,)], 8))
    nbytes = 2 * source.nbytes
    source.delete()
    size = 8192
    a, b = (jax.random.randint(jax.random.key(seed), (size, size), -127, 128, jnp.int8) for seed in range(2))

    def int8_dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    [dot] = compile_all([(int8_dot, (a, b))])
    dot_us = total_us(kernel_times(dot, [(a, b)], 8))
    return Ceilings(nbytes / copy_us * 1e6, 2 * size**3 / dot_us * 1e6)


def linear(x: jax.Array, weight: Any, implementation: str) -> jax.Array:
    """(a): what a layer with float input `[tokens, in_features]` runs; the output has its dtype."""
    return quantized_linear(x, weight, out_dtype=x.dtype, implementation=implementation)


def bf16_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """(c): the float layer, x `[tokens, in_features]`, weight `[out_features, in_features]`."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def executions_for(m: int) -> int:
    """Timed executions: many where they are short."""
    return 32 if m <= 64 else 12 if m <= 512 else 5


def benchmark_shape(
    shape: tuple[int, int],
    tokens: Sequence[int],
    shares: Sequence[float],
    implementation: str,
    ceilings: Ceilings,
    turn: AbstractContextManager[Any],
) -> tuple[list[Row], list[str]]:
    """Measure every case of a shape, leaving out those that fail.

    Args:
        shape: `(out_features, in_features)`.
        tokens: Numbers of tokens M.
        shares: Shares of 8-bit channels.
        implementation: Of the matmul and the quantisation, `auto` or a name from the registry.
        ceilings: For the floor of each case.
        turn: Held while anything runs on the device: other processes may compile meanwhile, but not run.

    Returns:
        The rows, and lines for the log.
    """
    (n, k), rows, log = shape, [], []
    started = time.perf_counter()
    inputs = {m: bfloat16_array((m, k), m) for m in tokens}
    floats = [bfloat16_array((n, k), seed) for seed in range(copies_for(2.0 * n * k))]
    packed = {}
    for share_8bit in shares:
        first = packed_weight(n, k, GROUP_SIZE, share_8bit, 0)
        packed[share_8bit] = [first] + [
            packed_weight(n, k, GROUP_SIZE, share_8bit, seed) for seed in range(1, copies_for(first.nbytes))
        ]
    cases = list(itertools.product(shares, tokens))
    functions = compile_all(
        [
            (lambda x, weight: linear(x, weight, implementation), (inputs[m], packed[share_8bit][0]))
            for share_8bit, m in cases
        ]
    )
    compiled = time.perf_counter() - started
    with turn:
        # The compiler times its candidates for the float dots on the device.
        functions = compile_all([(bf16_dot, (inputs[m], floats[0])) for m in tokens]) + functions
        bf16_us: dict[int, float] = {}
        in_turn: list[tuple[float | None, int]] = [*((None, m) for m in tokens), *cases]
        for (share, m), function in zip(in_turn, functions, strict=True):
            weights: list[Any] = floats if share is None else packed[share]
            argument_sets = [(inputs[m], weight) for weight in weights]
            try:
                times = kernel_times(function, argument_sets, repeats_for(len(weights), executions_for(m)))
                total = total_us(times)
                matmul = total if share is None else total_us(times, without="quantize")
            except Exception as error:  # one bad case is no reason to lose the others
                what = "bf16" if share is None else f"share {share}"
                log.append(f"FAILED, left out: {n} x {k}, M = {m}, {what}: {first_line(error)[:300]}")
                continue
            if share is None:
                bf16_us[m] = round(total, 2)
                continue
            if m not in bf16_us:
                continue
            chosen = "mosaic_gpu"  # whose kernel for few tokens quantises its activations itself
            if implementation not in ("auto", chosen) or any("quantize" in name for name in times):
                activations = jax.eval_shape(lambda x: quantize_activations(x, GROUP_SIZE), inputs[m])
                chosen = OPERATION.choose(
                    implementation, activations, weights[0], None, out_dtype=jnp.dtype(jnp.bfloat16)
                )
            rows.append(
                Row(
                    m=m,
                    n=n,
                    k=k,
                    share_8bit=share,
                    group_size=GROUP_SIZE,
                    implementation=chosen,
                    quantize_matmul_us=round(total, 2),
                    matmul_us=round(matmul, 2),
                    bf16_us=bf16_us[m],
                    floor_us=round(ceilings.floor_us(m, n, k, weights[0].nbytes), 2),
                )
            )
    log.append(f"{n} x {k}: compiled in {compiled:.0f} s, all in {time.perf_counter() - started:.0f} s")
    return rows, [*log, *map(format_row, rows)]


def benchmark(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    shares: Sequence[float],
    implementation: str,
    processes: int,
    log: Callable[[str], None],
    store: Callable[[Sequence[Row], Ceilings], None],
) -> tuple[list[Row], Ceilings]:
    """Measure every shape.

    Several processes trace and compile for different shapes at once, which is most of the time, and take turns at the
    device.

    Args:
        shapes: `(out_features, in_features)` each.
        tokens: Numbers of tokens M.
        shares: Shares of 8-bit channels.
        implementation: `auto`, or a name from the registry.
        processes: At once; with one, this process measures.
        log: Takes lines for the user.
        store: Takes all rows so far, in the order of the shapes, whenever a shape is done.

    Returns:
        All rows, and what the device was measured to do.
    """
    ceilings = measure_ceilings()
    log(
        f"copy {ceilings.copy_bytes_per_second / 1e12:.2f} TB/s, "
        f"int8 {ceilings.int8_operations_per_second / 1e12:.0f} TOP/s"
    )
    by_shape: dict[tuple[int, int], list[Row]] = {}

    def done(shape: tuple[int, int], result: tuple[list[Row], list[str]]) -> None:
        by_shape[shape], lines = result
        log("\n".join(lines))
        store([row for shape in shapes for row in by_shape.get(shape, [])], ceilings)

    if processes == 1:
        for shape in shapes:
            done(shape, benchmark_shape(shape, tokens, shares, implementation, ceilings, contextlib.nullcontext()))
    else:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
            turn = cast(AbstractContextManager[Any], manager.Lock())
            waiting = {
                pool.submit(benchmark_shape, shape, tokens, shares, implementation, ceilings, turn): shape
                for shape in shapes
            }
            for future in as_completed(waiting):
                done(waiting[future], future.result())
    return [row for shape in shapes for row in by_shape[shape]], ceilings


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="instead of the models' shapes")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="shares of 8-bit channels")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="that compile for different shapes at once and take turns at the device",
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, four numbers of tokens, one share")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    options = parser.parse_args(arguments)
    if options.processes > 1:  # before JAX starts: no process may take most of the memory for itself
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if registry.compute_capability() is None:
        print("the benchmark needs an NVIDIA GPU that JAX sees", file=sys.stderr)
        return 1
    if options.quick:
        options.shapes, options.tokens, options.shares = QUICK_SHAPES, QUICK_TOKENS, [0.1]
    print(HEADER)

    def store(rows: Sequence[Row], ceilings: Ceilings) -> None:
        if options.out:
            write_json(options.out, rows, ceilings)

    shapes = options.shapes or unique_shapes(options.models)
    rows, _ = benchmark(
        shapes,
        options.tokens,
        options.shares,
        options.implementation,
        options.processes,
        lambda line: print(line, flush=True),
        store,
    )
    if options.out and rows:
        plot(options.out.with_suffix(".png"), rows)
        print("wrote", options.out)
    expected = len(shapes) * len(options.tokens) * len(options.shares)
    if len(rows) < expected:
        print(f"only {len(rows)} of {expected} rows were measured, see FAILED above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
