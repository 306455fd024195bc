"""The output head and the embedding in 8 bits.

At batch 1 the head is a fifth of all bytes that a decode step reads; the embedding costs no time, but as much memory.

Rounding the weights costs nothing that could be measured. Rounding the head's input to int8 costs 0.15 % of perplexity
(SmolLM2-135M), so the head takes it as the sum of two int8 terms, of some 16 bits together: with few tokens a product
takes the time in which its weights are read, and twice as many tokens cost nothing.
"""

import functools
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixllm_jax.errors import OptionError
from pallas_kernels.packing import GROUP_SIZES, PackedWeight, concatenate

Bits = Literal[8, 16]

HEAD_ACTIVATION_TERMS: Literal[2] = 2
"""Int8 terms of the input of an 8-bit head."""

_ROWS_AT_ONCE = 8192
"""Rows rounded in one go: bounds what there is in float32 beside the table."""

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16, for groups of zeros."""


class TableBits(NamedTuple):
    """Bits of the output head and of the embedding."""

    lm_head: Bits
    embedding: Bits


def choose_bits(lm_head_bits: int | None, embedding_bits: int | None, *, quantized: bool, tied: bool) -> TableBits:
    """What was asked for, 8 or 16; where that is None, 8 in a model with int8 activations and 16 in a float one.

    Args:
        lm_head_bits: Asked for of the output head.
        embedding_bits: Asked for of the embedding.
        quantized: The model's linears take int8 activations.
        tied: The embedding is the output head as well; it then has 16 bits by default where that is to have them.

    Raises:
        OptionError: Other numbers of bits, or an 8-bit embedding that is to be a 16-bit output head as well.
    """
    for name, value in (("lm-head-bits", lm_head_bits), ("embedding-bits", embedding_bits)):
        if value not in (None, 8, 16):
            raise OptionError(f"{name} must be 8 or 16, found {value}")
    default: Bits = 8 if quantized else 16
    lm_head = default if lm_head_bits is None else cast(Bits, lm_head_bits)
    if embedding_bits is None:
        return TableBits(lm_head, lm_head if tied and lm_head == 16 else default)
    if tied and embedding_bits == 8 and lm_head == 16:
        raise OptionError(
            "the embedding of this model is its output head as well: --embedding-bits 8 needs --lm-head-bits 8 too"
        )
    return TableBits(lm_head, cast(Bits, embedding_bits))


def eight_bit_table(weight: Float[Array, "vocab hidden"]) -> PackedWeight:
    """The weight of a head or an embedding rounded to 8 bits, all channels alike, in the largest groups that fit.

    A NumPy array is brought to the device a few thousand rows at a time.

    Raises:
        OptionError: No group size divides the hidden size.
    """
    hidden = weight.shape[1]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if hidden % group_size == 0:
            parts = [
                _round(jnp.asarray(weight[first : first + _ROWS_AT_ONCE]), group_size)
                for first in range(0, weight.shape[0], _ROWS_AT_ONCE)
            ]
            return parts[0] if len(parts) == 1 else concatenate(parts)
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
