"""Random operands on the device for tuning and benchmarks, made from one pool without compiling anything."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device_time import REPEATED_BYTES
from pallas_kernels.mixed_matmul.api import prepare_weight
from pallas_kernels.packing import PackedWeight

_POOL_SIZE = 1 << 25


@functools.cache
def _byte_pool() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, _POOL_SIZE, dtype=np.uint8)


@functools.cache
def _float_pool() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32).astype(jnp.bfloat16)


def packed_weight(n: int, k: int, group_size: int, share_8bit: float, seed: int) -> PackedWeight:
    """A random weight, its 8-bit channels spread at random, prepared for the device (`prepare_weight`) and put on it.

    Args:
        n: Output channels.
        k: Input channels, a multiple of `group_size`.
        group_size: Input channels that share a scale.
        share_8bit: Share of 8-bit channels, 0..1.
        seed: Of another weight.
    """
    generator = np.random.default_rng(seed)
    n8 = round(n * share_8bit)
    n4, groups = n - n8, k // group_size
    permutation = generator.permutation(n)
    order = np.concatenate([np.sort(permutation[:n4]), np.sort(permutation[n4:])]).astype(np.int32)
    pool = np.roll(_byte_pool(), seed * 4099)
    weight = PackedWeight(
        codes4=np.resize(pool, (groups, n4, group_size // 2)),
        scales4=generator.uniform(0.001, 0.01, (groups, n4)).astype(np.float16),
        zero_points4=np.resize(pool, (groups, n4)) & np.uint8(15),
        codes8=np.resize(pool, (groups, n8, group_size)).view(np.int8),
        scales8=generator.uniform(0.0001, 0.001, (groups, n8)).astype(np.float16),
        channel_order=order,
        group_size=group_size,
    )
    return jax.device_put(prepare_weight(weight))


def bfloat16_array(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Normally distributed bfloat16 values on the device; other seeds give others."""
    return jax.device_put(np.resize(np.roll(_float_pool(), seed * 4099), shape))


def copies_for(nbytes: float) -> int:
    """Weights of `nbytes` bytes to rotate among."""
    return max(1, math.ceil(REPEATED_BYTES / nbytes))
