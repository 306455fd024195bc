"""Device time of kernels, read from the GPU's own clock through CUPTI, not from the host's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

REPEATED_BYTES = 160e6
"""Operands to rotate among, so that they come from memory each time: several times the L2 cache of an H100 (50 MB)."""


class KernelTime(NamedTuple):
    """One kernel launch."""

    name: str
    microseconds: float


def kernel_times(
    function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], repeats: int
) -> list[list[KernelTime]]:
    """The kernels of every execution of `function`, which runs `repeats` times on each set of arguments in turn.

    Args:
        function: Compiled, so that nothing but its kernels runs.
        argument_sets: Arguments on the device; several sets keep weights from staying in the cache.
        repeats: Rounds over all sets; one more round warms up.

    Raises:
        RuntimeError: No timings, or executions with different numbers of kernels.
    """
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    for arguments in argument_sets:
        result = function(*arguments)
    jax.block_until_ready(result)
    cupti._cupti_init()
    try:
        for _ in range(repeats):
            for arguments in argument_sets:
                result = function(*arguments)
        jax.block_until_ready(result)
    finally:
        timings = cupti._cupti_get_timings(False)
    executions = repeats * len(argument_sets)
    if not timings or len(timings) % executions:
        raise RuntimeError(f"{len(timings)} kernels were timed in {executions} executions; expected a multiple")
    per_execution = len(timings) // executions
    launches = [KernelTime(name, milliseconds * 1e3) for name, milliseconds in timings]
    return [launches[start : start + per_execution] for start in range(0, len(launches), per_execution)]


def repeats_for(sets: int, executions: int) -> int:
    """Rounds over `sets` argument sets that make about `executions` executions."""
    return max(1, round(executions / sets))
