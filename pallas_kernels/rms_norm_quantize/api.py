"""`rms_norm_quantize`: checks its arguments and picks an implementation."""

from __future__ import annotations

import jax

from pallas_kernels.activations import Layout, QuantizedActivations, validate_input, validate_layout
from pallas_kernels.registry import Operation
from pallas_kernels.rms_norm_quantize import pallas_triton, xla
from pallas_kernels.triton_common import implementations

OPERATION = Operation(
    name="rms_norm_quantize",
    implementations=implementations(xla.rms_norm_quantize, pallas_triton.rms_norm_quantize, pallas_triton.refuses),
    prefer=lambda *args, **kwargs: ("triton",),
)


def rms_norm_quantize(
    x: jax.Array,
    norm_weight: jax.Array,
    epsilon: float,
    group_size: int,
    *,
    residual: jax.Array | None = None,
    layout: Layout = "signed",
    implementation: str = "auto",
) -> tuple[QuantizedActivations, jax.Array]:
    """RMSNorm (arXiv 1910.07467) of `x + residual` and the quantisation of its output, in one launch on the GPU.

    normalised = s / sqrt(mean(s^2) + epsilon) * norm_weight with s = x + residual, all in float32 and quantised without
    rounding to x's dtype in between; only the returned sum is rounded.

    Args:
        x: Float `[tokens, features]`.
        norm_weight: Float `[features]`.
        epsilon: Added to the mean square.
        group_size: Channels that share a scale; divides `features`.
        residual: Like `x`, added before the norm; None adds nothing.
        layout: Of codes and scales, as `activation_layout` names it for the matmul that takes them.
        implementation: `auto`, or a name from the registry.

    Returns:
        The quantised norm, and `x + residual` (`x` itself without a residual) for the next residual connection.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an unknown layout or implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    validate_input("x", x, group_size)
    validate_layout(layout, group_size)
    if tuple(norm_weight.shape) != (x.shape[1],):
        raise ValueError(f"norm_weight must be [{x.shape[1]}], found {list(norm_weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be like x, {x.dtype} {list(x.shape)}, found {residual.dtype} {list(residual.shape)}"
        )
    return OPERATION(implementation, x, norm_weight, residual, epsilon=epsilon, group_size=group_size, layout=layout)
