"""XLA reference of RMSNorm + quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations import xla as quantize_xla


def rms_norm_quantize(
    x: jax.Array,
    norm_weight: jax.Array,
    residual: jax.Array | None,
    *,
    epsilon: float,
    group_size: int,
    layout: Layout = "signed",
) -> tuple[QuantizedActivations, jax.Array]:
    """RMSNorm of x (+ residual) in float32, quantised; also returns the sum that was normalised, in x's dtype.

    Arguments and result are those of the public `rms_norm_quantize`, which has checked them.
    """
    total = x.astype(jnp.float32)
    if residual is not None:
        total = total + residual.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + epsilon)
    normalized = total * inverse_rms * norm_weight.astype(jnp.float32)
    quantized = quantize_xla.quantize_activations(normalized, group_size=group_size, layout=layout)
    return quantized, total.astype(x.dtype)
