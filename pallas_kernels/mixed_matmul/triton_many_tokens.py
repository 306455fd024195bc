"""Triton kernel of the mixed matmul for many tokens: one output tile a program, groups of input channels in a pipeline.

The weight is the left operand: it is unpacked in registers, from which the tensor cores take it, while the activations
come from shared memory, where Triton's software pipeline puts them. A tile is therefore `[channels, tokens]`, and is
transposed as it is stored.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.triton_tiles import (
    Problem,
    Refs,
    clamp,
    iota,
    load_destination,
    operands,
    problem_of,
    store_tile,
)
from pallas_kernels.packing import PackedWeight
from pallas_kernels.triton_primitives import MAGIC_BITS, fma, int8_dot, scale_magic, subtract_zero_points


@dataclasses.dataclass(frozen=True)
class ManyTokensConfig:
    """How to tile a product with many tokens.

    Attributes:
        rows: Channels of a program.
        tokens: Tokens of a program.
        warps: Warps of a program; multiples of 4 use Hopper's warp-group instructions.
        stages: Depth of the software pipeline.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def mixed_matmul(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: ManyTokensConfig,
    interpret: bool = False,
) -> jax.Array:
    """The mixed matmul in one launch; see `pallas_kernels.mixed_matmul`."""
    problem = problem_of(activations, weight)
    tiles = pl.cdiv(problem.n8, config.rows) + pl.cdiv(problem.n4, config.rows)
    out = pl.pallas_call(
        functools.partial(_many_tokens_kernel, problem=problem, config=config),
        # Programs that share a tile of the weight are neighbours, so that it is read from memory once.
        grid=(pl.cdiv(problem.tokens, config.tokens), tiles),
        out_shape=jax.ShapeDtypeStruct((problem.tokens * problem.out_features,), out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="mixed_matmul_many_tokens",
    )(operands(activations, weight, bias))
    return out.reshape(problem.tokens, problem.out_features)


def _many_tokens_kernel(refs: Refs, out_ref: Any, *, problem: Problem, config: ManyTokensConfig) -> None:
    """One tile of channels of one bit width. The 8-bit tiles come first, since they take longest."""
    token0, tile = pl.program_id(0) * config.tokens, pl.program_id(1)
    tiles8 = pl.cdiv(problem.n8, config.rows)
    compute = functools.partial(_compute_tile, refs, out_ref, token0, problem, config)
    if problem.n8:
        pl.when(tile < tiles8)(lambda: compute(tile * config.rows, 8))
    if problem.n4:
        pl.when(tile >= tiles8)(lambda: compute((tile - tiles8) * config.rows, 4))


def _compute_tile(
    refs: Refs,
    out_ref: Any,
    token0: jax.Array,
    problem: Problem,
    config: ManyTokensConfig,
    row0: jax.Array,
    bits: int,
) -> None:
    group_size, channels = problem.group_size, problem.channels(bits)
    row = clamp(row0 + iota(config.rows, 0, 2), channels, config.rows)
    token = clamp(token0 + iota(config.tokens, 0, 2), problem.tokens, config.tokens)
    token_column = clamp(token0 + iota(config.tokens, 1, 2), problem.tokens, config.tokens)

    def load_scales(group: jax.Array | int) -> tuple[jax.Array, ...]:
        weight_scale = plgpu.load(refs[f"scales{bits}"].at[group * channels + row])
        activation_scale = plgpu.load(refs["activation_scales"].at[group * problem.tokens + token_column])
        if bits == 8:
            return weight_scale, activation_scale
        return weight_scale, activation_scale, plgpu.load(refs["zero_points4"].at[group * channels + row])

    def load_activations(group: jax.Array, start: int, width: int) -> jax.Array:
        offset = token * problem.in_features + group * group_size + start + iota(width, 1, 2)
        return plgpu.load(refs["codes"].at[offset]).T

    def body(group: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        total, (weight_scale, activation_scale, *zero_point) = carry
        accumulator = jnp.full(total.shape, MAGIC_BITS, jnp.int32)
        if bits == 8:
            codes = plgpu.load(refs["codes8"].at[(group * channels + row) * group_size + iota(group_size, 1, 2)])
            accumulator = accumulator + int8_dot(codes, load_activations(group, 0, group_size))
        else:
            half = group_size // 2
            codes = plgpu.load(refs["codes4"].at[(group * channels + row) * half + iota(half, 1, 2)])
            halves = subtract_zero_points(codes, jnp.broadcast_to(zero_point[0], codes.shape))
            if half < 32:  # shorter than the instruction
                joined = jnp.stack(halves, axis=-1).transpose(0, 2, 1).reshape(config.rows, group_size)
                accumulator = accumulator + int8_dot(joined, load_activations(group, 0, group_size))
            else:
                for index, weights in enumerate(halves):
                    accumulator = accumulator + int8_dot(weights, load_activations(group, index * half, half))
        # The next group's scales are on their way while this group's dots run.
        following = load_scales(jnp.minimum(group + 1, problem.num_groups - 1))
        scaled = scale_magic(accumulator, weight_scale.astype(jnp.float32))
        return fma(scaled, activation_scale, total), following

    destination = load_destination(refs, problem, bits, row0, config.rows)
    total = jnp.zeros((config.rows, config.tokens), jnp.float32)
    total, _ = jax.lax.fori_loop(0, problem.num_groups, body, (total, load_scales(0)))
    store_tile(out_ref, total, destination, problem, token0)
