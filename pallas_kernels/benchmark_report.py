"""The benchmark's results: rows, their table as text and JSON, and a plot."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from pallas_kernels import registry


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        share_8bit: Share of 8-bit channels.
        group_size: Input channels that share a scale.
        implementation: Of the matmul.
        quantize_matmul_us: Of quantising the activations and multiplying.
        matmul_us: Of the matmul alone.
        bf16_us: Of the bf16 dot.
        floor_us: The least that the device's measured ceilings allow.
    """

    m: int
    n: int
    k: int
    share_8bit: float
    group_size: int
    implementation: str
    quantize_matmul_us: float
    matmul_us: float
    bf16_us: float
    floor_us: float

    @property
    def speedup(self) -> float:
        """Of quantising and multiplying over the bf16 dot."""
        return self.bf16_us / self.quantize_matmul_us

    @property
    def tops(self) -> float:
        """10**12 operations a second of the matmul alone."""
        return 2e-6 * self.m * self.n * self.k / self.matmul_us


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do in the same run."""

    copy_bytes_per_second: float
    int8_operations_per_second: float

    def floor_us(self, m: int, n: int, k: int, weight_bytes: float) -> float:
        """The least time that one product can take."""
        return 1e6 * max(weight_bytes / self.copy_bytes_per_second, 2 * m * n * k / self.int8_operations_per_second)


HEADER = "    M      N      K  8-bit  implementation   all in   matmul     bf16    floor  speed-up  TOP/s  of floor"


def format_row(row: Row) -> str:
    """A line under `HEADER`."""
    return (
        f"{row.m:5d} {row.n:6d} {row.k:6d} {row.share_8bit:6.2f}  {row.implementation:14s} "
        f"{row.quantize_matmul_us:8.1f} {row.matmul_us:8.1f} {row.bf16_us:8.1f} {row.floor_us:8.1f} "
        f"{row.speedup:9.2f} {row.tops:6.0f} {row.floor_us / row.quantize_matmul_us:9.0%}"
    )


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing, as many in JAX do."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_json(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Write the table with the device, versions and ceilings beside it to `path`; a partial file never has its name."""
    document = {
        "command": "python -m pallas_kernels.benchmark " + shlex.join(sys.argv[1:]),
        "device": registry.device_kind(),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version.split()[0]},
        "ceilings": dataclasses.asdict(ceilings),
        "units": "microseconds of device time, medians, weights from memory",
    }
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(row)) for row in rows)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(document, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    partial.replace(path)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed-up over M, one panel a shape and one line a share of 8-bit channels (as Figure 5 of the paper).

    Args:
        path: Of the image; its suffix is the format.
        rows: At least one.

    Raises:
        ImportError: matplotlib is not installed (the extra `plot`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharey=True)
    for axis, (n, k) in zip(axes.flat, shapes, strict=False):
        for share in sorted({row.share_8bit for row in rows}):
            points = [row for row in rows if (row.n, row.k, row.share_8bit) == (n, k, share)]
            label = f"{share:.0%} 8-bit"
            axis.plot([row.m for row in points], [row.speedup for row in points], marker="o", markersize=3, label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{n} x {k}", xlabel="tokens")
        axis.set_xscale("log", base=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up over bf16")
    axes.flat[0].legend()
    for axis in axes.flat[len(shapes) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
