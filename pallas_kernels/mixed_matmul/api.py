"""`mixed_matmul` and `quantized_linear` check their arguments and pick an implementation.

`prepare_weight` and `activation_layout` say what that wants to find.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import activations as activations_module
from pallas_kernels import packing, registry, unsigned_operands
from pallas_kernels.activations import Layout, QuantizedActivations, validate_input
from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu, pallas_triton, xla
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig
from pallas_kernels.mixed_matmul.triton_tiles import problem_of
from pallas_kernels.packing import PackedWeight
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.registry import Implementation, Operation
from pallas_kernels.triton_common import implementations

OUT_DTYPES = ("bfloat16", "float16", "float32")


def _prefer(
    activations: QuantizedActivations, weight: PackedWeight, bias: jax.Array | None, **settings: object
) -> tuple[str, ...]:
    """The GPU implementations that were written for this device, the one that measured faster on it first.

    None where there is nothing to compute, which no kernel takes.
    """
    if 0 in (activations.tokens, weight.out_features):
        return ()
    by_speed = configs.by_speed(problem_of(activations, weight), registry.device_kind())
    if registry.compute_capability() == pallas_mosaic_gpu.COMPUTE_CAPABILITY:
        return by_speed
    return tuple(name for name in by_speed if name != "mosaic_gpu")


OPERATION = Operation(
    name="mixed_matmul",
    implementations={
        **implementations(xla.mixed_matmul, pallas_triton.mixed_matmul, pallas_triton.refuses),
        "mosaic_gpu": Implementation(pallas_mosaic_gpu.mixed_matmul, pallas_mosaic_gpu.refuses),
        "xla": Implementation(xla.mixed_matmul, xla.refuses),
    },
    prefer=_prefer,
)


def mixed_matmul(
    activations: QuantizedActivations,
    weight: PackedWeight,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: str = "auto",
) -> jax.Array:
    """Quantised linear layer: `[tokens, out_features]` of `activations @ weight.T + bias`.

    Y[m, n] = sum over groups g of  s_a[g, m] * s_w[g, n] * sum over k in g of A[m, k] * (W[n, k] - z[g, n])
    (MixLLM, section 4.1). The inner sum is exact, the outer one is in float32; with the sums of the codes in the weight
    (`prepare_weight`) and many tokens, a Hopper GPU takes off the terms of the zero points z with 16 significant bits.

    Args:
        activations: Of `[tokens, in_features]`, quantised with the weight's group size, best in the layout that
            `activation_layout` names: any other is brought into it by a pass over them.
        weight: `[out_features, in_features]`, with sums of its codes or without.
        bias: Float `[out_features]`, or None.
        out_dtype: bfloat16, float16 or float32.
        implementation: `auto`, or a name from the registry.

    Returns:
        `[tokens, out_features]`.

    Raises:
        ValueError: Shapes, dtypes or group sizes that do not fit, or an unknown implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    packing.validate(weight)
    activations_module.validate(activations)
    if (activations.in_features, activations.group_size) != (weight.in_features, weight.group_size):
        raise ValueError(
            f"activations have {activations.in_features} features in groups of {activations.group_size}, "
            f"the weight {weight.in_features} in groups of {weight.group_size}"
        )
    _validate_output(weight, bias, out_dtype)
    return OPERATION(implementation, activations, weight, bias, out_dtype=jnp.dtype(out_dtype))


