"""The output head and the embedding in 8 bits.

At batch 1 the head is a fifth of all bytes that a decode step reads; the embedding costs no time, but as much memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixllm_jax.errors import OptionError
from pallas_kernels.packing import GROUP_SIZES, PackedWeight

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16, for groups of zeros."""


def eight_bit_table(weight: Float[Array, "vocab hidden"]) -> PackedWeight:
    """The weight of a head or an embedding rounded to 8 bits, all channels alike, in the largest groups that fit.

    Raises:
        OptionError: No group size divides the hidden size.
    """
    hidden = weight.shape[1]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if hidden % group_size == 0:
            return _round(jnp.asarray(weight), group_size)
    raise OptionError(
        f"an output head or embedding of 8 bits needs a hidden size that a group size of {GROUP_SIZES} divides, found "
        f"{hidden}"
    )


def look_up(table: PackedWeight, tokens: Int[Array, "*batch"], dtype: DTypeLike) -> Float[Array, "*batch hidden"]:
    """The rows of an 8-bit table, in `dtype`; tokens outside it are taken as the nearest inside."""
    codes = jnp.take(table.codes8, tokens, axis=1, mode="clip").astype(jnp.float32)
    scales = jnp.take(table.scales8, tokens, axis=1, mode="clip").astype(jnp.float32)
    rows = jnp.moveaxis(codes * scales[..., None], 0, -2)
    return rows.reshape(*tokens.shape, table.in_features).astype(dtype)


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
