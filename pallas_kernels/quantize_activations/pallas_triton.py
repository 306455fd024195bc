"""Triton kernel of the activation quantisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations.triton_output import QuantizedOutput
from pallas_kernels.triton_common import refuses_triton

LoadGroups = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""Takes the input, the tokens, the offsets within a token and a mask; gives float32 `[groups, group_size]`."""

GROUPS_OF_PROGRAM = 8
"""Fastest or nearly so from 1 to 2048 tokens, of those from 2 to 64, for plain activations and behind SwiGLU."""


def quantize_activations(
    x: jax.Array, *, group_size: int, layout: Layout = "signed", interpret: bool = False
) -> QuantizedActivations:
    """Symmetric int8 quantisation of float `[tokens, features]`, one scale for each token and group."""
    tokens, features = x.shape
    load_groups = functools.partial(_load_groups, features=features)
    output = QuantizedOutput(tokens, features, group_size, layout)
    return quantize_loaded(load_groups, x, output, "quantize_activations", interpret=interpret)


def quantize_loaded(
    load_groups: LoadGroups, x: jax.Array, output: QuantizedOutput, name: str, *, interpret: bool
) -> QuantizedActivations:
    """Quantise what `load_groups` makes of `x`.

    The groups of all tokens are one list, of which a program takes a run.
    """
    out = pl.pallas_call(
        functools.partial(_quantize_kernel, load_groups=load_groups, output=output),
        grid=(pl.cdiv(output.tokens * output.places, GROUPS_OF_PROGRAM),),
        out_shape=output.shapes(),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(x.reshape(-1))
    return output.activations(out)


def _quantize_kernel(x_ref: Any, out_refs: dict[str, Any], *, load_groups: LoadGroups, output: QuantizedOutput) -> None:
    output.clear_counters(out_refs, pl.program_id(0) == 0)
    index = pl.program_id(0) * GROUPS_OF_PROGRAM + jax.lax.broadcasted_iota(jnp.int32, (GROUPS_OF_PROGRAM, 1), 0)
    token, group = index // output.places, index % output.places
    column = jax.lax.broadcasted_iota(jnp.int32, (1, output.group_size), 1)
    exists = (token < output.tokens) & (group < output.num_groups)
    output.store(out_refs, load_groups(x_ref, token, group * output.group_size + column, exists), token, group)


def _load_groups(x_ref: Any, token: jax.Array, offset: jax.Array, valid: jax.Array, *, features: int) -> jax.Array:
    return plgpu.load(x_ref.at[token * features + offset], mask=valid, other=0).astype(jnp.float32)


def refuses(x: jax.Array, *, group_size: int, layout: Layout = "signed", interpret: bool = False) -> str | None:
    """Why the kernel cannot run, or None."""
    return refuses_triton(group_size, x.size, interpret=interpret)
