"""An output head with 8-bit weights and activations: at batch 1 it is a fifth of all bytes a decode step reads."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixllm_jax.errors import OptionError
from pallas_kernels.packing import GROUP_SIZES, PackedWeight

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16, for groups of zeros."""


def eight_bit_head(weight: Float[Array, "vocab hidden"]) -> PackedWeight:
    """The weight rounded to 8 bits, all channels alike, in the largest groups that fit.

    Raises:
        OptionError: No group size divides the hidden size.
    """
    hidden = weight.shape[1]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if hidden % group_size == 0:
            return _round(jnp.asarray(weight), group_size)
    raise OptionError(
        f"--lm-head-bits 8 needs a hidden size that a group size of {GROUP_SIZES} divides, found {hidden}"
    )


@functools.partial(jax.jit, static_argnums=1)
def _round(weight: Float[Array, "vocab hidden"], group_size: int) -> PackedWeight:
    vocab, hidden = weight.shape
    groups = weight.astype(jnp.float32).reshape(vocab, hidden // group_size, group_size).transpose(1, 0, 2)
    absmax = jnp.max(jnp.abs(groups), axis=-1)
    # Codes are computed with the scale as it is stored.
    scales = jnp.maximum(absmax / 127, _SMALLEST_SCALE).astype(jnp.float16)
    codes = jnp.clip(jnp.round(groups / scales.astype(jnp.float32)[..., None]), -127, 127)
    return PackedWeight(
        codes4=jnp.zeros((hidden // group_size, 0, group_size // 2), jnp.uint8),
        scales4=jnp.zeros((hidden // group_size, 0), jnp.float16),
        zero_points4=jnp.zeros((hidden // group_size, 0), jnp.uint8),
        codes8=codes.astype(jnp.int8),
        scales8=scales,
        channel_order=jnp.arange(vocab, dtype=jnp.int32),
        group_size=group_size,
    )
