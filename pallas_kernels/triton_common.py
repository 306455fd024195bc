"""What the Triton implementations of all operations share: quantising a group, and when they cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import registry
from pallas_kernels.activations import SMALLEST_SCALE
from pallas_kernels.packing import GROUP_SIZES
from pallas_kernels.triton_primitives import divide, fma, round_to_int

MAX_ELEMENTS = 2**30
"""Elements of an array that the kernels' 32-bit offsets reach with room to spare."""


def quantize_groups(groups: jax.Array, *, offset: int = 0) -> tuple[jax.Array, jax.Array]:
    """Quantise groups whose values lie along all axes but the second.

    Args:
        groups: float32 `[chunks, groups, runs, columns]`.
        offset: Added to the codes; even.

    Returns:
        Codes plus the offset, int32 of the same shape, and float32 scales `[1, groups, 1, 1]`.
    """
    largest = of_groups(jnp.max, jnp.abs(groups))
    scales = divide(largest, jnp.full(largest.shape, 127.0, jnp.float32))
    scales = jnp.where(scales < SMALLEST_SCALE, 0.0, scales)
    divisors = jnp.where(scales > 0, scales, 1.0)
    inverses = divide(jnp.full(divisors.shape, 1.0, jnp.float32), divisors)
    # One correction step makes the product with the rounded inverse the correctly rounded quotient (Markstein), at a
    # fraction of the cost of a division for every element.
    quotients = groups * inverses
    remainders = fma(-quotients, divisors, groups)
    return round_to_int(fma(remainders, inverses, quotients), offset), scales


def of_groups(reduce: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
    """One value a group, `[1, groups, 1, 1]`, from `[chunks, groups, runs, columns]`: Triton reduces axis by axis."""
    return jnp.expand_dims(reduce(reduce(reduce(values, axis=0), axis=2), axis=1), (0, 2, 3))


NUM_COUNTERS = 1024
"""Counters that a quantising kernel clears for the matmul: more tiles than one with few tokens splits."""
MAX_COUNTED_TOKENS = 64
"""With more tokens than this, the matmul has tiles enough without splitting K."""


def counters_shape(tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The extra output of a quantising kernel for this many tokens."""
    return (jax.ShapeDtypeStruct((NUM_COUNTERS,), jnp.int32),) if tokens <= MAX_COUNTED_TOKENS else ()


def clear_counters(refs: Sequence[Any], is_first_program: jax.Array) -> None:
    """Write the extra output, where there is one."""
    for ref in refs:

        @pl.when(is_first_program)
        def _clear(ref: Any = ref) -> None:
            plgpu.store(ref.at[jnp.arange(NUM_COUNTERS)], jnp.zeros((NUM_COUNTERS,), jnp.int32))


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


def refuses_triton(group_size: int, elements: int, *, interpret: bool) -> str | None:
    """Why the Triton kernels cannot run here on arrays of this size, or None."""
    if interpret:
        if registry.default_platform() != "cpu":
            return "interpret mode is for tests on a CPU"
    else:
        capability = registry.compute_capability()
        if registry.default_platform() != "gpu" or capability is None:
            return f"it needs an NVIDIA GPU, and JAX's default device is a {registry.default_platform()}"
        if capability < (8, 0):
            return f"it needs int8 tensor cores of compute capability 8.0 or later, this GPU has {capability}"
    if elements == 0:
        return "there is nothing to compute"
    if group_size not in GROUP_SIZES:
        return f"it takes groups of {GROUP_SIZES}, not {group_size}"
    if elements >= MAX_ELEMENTS:
        return f"it addresses arrays of fewer than {MAX_ELEMENTS} elements, and one here has {elements}"
    return None


def implementations(
    xla: Callable[..., Any], triton: Callable[..., Any], refuses: Callable[..., str | None]
) -> dict[str, registry.Implementation]:
    """The implementations that every operation has.

    `triton_interpret` runs the Triton kernel step by step in JAX, on any device: slow, for tests. `mosaic_gpu` is the
    Triton kernel too, but for the matmul, which has its own: so that a model can run with one name for all operations.
    """
    interpret = {"interpret": True}
    return {
        "xla": registry.Implementation(xla, registry.never_refuses),
        "triton": registry.Implementation(triton, refuses),
        "mosaic_gpu": registry.Implementation(triton, refuses),
        "triton_interpret": registry.Implementation(
            functools.partial(triton, **interpret), functools.partial(refuses, **interpret)
        ),
    }
