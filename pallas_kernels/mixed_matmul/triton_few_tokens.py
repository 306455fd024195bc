"""Triton kernel of the mixed matmul for few tokens, where reading the weight is what takes time.

The warps of a program share a tile of channels and split the groups of input channels among them, so that many loads
are in flight and nothing has to be added across programs; at the end their sums are added in a fixed order.
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
from pallas_kernels.mixed_matmul.triton_few_tokens_step import (
    block_starts,
    compute_step,
    load_activations,
    load_weights,
)
from pallas_kernels.mixed_matmul.triton_tiles import (
    Destination,
    Problem,
    Refs,
    iota,
    load_destination,
    operands,
    problem_of,
    store_tile,
)
from pallas_kernels.packing import PackedWeight
from pallas_kernels.triton_primitives import loads_before


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
    row_blocks, token_blocks = block_starts(config.rows_of(bits)), block_starts(config.tokens)
    block = (config.warps, 16, min(16, config.tokens))
    totals = [[jnp.zeros(block, jnp.float32) for _ in token_blocks] for _ in row_blocks]
    destinations = [load_destination(refs, problem, bits, row0 + row, 16) for row in row_blocks]
    steps = config.steps(problem)
    step0 = split * steps

    def weights_of(step: jax.Array) -> Any:
        return load_weights(refs, row0, bits, problem, config, step)

    def activations_of(step: jax.Array) -> Any:
        return [load_activations(refs, token0, bits, problem, config, step, i) for i in range(config.groups)]

    def body(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        loaded, totals = carry
        if config.prefetch == "all":
            following: Any = weights_of(step + 1), activations_of(step + 1)
            loads_before(step)
            weights, activations = loaded
        elif config.prefetch == "weights":
            following = weights_of(step + 1)
            weights, activations = loaded, activations_of(loads_before(step))
        else:
            following = ()
            weights, activations = weights_of(step), activations_of(loads_before(step))
        return following, compute_step(bits, problem, weights, activations, totals)

    first: Any = ()
    if config.prefetch == "all":
        first = weights_of(step0), activations_of(step0)
    elif config.prefetch == "weights":
        first = weights_of(step0)
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
