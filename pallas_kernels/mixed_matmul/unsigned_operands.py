"""Activations as unsigned bytes, for the kernel whose tensor cores multiply unsigned by unsigned.

Of unsigned bytes, the dot of a group is positive and, in groups of 128, below 2**23 (`packing.with_code_sums` has the
algebra). The bits of such an integer, read as a float32, are that integer times 2**-149: a multiply-add takes them as
they are, so that neither a conversion nor a start value is needed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import QuantizedActivations

GROUP_SIZE = 128
"""The group size for which these operands are made."""

GROUPS_OF_CORRECTION = 32
"""Groups whose zero points are taken off together: their terms have as many bytes as the codes of a group."""


def corrections_of(num_groups: int) -> int:
    """Times that zero points are taken off, each time those of the next 32 groups."""
    return -(-num_groups // GROUPS_OF_CORRECTION)


@jax.jit
def unsigned_activations(activations: QuantizedActivations) -> jax.Array:
    """Codes plus 128, and what the zero points of the weight are to be multiplied by.

    Let R[g, m] = scales[g, m] * (sum of the codes of group g of token m). The term of the zero points in the output is
    the sum over g of (zero_point * scale)[n, g] * R[g, m]: a small product of bfloat16 matrices, for which R is
    split into hi = bfloat16(R) and mid = bfloat16(R - hi), together 16 significant bits.

    Args:
        activations: Groups of 128.

    Returns:
        uint8 `[tokens, in_features + 128 * corrections]`, corrections = ceil(num_groups / 32): first the codes plus
        128; then, of every 32 groups, 128 bytes with 64 little-endian bfloat16: hi of the 32 groups, mid of the 32
        groups. Groups that do not exist are 0.

    Raises:
        ValueError: Another group size.
    """
    if activations.group_size != GROUP_SIZE:
        raise ValueError(f"unsigned operands are for groups of {GROUP_SIZE}, not {activations.group_size}")
    tokens, groups = activations.tokens, activations.in_features // GROUP_SIZE
    corrections = corrections_of(groups)
    # Two codes an element, the size of a bfloat16. Made at the full width, so that one pass over the codes writes them
    # and adds them up (the barrier keeps XLA from making two of it); then what comes behind is written in place.
    pairs = jax.lax.bitcast_convert_type(activations.codes.reshape(tokens, groups, -1, 2), jnp.uint16)
    pairs = jnp.pad(pairs, ((0, 0), (0, corrections), (0, 0)))
    sums = jnp.sum(_signed(pairs & 0xFF) + _signed(pairs >> 8), axis=-1, dtype=jnp.int32)
    sums, unsigned = jax.lax.optimization_barrier((sums, pairs ^ np.uint16(0x8080)))

    r = sums[:, :groups].astype(jnp.float32) * activations.scales.T
    r = jnp.pad(r, ((0, 0), (0, corrections * GROUPS_OF_CORRECTION - groups)))
    r = r.reshape(tokens, corrections, 1, GROUPS_OF_CORRECTION)
    high = _round_to_bfloat16(r)
    is_high = jnp.arange(2)[:, None] == 0
    halves = jnp.where(is_high, high, _round_to_bfloat16(r - high))
    bits = (jax.lax.bitcast_convert_type(halves, jnp.uint32) >> 16).astype(jnp.uint16)
    unsigned = unsigned.at[:, groups:].set(bits.reshape(tokens, corrections, GROUP_SIZE // 2))
    return jax.lax.bitcast_convert_type(unsigned, jnp.uint8).reshape(tokens, -1)


def _signed(byte: jax.Array) -> jax.Array:
    """The int8 with these bits, in int32."""
    return byte.astype(jnp.int8).astype(jnp.int32)


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    """Rounded, but still float32; unlike a pair of conversions, XLA does not take this for nothing."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
