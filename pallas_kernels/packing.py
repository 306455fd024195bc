"""The packed mixed-precision weight: 4-bit and 8-bit output channels of one linear layer, stored group by group.

A weight of the format is  w[n, k] ~ (code[n, k] - zero_point[n, g]) * scale[n, g],  g = k // group_size,  with codes
0..15 and zero points 0..15 for 4-bit channels, and codes -128..127 and no zero point for 8-bit channels.

The arrays are group-major: one group of a tile of neighbouring channels is one contiguous block of memory, so that a
kernel which walks along the groups reads long runs, and one that splits the groups among programs reads disjoint ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GROUP_SIZES = (32, 64, 128)
"""Group sizes that every implementation takes; the XLA reference takes any even size up to 512."""

MAX_SUMMED_GROUP_SIZE = 257
"""Codes of 8 bits, 0..255, whose sum fits 16 bits for certain."""

Array = Any
"""A JAX array, a tracer, or a NumPy array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Weight of a linear layer whose output channels have either 4 or 8 bits (format version 1).

    Attributes:
        codes4: uint8 `[num_groups, n4, group_size // 2]`; byte j holds code j of the group in its low nibble and code
            j + group_size / 2 in its high nibble, so that the two halves of a group unpack without interleaving.
        scales4: float16 `[num_groups, n4]`.
        zero_points4: uint8 `[num_groups, n4]`, 0..15.
        codes8: int8 `[num_groups, n8, group_size]`.
        scales8: float16 `[num_groups, n8]`.
        channel_order: int32 `[n4 + n8]`; packed row i, 4-bit rows first, is output channel `channel_order[i]`.
        group_size: Input channels that share a scale.
        code_sums4: None, or uint16 `[num_groups, n4]` from `with_code_sums`, for the kernels that need it; what is
            derived from the codes is not part of the format, so checkpoints do not hold it.
        code_sums8: None, or uint16 `[num_groups, n8]`, likewise; there are either both or neither.
    """

    codes4: Array
    scales4: Array
    zero_points4: Array
    codes8: Array
    scales8: Array
    channel_order: Array
    group_size: int = dataclasses.field(metadata={"static": True})
    code_sums4: Array | None = None
    code_sums8: Array | None = None

    @property
    def num_groups(self) -> int:
        """Groups along the input channels."""
        return int(self.codes4.shape[0])

    @property
    def n4(self) -> int:
        """4-bit output channels."""
        return int(self.codes4.shape[1])

    @property
    def n8(self) -> int:
        """8-bit output channels."""
        return int(self.codes8.shape[1])

    @property
    def in_features(self) -> int:
        """Input channels (K)."""
        return self.num_groups * self.group_size

    @property
    def out_features(self) -> int:
        """Output channels (N)."""
        return self.n4 + self.n8

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, the shape of the weight that is packed here."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the format: codes, scales, zero points and the channel order, but not the sums of codes."""
        arrays = jax.tree_util.tree_leaves(dataclasses.replace(self, code_sums4=None, code_sums8=None))
        return sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in arrays)


class UnpackedWeight(NamedTuple):
    """The codes of a `PackedWeight`, one byte a code, channel-major, in packed row order.

    Attributes:
        codes4: uint8 `[n4, in_features]`, 0..15.
        scales4: float16 `[n4, num_groups]`.
        zero_points4: uint8 `[n4, num_groups]`, 0..15.
        codes8: int8 `[n8, in_features]`.
        scales8: float16 `[n8, num_groups]`.
        channel_order: int32 `[n4 + n8]`.
    """

    codes4: Array
    scales4: Array
    zero_points4: Array
    codes8: Array
    scales8: Array
    channel_order: Array


