"""Where the time of a decode step goes, from a trace of the profiler."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

_KINDS = (
    ("attention", ("decode_attention", "fmha", "flash", "cudnn")),
    ("weight matmul", ("mixed_matmul", "gemm", "gemv", "dot", "cutlass", "cublas", "nvjet", "splitk", "xmma")),
    ("quantize, norm, activation", ("quantize", "norm", "swiglu")),
)
"""Kinds of kernels, by parts of their names; the first that fits counts."""
_GRAPH_LAUNCH = "GraphLaunch"
"""Part of the name of the driver's call that starts a CUDA graph."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One execution on the device, times in nanoseconds."""

    name: str
    start: float
    duration: float


def profile(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Profiles `run`, which is to execute `steps` decode steps.

    Returns:
        Shares of the time by kind of kernel, with `gaps` where the device was idle; the longest of these, by the kernel
        behind them; kernels and CUDA graph launches per step; and the kernels that took the most time, microseconds per
        step.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
        return summarize(*_read(trace), steps)


def _read(trace: Any) -> tuple[list[Kernel], int]:
    """Kernels of the device's streams, and how many CUDA graphs the host launched."""
    kernels: list[Kernel] = []
    graph_launches = 0
    for plane in trace.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                kernels += [Kernel(event.name, event.start_ns, event.duration_ns) for event in line.events]
            elif not plane.name.startswith("/device"):
                graph_launches += sum(_GRAPH_LAUNCH in event.name for event in line.events)
    return kernels, graph_launches


def summarize(kernels: Iterable[Kernel], graph_launches: int, steps: int) -> dict[str, Any]:
    """The figures of `profile`."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    if not ordered:
        raise RuntimeError("the profiler saw no kernels: it needs CUPTI and a GPU")
    busy, end = 0.0, ordered[0].start
    by_kind: dict[str, float] = collections.defaultdict(float)
    by_name: dict[str, float] = collections.defaultdict(float)
    gaps: list[tuple[str, float]] = []
    for kernel in ordered:
        gaps.append((kernel.name, kernel.start - end))
        own = max(0.0, kernel.start + kernel.duration - max(end, kernel.start))  # without what overlaps another
        busy += own
        end = max(end, kernel.start + kernel.duration)
        by_kind[_kind(kernel.name)] += own
        by_name[kernel.name] += own
    span = end - ordered[0].start
    return {
        "step_us": round(span / steps / 1e3, 1),
        "shares": {kind: round(time / span, 4) for kind, time in _largest_first(by_kind.items())}
        | {"gaps": round(1 - busy / span, 4)},
        "longest_gaps_us": [[name, round(gap / 1e3, 1)] for name, gap in _largest_first(gaps)[:4] if gap > 0],
        "kernels_per_step": round(len(ordered) / steps, 1),
        "graph_launches_per_step": round(graph_launches / steps, 2),
        "kernels_us_per_step": {
            name: round(time / steps / 1e3, 1) for name, time in _largest_first(by_name.items())[:16]
        },
    }


def _largest_first(times: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(times, key=lambda item: -item[1])


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in _KINDS if any(part in lower for part in parts)), "rest")
