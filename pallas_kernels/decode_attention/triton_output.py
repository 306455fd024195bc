"""What the Triton kernel of the decode step does with its results: combines the splits, quantises, stores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton_common import next_power_of_2
from pallas_kernels.triton_primitives import loads_before, round_to_int8

_SMALLEST_DOT = 16
"""Least size of any side of a Triton dot."""
NOTHING = -1e30
"""Score of a slot that a query does not see; finite, so that differences of maxima are never NaN."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a call."""

    heads_per_kv: int
    kv_heads: int
    head_dim: int
    max_length: int
    window: int | None

    @property
    def rows(self) -> int:
        """Query heads of a program, padded for the dot."""
        return max(_SMALLEST_DOT, next_power_of_2(self.heads_per_kv))

    @property
    def half(self) -> int:
        """Half a head, padded for the dot."""
        return max(_SMALLEST_DOT, next_power_of_2(self.head_dim // 2))

    def quantizes(self, group_size: int) -> bool:
        """Whether a program holds whole groups: parts of half a head, or whole heads of one kv head."""
        if self.head_dim % (2 * group_size) == 0:
            return self.half == self.head_dim // 2
        return group_size % self.head_dim == 0 and self.heads_per_kv % (group_size // self.head_dim) == 0


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the results of one program go.

    Attributes:
        refs: `out` `[batch, heads * head_dim]`; with `group_size` it takes int8 codes, and there is `scales`
            `[groups, batch]`; with several splits also `partial` `[batch, heads, splits, head_dim]`, `log_totals`
            `[batch, heads, splits]` and `finished` `[batch, kv_heads]`, which is 0 before and after.
        row: Of the batch.
        kv_head: Whose query heads these are.
        shape: Static sizes.
        group_size: Quantises in groups of this many channels.
    """

    refs: dict[str, Any]
    row: jax.Array
    kv_head: jax.Array
    shape: Shape
    group_size: int | None

    @property
    def _first_head(self) -> jax.Array:
        return self.kv_head * self.shape.heads_per_kv

    @property
    def _offsets(self) -> tuple[int, int]:
        return 0, self.shape.head_dim // 2

    def store(self, halves: Sequence[jax.Array]) -> None:
        """Stores the halves of the heads, float32 `[heads (padded), half]` each."""
        head, channel, _, mask = self._layout(halves[0].shape[0])
        first = (self._first_head + head[:, None]) * self.shape.head_dim + channel[None, :]
        if self.group_size is not None:
            halves = self._quantize(halves)
        out = self.refs["out"]
        for offset, half in zip(self._offsets, halves, strict=True):
            plgpu.store(out.at[self.row, first + offset], half.astype(out.dtype), mask=mask)

    def combine(
        self, split: jax.Array, splits: int, halves: Sequence[jax.Array], maximum: jax.Array, total: jax.Array
    ) -> None:
        """Stores a split's sums; the program of a row and kv head that is the last to do so stores their result.

        Args:
            split: This program's.
            splits: Of the row.
            halves: float32 `[heads (padded), half]` each: weighted sums of the values, relative to `maximum`.
            maximum: float32 `[heads]`, of the scores, base 2.
            total: float32 `[heads]`, sum of the weights.
        """
        head, channel, head_exists, mask = self._layout(halves[0].shape[0])
        heads = self._first_head + head
        sees_any = total > 0
        inverse = 1.0 / jnp.where(sees_any, total, 1.0)
        for offset, half in zip(self._offsets, halves, strict=True):
            place = self.refs["partial"].at[self.row, heads[:, None], split, offset + channel[None, :]]
            plgpu.store(place, half * inverse[:, None], mask=mask)
        weight = jnp.where(sees_any, maximum + jnp.log2(jnp.where(sees_any, total, 1.0)), NOTHING)
        plgpu.store(self.refs["log_totals"].at[self.row, heads, split], weight, mask=head_exists)
        # The barrier orders the stores of all threads before the one that counts; the count is release and acquire.
        finished = plgpu.atomic_add(self.refs["finished"], (self.row, self.kv_head), loads_before(jnp.int32(1)))

        @pl.when(finished == splits - 1)
        def _combine() -> None:
            plgpu.store(self.refs["finished"].at[self.row, self.kv_head], jnp.int32(0))  # as the next call expects it
            self.store(self._combined(splits))

    def _combined(self, splits: int) -> list[jax.Array]:
        """Both halves of the heads, the splits weighed by their share of the softmax.

        Every thread loads all that its elements need: reducing along the splits across threads takes longer.
        """
        head, channel, head_exists, mask = self._layout(next_power_of_2(self.shape.heads_per_kv))
        heads = self._first_head + head[:, None]

        def load(name: str, exists: jax.Array, *place: Any) -> jax.Array:
            return plgpu.load(self.refs[name].at[self.row, heads, *place], mask=exists, other=0.0, volatile=True)

        log_totals = [load("log_totals", head_exists[:, None], split) for split in range(splits)]
        partials = [
            [load("partial", mask, split, offset + channel[None, :]) for split in range(splits)]
            for offset in self._offsets
        ]
        maximum = functools.reduce(jnp.maximum, log_totals)
        shares = [jnp.exp2(log_total - maximum) for log_total in log_totals]
        inverse = 1.0 / functools.reduce(jnp.add, shares)
        return [
            functools.reduce(jnp.add, [partial * share for partial, share in zip(half, shares, strict=True)]) * inverse
            for half in partials
        ]

    def _layout(self, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Heads and channels of a tile of `rows` heads, which of these heads exist, and which elements of the tile."""
        head, channel = jnp.arange(rows), jnp.arange(self.shape.half)
        exists = head < self.shape.heads_per_kv
        return head, channel, exists, exists[:, None] & (channel < self.shape.head_dim // 2)[None, :]

    def _quantize(self, halves: Sequence[jax.Array]) -> list[jax.Array]:
        """The int8 codes of the halves; their scales are stored."""
        group_size, rows = self.group_size or 0, halves[0].shape[0]
        if group_size < self.shape.head_dim:
            per_half = self.shape.half // group_size
            codes = []
            for offset, half in zip(self._offsets, halves, strict=True):
                grouped = half.reshape(rows, per_half, group_size)
                scales = jnp.max(jnp.abs(grouped), axis=2) / 127.0
                head, index = jnp.arange(rows), jnp.arange(per_half)
                first = (self._first_head + head) * (2 * per_half) + offset // group_size
                self._store_scales(first[:, None] + index[None, :], scales, (head < self.shape.heads_per_kv)[:, None])
                codes.append(_codes(grouped, scales[:, :, None]).reshape(half.shape))
            return codes
        heads = group_size // self.shape.head_dim
        absmax = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(half), axis=1) for half in halves])
        scales = jnp.max(absmax.reshape(rows // heads, heads), axis=1) / 127.0
        index = jnp.arange(rows // heads)
        self._store_scales(self._first_head // heads + index, scales, index < self.shape.heads_per_kv // heads)
        of_head = jnp.broadcast_to(scales[:, None], (rows // heads, heads)).reshape(rows)
        return [_codes(half, of_head[:, None]) for half in halves]

    def _store_scales(self, group: jax.Array, scales: jax.Array, mask: jax.Array) -> None:
        mask = jnp.broadcast_to(mask, scales.shape)
        plgpu.store(self.refs["scales"].at[group, self.row], scales, mask=mask)


def _codes(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Codes of `values`; where the scale is 0, so is the group."""
    return round_to_int8(values * jnp.where(scales > 0, 1.0 / scales, 0.0))