def pack(
    codes4: Array,
    scales4: Array,
    zero_points4: Array,
    codes8: Array,
    scales8: Array,
    channel_order: Array,
    *,
    group_size: int,
) -> PackedWeight:
    """Pack channel-major codes; the inverse of `unpack`.

    NumPy arrays give a packed weight of NumPy arrays, JAX arrays one of JAX arrays.

    Args:
        codes4: Integer `[n4, in_features]`, values 0..15 (not checked under a trace).
        scales4: `[n4, num_groups]`; must already be representable in float16, since codes are computed with the
            rounded scale.
        zero_points4: Integer `[n4, num_groups]`, 0..15.
        codes8: Integer `[n8, in_features]`, -128..127.
        scales8: `[n8, num_groups]`.
        channel_order: Integer `[n4 + n8]`, a permutation of the output channels.
        group_size: Input channels that share a scale; divides `in_features`.

    Raises:
        ValueError: Shapes that do not fit together, or (for NumPy arrays) values outside their ranges.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be a positive even number, found {group_size}")
    for name, codes in (("codes4", codes4), ("codes8", codes8)):
        if codes.ndim != 2 or codes.shape[1] % group_size:
            raise ValueError(
                f"{name} must be [channels, in_features] with in_features a multiple of group_size {group_size}, "
                f"found shape {tuple(codes.shape)}"
            )
    if isinstance(codes4, np.ndarray) and codes4.size and (codes4.min() < 0 or codes4.max() > 15):
        raise ValueError(f"4-bit codes must lie in 0..15, found {codes4.min()}..{codes4.max()}")
    if isinstance(codes8, np.ndarray) and codes8.size and (codes8.min() < -128 or codes8.max() > 127):
        raise ValueError(f"8-bit codes must lie in -128..127, found {codes8.min()}..{codes8.max()}")
    num_groups = codes4.shape[1] // group_size
    half = group_size // 2
    grouped4 = codes4.astype(np.uint8).reshape(codes4.shape[0], num_groups, group_size)
    grouped8 = codes8.astype(np.int8).reshape(codes8.shape[0], codes8.shape[1] // group_size, group_size)
    packed = PackedWeight(
        codes4=(grouped4[..., :half] | (grouped4[..., half:] << np.uint8(4))).transpose(1, 0, 2),
        scales4=scales4.astype(np.float16).T,
        zero_points4=zero_points4.astype(np.uint8).T,
        codes8=grouped8.transpose(1, 0, 2),
        scales8=scales8.astype(np.float16).T,
        channel_order=channel_order.astype(np.int32),
        group_size=group_size,
    )
    if isinstance(codes4, np.ndarray):
        packed = jax.tree_util.tree_map(np.ascontiguousarray, packed)
    validate(packed, values=isinstance(codes4, np.ndarray))
    return packed


def unpack(packed: PackedWeight) -> UnpackedWeight:
    """The codes one byte each, channel-major; the inverse of `pack`."""
    codes4 = unpack_nibbles(packed.codes4)
    return UnpackedWeight(
        codes4=codes4.transpose(1, 0, 2).reshape(packed.n4, packed.in_features),
        scales4=packed.scales4.T,
        zero_points4=packed.zero_points4.T,
        codes8=packed.codes8.transpose(1, 0, 2).reshape(packed.n8, packed.in_features),
        scales8=packed.scales8.T,
        channel_order=packed.channel_order,
    )


def unpack_nibbles(codes4: Array) -> Array:
    """uint8 `[..., group_size // 2]` of packed pairs to uint8 `[..., group_size]` of codes 0..15."""
    xp = _namespace(codes4)
    return xp.concatenate([codes4 & np.uint8(15), codes4 >> np.uint8(4)], axis=-1)


def with_code_sums(packed: PackedWeight) -> PackedWeight:
    """The weight with `code_sums4` and `code_sums8`, which it takes to multiply by its codes as unsigned bytes.

    With the bytes q' = code, z' = zero point of a 4-bit channel, q' = code + 128, z' = 128 of an 8-bit one, and those
    of the activations a' = a + 128, the dot of one group is

        sum (q' - z') a  =  sum q' a'  -  128 SQ  -  z' S,        SQ = sum q',  S = sum a

    SQ, of each group and channel, is what is added here: at most 128 * 15 and 128 * 255 in groups of 128.

    Raises:
        ValueError: Groups so large that a sum may exceed 16 bits.
    """
    if packed.group_size > MAX_SUMMED_GROUP_SIZE:
        raise ValueError(f"code sums fit 16 bits in groups of up to {MAX_SUMMED_GROUP_SIZE}, not {packed.group_size}")
    # In NumPy for NumPy: the numbers of channels differ from layer to layer, and compiling takes longer than adding.
    code_sums = _code_sums if isinstance(packed.codes4, np.ndarray) else jax.jit(_code_sums)
    sums4, sums8 = code_sums(packed.codes4, packed.codes8)
    return dataclasses.replace(packed, code_sums4=sums4, code_sums8=sums8)


def _code_sums(codes4: Array, codes8: Array) -> tuple[Array, Array]:
    xp = _namespace(codes4)
    pairs = (codes4 & np.uint8(15)) + (codes4 >> np.uint8(4))
    sums8 = xp.sum(codes8, axis=-1, dtype=np.int32) + np.int32(128 * codes8.shape[-1])
    return xp.sum(pairs, axis=-1, dtype=np.uint16), sums8.astype(np.uint16)


ALIGNED_ROWS = 16
"""Channels for which a row of scales, zero points or sums is whole pieces of 16 bytes."""


def has_aligned_rows(packed: PackedWeight) -> bool:
    """Whether the channels of both widths are multiples of `ALIGNED_ROWS`, as bulk copies of several rows want."""
    return packed.n4 % ALIGNED_ROWS == packed.n8 % ALIGNED_ROWS == 0


def with_aligned_rows(packed: PackedWeight) -> PackedWeight:
    """The same weight with aligned rows where its output channels allow it: up to 15 channels more have 8 bits."""
    return packed if packed.out_features % ALIGNED_ROWS else with_8bit_channels(packed, packed.n4 % ALIGNED_ROWS)


def with_8bit_channels(packed: PackedWeight, number: int) -> PackedWeight:
    """The same weight with the first `number` of its 4-bit channels stored with 8 bits; without sums of codes.

    A 4-bit code less its zero point is a legal 8-bit code with the same scale: products stay the same to the bit.

    Raises:
        ValueError: More channels than there are.
    """
    if not 0 <= number <= packed.n4:
        raise ValueError(f"there are {packed.n4} 4-bit channels, not {number}")
    if number == 0:
        return packed
    xp = _namespace(packed.codes4)
    n4 = packed.n4
    moved = unpack_nibbles(packed.codes4[:, :number]).astype(np.int8)
    moved = moved - packed.zero_points4[:, :number, None].astype(np.int8)
    order = xp.concatenate([packed.channel_order[n4:], packed.channel_order[:number]])
    ascending = xp.argsort(order)

    def merged(eight: Array, four: Array) -> Array:
        return xp.concatenate([eight, four], axis=1)[:, ascending]

    return dataclasses.replace(
        packed,
        codes4=packed.codes4[:, number:],
        scales4=packed.scales4[:, number:],
        zero_points4=packed.zero_points4[:, number:],
        codes8=merged(packed.codes8, moved),
        scales8=merged(packed.scales8, packed.scales4[:, :number]),
        channel_order=xp.concatenate([packed.channel_order[number:n4], order[ascending]]),
        code_sums4=None,
        code_sums8=None,
    )


def dequantize(packed: PackedWeight) -> Array:
    """The weight in float32, `[out_features, in_features]`, rows in output-channel order."""
    xp = _namespace(packed.codes4)
    codes4 = unpack_nibbles(packed.codes4).astype(np.float32)
    zero_points4 = packed.zero_points4.astype(np.float32)[..., None]
    rows4 = (codes4 - zero_points4) * packed.scales4.astype(np.float32)[..., None]
    rows8 = packed.codes8.astype(np.float32) * packed.scales8.astype(np.float32)[..., None]
    rows = xp.concatenate([rows4, rows8], axis=1).transpose(1, 0, 2).reshape(packed.shape)
    return rows[xp.argsort(packed.channel_order)]


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Fuse layers that share their input: the output channels of the first layer, then of the second, and so on.

    The result has sums of codes where all weights have them.

    Raises:
        ValueError: No weights, or weights that differ in `in_features` or `group_size`.
    """
    if not weights:
        raise ValueError("concatenate needs at least one packed weight")
    first = weights[0]
    for index, weight in enumerate(weights):
        if (weight.in_features, weight.group_size) != (first.in_features, first.group_size):
            raise ValueError(
                f"weights to concatenate must share in_features and group_size: weight 0 has {first.in_features} and "
                f"{first.group_size}, weight {index} has {weight.in_features} and {weight.group_size}"
            )
    xp = _namespace(first.codes4)
    offsets = np.cumsum([0] + [weight.out_features for weight in weights])
    orders = [weight.channel_order + np.int32(offset) for weight, offset in zip(weights, offsets[:-1], strict=True)]
    orders4 = [order[: weight.n4] for order, weight in zip(orders, weights, strict=True)]
    orders8 = [order[weight.n4 :] for order, weight in zip(orders, weights, strict=True)]

    summed = all(weight.code_sums4 is not None for weight in weights)

    def along_channels(name: str) -> Array:
        return xp.concatenate([getattr(weight, name) for weight in weights], axis=1)

    return PackedWeight(
        codes4=along_channels("codes4"),
        scales4=along_channels("scales4"),
        zero_points4=along_channels("zero_points4"),
        codes8=along_channels("codes8"),
        scales8=along_channels("scales8"),
        channel_order=xp.concatenate(orders4 + orders8),
        group_size=first.group_size,
        code_sums4=along_channels("code_sums4") if summed else None,
        code_sums8=along_channels("code_sums8") if summed else None,
    )


