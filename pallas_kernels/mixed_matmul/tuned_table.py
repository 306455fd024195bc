"""The tuned table of a device: which settings were fastest for which case, in JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
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
        microseconds: Its device time; that of quantising is part of it only where the kernel does that itself.
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


H100 = "NVIDIA H100 80GB HBM3"
"""The device whose table its relatives share."""


def tuned_device(device_kind: str) -> str:
    """Kind of the device whose table counts: its own where there is one, that of an H100 for its relatives."""
    is_relative = re.search(r"\bG?H[128]00\b", device_kind) is not None
    return H100 if is_relative and not table_path(device_kind).exists() else device_kind


@functools.cache
def read_table(device_kind: str) -> tuple[Entry, ...]:
    """Entries tuned for a device, or for the one whose table it shares; none for an unknown one."""
    path = table_path(tuned_device(device_kind))
    return _read(path) if path.exists() else ()


def _read(path: Path) -> tuple[Entry, ...]:
    return tuple(Entry.from_json(row) for row in json.loads(path.read_text())["entries"])


def write_table(device_kind: str, entries: list[Entry], versions: dict[str, str], path: Path | None = None) -> Path:
    """Write a device's table (or another file), replacing entries of the same cases and implementations in it.

    Args:
        device_kind: As JAX names the device.
        entries: The new ones.
        versions: Of jax and jaxlib, for the reader.
        path: Another file than the one that is shipped for the device.

    Returns:
        The file.
    """
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
