"""Activations as unsigned bytes, for the kernel of the matmul whose tensor cores multiply unsigned by unsigned.

Of unsigned bytes, the dot of a group is positive and, in groups of 128, below 2**23 (`packing.with_code_sums` has the
algebra). The bits of such an integer, read as a float32, are that integer times 2**-149: a multiply-add takes them as
they are, so that neither a conversion nor a start value is needed.

Let R[g, m] = scales[g, m] * (sum of the codes of group g of token m). The term of the zero points in the output is the
sum over g of (zero_point * scale)[n, g] * R[g, m]: a small product of bfloat16 matrices, for which R is split into
hi = bfloat16(R) and mid = bfloat16(R - hi), together 16 significant bits. The operand has one row a token:

    codes + 128                                          in_features bytes
    for every 32 groups: hi of the 32, mid of the 32     128 bytes, little-endian bfloat16; 0 for groups past the end

The kernels that quantise write it themselves; the functions here are the reference of the layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

GROUP_SIZE = 128
"""The group size for which these operands are made."""

GROUPS_OF_CORRECTION = 32
"""Groups whose zero points are taken off together: their terms have as many bytes as the codes of a group."""

OFFSET = 128
"""Added to the codes."""


def corrections_of(num_groups: int) -> int:
    """Times that zero points are taken off, each time those of the next 32 groups."""
    return -(-num_groups // GROUPS_OF_CORRECTION)


def operand_width(in_features: int) -> int:
    """Bytes of a token."""
    return in_features + GROUP_SIZE * corrections_of(in_features // GROUP_SIZE)


def unsigned_codes(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The operand, uint8 `[tokens, operand_width]`, of the codes and scales of `QuantizedActivations`."""
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
