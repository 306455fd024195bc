"""Triton implementation of the mixed matmul: picks the kernel and its tile sizes."""

from __future__ import annotations

import jax

from pallas_kernels import registry
from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul import configs, triton_few_tokens, triton_many_tokens
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import problem_of
from pallas_kernels.packing import PackedWeight
from pallas_kernels.triton_common import refuses_triton


def mixed_matmul(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: configs.Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The mixed matmul in one launch.

    Activations in the unsigned layout go through a pass of their own first. Arguments and result are those of the
    public `mixed_matmul`, which has checked them; `config` overrides the tuned choice, and with `interpret` the kernel
    runs step by step in JAX, for tests on a CPU.
    """
    if config is None:
        problem = problem_of(activations, weight)
        config = configs.default(problem) if interpret else configs.choose(problem, registry.device_kind())
    activations = activations.in_layout("signed")
    if isinstance(config, FewTokensConfig):
        return triton_few_tokens.mixed_matmul(
            activations, weight, bias, out_dtype=out_dtype, config=config, interpret=interpret
        )
    return triton_many_tokens.mixed_matmul(
        activations, weight, bias, out_dtype=out_dtype, config=config, interpret=interpret
    )


def refuses(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> str | None:
    """Why the kernels cannot run, or None."""
    if 0 in (activations.tokens, weight.out_features):
        return "there is nothing to compute"
    elements = max(
        activations.tokens * max(weight.in_features, weight.out_features), weight.out_features * weight.in_features
    )
    return refuses_triton(weight.group_size, elements, interpret=interpret)
