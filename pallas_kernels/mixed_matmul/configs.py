"""Which kernel and which tile sizes to use: by the tuned table of the device, or by a rule where there is none.

`python -m pallas_kernels.tune` writes a table; a call uses the entry whose configuration should be fastest for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pallas_kernels.device_traits import DeviceTraits, traits_of
from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MULTIPROCESSORS, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig, MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem
from pallas_kernels.mixed_matmul.tuned_table import QUANTIZING, Config, Entry, MosaicConfig, read_table, tuned_device

QUANTIZE_MICROSECONDS = 1.3
"""Of the launch that quantises few tokens."""

WARPS_OF_FEW_TOKENS = 16
"""Warps of the Triton kernel for few tokens that the registers of a multiprocessor hold at once."""


def choose(problem: Problem, device_kind: str, implementation: str = "triton") -> Any:
    """The implementation's configuration that should be fastest, or what its rule gives where there is no table.

    Args:
        problem: The sizes of the call.
        device_kind: As JAX names the device, such as `NVIDIA H100 80GB HBM3`.
        implementation: `triton` or `mosaic_gpu`.
    """
    best = _best(problem, device_kind, implementation)
    if best is not None:
        return best.entry.config
    return mosaic_gpu_config.default(problem) if implementation == "mosaic_gpu" else default(problem)


def by_speed(problem: Problem, device_kind: str) -> tuple[str, str]:
    """The GPU implementations, the one that should be faster first.

    Without a table, Mosaic GPU comes first from 9 tokens on: its dots of 64 channels then have tokens to work on.
    Whether either can run on the device is not asked here.
    """
    mosaic, triton = (_best(problem, device_kind, name) for name in ("mosaic_gpu", "triton"))
    if mosaic is not None and triton is not None:
        mosaic_first = mosaic.microseconds < triton.microseconds
    else:
        mosaic_first = problem.tokens > 8
    return ("mosaic_gpu", "triton") if mosaic_first else ("triton", "mosaic_gpu")


def quantizing(problem: Problem, device_kind: str) -> MosaicGpuQuantizeConfig | None:
    """Settings of the kernel that quantises its activations, or None where a launch before the matmul is faster."""
    best = _best(problem, device_kind, QUANTIZING)
    config = None if best is None else best.entry.config
    if best is None or not isinstance(config, MosaicGpuQuantizeConfig) or problem.tokens > config.tile_tokens:
        return None
    matmuls = [_best(problem, device_kind, name) for name in ("mosaic_gpu", "triton")]
    others = [estimate.microseconds + QUANTIZE_MICROSECONDS for estimate in matmuls if estimate is not None]
    return config if best.microseconds < min(others, default=math.inf) else None


class _Estimate(NamedTuple):
    """What an entry's configuration should take for another problem."""

    microseconds: float
    entry: Entry


RAMP = 2.0
"""Microseconds of a launch that do not depend on the size: first loads to arrive, last outputs to be stored."""

READ_SHARE = 3.0 / 3.35
"""Of the bandwidth of a data sheet that a kernel reads with, on an H100."""

FEW_TOKENS = 64
"""Up to here, reading the weight counts in any case."""

UNCERTAINTY = 0.02
"""Share by which an estimate grows with each unit of `_distance`: of about equal ones, the nearest case counts."""


def _best(problem: Problem, device_kind: str, implementation: str) -> _Estimate | None:
    """The entry with the least estimate, or None on a device without a table.

    But for a constant, the time of an entry carries over in proportion to its waves of tiles times the groups of a
    tile, or, where memory bounds it, to what is read of the weight if that gives more: so a configuration is only taken
    where its tiles fill the multiprocessors. A case that was tuned is its own estimate, also for a few more or fewer
    8-bit channels.
    """
    entries = [entry for entry in read_table(device_kind) if entry.implementation == implementation]
    if not entries:
        return None
    traits = traits_of(tuned_device(device_kind))  # on which the entries took their time
    estimates = [
        _Estimate(_estimate(problem, entry, traits) * (1 + UNCERTAINTY * _distance(problem, entry)), entry)
        for entry in entries
        if entry.group_size == problem.group_size or not any(e.group_size == problem.group_size for e in entries)
    ]
    return min(estimates, key=lambda estimate: (not _is_case(problem, estimate.entry), estimate.microseconds))


SAME_SHARE = 0.05
"""Shares of 8-bit channels that are the same case: layers round theirs to common numbers, and rows to 16 bytes."""


