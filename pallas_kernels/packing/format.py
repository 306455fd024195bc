"""The packed weight as a dataclass, its checks, and the nibbles that hold its 4-bit codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GROUP_SIZES = (32, 64, 128)
"""Group sizes that every implementation takes; the XLA reference takes any even size up to 512."""

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


def unpack_nibbles(codes4: Array) -> Array:
    """uint8 `[..., group_size // 2]` of packed pairs to uint8 `[..., group_size]` of codes 0..15."""
    xp = array_namespace(codes4)
    return xp.concatenate([codes4 & np.uint8(15), codes4 >> np.uint8(4)], axis=-1)


def array_namespace(array: Array) -> Any:
    """`numpy` for NumPy arrays, `jax.numpy` otherwise."""
    return np if isinstance(array, np.ndarray) else jnp
