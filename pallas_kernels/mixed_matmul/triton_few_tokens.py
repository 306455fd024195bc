"""Triton kernel of the mixed matmul for few tokens, where reading the weight is what takes time.

The warps of a program share a tile of channels and split the groups of input channels among them, so that many loads
are in flight and nothing has to be added across programs; at the end their sums are added in a fixed order.

Weights go from memory to the registers of the tensor-core instruction without passing through shared memory. In
mma.m16n8k32, lane l of a warp holds rows l // 4 and l // 4 + 8, and of their 32 bytes along k those at 4 * (l % 4) and
16 + 4 * (l % 4). A dot does not care in which order k runs, as long as both operands agree: so each lane loads 16
neighbouring bytes of a row and calls them the bytes that it should hold. Transposing the loaded tile says this to
Triton, which then has nothing to move.
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
from pallas_kernels.triton_primitives import (
    MAGIC_BITS,
    fma,
    int8_dot,
    loads_before,
    scale_magic,
    subtract_zero_points,
)


@dataclasses.dataclass(frozen=True)
class FewTokensConfig:
    """How to tile a product with few tokens.

    Attributes:
        rows: 4-bit channels of a program, a multiple of 16; of 8-bit channels half as many, but at least 16.
        tokens: Tokens of a program: 8, or a multiple of 16.
        warps: Warps of a program, each of which takes every `warps`-th group.
        groups: Groups whose weights a warp loads at once.
        prefetch: Whether to load the next step's weights before computing with this step's.
    """

    rows: int
    tokens: int
    warps: int
    groups: int
    prefetch: bool

    def rows_of(self, bits: int) -> int:
        """Channels of a program of this bit width."""
        return self.rows if bits == 4 else max(16, self.rows // 2)


def mixed_matmul(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: FewTokensConfig,
    interpret: bool = False,
) -> jax.Array:
    """The mixed matmul in one launch; see `pallas_kernels.mixed_matmul`."""
    problem = problem_of(activations, weight)
    tiles = pl.cdiv(problem.n8, config.rows_of(8)) + pl.cdiv(problem.n4, config.rows)
    out = pl.pallas_call(
        functools.partial(_few_tokens_kernel, problem=problem, config=config),
        grid=(tiles, pl.cdiv(problem.tokens, config.tokens)),
        out_shape=jax.ShapeDtypeStruct((problem.tokens * problem.out_features,), out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="mixed_matmul_few_tokens",
    )(operands(activations, weight, bias))
    return out.reshape(problem.tokens, problem.out_features)


def _few_tokens_kernel(refs: Refs, out_ref: Any, *, problem: Problem, config: FewTokensConfig) -> None:
    """One tile of channels of one bit width. The 8-bit tiles come first, since they take longest."""
    # Read here, since interpret mode does not know program ids inside a branch.
    program, token0 = pl.program_id(0), pl.program_id(1) * config.tokens
    tiles8 = pl.cdiv(problem.n8, config.rows_of(8))
    if problem.n8:
        pl.when(program < tiles8)(lambda: _compute_tile(refs, out_ref, program, token0, 8, problem, config))
    if problem.n4:
        pl.when(program >= tiles8)(lambda: _compute_tile(refs, out_ref, program - tiles8, token0, 4, problem, config))


def _compute_tile(
    refs: Refs,
    out_ref: Any,
    tile: jax.Array,
    token0: jax.Array,
    bits: int,
    problem: Problem,
    config: FewTokensConfig,
) -> None:
    row0 = tile * config.rows_of(bits)
    load = functools.partial(_load_weights, refs, row0, bits, problem, config)
    compute = functools.partial(_compute_step, refs, token0, bits, problem, config)
    # Blocks of the instruction's size, each with its own loads: Triton keeps the small loads of scales in the layout
    # in which they are used only where they have fewer elements than the program has threads.
    block = (config.warps, 16, min(16, config.tokens))
    totals = [[jnp.zeros(block, jnp.float32) for _ in _blocks(config.tokens)] for _ in _blocks(config.rows_of(bits))]
    destinations = [load_destination(refs, problem, bits, row0 + row, 16) for row in _blocks(config.rows_of(bits))]
    steps = pl.cdiv(problem.num_groups, config.warps * config.groups)
    if config.prefetch and steps > 1:

        def body(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            weights, totals = carry
            following = load(step + 1)
            return following, compute(step, weights, totals)

        weights, totals = jax.lax.fori_loop(0, steps - 1, body, (load(jnp.int32(0)), totals))
        totals = compute(jnp.int32(steps - 1), weights, totals)
    else:
        totals = jax.lax.fori_loop(0, steps, lambda step, totals: compute(step, load(step), totals), totals)
    for destination, row_totals in zip(destinations, totals, strict=True):
        for token, total in zip(_blocks(config.tokens), row_totals, strict=True):
            store_tile(out_ref, jnp.sum(total, axis=0), destination, problem, token0 + token)


def _blocks(size: int) -> range:
    """Starts of the blocks of 16 (or one of 8) that a tile is made of."""
    return range(0, size, 16)


def _group_index(
    step: jax.Array, index: int, axis: int, ndim: int, problem: Problem, config: FewTokensConfig
) -> tuple[jax.Array, jax.Array | None]:
    """The group of each warp, along `axis`, and where it exists (None: everywhere).

    Groups past the end are read from the last one; their scale is set to 0.
    """
    group = (step * config.groups + index) * config.warps + iota(config.warps, axis, ndim)
    if problem.num_groups % (config.warps * config.groups) == 0:
        return group, None
    return jnp.minimum(group, problem.num_groups - 1), group < problem.num_groups


def _load_weights(
    refs: Refs, row0: jax.Array, bits: int, problem: Problem, config: FewTokensConfig, step: jax.Array
) -> list[list[tuple[Any, ...]]]:
    """Codes, zero points and scales of one step: for each of its groups, for each block of 16 rows."""
    channels, group_size, rows = problem.channels(bits), problem.group_size, config.rows_of(bits)
    width = group_size // 2 if bits == 4 else min(64, group_size)
    stride = group_size * bits // 8
    loaded = []
    for index in range(config.groups):
        group3, _ = _group_index(step, index, 0, 3, problem, config)
        group4, _ = _group_index(step, index, 1, 4, problem, config)
        blocks = []
        for start in _blocks(rows):
            row3 = clamp(row0 + start + iota(16, 1, 3), channels, rows)
            row4 = clamp(row0 + start + iota(2, 0, 4) * 8 + iota(8, 2, 4), channels, rows)
            first = (group4 * channels + row4) * stride + iota(width, 3, 4)
            codes = [
                plgpu.load(refs[f"codes{bits}"].at[first + part], eviction_policy="evict_first")
                for part in range(0, stride, width)
            ]
            zero_point = plgpu.load(refs["zero_points4"].at[group4 * channels + row4]) if bits == 4 else None
            blocks.append((codes, zero_point, plgpu.load(refs[f"scales{bits}"].at[group3 * channels + row3])))
        loaded.append(blocks)
    return loaded


def _load_activations(
    refs: Refs, token0: jax.Array, bits: int, problem: Problem, config: FewTokensConfig, step: jax.Array, index: int
) -> list[tuple[list[jax.Array], jax.Array]]:
    """Codes, in the parts that the weights come in, and scales of one group: for each block of 8 or 16 tokens."""
    group3, real = _group_index(step, index, 0, 3, problem, config)
    group4, _ = _group_index(step, index, 1, 4, problem, config)
    width = _part_width(bits, problem.group_size)
    short = _is_short(bits, problem.group_size)
    block = min(16, config.tokens)
    blocks = []
    for start in _blocks(config.tokens):
        token3 = clamp(token0 + start + iota(block, 2, 3), problem.tokens, config.tokens)
        token4 = clamp(token0 + start + iota(block // 8, 0, 4) * 8 + iota(8, 2, 4), problem.tokens, config.tokens)
        first = token4 * problem.in_features + group4 * problem.group_size + iota(width, 3, 4)
        parts = [plgpu.load(refs["codes"].at[first + part]) for part in range(0, problem.group_size, width)]
        scale = plgpu.load(refs["activation_scales"].at[group3 * problem.tokens + token3])
        columns = [(_merge_rows(part) if short else _fragments(part)).transpose(0, 2, 1) for part in parts]
        blocks.append((columns, scale if real is None else jnp.where(real, scale, 0.0)))
    return blocks


def _part_width(bits: int, group_size: int) -> int:
    """Input channels of one dot: half a 4-bit group, unless that is shorter than the instruction's 32."""
    return max(32, group_size // 2) if bits == 4 else min(64, group_size)


def _is_short(bits: int, group_size: int) -> bool:
    """Whether the halves of a group are too short for a dot each, so that they are joined."""
    return bits == 4 and group_size == 32


def _compute_step(
    refs: Refs,
    token0: jax.Array,
    bits: int,
    problem: Problem,
    config: FewTokensConfig,
    step: jax.Array,
    weights: list[list[tuple[Any, ...]]],
    totals: Any,
) -> Any:
    """Add one step to the warps' sums, float32 `[warps, 16, tokens]` for each block."""
    totals = [list(row) for row in totals]
    step = loads_before(step)
    for index, blocks in enumerate(weights):
        activations = _load_activations(refs, token0, bits, problem, config, step, index)
        for row, (codes, zero_point, scale) in enumerate(blocks):
            parts = _weight_parts(codes, zero_point, _is_short(bits, problem.group_size))
            for token, (columns, column_scale) in enumerate(activations):
                accumulator = jnp.full(totals[row][token].shape, MAGIC_BITS, jnp.int32)
                for part, column in zip(parts, columns, strict=True):
                    accumulator = accumulator + int8_dot(part, column)
                scaled = scale_magic(accumulator, scale.astype(jnp.float32))
                totals[row][token] = fma(scaled, column_scale, totals[row][token])
    return totals


def _weight_parts(codes: list[jax.Array], zero_point: jax.Array | None, short: bool) -> list[jax.Array]:
    """int8 weights of 16 rows and one group, `[warps, 16, k]` for each part of the group."""
    if zero_point is None:
        return [_fragments(part) for part in codes]
    low, high = subtract_zero_points(codes[0], jnp.broadcast_to(zero_point, codes[0].shape))
    return [_join_halves(low, high)] if short else [_fragments(low), _fragments(high)]


def _fragments(x: jax.Array) -> jax.Array:
    """`[rows / 8, warps, 8, k]`, as loaded, to `[warps, rows, k]`, k in the order of the instruction's registers."""
    blocks, warps, eight, k = x.shape
    return x.reshape(blocks, warps, eight, 4, k // 16, 4).transpose(1, 0, 2, 4, 3, 5).reshape(warps, blocks * eight, k)


def _merge_rows(x: jax.Array) -> jax.Array:
    """`[rows / 8, warps, 8, k]` to `[warps, rows, k]`."""
    blocks, warps, eight, k = x.shape
    return x.transpose(1, 0, 2, 3).reshape(warps, blocks * eight, k)


def _join_halves(low: jax.Array, high: jax.Array) -> jax.Array:
    """The two halves of a group, each `[rows / 8, warps, 8, k]`, to `[warps, rows, 2 * k]`."""
    blocks, warps, eight, k = low.shape
    joined = jnp.stack([low, high], axis=-1)
    return joined.transpose(1, 0, 2, 4, 3).reshape(warps, blocks * eight, 2 * k)