def _is_case(problem: Problem, entry: Entry) -> bool:
    """Whether the problem is what the entry was tuned for."""
    own = entry.problem
    sizes = (problem.tokens, problem.out_features, problem.in_features, problem.group_size)
    same = sizes == (own.tokens, own.out_features, own.in_features, own.group_size)
    return same and abs(problem.n8 - own.n8) <= SAME_SHARE * own.out_features


def _estimate(problem: Problem, entry: Entry, traits: DeviceTraits) -> float:
    """Microseconds of an entry's configuration for a problem, on the device with these traits."""
    own = entry.problem
    own_waves, problem_waves = (waves(entry.config, case, traits.multiprocessors) for case in (own, problem))
    computing = problem_waves * problem.num_groups / (own_waves * own.num_groups)
    time = entry.microseconds - RAMP
    many = min(problem.tokens, own.tokens) > FEW_TOKENS
    bits_per_microsecond = 8e-6 * READ_SHARE * traits.bandwidth
    # One that takes more than twice as long as reading its weight is bound by computing.
    if many and _weight_bits(own) / bits_per_microsecond < time / 2:
        time = max(time * computing, _weight_bits(problem) / bits_per_microsecond)
    else:
        time *= max(computing, _weight_reads(entry.config, problem) / _weight_reads(entry.config, own))
    longer_before = max(0.0, _microseconds_before(entry.config, problem) - _microseconds_before(entry.config, own))
    return RAMP + longer_before + time


def _microseconds_before(config: Config | MosaicConfig, problem: Problem) -> float:
    """What comes before the matmul and is not part of it: quantising, longer than the first weights take to arrive."""
    return config.quantizing_microseconds(problem) if isinstance(config, MosaicGpuQuantizeConfig) else 0.0


def waves(config: Config | MosaicConfig, problem: Problem, multiprocessors: int = MULTIPROCESSORS) -> float:
    """Times that a multiprocessor computes a tile, or as many as fit it at once; at least 1.

    Programs of the Triton kernels start whenever one ends, so that a last wave may be partly filled at no loss. Those
    of the Mosaic GPU kernels, which are for Hopper alone, are counted as on an H100.

    Args:
        config: The kernel's settings.
        problem: The sizes of the call.
        multiprocessors: Of the device.
    """
    if isinstance(config, MosaicGpuSplitConfig):
        return config.waves(problem)
    if isinstance(config, MosaicGpuConfig):
        return mosaic_gpu_config.waves(problem, config)
    if isinstance(config, FewTokensConfig):
        tiles = math.prod((sum(config.tiles(problem)[:2]), config.tiles(problem)[2], config.splits))
        resident = max(1, WARPS_OF_FEW_TOKENS // config.warps)
    else:
        channels = math.ceil(problem.n4 / config.rows) + math.ceil(problem.n8 / config.rows)
        tiles, resident = channels * math.ceil(problem.tokens / config.tokens), 2
    return max(1.0, tiles / (multiprocessors * resident))


def _weight_reads(config: Config | MosaicConfig, problem: Problem) -> float:
    """Bits of the weight that are read: by the first tile of tokens, and at half the cost by the others."""
    tile_tokens = config.tile_tokens if isinstance(config, MosaicConfig) else config.tokens
    return _weight_bits(problem) * (1 + math.ceil(problem.tokens / tile_tokens)) / 2


def _weight_bits(problem: Problem) -> int:
    """Bits of the codes."""
    return problem.in_features * (4 * problem.n4 + 8 * problem.n8)


def _distance(problem: Problem, entry: Entry) -> float:
    """How unlike a tuned case is to the problem: powers of two in its sizes, and the share of 8-bit channels."""
    sizes = ((problem.tokens, entry.tokens), (problem.out_features, entry.n), (problem.in_features, entry.k))
    share = abs(problem.n8 / problem.out_features - entry.share_8bit)
    return sum(abs(math.log2(size / tuned)) for size, tuned in sizes) + share


def default(problem: Problem) -> Config:
    """A Triton configuration for any device: loads in flight for few tokens, tiles that fit registers for many."""
    if problem.tokens <= 32:
        warps = 8 if problem.num_groups >= 16 else 4
        return FewTokensConfig(16, 8 if problem.tokens <= 8 else 16, warps, 1, splits=1, prefetch="weights")
    if problem.tokens <= 64:
        return ManyTokensConfig(64, 64 if problem.tokens > 32 else 32, 4, 4)
    return ManyTokensConfig(64, 128, 4, 3)
