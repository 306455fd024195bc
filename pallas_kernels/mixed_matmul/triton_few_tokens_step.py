"""What a warp of the Triton kernel for few tokens does in a step: load a few groups, and add their products.

Weights go from memory to the registers of the tensor-core instruction without passing through shared memory. In
mma.m16n8k32, lane l of a warp holds rows l // 4 and l // 4 + 8, and of their 32 bytes along k those at 4 * (l % 4) and
16 + 4 * (l % 4). A dot does not care in which order k runs, as long as both operands agree: so each lane loads 16
neighbouring bytes of a row and calls them the bytes that it should hold. Transposing the loaded tile says this to
Triton, which then has nothing to move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.mixed_matmul.triton_tiles import Problem, Refs, clamp, iota
from pallas_kernels.triton_primitives import MAGIC_BITS, fma, int8_dot, scale_magic, unpack_codes

if TYPE_CHECKING:
    from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig


def block_starts(size: int) -> range:
    """Starts of the blocks of 16 (or one of 8) that a tile is made of."""
    return range(0, size, 16)


def _group_index(
    step: jax.Array, index: int, axis: int, ndim: int, problem: Problem, config: FewTokensConfig
) -> tuple[jax.Array, jax.Array | None]:
    """The group of each warp, along `axis`, and where it exists (None: everywhere).

    Groups past the end are read from the last one; their scale is set to 0.
    """
    group = (step * config.groups + index) * config.warps + iota(config.warps, axis, ndim)
    ragged = config.steps(problem) * config.splits * config.warps * config.groups != problem.num_groups
    exists = group < problem.num_groups if ragged else None
    if ragged or config.prefetch != "none":  # prefetching goes one step too far
        group = jnp.minimum(group, problem.num_groups - 1)
    return group, exists


def load_weights(
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
        for start in block_starts(rows):
            row3 = clamp(row0 + start + iota(16, 1, 3), channels, rows)
            row4 = clamp(row0 + start + iota(2, 0, 4) * 8 + iota(8, 2, 4), channels, rows)
            first = (group4 * channels + row4) * stride + iota(width, 3, 4)
            codes = [
                plgpu.load(refs[f"codes{bits}"].at[first + part], eviction_policy="evict_first")
                for part in range(0, stride, width)
            ]
            of_row = group3 * channels + row3
            zero_point = plgpu.load(refs["zero_points4"].at[of_row]) if bits == 4 else None
            blocks.append((codes, zero_point, plgpu.load(refs[f"scales{bits}"].at[of_row])))
        loaded.append(blocks)
    return loaded


def load_activations(
    refs: Refs, token0: jax.Array, bits: int, problem: Problem, config: FewTokensConfig, step: jax.Array, index: int
) -> list[tuple[list[jax.Array], jax.Array]]:
    """Codes, in the parts that the weights come in, and scales of one group: for each block of 8 or 16 tokens."""
    group3, real = _group_index(step, index, 0, 3, problem, config)
    group4, _ = _group_index(step, index, 1, 4, problem, config)
    width = _part_width(bits, problem.group_size)
    short = _is_short(bits, problem.group_size)
    block = min(16, config.tokens)
    blocks = []
    for start in block_starts(config.tokens):
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


def compute_step(bits: int, problem: Problem, weights: Any, activations: Any, totals: Any) -> Any:
    """Add one step to the warps' sums, float32 `[warps, 16, tokens]` for each block."""
    totals = [list(row) for row in totals]
    for row_blocks, token_blocks in zip(weights, activations, strict=True):
        for index, (columns, column_scale) in enumerate(token_blocks):
            block = totals[0][index].shape
            if bits == 4:
                # The tensor cores also add up the activations of each token, for the zero points.
                ones = jnp.ones((block[0], 16, columns[0].shape[1]), jnp.int8)
                activation_sums = sum(int8_dot(ones, part) for part in columns)
            for row, (codes, zero_point, scale) in enumerate(row_blocks):
                accumulator = jnp.full(block, MAGIC_BITS, jnp.int32)
                if bits == 4:
                    accumulator = accumulator - zero_point.astype(jnp.int32) * activation_sums
                parts = _weight_parts(codes, bits, problem.group_size)
                # Added to the dots, and not the dots to it: they need not wait for the activation sums.
                dots = sum(int8_dot(part, column) for part, column in zip(parts, columns, strict=True))
                accumulator = dots + accumulator
                scaled = scale_magic(accumulator, scale.astype(jnp.float32))
                totals[row][index] = fma(scaled, column_scale, totals[row][index])
    return totals


def _weight_parts(codes: list[jax.Array], bits: int, group_size: int) -> list[jax.Array]:
    """int8 codes of 16 rows and one group, `[warps, 16, k]` for each part of the group."""
    if bits == 8:
        return [_fragments(part) for part in codes]
    low, high = unpack_codes(codes[0])
    return [_join_halves(low, high)] if _is_short(bits, group_size) else [_fragments(low), _fragments(high)]


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
