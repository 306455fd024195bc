"""Keys and values of one layer: float, or int8 with one scale for each token and head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
"""A JAX array, a tracer, or a `jax.ShapeDtypeStruct`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Slot i of a row holds the key and the value of position i.

    Attributes:
        keys: `[batch, max_length, kv_heads, head_dim]`, in a float dtype or int8.
        values: Like `keys`.
        key_scales: float32 `[batch, kv_heads, max_length]` of an int8 cache: key ~ code * scale, scale = absmax / 127
            of the token's head. None for a float cache.
        value_scales: Like `key_scales`.
    """

    keys: Array
    values: Array
    key_scales: Array = None
    value_scales: Array = None

    @classmethod
    def zeros(
        cls, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> LayerCache:
        """An empty cache; every array has memory of its own, so that a jitted step may donate them all.

        Args:
            batch: Rows.
            max_length: Positions each row has room for.
            num_kv_heads: Key and value heads.
            head_dim: Channels of a head.
            dtype: A float dtype, or int8 for codes with scales.
        """
        shape = (batch, max_length, num_kv_heads, head_dim)
        if jnp.dtype(dtype) != jnp.int8:
            return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        scales = (batch, num_kv_heads, max_length)
        return cls(
            jnp.zeros(shape, jnp.int8),
            jnp.zeros(shape, jnp.int8),
            jnp.zeros(scales, jnp.float32),
            jnp.zeros(scales, jnp.float32),
        )

    @property
    def quantized(self) -> bool:
        """Whether keys and values are int8 codes."""
        return self.key_scales is not None

    @property
    def max_length(self) -> int:
        """Positions each row has room for."""
        return int(self.keys.shape[1])

    def write(self, positions: jax.Array, keys: jax.Array, values: jax.Array) -> LayerCache:
        """Stores new keys and values at each row's own positions.

        Writes beyond the end are dropped: only the padding of a row can lie there, and clamping them would overwrite
        the row's last real token.

        Args:
            positions: int32 `[batch, length]`.
            keys: Float `[batch, length, kv_heads, head_dim]`.
            values: Like `keys`.
        """
        rows = jnp.arange(positions.shape[0])[:, None]

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[rows, positions].set(new.astype(cache.dtype), mode="drop")

        def put_scales(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[rows, :, positions].set(new, mode="drop")

        if not self.quantized:
            return LayerCache(put(self.keys, keys), put(self.values, values))
        (key_codes, key_scales), (value_codes, value_scales) = quantize_heads(keys), quantize_heads(values)
        return LayerCache(
            put(self.keys, key_codes),
            put(self.values, value_codes),
            put_scales(self.key_scales, key_scales),
            put_scales(self.value_scales, value_scales),
        )

    def write_first(self, keys: jax.Array, values: jax.Array) -> LayerCache:
        """`write` to an empty cache, from position 0 of every row on; a slice copy in place of a scatter.

        Args:
            keys: Float `[batch, length, kv_heads, head_dim]`, with `length` at most `max_length`.
            values: Like `keys`.
        """
        length = keys.shape[1]
        if not self.quantized:
            return LayerCache(
                self.keys.at[:, :length].set(keys.astype(self.keys.dtype)),
                self.values.at[:, :length].set(values.astype(self.values.dtype)),
            )
        (key_codes, key_scales), (value_codes, value_scales) = quantize_heads(keys), quantize_heads(values)
        return LayerCache(
            self.keys.at[:, :length].set(key_codes),
            self.values.at[:, :length].set(value_codes),
            self.key_scales.at[:, :, :length].set(key_scales.transpose(0, 2, 1)),
            self.value_scales.at[:, :, :length].set(value_scales.transpose(0, 2, 1)),
        )

    def read(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """All keys and values as float `[batch, max_length, kv_heads, head_dim]`."""
        if not self.quantized:
            return self.keys.astype(dtype), self.values.astype(dtype)
        return (
            dequantize_heads(self.keys, self.key_scales.transpose(0, 2, 1), dtype),
            dequantize_heads(self.values, self.value_scales.transpose(0, 2, 1), dtype),
        )

    def first_slots(self, slots: int) -> LayerCache:
        """The first `slots` positions of every row."""
        if slots == self.max_length:
            return self
        return LayerCache(
            self.keys[:, :slots],
            self.values[:, :slots],
            None if self.key_scales is None else self.key_scales[:, :, :slots],
            None if self.value_scales is None else self.value_scales[:, :, :slots],
        )

    def as_stored(self, x: jax.Array) -> jax.Array:
        """What `read` would give for keys or values `x` after a `write`."""
        if not self.quantized:
            return x.astype(self.keys.dtype).astype(x.dtype)
        return dequantize_heads(*quantize_heads(x), x.dtype)

    def grown(self, max_length: int) -> LayerCache:
        """The same content with room for `max_length` positions."""

        def pad(array: jax.Array | None, axis: int) -> jax.Array | None:
            if array is None:
                return None
            room = [(0, 0)] * array.ndim
            room[axis] = (0, max_length - array.shape[axis])
            return jnp.pad(array, room)

        return LayerCache(pad(self.keys, 1), pad(self.values, 1), pad(self.key_scales, 2), pad(self.value_scales, 2))


def bytes_per_position(num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes that one token takes in the cache of one layer: key, value, and the scales of an int8 cache."""
    itemsize = np.dtype(dtype).itemsize
    scale_bytes = 4 if np.dtype(dtype) == np.int8 else 0
    return 2 * num_kv_heads * (head_dim * itemsize + scale_bytes)


def quantize_heads(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 codes of `x` `[..., head_dim]` and float32 scales `[...]`; a head of zeros has scale 0 and codes 0."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127.0
    inverse = jnp.where(scales > 0, 1.0 / scales, 0.0)
    return jnp.round(wide * inverse[..., None]).astype(jnp.int8), scales


def dequantize_heads(codes: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `quantize_heads`: int8 `[..., head_dim]` and float32 `[...]` to `dtype`, `[..., head_dim]`."""
    return (codes.astype(jnp.float32) * scales[..., None]).astype(dtype)
