"""Runs every GPU kernel once on odd shapes, to be run under NVIDIA's memory checker.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m pallas_kernels.memcheck
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

# One allocation for each array, so that an access past its end leaves the memory that belongs to the program.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.benchmark import compile_all
from pallas_kernels.benchmark_data import bfloat16_array, packed_weight
from pallas_kernels.mixed_matmul import pallas_triton
from pallas_kernels.mixed_matmul.api import OPERATION, mixed_matmul
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.rms_norm_quantize.api import rms_norm_quantize
from pallas_kernels.swiglu_quantize.api import swiglu_quantize

SIZES = ((1, 37, 384, 128, 0.1), (17, 131, 320, 64, 0.3), (70, 257, 640, 128, 0.1), (5, 19, 96, 32, 1.0))
"""Tokens, out_features, in_features, group size, share of 8-bit channels."""

CONFIGS = (
    FewTokensConfig(16, 8, 4, 2, 1, "weights"),
    FewTokensConfig(32, 16, 4, 1, 2, "all"),
    ManyTokensConfig(64, 32, 4, 3),
)


def main() -> int:
    """Run all kernels and wait for them."""
    if registry.compute_capability() is None:
        print("this needs an NVIDIA GPU that JAX sees", file=sys.stderr)
        return 1
    names = [name for name in OPERATION.implementations if name not in ("xla", "triton_interpret")]
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    for tokens, n, k, group_size, share in SIZES:
        x = bfloat16_array((tokens, k), tokens)
        weight = packed_weight(n, k, group_size, share, tokens)
        bias = jnp.ones((n,), jnp.float32)
        quantize = functools.partial(quantize_activations, group_size=group_size, implementation="triton")
        activations = quantize(x)
        norm = functools.partial(rms_norm_quantize, epsilon=1e-5, group_size=group_size, implementation="triton")
        swiglu = functools.partial(swiglu_quantize, group_size=group_size, implementation="triton")
        jobs.append((swiglu, (bfloat16_array((tokens, 2 * k), n),)))
        jobs.append((lambda x, weight, norm=norm: norm(x, weight), (x, x[0])))
        jobs.append((lambda x, weight, norm=norm: norm(x, weight, residual=x), (x, x[0])))
        for name in names:
            arguments = (activations, weight, bias)
            if OPERATION.implementations[name].refuses(*arguments, out_dtype=jnp.dtype(jnp.bfloat16)) is None:
                run = functools.partial(mixed_matmul, out_dtype=jnp.bfloat16, implementation=name)
                jobs += [(run, arguments), (run, (activations, weight))]
        jobs += [
            (
                functools.partial(pallas_triton.mixed_matmul, out_dtype=jnp.float32, config=config),
                (activations, weight, bias),
            )
            for config in CONFIGS
        ]
    for function, (_, arguments) in zip(compile_all(jobs), jobs, strict=True):
        jax.block_until_ready(function(*arguments))
    print(f"ran {len(jobs)} kernels on odd shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
