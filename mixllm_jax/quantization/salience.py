"""Salience of output channels: by how much the loss is estimated to change when a channel is rounded to 4 bits.

Paper Eq. 4 and Algorithm 1: with ``delta`` the error of rounding a channel to 4 bits and ``g_d`` the gradient of the
loss of calibration sequence d with respect to the channel's weights,

    S_c = mean over d of | g_d . delta + 1/2 (g_d . delta)^2 |

(the second term is the Fisher approximation of the Hessian term). ``g_d`` is never formed: it is the sum over tokens of
output gradient times input, so ``g_d . delta = sum_t gy[t, c] * (x[t] . delta[c])``, one product like the layer itself.
"""

import jax
import jax.numpy as jnp

from mixllm_jax.quantization.rounding import dequantize, round_to_nearest


def rounding_error(weight: jax.Array, group_size: int) -> jax.Array:
    """``delta``: plain 4-bit min/max rounding minus the weight, float32 [out_features, in_features]."""
    four_bit = jnp.zeros(weight.shape[:1], bool)
    return dequantize(round_to_nearest(weight, four_bit, group_size)) - weight.astype(jnp.float32)


def sequence_salience(inputs: jax.Array, output_gradient: jax.Array, delta: jax.Array) -> jax.Array:
    """Salience of each output channel of a linear layer for each sequence.

    Args:
        inputs: float [sequences, tokens, in_features], what the layer was given.
        output_gradient: float [sequences, tokens, out_features], gradient of each sequence's loss (the mean over its
            predicted tokens) with respect to the layer's output.
        delta: float32 [out_features, in_features] (:func:`rounding_error`).

    Returns:
        float32 [sequences, out_features], not negative; Eq. 4 is the mean over the sequences of all batches.
    """
    output_change = jnp.einsum("stk,nk->stn", inputs, delta.astype(inputs.dtype), preferred_element_type=jnp.float32)
    first_order = jnp.sum(output_gradient.astype(jnp.float32) * output_change, axis=1)
    return jnp.abs(first_order + 0.5 * first_order**2)
