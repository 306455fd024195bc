"""XLA reference of the activation quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import SMALLEST_SCALE, Layout, QuantizedActivations


def quantize_activations(
    x: jax.Array, *, group_size: int, terms: int = 1, layout: Layout = "signed"
) -> QuantizedActivations:
    """Symmetric int8 quantisation of float `[tokens, features]`, one scale for each token and group.

    Arguments and result are those of the public `quantize_activations`, which has checked them.
    """
    remainder = x.astype(jnp.float32)
    codes, scales = [], []
    for _ in range(terms):
        term = _quantize(remainder, group_size)
        codes.append(term.codes)
        scales.append(term.scales)
        remainder = remainder - term.codes.astype(jnp.float32) * jnp.repeat(term.scales.T, group_size, axis=1)
    return QuantizedActivations(jnp.concatenate(codes), jnp.concatenate(scales, axis=1), group_size).in_layout(layout)


def _quantize(x: jax.Array, group_size: int) -> QuantizedActivations:
    tokens, features = x.shape
    groups = x.reshape(tokens, features // group_size, group_size)
    scales = jnp.max(jnp.abs(groups), axis=-1) / 127.0
    scales = jnp.where(scales < SMALLEST_SCALE, 0.0, scales)
    # Where the scale is 0, so is the group to within rounding: any divisor gives codes of 0.
    divisors = jnp.where(scales > 0, scales, 1.0)[..., None]
    codes = jnp.clip(jnp.round(groups / divisors), -127, 127).astype(jnp.int8)
    return QuantizedActivations(codes.reshape(tokens, features), scales.T, group_size)
