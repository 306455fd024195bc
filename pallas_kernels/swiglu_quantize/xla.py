"""XLA reference of SwiGLU + quantisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.quantize_activations import xla as quantize_xla


def swiglu_quantize(gate_up: jax.Array, *, group_size: int, layout: Layout = "signed") -> QuantizedActivations:
    """silu(gate) * up in float32, quantised; gate is the first half of the features.

    Arguments and result are those of the public `swiglu_quantize`, which has checked them.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    activated = gate * jax.nn.sigmoid(gate) * up
    return quantize_xla.quantize_activations(activated, group_size=group_size, layout=layout)
