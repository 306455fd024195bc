"""Which kernel and which tile sizes to use: tuned tables by device kind, and rules where there is none.

`python -m pallas_kernels.tune` writes a table; a call uses the entry of the nearest tuned case.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from pallas_kernels.mixed_matmul import pallas_mosaic_gpu_config
from pallas_kernels.mixed_matmul.pallas_mosaic_gpu_config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

TABLE_DIR = Path(__file__).parent / "tuned"

Config = FewTokensConfig | ManyTokensConfig
"""Settings of a Triton kernel."""

_KERNELS: dict[str, type[Any]] = {
    "few_tokens": FewTokensConfig,
    "many_tokens": ManyTokensConfig,
    "mosaic_gpu": MosaicGpuConfig,
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
    config: Config | MosaicGpuConfig
    microseconds: float

    @property
    def case(self) -> tuple[int, int, int, int, float]:
        """What the configuration was tuned for."""
        return self.tokens, self.n, self.k, self.group_size, self.share_8bit

    @property
    def implementation(self) -> str:
        """Name in the registry of the implementation that the configuration is for."""
        return "mosaic_gpu" if isinstance(self.config, MosaicGpuConfig) else "triton"

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
    """Entries tuned for a device; none for an unknown one."""
    path = table_path(device_kind)
    if not path.exists():
        return ()
    return tuple(Entry.from_json(row) for row in json.loads(path.read_text())["entries"])


def write_table(device_kind: str, entries: list[Entry], versions: dict[str, str]) -> Path:
    """Write a table, replacing entries of the same cases and implementations in an existing one."""
    by_case = {(entry.case, entry.implementation): entry for entry in (*read_table(device_kind), *entries)}
    rows = sorted(
        by_case.values(), key=lambda entry: (entry.n, entry.k, entry.share_8bit, entry.tokens, entry.implementation)
    )
    path = table_path(device_kind)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = ",\n".join("  " + json.dumps(entry.to_json()) for entry in rows)
    header = json.dumps({"device_kind": device_kind, "versions": versions})[:-1]
    partial.write_text(f'{header}, "entries": [\n{lines}\n]}}\n')
    partial.replace(path)
    read_table.cache_clear()
    return path


def choose(problem: Problem, device_kind: str, implementation: str = "triton") -> Any:
    """The implementation's configuration of the nearest tuned case, or what its rule gives where there is no table."""
    entry = _nearest(problem, device_kind, implementation)
    if entry is not None:
        return entry.config
    return pallas_mosaic_gpu_config.default(problem) if implementation == "mosaic_gpu" else default(problem)


def by_speed(problem: Problem, device_kind: str) -> tuple[str, str]:
    """The GPU implementations, the one that should be faster first.

    Where both were tuned for the nearest case, their measured times decide; otherwise Mosaic GPU comes first from 9
    tokens on, where its dots of 64 channels have enough tokens to work on.
    """
    mosaic, triton = (_nearest(problem, device_kind, name) for name in ("mosaic_gpu", "triton"))
    if mosaic is not None and triton is not None and mosaic.case == triton.case:
        mosaic_first = mosaic.microseconds < triton.microseconds
    else:
        mosaic_first = problem.tokens > 8
    return ("mosaic_gpu", "triton") if mosaic_first else ("triton", "mosaic_gpu")


def _nearest(problem: Problem, device_kind: str, implementation: str) -> Entry | None:
    """The nearest tuned case of an implementation, or None on a device without a table."""
    entries = [
        entry
        for entry in read_table(device_kind)
        if entry.group_size == problem.group_size and entry.implementation == implementation
    ]
    return min(entries, key=functools.partial(_distance, problem), default=None)


def _distance(problem: Problem, entry: Entry) -> tuple[float, float]:
    """Tuned numbers of tokens that are too small count as far away, since their tiles would be read again and again.

    The output channels, which say how many programs there are, weigh more than the input channels.
    """
    ratio = math.log2(problem.tokens / entry.tokens)
    tokens = ratio * 4 if ratio > 0 else -ratio
    channels = abs(math.log2(problem.out_features / entry.n)) / 4 + abs(math.log2(problem.in_features / entry.k)) / 8
    share = abs(problem.n8 / problem.out_features - entry.share_8bit)
    return tokens + channels + share, channels


def default(problem: Problem) -> Config:
    """A Triton configuration for any device: loads in flight for few tokens, tiles that fit registers for many."""
    if problem.tokens <= 32:
        warps = 8 if problem.num_groups >= 16 else 4
        return FewTokensConfig(16, 8 if problem.tokens <= 8 else 16, warps, 1, splits=1, prefetch="weights")
    if problem.tokens <= 64:
        return ManyTokensConfig(64, 64 if problem.tokens > 32 else 32, 4, 4)
    return ManyTokensConfig(64, 128, 4, 3)
