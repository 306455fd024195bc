"""Which kernel and which tile sizes to use: tuned tables by device kind, and rules where there is none.

`python -m pallas_kernels.tune` writes a table; a call uses the entry whose configuration should be fastest for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MULTIPROCESSORS, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig, MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

TABLE_DIR = Path(__file__).parent / "tuned"

Config = FewTokensConfig | ManyTokensConfig
"""Settings of a Triton kernel."""

MosaicConfig = MosaicGpuConfig | MosaicGpuSplitConfig
"""Settings of a Mosaic GPU kernel."""

QUANTIZING = "mosaic_gpu_quantize"
"""What entries of the kernel that quantises its activations itself are for."""

QUANTIZE_MICROSECONDS = 1.3
"""Of the launch that quantises few tokens."""

WARPS_OF_FEW_TOKENS = 16
"""Warps of the Triton kernel for few tokens that the registers of a multiprocessor hold at once."""

_KERNELS: dict[str, type[Any]] = {
    "few_tokens": FewTokensConfig,
    "many_tokens": ManyTokensConfig,
    "mosaic_gpu": MosaicGpuConfig,
    "mosaic_gpu_quantize": MosaicGpuQuantizeConfig,  # before the class that it extends
    "mosaic_gpu_split": MosaicGpuSplitConfig,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest configuration of one implementation for one tuned case.

    Attributes:
        tokens: M of the case.
        n: Output channels.
        k: Input channels.
        group_size: Input channels that share a scale.
        share_8bit: Share of 8-bit channels.
        config: What was fastest.
        microseconds: Its device time.
    """

    tokens: int
    n: int
    k: int
    group_size: int
    share_8bit: float
    config: Config | MosaicConfig
    microseconds: float

    @property
    def case(self) -> tuple[int, int, int, int, float]:
        """What the configuration was tuned for."""
        return self.tokens, self.n, self.k, self.group_size, self.share_8bit

    @property
    def problem(self) -> Problem:
        """The sizes of the case."""
        n8 = round(self.n * self.share_8bit)
        return Problem(self.tokens, self.k, self.group_size, self.n - n8, n8)

    @property
    def implementation(self) -> str:
        """Name in the registry of the implementation that the configuration is for, or `QUANTIZING`."""
        if isinstance(self.config, MosaicGpuQuantizeConfig):
            return QUANTIZING
        return "mosaic_gpu" if isinstance(self.config, MosaicConfig) else "triton"

    def to_json(self) -> dict[str, Any]:
        """As in a table file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kernel = next(name for name, kind in _KERNELS.items() if isinstance(self.config, kind))
        return {**fields, "config": {"kernel": kernel, **dataclasses.asdict(self.config)}}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Entry:
        """The inverse of `to_json`."""
        settings = dict(row["config"])
        return Entry(**{**row, "config": _KERNELS[settings.pop("kernel")](**settings)})


def table_path(device_kind: str) -> Path:
    """File of a device's table, such as `nvidia_h100_80gb_hbm3.json`."""
    return TABLE_DIR / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


@functools.cache
def read_table(device_kind: str) -> tuple[Entry, ...]:
    """Entries tuned for a device, those of an H100 for its relatives without a table; none for an unknown one."""
    path = table_path(device_kind)
    if not path.exists() and re.search(r"\bG?H[128]00\b", device_kind):
        path = table_path("NVIDIA H100 80GB HBM3")
    return _read(path) if path.exists() else ()


def _read(path: Path) -> tuple[Entry, ...]:
    return tuple(Entry.from_json(row) for row in json.loads(path.read_text())["entries"])


def write_table(device_kind: str, entries: list[Entry], versions: dict[str, str], path: Path | None = None) -> Path:
    """Write a device's table (or another file), replacing entries of the same cases and implementations in it."""
    path = path or table_path(device_kind)
    existing = _read(path) if path.exists() else ()
    by_case = {(entry.case, entry.implementation): entry for entry in (*existing, *entries)}
    rows = sorted(
        by_case.values(), key=lambda entry: (entry.n, entry.k, entry.share_8bit, entry.tokens, entry.implementation)
    )
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join("  " + json.dumps(entry.to_json()) for entry in rows)
    header = json.dumps({"device_kind": device_kind, "versions": versions})[:-1]
    partial.write_text(f'{header}, "entries": [\n{lines}\n]}}\n')
    partial.replace(path)
    read_table.cache_clear()
    return path


