"""Runs every GPU kernel once on odd shapes, to be run under NVIDIA's memory checker.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m pallas_kernels.memcheck

The kernels are called directly, with the settings that a device's table picks and with others, so that every path of
each is taken whatever the device would choose for shapes as small as these.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# One allocation for each array, so that an access past its end leaves the memory that belongs to the program.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

import jax
import jax.numpy as jnp
from tqdm import tqdm

from pallas_kernels import registry, unsigned_operands
from pallas_kernels.activations import Layout
from pallas_kernels.benchmark import compile_all
from pallas_kernels.benchmark_data import bfloat16_array, packed_weight
from pallas_kernels.decode_attention import pallas_triton as attention_triton
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu, pallas_triton
from pallas_kernels.mixed_matmul.configs import Config, MosaicConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig, MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.packing import PackedWeight, with_aligned_rows, with_code_sums
from pallas_kernels.quantize_activations import pallas_triton as quantize_triton
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.rms_norm_quantize import pallas_triton as rms_norm_triton
from pallas_kernels.swiglu_quantize import pallas_triton as swiglu_triton

SIZES = (
    (1, 37, 384, 128, 0.1),
    (17, 131, 320, 64, 0.3),
    (70, 272, 640, 128, 0.1),
    (5, 19, 96, 32, 1.0),
    (9, 48, 256, 128, 1.0),
    (16, 112, 256, 128, 0.0),
    (577, 1088, 384, 128, 0.1),
    (131, 80, 4224, 128, 0.5),
)
"""Tokens, out_features, in_features, group size, share of 8-bit channels.

The next to last has more tiles than there are multiprocessors: an order that turns from wave to wave and halved ones in
the last wave, and for the kernel that splits the input channels sums of two tiles at a time. The last has more than one
block of zero points.
"""

TRITON_CONFIGS: tuple[Config | None, ...] = (
    None,
    FewTokensConfig(16, 8, 4, 2, 1, "weights"),
    FewTokensConfig(32, 16, 4, 1, 2, "all"),
    ManyTokensConfig(64, 32, 4, 3),
)
"""Settings of the Triton matmuls; None is what is chosen."""

MOSAIC_CONFIGS: tuple[MosaicConfig | None, ...] = (
    None,
    MosaicGpuConfig(),
    MosaicGpuConfig(64, 1, 12, 4, parts=1),
    MosaicGpuConfig(64, 1, 4, 8, parts=1, unsigned=True),
    MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True),
    MosaicGpuSplitConfig(16, 1, 1, 8, 4),
    MosaicGpuSplitConfig(16, 4, 1, 8, 2),
    MosaicGpuSplitConfig(48, 2, 2, 4, 1),
    MosaicGpuSplitConfig(16, 2, 2, 8, 2),
)
"""Settings of the Hopper matmuls: signed operands, unsigned ones, and split input channels."""

QUANTIZE_CONFIGS = (MosaicGpuQuantizeConfig(8, 2, 1, 8, 2), MosaicGpuQuantizeConfig(16, 4, 2, 8, 1))
"""Settings of the Hopper matmul that quantises its activations, of at most 8 and 16 tokens."""

ATTENTION_SIZES = (
    (1, 3, 2, 64, 77, 32, "bfloat16"),
    (3, 1, 3, 48, 130, None, "float32"),
    (2, 4, 1, 128, 33, 128, "int8"),
)
"""Batch, query heads of a kv head, kv heads, head_dim, positions of the cache, group size of the result (None: float),
cache dtype."""

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that launches kernels, and its arguments."""


def quantizing_jobs() -> Iterator[Job]:
    """The kernels that quantise activations, alone and fused with norm and SwiGLU, in one int8 term and in two."""
    for tokens, _, k, group_size, _ in SIZES:
        x, gate_up = bfloat16_array((tokens, k), tokens), bfloat16_array((tokens, 2 * k), k)
        layouts: list[Layout] = ["signed", "unsigned"] if group_size == unsigned_operands.GROUP_SIZE else ["signed"]
        for layout in layouts:
            settings: dict[str, Any] = {"group_size": group_size, "layout": layout}
            norm = functools.partial(rms_norm_triton.rms_norm_quantize, epsilon=1e-5, **settings)
            yield norm, (x, x[0], None)
            yield norm, (x, x[0], x)
            for groups in (1, quantize_triton.MANY_GROUPS):  # whose settings are others
                config = quantize_triton.choose_config(groups, group_size, quantize_triton.MANY)
                for terms in (1, 2):
                    quantize = functools.partial(quantize_triton.quantize_activations, terms=terms, config=config)
                    yield functools.partial(quantize, **settings), (x,)
                config = quantize_triton.choose_config(groups, group_size, swiglu_triton.MANY)
                yield functools.partial(swiglu_triton.swiglu_quantize, config=config, **settings), (gate_up,)


