"""Triton kernel of RMSNorm + quantisation: one program a token, which holds the whole row in registers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations.triton_output import RUN, QuantizedOutput, eviction_policy, iota
from pallas_kernels.triton_common import next_power_of_2, refuses_triton

MAX_FEATURES = 2**16
"""Longest row: 64 elements for each of 1024 threads."""


def rms_norm_quantize(
    x: jax.Array,
    norm_weight: jax.Array,
    residual: jax.Array | None,
    *,
    epsilon: float,
    group_size: int,
    layout: Layout = "signed",
    interpret: bool = False,
) -> tuple[QuantizedActivations, jax.Array]:
    """RMSNorm of x (+ residual) in float32, quantised; also returns the sum that was normalised, in x's dtype."""
    tokens, features = x.shape
    # Groups in one piece: with fewer columns of a group at a time the norm was slower.
    output = QuantizedOutput(tokens, features, group_size, layout, columns=group_size)
    inputs = {"x": x.reshape(-1), "norm_weight": norm_weight}
    out_shape = output.shapes()
    if residual is not None:
        inputs["residual"] = residual.reshape(-1)
        out_shape["total"] = jax.ShapeDtypeStruct((tokens * features,), x.dtype)
    warps = next_power_of_2(output.places) * group_size // (32 * RUN)  # whose threads take all values once
    out = pl.pallas_call(
        functools.partial(_rms_norm_quantize_kernel, output=output, epsilon=epsilon),
        grid=(tokens,),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=min(32, max(4, warps)), num_stages=1),
        interpret=interpret,
        name="rms_norm_quantize",
    )(inputs)
    return output.activations(out), x if residual is None else out["total"].reshape(tokens, features)


def _rms_norm_quantize_kernel(
    in_refs: dict[str, Any], out_refs: dict[str, Any], *, output: QuantizedOutput, epsilon: float
) -> None:
    token = pl.program_id(0)
    output.clear_counters(out_refs, token == 0)
    group = iota(next_power_of_2(output.places), 1)
    column = group * output.group_size + output.channels
    valid = group < output.num_groups
    place = token * output.features + column
    policy = eviction_policy(output.tokens * output.features)
    load = functools.partial(plgpu.load, mask=valid, other=0, eviction_policy=policy)
    total = load(in_refs["x"].at[place]).astype(jnp.float32)
    if "residual" in in_refs:
        total = total + load(in_refs["residual"].at[place]).astype(jnp.float32)
        plgpu.store(out_refs["total"].at[place], total.astype(out_refs["total"].dtype), mask=valid)
    norm_weight = plgpu.load(in_refs["norm_weight"].at[column], mask=valid, other=0).astype(jnp.float32)
    mean_square = jnp.sum(total * total) / output.features
    output.store(out_refs, total * jax.lax.rsqrt(mean_square + epsilon) * norm_weight, token, group)


def refuses(
    x: jax.Array,
    norm_weight: jax.Array,
    residual: jax.Array | None,
    *,
    epsilon: float,
    group_size: int,
    layout: Layout = "signed",
    interpret: bool = False,
) -> str | None:
    """Why the kernel cannot run, or None."""
    if x.shape[1] > MAX_FEATURES:
        return f"it holds a row of at most {MAX_FEATURES} features, not {x.shape[1]}"
    return refuses_triton(group_size, x.size, interpret=interpret)
