"""The ring of stages in shared memory, as far as the three kernels share it, and the tiles whose groups it brings.

A stage is one group of a tile: packed codes, scales, zero points, activations and their scales. A loading warp copies
groups to slot after slot; a slot has two barriers, which its uses pass through in turn:

    loading warp                                            computing warpgroups
    wait for `empty`, but the first time round the ring
    start the copies, which arrive at `full`  ---------->   wait for `full`
    next slot                                               read codes, dot, scale
                             <---------------------------   each arrives at `empty`

Both sides count groups over all tiles of the block, so that the ring runs on from one tile to the next. A barrier knows
only the parity of its uses: a waiter must not fall a whole use behind, which the two waits above see to.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Index, Ref, Slice, swizzled
from pallas_kernels.packing import PackedWeight


@dataclasses.dataclass(frozen=True)
class Tile:
    """Which channels and tokens a tile has.

    Attributes:
        is8: 8-bit channels, not 4-bit ones.
        first_row: Row of its first channel among those of its bit width.
        first_token: Its first token.
    """

    is8: bool
    first_row: Index
    first_token: Index


@dataclasses.dataclass(frozen=True)
class RingKernel(abc.ABC):
    """The kernel of one problem, as far as its tiles and its ring go.

    Attributes:
        tokens: Rows of the activations.
        n4: 4-bit channels.
        n8: 8-bit channels.
        num_groups: Groups along the input channels.
        group_size: Input channels of a group.
    """

    tokens: int
    n4: int
    n8: int
    num_groups: int
    group_size: int

    @property
    @abc.abstractmethod
    def tile_tokens(self) -> int:
        """Tokens of a tile."""

    @property
    @abc.abstractmethod
    def tile_channels(self) -> int:
        """Output channels of a tile."""

    @property
    @abc.abstractmethod
    def stages(self) -> int:
        """Ring slots."""

    @property
    def tiles4(self) -> int:
        """Tiles of 4-bit channels along the output channels."""
        return pl.cdiv(self.n4, self.tile_channels)

    @property
    def tiles8(self) -> int:
        """Tiles of 8-bit channels along the output channels."""
        return pl.cdiv(self.n8, self.tile_channels)

    @property
    def token_tiles(self) -> int:
        """Tiles along the tokens."""
        return pl.cdiv(self.tokens, self.tile_tokens)

    @property
    def num_tiles(self) -> int:
        """All tiles."""
        return (self.tiles4 + self.tiles8) * self.token_tiles

    @property
    def token_scales(self) -> Slice:
        """Where a tile's scales of tokens lie."""
        return Slice(self.tokens, self.tile_tokens, 4)

    def channel_scales(self, is8: bool) -> Slice:
        """Where a tile's scales of channels lie."""
        return Slice(self.n8 if is8 else self.n4, self.tile_channels, 2)

    @property
    def zero_points(self) -> Slice:
        """Where a tile's zero points lie."""
        return Slice(self.n4, self.tile_channels, 1)

    def operands(self, activations: QuantizedActivations | jax.Array, weight: PackedWeight) -> dict[str, jax.Array]:
        """Arrays to copy from, by name: `codes` are the activations themselves where these are float.

        Rows of scales are not always multiples of 16 bytes apart, as the copy engine wants of two axes: it gets one.
        """
        if isinstance(activations, QuantizedActivations):
            arrays = {"codes": activations.codes, "token_scales": activations.scales.reshape(-1)}
        else:
            arrays = {"codes": activations}
        if weight.n4:
            arrays |= {"codes4": weight.codes4, "scales4": weight.scales4.reshape(-1)}
            arrays |= {"zero_points4": weight.zero_points4.reshape(-1)}
        if weight.n8:
            arrays |= {"codes8": weight.codes8, "scales8": weight.scales8.reshape(-1)}
        return arrays

    def output_operands(self, weight: PackedWeight, bias: jax.Array | None) -> dict[str, jax.Array]:
        """Arrays that say where outputs go and what is added to them, by name."""
        arrays = {"order": weight.channel_order}
        return arrays if bias is None else arrays | {"bias": bias.astype(jnp.float32)}

    def rings(self, activation_dtype: jax.typing.DTypeLike = jnp.int8) -> dict[str, Any]:
        """Shared memory of activations and of the scales of tokens and channels."""
        size = self.group_size
        channel_scales = max(self.channel_scales(is8).copied for is8 in (False, True))
        activations = (self.stages, self.tile_tokens, size)
        return {
            "activation_ring": plgpu.SMEM(activations, activation_dtype, transforms=swizzled(size)),
            "token_scale_ring": plgpu.SMEM((self.stages, self.token_scales.copied), jnp.float32),
            "channel_scale_ring": plgpu.SMEM((self.stages, channel_scales), jnp.float16),
        }

    def barriers(self, copies: int, readers: int) -> dict[str, Any]:
        """Barriers of the stages: each of `copies` copies, and each of `readers` warpgroups, arrives once."""
        return {
            "full": plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages),
            "empty": plgpu.Barrier(num_arrivals=readers, num_barriers=self.stages),
        }

    def zero_point_ring(self) -> dict[str, Any]:
        """Shared memory of zero points, where there are any."""
        if not self.n4:
            return {}
        return {"zero_point_ring": plgpu.SMEM((self.stages, self.zero_points.copied), jnp.uint8)}

    def code_rings(self) -> dict[str, Any]:
        """Shared memory of codes."""
        size = self.group_size
        # A slot of 4-bit codes takes the room of one of 8-bit codes where both share the memory: slots of tiles of
        # both kinds are in use at the same time, and only equal slots have equal barriers.
        both = bool(self.n4 and self.n8)
        shape4 = (self.stages, 2 if both else 1, self.tile_channels, size // 2)
        ring4 = plgpu.SMEM(shape4, jnp.uint8, transforms=swizzled(size // 2))
        ring8 = plgpu.SMEM((self.stages, self.tile_channels, size), jnp.int8, transforms=swizzled(size))
        return {"code_rings": plgpu.RefUnion(ring4, ring8) if both else ring4 if self.n4 else ring8}

    def code_slot(self, scratch: dict[str, Any], is8: bool, slot: Index) -> Ref:
        """The codes of a stage."""
        ring4, ring8 = scratch["code_rings"] if self.n4 and self.n8 else (scratch["code_rings"],) * 2
        return ring8.at[slot] if is8 else ring4.at[slot, 0]
