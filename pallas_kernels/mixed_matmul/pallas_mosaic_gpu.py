"""Mosaic GPU implementation of the mixed matmul, for Hopper GPUs: picks the settings and launches a kernel."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import registry, unsigned_operands
from pallas_kernels.activations import Layout, QuantizedActivations
from pallas_kernels.mixed_matmul import configs
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MULTIPROCESSORS, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig, MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem
from pallas_kernels.packing import GROUP_SIZES, PackedWeight, has_aligned_rows

if TYPE_CHECKING:
    from pallas_kernels.mixed_matmul.mosaic_gpu.persistent import PersistentKernel

COMPUTE_CAPABILITY = (9, 0)
"""Of Hopper GPUs, whose `wgmma` other generations do not have."""

MAX_ELEMENTS = 2**31
"""The copy engine and the kernel count the elements of an array (weight, output, activations) in 32-bit integers."""


def mixed_matmul(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: MosaicGpuConfig | MosaicGpuSplitConfig | None = None,
) -> jax.Array:
    """The mixed matmul in one launch, for activations in the layout that the settings want.

    Activations in another layout go through a pass of their own first. Arguments and result are those of the public
    `mixed_matmul`, which has checked them; `config` overrides the tuned choice.
    """
    # Imports slowly, and not everywhere.
    from pallas_kernels.mixed_matmul.mosaic_gpu import persistent
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import kernel as split

    config = config_for(activations.tokens, weight, config)
    activations = activations.in_layout(_layout(config))
    arguments = (activations, weight, bias, jnp.dtype(out_dtype))
    if isinstance(config, MosaicGpuSplitConfig):
        return split.launch(*arguments, config, _multiprocessors())
    return persistent.launch(kernel_type(config), *arguments, config, _multiprocessors())


def kernel_type(config: MosaicGpuConfig) -> type[PersistentKernel]:
    """The kernel that these settings are for."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.signed.kernel import SignedKernel
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel

    return UnsignedKernel if config.unsigned else SignedKernel


def quantized_linear(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: MosaicGpuQuantizeConfig,
) -> jax.Array:
    """`mixed_matmul` of float `[tokens, in_features]` in one launch, for few tokens.

    The other arguments and the result are those of the public `quantized_linear`, which has checked them; `config` is
    what `quantizing_config` gives.
    """
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import kernel  # imports slowly, and not everywhere

    return kernel.launch(x, weight, bias, jnp.dtype(out_dtype), config, _multiprocessors())


QUANTIZES_ITSELF = False
"""Whether `quantized_linear` may take the kernel that quantises its activations in the launch of the matmul.

Off until it is understood why, on an H100, 34 of 600 launches with one token and a 4096 x 4096 weight gave other values
in the 32 channels of the last, half-filled tile of 8-bit channels (docs/kernels.md, "Quantising in the matmul"). Other
shapes and numbers of tokens gave the same bits in 600 launches each, which is no proof.
"""


def quantizing_config(tokens: int, weight: PackedWeight) -> MosaicGpuQuantizeConfig | None:
    """Settings to quantise activations in the matmul itself, or None where that is off, slower, or does not fit."""
    if not QUANTIZES_ITSELF:
        return None
    problem = Problem(tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)
    config = configs.quantizing(problem, registry.device_kind())
    return config if config is not None and config.fits(problem, _multiprocessors()) else None


def config_for(
    tokens: int, weight: PackedWeight, config: MosaicGpuConfig | MosaicGpuSplitConfig | None = None
) -> MosaicGpuConfig | MosaicGpuSplitConfig:
    """What the kernel runs with: the tuned choice or `config`, as far as the weight allows it.

    A weight without the sums of its codes, in other groups than those of 128, or whose rows of scales do not start at
    multiples of 16 bytes, takes signed operands in tiles of the same size where unsigned ones are wanted.
    """
    if config is None:
        problem = Problem(tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)
        config = configs.choose(problem, registry.device_kind(), "mosaic_gpu")
    may_be_unsigned = weight.code_sums4 is not None and weight.group_size == unsigned_operands.GROUP_SIZE
    may_be_unsigned = may_be_unsigned and has_aligned_rows(weight)
    return config if may_be_unsigned or isinstance(config, MosaicGpuSplitConfig) else config.signed


def activation_layout(
    tokens: int, weight: PackedWeight, config: MosaicGpuConfig | MosaicGpuSplitConfig | None = None
) -> Layout:
    """In which layout the kernel wants this many tokens for the weight."""
    return _layout(config_for(tokens, weight, config))


def _layout(config: MosaicGpuConfig | MosaicGpuSplitConfig) -> Layout:
    return "unsigned" if isinstance(config, MosaicGpuConfig) and config.unsigned else "signed"


def refuses(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
    **settings: object,
) -> str | None:
    """Why the kernel cannot run, or None."""
    if jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or later, this is {jax.__version__}"
    capability = registry.compute_capability()
    if registry.default_platform() != "gpu" or capability is None:
        return f"it needs an NVIDIA GPU, and JAX's default device is a {registry.default_platform()}"
    if capability != COMPUTE_CAPABILITY:
        return f"it is written for Hopper GPUs (compute capability {COMPUTE_CAPABILITY}), this GPU has {capability}"
    if 0 in (activations.tokens, weight.out_features):
        return "there is nothing to compute"
    if weight.group_size not in GROUP_SIZES:
        return f"it takes groups of {GROUP_SIZES}, not {weight.group_size}"
    tokens, in_features, out_features = activations.tokens, weight.in_features, weight.out_features
    # Unsigned activations have 128 bytes more for every 32 groups: at most twice the codes.
    elements = max(out_features * in_features, 2 * tokens * in_features, tokens * out_features)
    if elements >= MAX_ELEMENTS:
        return f"it addresses arrays of fewer than {MAX_ELEMENTS} elements, and one here may have {elements}"
    return None


@functools.cache
def _multiprocessors() -> int:
    """Of the default device; off the GPU, where the kernel can only be lowered, of an H100."""
    return int(getattr(jax.devices()[0], "core_count", 0) or MULTIPROCESSORS)
