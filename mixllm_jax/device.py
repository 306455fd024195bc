"""Whether the device can run a quantised model fast: checked before one is loaded, so that nothing is slow silently."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mixllm_jax.errors import MixLLMError
from pallas_kernels import quantize_activations, registry
from pallas_kernels.packing import GROUP_SIZES

OLDEST_CAPABILITY = (8, 0)
"""The oldest NVIDIA GPUs that our kernels are written for (Ampere)."""


class UnsupportedDeviceError(MixLLMError):
    """The device has no kernels for this model."""


def require_kernels(group_size: int, implementation: str) -> None:
    """Checks that a GPU has kernels for int8 activations in groups of `group_size`.

    A CPU runs the exact XLA reference, and so does a GPU that is told to (`implementation` `xla`).

    Raises:
        UnsupportedDeviceError: The GPU is too old, or no kernel takes the group size.
        NotImplementedError: A kernel was asked for by name that cannot run here; says why.
    """
    if implementation not in ("auto", "xla"):
        activations = jax.ShapeDtypeStruct((1, group_size), jnp.bfloat16)
        quantize = functools.partial(quantize_activations, group_size=group_size, implementation=implementation)
        jax.eval_shape(quantize, activations)
    if implementation == "xla" or registry.default_platform() != "gpu":
        return
    remedy = "use a CPU (JAX_PLATFORMS=cpu), or --implementation xla, which is exact but slow"
    capability = registry.compute_capability()
    if capability is not None and capability < OLDEST_CAPABILITY:
        raise UnsupportedDeviceError(
            f"{registry.device_kind()} has compute capability {capability[0]}.{capability[1]}, but the int8 kernels "
            f"need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer: {remedy}"
        )
    if group_size not in GROUP_SIZES:
        raise UnsupportedDeviceError(
            f"the model is quantized in groups of {group_size}, but the kernels take groups of "
            f"{', '.join(map(str, GROUP_SIZES))}: quantize it again with one of these, or {remedy}"
        )
