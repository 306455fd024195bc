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
    Destination,
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
    unpack_codes,
)


@dataclasses.dataclass(frozen=True)
class FewTokensConfig:
    """How to tile a product with few tokens.

    Attributes:
        rows: 4-bit channels of a program, a multiple of 16; of 8-bit channels half as many, but at least 16.
        tokens: Tokens of a program: 8, or a multiple of 16.
        warps: Warps of a program, each of which takes every `warps`-th group.
        groups: Groups whose weights a warp loads at once.
        splits: Programs that share a tile, each with its own run of the groups. The last one to finish adds up.
        prefetch: What to load for the next step before computing this one: "none", "weights", or "all" (activations
            too, which are few and mostly in the cache, but cost registers).
    """

    rows: int
    tokens: int
    warps: int
    groups: int
    splits: int
    prefetch: str

    def rows_of(self, bits: int) -> int:
        """Channels of a program of this bit width."""
        return self.rows if bits == 4 else max(16, self.rows // 2)

    def steps(self, problem: Problem) -> int:
        """Steps of a program, in each of which every warp takes `groups` groups."""
        return pl.cdiv(problem.num_groups, self.warps * self.groups * self.splits)

    def tiles(self, problem: Problem) -> tuple[int, int, int]:
        """Tiles of 8-bit channels, of 4-bit channels, and of tokens."""
        return (
            pl.cdiv(problem.n8, self.rows_of(8)),
            pl.cdiv(problem.n4, self.rows),
            pl.cdiv(problem.tokens, self.tokens),
        )


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
    tiles8, tiles4, token_tiles = config.tiles(problem)
    num_tiles = (tiles8 + tiles4) * token_tiles
    out_shape = [jax.ShapeDtypeStruct((problem.tokens * problem.out_features,), out_dtype)]
    inputs = [operands(activations, weight, bias)]
    aliases = {}
    if config.splits > 1:
        counters = activations.counters
        if counters is None or counters.shape[0] < num_tiles:
            counters = jnp.zeros((num_tiles,), jnp.int32)
        partial_sums = jax.ShapeDtypeStruct((num_tiles * config.splits * config.rows * config.tokens,), jnp.float32)
        out_shape += [jax.ShapeDtypeStruct(counters.shape, jnp.int32), partial_sums]
        inputs.append(counters)
        aliases = {len(inputs[0]): 1}
    out, *_ = pl.pallas_call(
        functools.partial(_few_tokens_kernel, problem=problem, config=config),
        grid=(tiles8 + tiles4, config.splits, token_tiles),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="mixed_matmul_few_tokens",
    )(*inputs)
    return out.reshape(problem.tokens, problem.out_features)


def _few_tokens_kernel(refs: Refs, *more_refs: Any, problem: Problem, config: FewTokensConfig) -> None:
    """One tile of channels of one bit width. The 8-bit tiles come first, since they may take longer."""
    # Read here, since interpret mode does not know program ids inside a branch.
    program, split, token_tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tiles8, tiles4, _ = config.tiles(problem)
    out_ref = more_refs[1 if config.splits > 1 else 0]
    tile_index = token_tile * (tiles8 + tiles4) + program
    sums = _SharedSums(more_refs[2], more_refs[3], tile_index, split) if config.splits > 1 else None

    def compute(bits: int) -> None:
        row0 = (program if bits == 8 else program - tiles8) * config.rows_of(bits)
        _compute_tile(refs, out_ref, sums, row0, token_tile * config.tokens, split, bits, problem, config)

    if problem.n8:
        pl.when(program < tiles8)(lambda: compute(8))
    if problem.n4:
        pl.when(program >= tiles8)(lambda: compute(4))


@dataclasses.dataclass(frozen=True)
class _SharedSums:
    """Where the programs of one tile meet.

    Attributes:
        counters_ref: int32, one a tile: the programs that have stored their sums; starts at 0.
        sums_ref: float32, the sums of every tile and split.
        tile: Index of the tile.
        split: Which of the tile's programs this is.
    """

    counters_ref: Any
    sums_ref: Any
    tile: jax.Array
    split: jax.Array


def _compute_tile(
    refs: Refs,
    out_ref: Any,
    sums: _SharedSums | None,
    row0: jax.Array,
    token0: jax.Array,
    split: jax.Array,
    bits: int,
    problem: Problem,
    config: FewTokensConfig,
) -> None:
    # Blocks of the instruction's size, each with its own loads: Triton keeps the small loads of scales in the layout
    # in which they are used only where they have fewer elements than the program has threads.
    row_blocks, token_blocks = _blocks(config.rows_of(bits)), _blocks(config.tokens)
    block = (config.warps, 16, min(16, config.tokens))
    totals = [[jnp.zeros(block, jnp.float32) for _ in token_blocks] for _ in row_blocks]
    destinations = [load_destination(refs, problem, bits, row0 + row, 16) for row in row_blocks]
    steps = config.steps(problem)
    step0 = split * steps

    def load_weights(step: jax.Array) -> Any:
        return _load_weights(refs, row0, bits, problem, config, step)

    def load_activations(step: jax.Array) -> Any:
        return [_load_activations(refs, token0, bits, problem, config, step, i) for i in range(config.groups)]

    def body(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        loaded, totals = carry
        if config.prefetch == "all":
            following: Any = load_weights(step + 1), load_activations(step + 1)
            loads_before(step)
            weights, activations = loaded
        elif config.prefetch == "weights":
            following = load_weights(step + 1)
            weights, activations = loaded, load_activations(loads_before(step))
        else:
            following = ()
            weights, activations = load_weights(step), load_activations(loads_before(step))
        return following, _compute_step(bits, problem, weights, activations, totals)

    first: Any = ()
    if config.prefetch == "all":
        first = load_weights(step0), load_activations(step0)
    elif config.prefetch == "weights":
        first = load_weights(step0)
    # The last step loads the groups past the end once more instead of leaving the loop: less code, and they are cached.
    _, totals = jax.lax.fori_loop(step0, step0 + steps, body, (first, totals))
    tiles = [[jnp.sum(total, axis=0) for total in row] for row in totals]
    if sums is None:
        _store(out_ref, tiles, destinations, problem, token0)
    else:
        _store_shared(out_ref, sums, tiles, destinations, problem, config, token0)


def _store(
    out_ref: Any, tiles: list[list[jax.Array]], destinations: list[Destination], problem: Problem, token0: jax.Array
) -> None:
    for destination, row in zip(destinations, tiles, strict=True):
        for index, tile in enumerate(row):
            store_tile(out_ref, tile, destination, problem, token0 + 16 * index)


def _store_shared(
    out_ref: Any,
    sums: _SharedSums,
    tiles: list[list[jax.Array]],
    destinations: list[Destination],
    problem: Problem,
    config: FewTokensConfig,
    token0: jax.Array,
) -> None:
    """Store this program's sums; the last program of the tile adds all of them, always in the same order."""
    size = config.rows * config.tokens

    def place(split: jax.Array | int, row: int, column: int) -> jax.Array:
        rows, tokens = tiles[row][column].shape
        local = (row * 16 + iota(rows, 0, 2)) * config.tokens + column * 16 + iota(tokens, 1, 2)
        return (sums.tile * config.splits + split) * size + local

    for row, blocks in enumerate(tiles):
        for column, tile in enumerate(blocks):
            plgpu.store(sums.sums_ref.at[place(sums.split, row, column)], tile)
    # The barrier orders the stores of all threads before the one that counts; the count is release and acquire.
    finished = plgpu.atomic_add(sums.counters_ref, (sums.tile,), loads_before(jnp.int32(1)))

    @pl.when(finished == config.splits - 1)
    def _add() -> None:
        def total(row: int, column: int) -> jax.Array:
            places = [place(split, row, column) for split in range(config.splits)]
            return functools.reduce(jnp.add, [plgpu.load(sums.sums_ref.at[p], volatile=True) for p in places])

        added = [[total(row, column) for column in range(len(blocks))] for row, blocks in enumerate(tiles)]
        _store(out_ref, added, destinations, problem, token0)


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
    ragged = config.steps(problem) * config.splits * config.warps * config.groups != problem.num_groups
    exists = group < problem.num_groups if ragged else None
    if ragged or config.prefetch != "none":  # prefetching goes one step too far
        group = jnp.minimum(group, problem.num_groups - 1)
    return group, exists


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
            of_row = group3 * channels + row3
            zero_point = plgpu.load(refs["zero_points4"].at[of_row]) if bits == 4 else None
            blocks.append((codes, zero_point, plgpu.load(refs[f"scales{bits}"].at[of_row])))
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


def _compute_step(bits: int, problem: Problem, weights: Any, activations: Any, totals: Any) -> Any:
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