def choose(problem: Problem, device_kind: str, implementation: str = "triton") -> Any:
    """The implementation's configuration that should be fastest, or what its rule gives where there is no table."""
    best = _best(problem, device_kind, implementation)
    if best is not None:
        return best.entry.config
    return mosaic_gpu_config.default(problem) if implementation == "mosaic_gpu" else default(problem)


def by_speed(problem: Problem, device_kind: str) -> tuple[str, str]:
    """The GPU implementations, the one that should be faster first.

    Without a table, Mosaic GPU comes first from 9 tokens on: its dots of 64 channels then have tokens to work on.
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

BITS_PER_MICROSECOND = 8 * 3.0e6
"""That an H100 reads from memory: an entry that takes more than twice as long as its weight is bound by computing."""

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
    estimates = [
        _Estimate(_estimate(problem, entry) * (1 + UNCERTAINTY * _distance(problem, entry)), entry)
        for entry in entries
        if entry.group_size == problem.group_size or not any(e.group_size == problem.group_size for e in entries)
    ]
    return min(
        estimates, key=lambda estimate: (not _is_case(problem, estimate.entry), estimate.microseconds), default=None
    )


SAME_SHARE = 0.05
"""Shares of 8-bit channels that are the same case: layers round theirs to common numbers, and rows to 16 bytes."""


def _is_case(problem: Problem, entry: Entry) -> bool:
    """Whether the problem is what the entry was tuned for."""
    own = entry.problem
    sizes = (problem.tokens, problem.out_features, problem.in_features, problem.group_size)
    same = sizes == (own.tokens, own.out_features, own.in_features, own.group_size)
    return same and abs(problem.n8 - own.n8) <= SAME_SHARE * own.out_features


def _estimate(problem: Problem, entry: Entry) -> float:
    """Microseconds of an entry's configuration for a problem."""
    own = entry.problem
    computing = waves(entry.config, problem) * problem.num_groups / (waves(entry.config, own) * own.num_groups)
    time = entry.microseconds - RAMP
    many = min(problem.tokens, own.tokens) > FEW_TOKENS
    if many and _weight_bits(own) / BITS_PER_MICROSECOND < time / 2:
        time = max(time * computing, _weight_bits(problem) / BITS_PER_MICROSECOND)
    else:
        time *= max(computing, _weight_reads(entry.config, problem) / _weight_reads(entry.config, own))
    longer_before = max(0.0, _microseconds_before(entry.config, problem) - _microseconds_before(entry.config, own))
    return RAMP + longer_before + time


def _microseconds_before(config: Config | MosaicConfig, problem: Problem) -> float:
    """What comes before the matmul and is not part of it: quantising, longer than the first weights take to arrive."""
    return config.quantizing_microseconds(problem) if isinstance(config, MosaicGpuQuantizeConfig) else 0.0


def waves(config: Config | MosaicConfig, problem: Problem) -> float:
    """Times that a multiprocessor computes a tile, or as many as fit it at once; at least 1.

    Programs of the Triton kernels start whenever one ends, so that a last wave may be partly filled at no loss.
    """
    if isinstance(config, MosaicGpuSplitConfig):
        return config.waves(problem)
    if isinstance(config, MosaicGpuConfig):
        channels = math.ceil(problem.n4 / config.tile_channels) + math.ceil(problem.n8 / config.tile_channels)
        tiles = channels * math.ceil(problem.tokens / config.tile_tokens)
        return mosaic_gpu_config.waves(tiles, config.tile_tokens, unsigned=config.unsigned)
    if isinstance(config, FewTokensConfig):
        tiles = math.prod((sum(config.tiles(problem)[:2]), config.tiles(problem)[2], config.splits))
        resident = max(1, WARPS_OF_FEW_TOKENS // config.warps)
    else:
        channels = math.ceil(problem.n4 / config.rows) + math.ceil(problem.n8 / config.rows)
        tiles, resident = channels * math.ceil(problem.tokens / config.tokens), 2
    return max(1.0, tiles / (MULTIPROCESSORS * resident))


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
