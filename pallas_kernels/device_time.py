"""Device time of kernels, read from the GPU's own clock through CUPTI, not from the host's."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

REPEATED_BYTES = 160e6
"""Operands to rotate among, so that they come from memory each time: several times the L2 cache of an H100 (50 MB)."""


def kernel_times(
    function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], repeats: int
) -> dict[str, float]:
    """Microseconds that one execution of `function` spends in each of its kernels, by the kernel's name.

    The median launch of a kernel times its launches per execution. Launches are told apart by name and not by their
    place in the list: CUPTI hands records out as its buffers fill up, which is not always the order of the launches.

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
        # Detaching makes CUPTI forget the names of kernels. It keeps them by handle, and the driver gives the handle of
        # an unloaded kernel to the next one that is loaded, which would be reported under the other's name.
        timings = cupti._cupti_get_timings(True)
    executions = repeats * len(argument_sets)
    launches: dict[str, list[float]] = collections.defaultdict(list)
    for name, milliseconds in timings or ():
        launches[name].append(milliseconds * 1e3)
    counts = {name: len(times) for name, times in launches.items()}
    if not counts or any(count % executions for count in counts.values()):
        raise RuntimeError(f"in {executions} executions these kernels were timed: {counts}; expected multiples")
    return {name: statistics.median(times) * len(times) / executions for name, times in launches.items()}


def repeats_for(sets: int, executions: int) -> int:
    """Rounds over `sets` argument sets that make about `executions` executions."""
    return max(1, round(executions / sets))
