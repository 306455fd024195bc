"""Triton kernel of the activation quantisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations.triton_output import QuantizedOutput, iota
from pallas_kernels.triton_common import refuses_triton

LoadGroups = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""Takes the input, the tokens, the offsets within a token and a mask; gives float32 for `QuantizedOutput.store`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the groups are divided among programs and threads.

    Attributes:
        groups: Of a program.
        columns: Of a group, in a chunk of it; see `QuantizedOutput`.
        num_warps: Of a program.
    """

    groups: int
    columns: int
    num_warps: int


MANY_GROUPS = 8192
"""Groups of all tokens from which on instructions count for more than threads."""

FEW = Config(8, 128, 4)
"""For fewer groups, of all operations."""

MANY = Config(8, 32, 1)
"""For more of them, where a warp alone needs no barriers: of eight settings the fastest for plain activations."""


def choose_config(groups: int, group_size: int, many: Config) -> Config:
    """The settings for a number of groups of all tokens.

    Args:
        groups: Of all tokens.
        group_size: Channels of a group.
        many: The operation's settings for `MANY_GROUPS` and more.
    """
    config = many if groups >= MANY_GROUPS else FEW
    return dataclasses.replace(config, columns=min(group_size, config.columns))


def quantize_activations(
    x: jax.Array,
    *,
    group_size: int,
    terms: int = 1,
    layout: Layout = "signed",
    config: Config | None = None,
    interpret: bool = False,
) -> QuantizedActivations:
    """Symmetric int8 quantisation of float `[tokens, features]`; `config` overrides the choice."""
    tokens, features = x.shape
    load_groups = functools.partial(_load_groups, features=features)
    sizes = (tokens, features, group_size, layout)
    config = config or choose_config(x.size // group_size, group_size, MANY)
    return quantize_loaded(load_groups, x, sizes, "quantize_activations", config, terms=terms, interpret=interpret)


def quantize_loaded(
    load_groups: LoadGroups,
    x: jax.Array,
    sizes: tuple[int, int, int, Layout],
    name: str,
    config: Config,
    *,
    terms: int = 1,
    interpret: bool,
) -> QuantizedActivations:
    """Quantise what `load_groups` makes of `x`; `sizes` are tokens, features, the group size and the layout.

    The groups of all tokens are one list, of which a program takes a run.
    """
    tokens, features, group_size, layout = sizes
    output = QuantizedOutput(terms * tokens, features, group_size, layout, config.columns)
    out = pl.pallas_call(
        functools.partial(_quantize_kernel, load_groups=load_groups, output=output, terms=terms, groups=config.groups),
        grid=(pl.cdiv(tokens * output.places, config.groups),),
        out_shape=output.shapes(),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(x.reshape(-1))
    return output.activations(out)


def _quantize_kernel(
    x_ref: Any, out_refs: dict[str, Any], *, load_groups: LoadGroups, output: QuantizedOutput, terms: int, groups: int
) -> None:
    tokens = output.tokens // terms
    output.clear_counters(out_refs, pl.program_id(0) == 0)
    index = pl.program_id(0) * groups + iota(groups, 1)
    token, group = index // output.places, index % output.places
    exists = (token < tokens) & (group < output.num_groups)
    values = load_groups(x_ref, token, group * output.group_size + output.channels, exists)
    for term in range(terms):  # each quantises what the one before has left
        values = output.store(out_refs, values, jnp.where(token < tokens, term * tokens + token, output.tokens), group)


def _load_groups(x_ref: Any, token: jax.Array, offset: jax.Array, valid: jax.Array, *, features: int) -> jax.Array:
    return plgpu.load(x_ref.at[token * features + offset], mask=valid, other=0).astype(jnp.float32)


def refuses(
    x: jax.Array, *, group_size: int, terms: int = 1, layout: Layout = "signed", interpret: bool = False
) -> str | None:
    """Why the kernel cannot run, or None."""
    return refuses_triton(group_size, terms * x.size, interpret=interpret)
