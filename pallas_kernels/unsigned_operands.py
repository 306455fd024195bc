"""Activations as unsigned bytes, for the kernel of the matmul whose tensor cores multiply unsigned by unsigned.

Of unsigned bytes, the dot of a group is positive and, in groups of 128, below 2**23 (`packing.with_code_sums` has the
algebra). The bits of such an integer, read as a float32, are that integer times 2**-149: a multiply-add takes them as
they are, so that neither a conversion nor a start value is needed.

Let R[g, m] = scales[g, m] * (sum of the codes of group g of token m). The term of the zero points in the output is the
sum over g of (zero_point * scale)[n, g] * R[g, m]: a small product of bfloat16 matrices, for which R is split into
hi = bfloat16(R) and mid = bfloat16(R - hi), together 16 significant bits. The operand has one row a token:

    codes + 128                                          in_features bytes
    for every 32 groups: hi of the 32, mid of the 32     128 bytes, little-endian bfloat16; 0 for groups past the end

The scales are as wide as whole sixteens of tokens, 0 where there is no token, and each sixteen is in the order in which
the threads of the kernel take them, four in a load (`scale_place`; tokens of a sixteen by their place):

    0 1 8 9   2 3 10 11   4 5 12 13   6 7 14 15

The kernels that quantise write all of this themselves; the functions here are the reference of the layout.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

GROUP_SIZE = 128
"""The group size for which these operands are made."""

GROUPS_OF_CORRECTION = 32
"""Groups whose zero points are taken off together: their terms have as many bytes as the codes of a group."""

OFFSET = 128
"""Added to the codes."""

TOKENS_OF_SCALES = 16
"""Tokens whose scales lie together, in an order of their own."""

Index = TypeVar("Index", int, np.ndarray, jax.Array)
"""One index or many."""


def corrections_of(num_groups: int) -> int:
    """Times that zero points are taken off, each time those of the next 32 groups."""
    return -(-num_groups // GROUPS_OF_CORRECTION)


def operand_width(in_features: int) -> int:
    """Bytes of a token."""
    return in_features + GROUP_SIZE * corrections_of(in_features // GROUP_SIZE)


def scale_width(tokens: int) -> int:
    """Scales of a group: whole sixteens."""
    return -(-tokens // TOKENS_OF_SCALES) * TOKENS_OF_SCALES


def scale_place(token: Index) -> Index:
    """Where among the scales of a group that of a token lies.

    Of 16 tokens a thread of `wgmma` has t, t + 1, t + 8 and t + 9, for an even t below 8 (`mosaic_gpu/fragments.py`).
    """
    return (token & ~15) | ((token >> 1 & 3) << 2) | ((token >> 3 & 1) << 1) | (token & 1)


def placed_scales(scales: jax.Array) -> jax.Array:
    """Scales `[num_groups, scale_width(tokens)]` of this layout from `[num_groups, tokens]`."""
    tokens = scales.shape[1]
    width = scale_width(tokens)
    token_at = np.argsort(scale_place(np.arange(width)))
    return jnp.pad(scales, ((0, 0), (0, width - tokens)))[:, token_at]


def scales_of_tokens(placed: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `placed_scales`."""
    return placed[:, scale_place(np.arange(tokens))]


def unsigned_codes(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The operand, uint8 `[tokens, operand_width]`, of the codes and scales of the signed layout."""
    tokens, in_features = codes.shape
    groups = in_features // GROUP_SIZE
    corrections = corrections_of(groups)
    sums = jnp.sum(codes.reshape(tokens, groups, GROUP_SIZE), axis=-1, dtype=jnp.int32)
    terms = jnp.stack(correction_terms(sums, scales.T), axis=1)  # [tokens, 2, groups]
    terms = jnp.pad(terms, ((0, 0), (0, 0), (0, corrections * GROUPS_OF_CORRECTION - groups)))
    terms = terms.reshape(tokens, 2, corrections, GROUPS_OF_CORRECTION).swapaxes(1, 2)
    behind = jax.lax.bitcast_convert_type(terms.astype(jnp.uint16), jnp.uint8)
    behind = behind.reshape(tokens, corrections * GROUP_SIZE)
    unsigned = jax.lax.bitcast_convert_type(codes, jnp.uint8) ^ np.uint8(OFFSET)
    return jnp.concatenate([unsigned, behind], axis=1)


def signed_codes(operand: jax.Array, in_features: int) -> jax.Array:
    """The int8 codes `[tokens, in_features]` of an operand."""
    return jax.lax.bitcast_convert_type(operand[:, :in_features] ^ np.uint8(OFFSET), jnp.int8)


def correction_terms(sums: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bits of hi and mid of R = sums * scales, each in the low half of a uint32.

    For the reference and for kernels: integer operations, since XLA may leave out a pair of conversions to bfloat16 and
    back, and takes mid for 0 then.

    Args:
        sums: int32, of the codes of a group.
        scales: float32 of the same shape.
    """
    r = sums.astype(jnp.float32) * scales
    high = _bfloat16_bits(r)
    return high, _bfloat16_bits(r - jax.lax.bitcast_convert_type(high << 16, jnp.float32))


def _bfloat16_bits(x: jax.Array) -> jax.Array:
    """The bits of finite float32 values rounded to bfloat16, half to even."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
