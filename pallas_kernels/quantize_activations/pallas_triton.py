"""Triton kernel of the activation quantisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.triton_common import clear_counters, counters_shape, quantize_groups, refuses_triton

LoadGroups = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""Takes the input, the tokens, the offsets within a token and a mask; gives float32 `[groups, group_size]`."""

GROUPS_OF_PROGRAM = 8
"""Fastest or nearly so from 1 to 2048 tokens, of those from 2 to 64, for plain activations and behind SwiGLU."""


def quantize_activations(x: jax.Array, *, group_size: int, interpret: bool = False) -> QuantizedActivations:
    """Symmetric int8 quantisation of float `[tokens, features]`, one scale for each token and group."""
    load_groups = functools.partial(_load_groups, features=x.shape[1])
    return quantize_loaded(load_groups, x, x.shape[1], group_size, "quantize_activations", interpret=interpret)


def quantize_loaded(
    load_groups: LoadGroups, x: jax.Array, features: int, group_size: int, name: str, *, interpret: bool
) -> QuantizedActivations:
    """Quantise what `load_groups` makes of `x`, `[tokens, features]`.

    The groups of all tokens are one list, of which a program takes a run.
    """
    tokens = x.shape[0]
    count = tokens * (features // group_size)
    codes, scales, *counters = pl.pallas_call(
        functools.partial(
            _quantize_kernel, load_groups=load_groups, tokens=tokens, features=features, group_size=group_size
        ),
        grid=(pl.cdiv(count, GROUPS_OF_PROGRAM),),
        out_shape=(
            jax.ShapeDtypeStruct((tokens * features,), jnp.int8),
            jax.ShapeDtypeStruct((count,), jnp.float32),
            *counters_shape(tokens),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(x.reshape(-1))
    return QuantizedActivations(codes.reshape(tokens, features), scales.reshape(-1, tokens), group_size, *counters)


def _quantize_kernel(
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    *counters_refs: Any,
    load_groups: LoadGroups,
    tokens: int,
    features: int,
    group_size: int,
) -> None:
    num_groups = features // group_size
    clear_counters(counters_refs, pl.program_id(0) == 0)
    index = pl.program_id(0) * GROUPS_OF_PROGRAM + jax.lax.broadcasted_iota(jnp.int32, (GROUPS_OF_PROGRAM, 1), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, group_size), 1)
    valid = index < tokens * num_groups
    token, group = index // num_groups, index % num_groups
    codes, scales = quantize_groups(load_groups(x_ref, token, group * group_size + column, valid))
    plgpu.store(codes_ref.at[index * group_size + column], codes, mask=valid)
    # Groups past the end point past the output, see `store_tile` of the matmul.
    place = jnp.where(valid, group * tokens + token, tokens * num_groups)
    plgpu.store(scales_ref.at[place], jnp.expand_dims(scales, 1), mask=valid)


def _load_groups(x_ref: Any, token: jax.Array, offset: jax.Array, valid: jax.Array, *, features: int) -> jax.Array:
    return plgpu.load(x_ref.at[token * features + offset], mask=valid, other=0).astype(jnp.float32)


def refuses(x: jax.Array, *, group_size: int, interpret: bool = False) -> str | None:
    """Why the kernel cannot run, or None."""
    return refuses_triton(group_size, x.size, interpret=interpret)