def validate(packed: PackedWeight, *, values: bool = False) -> None:
    """Check shapes and dtypes, and with `values` also the contents (which must then be concrete).

    Raises:
        ValueError: Naming the field, what was expected and what was found.
    """
    if packed.group_size < 2 or packed.group_size % 2:
        raise ValueError(f"group_size must be a positive even number, found {packed.group_size}")
    for name, ndim in (("codes4", 3), ("codes8", 3)):
        if len(getattr(packed, name).shape) != ndim:
            raise ValueError(f"PackedWeight.{name} must have {ndim} axes, found {getattr(packed, name).shape}")
    groups, n4, n8 = packed.num_groups, packed.n4, packed.n8
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes4": ((groups, n4, packed.group_size // 2), np.uint8),
        "scales4": ((groups, n4), np.float16),
        "zero_points4": ((groups, n4), np.uint8),
        "codes8": ((groups, n8, packed.group_size), np.int8),
        "scales8": ((groups, n8), np.float16),
        "channel_order": ((n4 + n8,), np.int32),
    }
    if packed.code_sums4 is not None or packed.code_sums8 is not None:
        expected |= {"code_sums4": ((groups, n4), np.uint16), "code_sums8": ((groups, n8), np.uint16)}
    for name, (shape, dtype) in expected.items():
        array = getattr(packed, name)
        if array is None:
            raise ValueError(f"PackedWeight.{name} is missing: with_code_sums adds the sums of both bit widths")
        if tuple(array.shape) != shape or array.dtype != dtype:
            raise ValueError(
                f"PackedWeight.{name} must be {np.dtype(dtype).name} {list(shape)}, "
                f"found {array.dtype} {list(array.shape)}"
            )
    if not values:
        return
    order = np.asarray(packed.channel_order)
    if not np.array_equal(np.sort(order), np.arange(n4 + n8)):
        raise ValueError(f"PackedWeight.channel_order must be a permutation of 0..{n4 + n8 - 1}")
    zero_points = np.asarray(packed.zero_points4)
    if zero_points.size and zero_points.max() > 15:
        raise ValueError(f"PackedWeight.zero_points4 must lie in 0..15, found {zero_points.max()}")
    for name in ("scales4", "scales8"):
        if not np.isfinite(np.asarray(getattr(packed, name))).all():
            raise ValueError(f"PackedWeight.{name} must be finite")


def _namespace(array: Array) -> Any:
    """`numpy` for NumPy arrays, `jax.numpy` otherwise."""
    return np if isinstance(array, np.ndarray) else jnp
