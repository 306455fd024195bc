"""`swiglu_quantize`: checks its arguments and picks an implementation."""

from __future__ import annotations

import jax

from pallas_kernels.activations import Layout, QuantizedActivations, validate_input, validate_layout
from pallas_kernels.registry import Operation
from pallas_kernels.swiglu_quantize import pallas_triton, xla
from pallas_kernels.triton_common import implementations

OPERATION = Operation(
    name="swiglu_quantize",
    implementations=implementations(xla.swiglu_quantize, pallas_triton.swiglu_quantize, pallas_triton.refuses),
    prefer=lambda *args, **kwargs: ("triton",),
)


def swiglu_quantize(
    gate_up: jax.Array, group_size: int, *, layout: Layout = "signed", implementation: str = "auto"
) -> QuantizedActivations:
    """silu(gate) * up, quantised to int8 in groups, in one launch on the GPU.

    The activation (SwiGLU, arXiv 2002.05202) is in float32 and not rounded to the input's dtype in between.

    Args:
        gate_up: Float `[tokens, 2 * features]`, the gate in the first half.
        group_size: Channels that share a scale; divides `features`.
        layout: Of codes and scales, as `activation_layout` names it for the matmul that takes them.
        implementation: `auto`, or a name from the registry.

    Returns:
        Codes and scales of `[tokens, features]`.

    Raises:
        ValueError: Wrong rank, dtype, an odd width or a group size that does not divide, or an
            unknown layout or implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    validate_input("gate_up", gate_up, 2 * group_size)
    validate_layout(layout, group_size)
    return OPERATION(implementation, gate_up, group_size=group_size, layout=layout)