def triton_matmul_jobs() -> Iterator[Job]:
    """The Triton matmuls, with a bias and without."""
    for x, weight, bias in _linears():
        activations = quantize_activations(x, weight.group_size)
        for config in TRITON_CONFIGS:
            kernel = functools.partial(pallas_triton.mixed_matmul, config=config)
            yield functools.partial(kernel, out_dtype=jnp.float32), (activations, weight, bias)
            yield functools.partial(kernel, out_dtype=jnp.bfloat16), (activations, weight, None)


def hopper_matmul_jobs() -> Iterator[Job]:
    """The matmuls of Hopper GPUs, of quantised and of float activations.

    With a bias to float32 and without one to bfloat16, in turn: each call is some seconds of compilation.
    """
    for number, (x, weight, bias) in enumerate(_linears()):
        outputs = itertools.cycle([(jnp.float32, bias), (jnp.bfloat16, None)])
        if number % 2:
            next(outputs)
        for config in MOSAIC_CONFIGS:
            out_dtype, added = next(outputs)
            layout = pallas_mosaic_gpu.activation_layout(x.shape[0], weight, config)
            activations = quantize_activations(x, weight.group_size, layout=layout)
            kernel = functools.partial(pallas_mosaic_gpu.mixed_matmul, config=config, out_dtype=out_dtype)
            yield kernel, (activations, weight, added)
        for quantizing_config in QUANTIZE_CONFIGS:
            if x.shape[0] <= quantizing_config.tile_tokens:
                out_dtype, added = next(outputs)
                x = x.astype(out_dtype)
                kernel = functools.partial(
                    pallas_mosaic_gpu.quantized_linear, config=quantizing_config, out_dtype=out_dtype
                )
                yield kernel, (x, weight, added)


def _linears() -> Iterator[tuple[jax.Array, PackedWeight, jax.Array]]:
    """Float inputs, a weight (with the sums of its codes where they are used) and a bias of every size."""
    for tokens, n, k, group_size, share in SIZES:
        weight = packed_weight(n, k, group_size, share, tokens)
        if group_size == unsigned_operands.GROUP_SIZE:
            weight = with_code_sums(with_aligned_rows(weight))
        yield bfloat16_array((tokens, k), tokens), weight, jnp.ones((n,), jnp.float32)


def attention_jobs() -> Iterator[Job]:
    """The decode step of attention in one program a head and in several, with rows that are empty, full and cut."""
    for batch, heads_per_kv, kv_heads, head_dim, max_length, group_size, cache_dtype in ATTENTION_SIZES:
        qkv = bfloat16_array((batch, (heads_per_kv + 2) * kv_heads, head_dim), batch)
        if cache_dtype == "float32":
            qkv = qkv.astype(jnp.float32)
        rotation = jnp.ones((batch, head_dim // 2), jnp.float32)
        cache = LayerCache.zeros(batch, max_length, kv_heads, head_dim, cache_dtype)
        for config in (attention_triton.Config(splits=2), attention_triton.Config(splits=1, block=16)):
            for window in (None, 16):
                run = functools.partial(
                    attention_triton.decode_attention, window=window, quantize_group_size=group_size, config=config
                )
                for last in (0, max_length - 1, max_length):
                    positions = jnp.maximum(0, last - 9 * jnp.arange(batch, dtype=jnp.int32))
                    yield run, (qkv, rotation, rotation, positions, cache)


def main() -> int:
    """Run all kernels and wait for them."""
    if registry.compute_capability() is None:
        print("this needs an NVIDIA GPU that JAX sees", file=sys.stderr)
        return 1
    _, operands = next(triton_matmul_jobs())
    reason = pallas_mosaic_gpu.refuses(*operands, out_dtype=jnp.float32)
    if reason is not None:
        print("without the Hopper kernels:", reason)
    jobs = [*quantizing_jobs(), *triton_matmul_jobs(), *attention_jobs()]
    for function, (_, arguments) in zip(compile_all(jobs), jobs, strict=True):
        jax.block_until_ready(function(*arguments))
    # One after another: compiled on many threads, their modules make compute-sanitizer itself crash as they are loaded.
    hopper_jobs = list(hopper_matmul_jobs()) if reason is None else []
    for kernel, arguments in tqdm(hopper_jobs, "Hopper matmuls", disable=None):
        jax.block_until_ready(jax.jit(kernel)(*arguments))
    print(f"ran {len(jobs) + len(hopper_jobs)} calls on odd shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
