"""What every Triton kernel that quantises whole groups writes, in either layout of codes and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import unsigned_operands
from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.triton_common import clear_counters, counters_shape, of_groups, quantize_groups

RUN = 8
"""Neighbouring values of a thread, 16 bytes of bfloat16. Left to itself Triton takes 16, which make 16 bytes of codes,
and the loads of neighbouring threads lie 32 bytes apart."""

LARGE_INPUT = 2**21
"""Values of an input that takes a good part of a cache."""


def eviction_policy(values: int) -> str | None:
    """For loading an input that nothing reads again: a large one is not to drive out of the cache what is still wanted.

    Behind the matmul that wrote 2048 x 28672 values of gate and up, SwiGLU took 56.4 us without this and 51.4 with it.
    """
    return "evict_first" if values >= LARGE_INPUT else None


def iota(size: int, axis: int) -> jax.Array:
    """0..size-1 along one of the four axes of a kernel's values, the others of size 1."""
    shape = [1] * 4
    shape[axis] = size
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


@dataclasses.dataclass(frozen=True)
class QuantizedOutput:
    """The outputs of a kernel, flat arrays by name, and how groups are stored in them.

    Attributes:
        tokens: Rows of the activations.
        features: Input channels.
        group_size: Channels that share a scale.
        layout: Of codes and scales.
        columns: Of a group in one chunk. A kernel has its values as `[chunks, groups, columns / RUN, RUN]`, where the
            threads divide the two axes in the middle among them: with fewer columns a thread has more of a group, and
            less of its instructions are spent on what there is once for each group.
    """

    tokens: int
    features: int
    group_size: int
    layout: Layout
    columns: int

    @property
    def channels(self) -> jax.Array:
        """int32 `[chunks, 1, runs, RUN]`: which channel of its group a value belongs to."""
        sizes = self.group_size // self.columns, self.columns // RUN, RUN
        chunk, run, column = (iota(size, axis) for size, axis in zip(sizes, (0, 2, 3), strict=True))
        return chunk * self.columns + run * RUN + column

    @property
    def num_groups(self) -> int:
        """Groups of a token."""
        return self.features // self.group_size

    @property
    def places(self) -> int:
        """Groups of a token that are to be stored: those past the last one as zeros, where the layout has such."""
        if self.layout == "signed":
            return self.num_groups
        return unsigned_operands.corrections_of(self.num_groups) * unsigned_operands.GROUPS_OF_CORRECTION

    @property
    def width(self) -> int:
        """Bytes of the codes of a token, and what lies behind them."""
        return self.features if self.layout == "signed" else unsigned_operands.operand_width(self.features)

    @property
    def scale_width(self) -> int:
        """Scales of a group: one a token, and some of none where the layout has such."""
        return self.tokens if self.layout == "signed" else unsigned_operands.scale_width(self.tokens)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the outputs."""
        shapes = {
            "codes": jax.ShapeDtypeStruct(
                (self.tokens * self.width,), jnp.int8 if self.layout == "signed" else jnp.uint8
            ),
            "scales": jax.ShapeDtypeStruct((self.num_groups * self.scale_width,), jnp.float32),
        }
        if counters := counters_shape(self.tokens):
            [shapes["counters"]] = counters
        return shapes

    def clear_counters(self, refs: Mapping[str, Any], is_first_program: jax.Array) -> None:
        """Write the counters, where there are some."""
        clear_counters([refs["counters"]] if "counters" in refs else [], is_first_program)

    def store(self, refs: Mapping[str, Any], values: jax.Array, token: jax.Array, group: jax.Array) -> jax.Array:
        """Quantise groups, store them, and return what quantising left of them.

        Args:
            refs: The outputs.
            values: float32 `[chunks, groups, runs, RUN]`; 0 where there is no such group.
            token: int32 `[1, groups, 1, 1]` or a scalar; groups of tokens past the end are left out.
            group: int32 `[1, groups, 1, 1]`, of the token; those past `places` are left out.
        """
        unsigned = self.layout == "unsigned"
        offset = unsigned_operands.OFFSET if unsigned else 0
        codes, scales = quantize_groups(values, offset=offset)
        if unsigned:
            sums = of_groups(jnp.sum, codes) - offset * self.group_size
            self._store_corrections(refs["codes"], sums, scales, token, group)
        exists = (token < self.tokens) & (group < self.num_groups)
        place = token * self.width + group * self.group_size + self.channels
        plgpu.store(refs["codes"].at[place], codes.astype(refs["codes"].dtype), mask=exists)
        self._store_scales(refs["scales"], scales, token, group, exists)
        return values - (codes - offset).astype(jnp.float32) * scales

    def _store_scales(self, ref: Any, scales: jax.Array, token: jax.Array, group: jax.Array, exists: jax.Array) -> None:
        """Store scales `[1, groups, 1, 1]`, and behind those of the last token the zeros of no token."""
        end = self.num_groups * self.scale_width  # what is left out points there, see `store_tile` of the matmul
        place = token if self.layout == "signed" else unsigned_operands.scale_place(token)
        plgpu.store(ref.at[jnp.where(exists, group * self.scale_width + place, end)], scales, mask=exists)
        if self.scale_width > self.tokens:
            beyond = self.tokens + iota(unsigned_operands.TOKENS_OF_SCALES, 3)
            exists = exists & (token == self.tokens - 1) & (beyond < self.scale_width)
            place = group * self.scale_width + unsigned_operands.scale_place(beyond)
            plgpu.store(ref.at[jnp.where(exists, place, end)], jnp.zeros(exists.shape, scales.dtype), mask=exists)

    def _store_corrections(
        self, ref: Any, sums: jax.Array, scales: jax.Array, token: jax.Array, group: jax.Array
    ) -> None:
        """Store what the zero points are multiplied by, behind the codes; all but `ref` are `[1, groups, 1, 1]`."""
        exists = (token < self.tokens) & (group < self.places)
        correction = group // unsigned_operands.GROUPS_OF_CORRECTION
        within = group % unsigned_operands.GROUPS_OF_CORRECTION
        high, mid = unsigned_operands.correction_terms(sums, scales)
        # One store of single bytes `[1, groups, 1, 4]`: of each group two of hi and, 64 bytes on, two of mid.
        byte = iota(4, 3)
        place = token * self.width + self.features + correction * self.group_size + 2 * within
        place = place + byte % 2 + byte // 2 * (2 * unsigned_operands.GROUPS_OF_CORRECTION)
        bits = (high | (mid << 16)) >> (8 * byte).astype(jnp.uint32)
        plgpu.store(ref.at[jnp.where(exists, place, self.tokens * self.width)], bits.astype(jnp.uint8), mask=exists)

    def activations(self, out: Mapping[str, jax.Array]) -> QuantizedActivations:
        """What was stored."""
        return QuantizedActivations(
            codes=out["codes"].reshape(self.tokens, self.width),
            scales=out["scales"].reshape(self.num_groups, self.scale_width),
            group_size=self.group_size,
            counters=out.get("counters"),
            layout=self.layout,
        )
