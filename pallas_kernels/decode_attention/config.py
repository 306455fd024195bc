"""How the decode step of attention is cut among programs, and the rule that says so."""

from __future__ import annotations

import dataclasses
import math

from jax.experimental import pallas as pl

from pallas_kernels import registry
from pallas_kernels.triton_common import next_power_of_2


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut (static).

    Attributes:
        splits: Programs among which one row's positions are divided.
        block: Positions that a program reads at a time.
        num_warps: Warps of a program.
        num_stages: Blocks in flight.
    """

    splits: int
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


_TARGET_PROGRAMS = 132
"""One for each multiprocessor of an H100: more splits only add partial results."""
_LONG_SHARE = 32
"""Blocks of one program from which on a fourth one in flight pays."""
_KEPT_IN_FLIGHT = {(8, 0): 128 << 10, (9, 0): 128 << 10}
"""Most bytes of shared memory for blocks in flight, by compute capability."""
_KEPT_IN_FLIGHT_ELSEWHERE = 96 << 10


def default_config(batch: int, kv_heads: int, max_length: int, position_bytes: int) -> Config:
    """Enough splits to fill the device, none smaller than a block of a full row.

    The rule behind the fastest of 4 to 14 candidates at each of batches 1, 16, 64 and contexts of 256 to 32768 (8 kv
    heads of 128 channels, H100): at most 4 % slower than those.

    Args:
        batch: Rows.
        kv_heads: Key and value heads.
        max_length: Positions of the cache.
        position_bytes: Of the key and value of one position and head.
    """
    block = 64
    wanted = 1 << round(math.log2(max(1.0, _TARGET_PROGRAMS / (batch * kv_heads))))
    splits = min(wanted, next_power_of_2(pl.cdiv(max_length, block)))
    share = pl.cdiv(max_length, block * splits)
    programs = batch * kv_heads * splits
    # Several programs share a multiprocessor's memory where there are many, and a single block needs no pipeline.
    stages = 4 if share >= _LONG_SHARE else 2 if share == 1 or programs > 2 * _TARGET_PROGRAMS else 3
    most = _KEPT_IN_FLIGHT.get(registry.compute_capability() or (0, 0), _KEPT_IN_FLIGHT_ELSEWHERE)
    return Config(splits, block, num_stages=min(stages, max(1, most // (block * position_bytes))))