def quantized_linear(
    x: jax.Array,
    weight: PackedWeight,
    bias: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    activation_terms: int = 1,
    implementation: str = "auto",
) -> jax.Array:
    """`mixed_matmul(quantize_activations(x), weight, bias)`: for layers whose input no other kernel has quantised.

    In two launches. A kernel that does both for few tokens is off; see `pallas_mosaic_gpu.QUANTIZES_ITSELF`.

    Args:
        x: Float `[tokens, in_features]`.
        weight: `[out_features, in_features]`, with sums of its codes or without.
        bias: Float `[out_features]`, or None.
        out_dtype: bfloat16, float16 or float32.
        activation_terms: 1 or 2: int8 terms whose sum stands for x, two of which hold some 16 bits; see
            `quantize_activations`.
        implementation: Of both operations: `auto`, or a name from the registry.

    Returns:
        `[tokens, out_features]`.

    Raises:
        ValueError: Shapes or dtypes that do not fit, another number of terms, or an unknown implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    validate_input("x", x, weight.group_size)
    packing.validate(weight)
    _validate_output(weight, bias, out_dtype)
    config = (
        _quantizing_config(x, weight) if activation_terms == 1 and implementation in ("auto", "mosaic_gpu") else None
    )
    if config is not None:
        settings = (("config", config), ("out_dtype", jnp.dtype(out_dtype)))
        return registry.inference_function("quantized_linear", pallas_mosaic_gpu.quantized_linear, settings)(
            x, weight, bias
        )
    layout = activation_layout(activation_terms * x.shape[0], weight, implementation)
    activations = quantize_activations(
        x, weight.group_size, terms=activation_terms, layout=layout, implementation=implementation
    )
    if activation_terms == 1:
        return mixed_matmul(activations, weight, bias, out_dtype=out_dtype, implementation=implementation)
    products = mixed_matmul(activations, weight, out_dtype=jnp.float32, implementation=implementation)
    total = products.reshape(activation_terms, x.shape[0], weight.out_features).sum(axis=0)
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(out_dtype)


def prepare_weight(weight: PackedWeight, implementation: str = "auto") -> PackedWeight:
    """The weight with what the kernels of the default device want to have computed beforehand.

    To be called once where a weight is put on the device: on a Hopper GPU, a weight in groups of 128 gets the sums of
    its codes (`packing.with_code_sums`, 3 % of its size), for the kernel that multiplies unsigned bytes, and rows of
    whole 16 bytes (`packing.with_aligned_rows`). Elsewhere, and where another implementation is asked for, it comes
    back as it is. `mixed_matmul` takes either.

    Args:
        weight: Of NumPy or JAX arrays; the sums are of the same kind.
        implementation: That the weight is for: `auto`, or a name from the registry.
    """
    if weight.code_sums8 is not None:
        return weight
    if implementation not in ("auto", "mosaic_gpu") or weight.group_size != unsigned_operands.GROUP_SIZE:
        return weight
    reason = OPERATION.implementations["mosaic_gpu"].refuses(
        _abstract_activations(1, weight), weight, None, out_dtype=jnp.bfloat16
    )
    return packing.with_code_sums(packing.with_aligned_rows(weight)) if reason is None else weight


def activation_layout(tokens: int, weight: PackedWeight, implementation: str = "auto") -> Layout:
    """In which layout to quantise the activations of `mixed_matmul` for this weight.

    Args:
        tokens: Rows of the activations.
        weight: As `mixed_matmul` gets it.
        implementation: As `mixed_matmul` gets it.

    Raises:
        ValueError: Unknown implementation.
        NotImplementedError: The implementation asked for cannot run here.
    """
    if weight.code_sums4 is None:  # which the unsigned layout needs
        return "signed"
    activations = _abstract_activations(tokens, weight)
    name = OPERATION.choose(implementation, activations, weight, None, out_dtype=jnp.dtype(jnp.bfloat16))
    return pallas_mosaic_gpu.activation_layout(tokens, weight) if name == "mosaic_gpu" else "signed"


def _quantizing_config(x: jax.Array, weight: PackedWeight) -> MosaicGpuQuantizeConfig | None:
    """Settings of the kernel that quantises x on its way to the product, None where it cannot or is slower."""
    if x.shape[1] != weight.in_features or x.dtype.name not in OUT_DTYPES:
        return None
    activations = _abstract_activations(x.shape[0], weight)
    reason = pallas_mosaic_gpu.refuses(activations, weight, None, out_dtype=x.dtype)
    return pallas_mosaic_gpu.quantizing_config(x.shape[0], weight) if reason is None else None


def _abstract_activations(tokens: int, weight: PackedWeight) -> QuantizedActivations:
    return QuantizedActivations(
        codes=jax.ShapeDtypeStruct((tokens, weight.in_features), jnp.int8),
        scales=jax.ShapeDtypeStruct((weight.num_groups, tokens), jnp.float32),
        group_size=weight.group_size,
    )


def _validate_output(weight: PackedWeight, bias: jax.Array | None, out_dtype: jax.typing.DTypeLike) -> None:
    if bias is not None and tuple(bias.shape) != (weight.out_features,):
        raise ValueError(f"bias must be [{weight.out_features}], found {list(bias.shape)}")
    if jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be one of {', '.join(OUT_DTYPES)}, found {jnp.dtype(out_dtype).name}")
