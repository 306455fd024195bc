"""`quantize_activations`: checks its arguments and picks an implementation."""

from __future__ import annotations

import jax

from pallas_kernels.activations import Layout, QuantizedActivations, validate_input, validate_layout
from pallas_kernels.quantize_activations import pallas_triton, xla
from pallas_kernels.registry import Operation
from pallas_kernels.triton_common import implementations

OPERATION = Operation(
    name="quantize_activations",
    implementations=implementations(
        xla.quantize_activations, pallas_triton.quantize_activations, pallas_triton.refuses
    ),
    prefer=lambda *args, **kwargs: ("triton",),
)


def quantize_activations(
    x: jax.Array, group_size: int, *, terms: int = 1, layout: Layout = "signed", implementation: str = "auto"
) -> QuantizedActivations:
    """Quantise activations to int8, symmetric, one scale for each token and group of channels.

    scale = absmax / 127 of the group; codes = x / scale, rounded half to even (MixLLM, section 3.1).

    With two terms x ~ s1 c1 + s2 c2, where the second quantises what the first has left: within 1/64516 of the largest
    value of a group, where one term is within 1/254. The result then has `terms * tokens` rows, the first term of all
    tokens before the second, and a product with it so many halves to add up: for layers where few tokens and great
    accuracy meet, such as the output head. A product of few tokens takes the time in which its weights are read,
    whatever the number of tokens.

    Args:
        x: Float `[tokens, features]`.
        group_size: Channels that share a scale; divides `features`.
        terms: Whose sum stands for x.
        layout: Of codes and scales, as `activation_layout` names it for the matmul that takes them.
        implementation: `auto`, or a name from the registry.

    Returns:
        Codes and scales of `terms * tokens` rows.

    Raises:
        ValueError: Wrong rank, dtype, group size or number of terms, or an unknown layout or implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    validate_input("x", x, group_size)
    validate_layout(layout, group_size)
    if terms not in (1, 2):
        raise ValueError(f"terms must be 1 or 2, found {terms}")
    return OPERATION(implementation, x, group_size=group_size, terms=terms, layout=layout)
