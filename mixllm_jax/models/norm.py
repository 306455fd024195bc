"""Root-mean-square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32, result in the dtype of `x`."""

    def __init__(self, weight: Float[Array, " features"], epsilon: float) -> None:
        self.weight = nnx.Param(jnp.asarray(weight, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Array:
        """Normalises the last axis of `x`."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse_rms * self.weight.get_value()).astype(x.dtype)
