"""Triton kernel of SwiGLU + quantisation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations.pallas_triton import Config, choose_config, quantize_loaded
from pallas_kernels.quantize_activations.triton_output import eviction_policy
from pallas_kernels.triton_common import refuses_triton
from pallas_kernels.triton_primitives import silu

MANY = Config(16, 64, 4)
"""Settings for many groups, see `choose_config`: of four the fastest behind the matmul that writes the input."""


def swiglu_quantize(
    gate_up: jax.Array,
    *,
    group_size: int,
    layout: Layout = "signed",
    config: Config | None = None,
    interpret: bool = False,
) -> QuantizedActivations:
    """silu(gate) * up in float32, quantised; gate is the first half of the features. `config` overrides the choice."""
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    load_groups = functools.partial(_load_groups, features=features, eviction_policy=eviction_policy(tokens * features))
    sizes = (tokens, features, group_size, layout)
    config = config or choose_config(tokens * features // group_size, group_size, MANY)
    return quantize_loaded(load_groups, gate_up, sizes, "swiglu_quantize", config, interpret=interpret)


def _load_groups(
    ref: Any, token: jax.Array, offset: jax.Array, valid: jax.Array, *, features: int, eviction_policy: str | None
) -> jax.Array:
    start = token * (2 * features) + offset
    load = functools.partial(plgpu.load, mask=valid, other=0, eviction_policy=eviction_policy)
    gate, up = (load(ref.at[place]).astype(jnp.float32) for place in (start, start + features))
    return silu(gate) * up


def refuses(gate_up: jax.Array, *, group_size: int, layout: Layout = "signed", interpret: bool = False) -> str | None:
    """Why the kernel cannot run, or None."""
    return refuses_triton(group_size, gate_up.size, interpret=interpret)
