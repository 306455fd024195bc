"""Finds the fastest configuration of each implementation of the matmul for each case; writes the device's table.

python -m pallas_kernels.tune --models llama-3.1-8b --tokens 1 16 64
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from pallas_kernels import registry
from pallas_kernels.benchmark_data import bfloat16_array, copies_for, packed_weight
from pallas_kernels.device_time import kernel_times, repeats_for
from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu, pallas_mosaic_gpu_config, pallas_triton
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
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
}


def candidates(implementation: str, tokens: int) -> Iterator[configs.Config | MosaicGpuConfig]:
    """The configurations to try for a number of tokens."""
    if implementation == "mosaic_gpu":
        yield from pallas_mosaic_gpu_config.candidates(tokens)
        return
    if tokens <= 32:
        yield from _UP_TO_8_TOKENS if tokens <= 8 else _UP_TO_32_TOKENS
    if tokens > 16:
        token_tiles = [tile for tile in (32, 64, 128) if tile // 2 < tokens]
        for token_tile, (rows, warps), stages in itertools.product(token_tiles, ((64, 4), (128, 8)), (3, 4)):
            yield ManyTokensConfig(rows, token_tile, warps, stages)


def tune(
    implementation: str,
    shapes: list[tuple[int, int]],
    tokens: list[int],
    shares: list[float],
    group_size: int,
    shown: int,
    log: Callable[[str], None],
) -> list[configs.Entry]:
    """Time every candidate of every case; return the fastest of each case that has one."""
    entries = []
    for (n, k), share in itertools.product(shapes, shares):
        first = packed_weight(n, k, group_size, share, 0)
        weights = [first] + [packed_weight(n, k, group_size, share, i) for i in range(1, copies_for(first.nbytes))]
        for m in tokens:
            activations = quantize_activations(bfloat16_array((m, k), m), group_size)
            todo = list(candidates(implementation, m))
            with ThreadPoolExecutor() as pool:
                functions = list(
                    pool.map(functools.partial(_compile, MATMULS[implementation], activations, first), todo)
                )
            rows = []
            for config, function in zip(todo, functions, strict=True):
                if isinstance(function, Exception):
                    log(f"  {config}: {str(function).splitlines()[0][:150]}")
                    continue
                times = kernel_times(
                    function, [(activations, weight) for weight in weights], repeats_for(len(weights), EXECUTIONS)
                )
                rows.append((sum(times.values()), config))
            rows.sort(key=lambda row: row[0])
            log(f"M={m} N={n} K={k} share={share}: " + "".join(f"\n  {us:.2f} {config}" for us, config in rows[:shown]))
            entries += [configs.Entry(m, n, k, group_size, share, config, round(us, 2)) for us, config in rows[:1]]
    return entries


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
    options = parser.parse_args(arguments)
    if registry.compute_capability() is None:
        print("tuning needs an NVIDIA GPU that JAX sees", file=sys.stderr)
        return 1
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    entries = []
    for implementation in options.implementations:
        entries += tune(
            implementation,
            options.shapes or unique_shapes(options.models),
            options.tokens,
            options.shares,
            options.group_size,
            options.show,
            lambda line: print(line, flush=True),
        )
    print("wrote", configs.write_table(registry.device_kind(), entries, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
