"""XLA reference of SwiGLU + quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.quantize_activations import xla as quantize_xla


def swiglu_quantize(gate_up: jax.Array, *, group_size: int) -> QuantizedActivations:
    """silu(gate) * up in float32, quantised; gate is the first half of the features."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return quantize_xla.quantize_activations(gate * jax.nn.sigmoid(gate) * up, group_size=group_size)
