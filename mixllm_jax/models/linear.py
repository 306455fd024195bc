"""The one linear layer: float weights, or packed mixed-precision weights with int8 or float activations."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import QuantizedActivations, activation_layout, mixed_matmul, prepare_weight, quantized_linear
from pallas_kernels.activations import Layout
from pallas_kernels.packing import PackedWeight, dequantize


class Linear(nnx.Module):
    """y = x W^T + b.

    Attributes:
        weight: nnx.Param holding a float array `[out_features, in_features]` or a `PackedWeight`.
        bias: nnx.Param holding a float array `[out_features]`, or None.
        dtype: Compute dtype; also the dtype of the result where the input is `QuantizedActivations`.
        activation_bits: For packed weights: 8 runs the integer arithmetic of the format; 16 de-quantises the weights
            and leaves the activations as they are (for comparison rows such as W4A16, not for speed).
        activation_terms: Int8 terms whose sum stands for the activations, with 8 `activation_bits`: 2 are as good as
            16 bits and cost twice the tokens in the product. The layer then takes float activations alone.
        implementation: Which implementation of the operations in `pallas_kernels` to use.
    """

    def __init__(
        self,
        weight: Float[Array, "out_features in_features"] | PackedWeight,
        bias: Float[Array, " out_features"] | None = None,
        *,
        dtype: DTypeLike,
        activation_bits: Literal[8, 16] = 8,
        activation_terms: Literal[1, 2] = 1,
        implementation: str = "auto",
    ) -> None:
        if activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, found {activation_bits}")
        if activation_terms not in (1, 2):
            raise ValueError(f"activation_terms must be 1 or 2, found {activation_terms}")
        if isinstance(weight, PackedWeight):
            prepared = prepare_weight(weight, implementation) if activation_bits == 8 else weight
            self.weight = nnx.Param(jax.tree.map(jnp.asarray, prepared))
        else:
            self.weight = nnx.Param(jnp.asarray(weight, dtype))
        self.bias = None if bias is None else nnx.Param(jnp.asarray(bias, dtype))
        self.dtype = jnp.dtype(dtype)
        self.activation_bits = activation_bits
        self.activation_terms = activation_terms
        self.implementation = implementation

    @property
    def group_size(self) -> int | None:
        """Group size of the int8 activations this layer accepts, None where it needs float activations."""
        weight = self.weight.get_value()
        takes_codes = isinstance(weight, PackedWeight) and self.activation_bits == 8 and self.activation_terms == 1
        return weight.group_size if takes_codes else None

    def activation_layout(self, tokens: int) -> Layout:
        """In which layout `tokens` rows of quantised activations should come: any other costs a pass over them."""
        weight = self.weight.get_value()
        if not isinstance(weight, PackedWeight):
            raise ValueError("this layer's weights are float: it takes no QuantizedActivations")
        return activation_layout(tokens, weight, self.implementation)

    def __call__(
        self, x: Float[Array, "*batch in_features"] | QuantizedActivations, *, out_dtype: DTypeLike | None = None
    ) -> Array:
        """Applies the layer.

        Args:
            x: Float `[..., in_features]`, or, where `group_size` is not None, activations quantised with that group
                size, which stand for a `[tokens, in_features]` array.
            out_dtype: Dtype of the result; by default that of a float `x`, or `dtype`.

        Returns:
            `[..., out_features]`, or `[tokens, out_features]` of quantised activations.

        Raises:
            ValueError: Quantised activations were handed to a layer that cannot take them.
        """
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        if isinstance(x, QuantizedActivations):
            if not isinstance(weight, PackedWeight) or self.group_size is None:
                raise ValueError("this layer's weights or activations are float: it takes no QuantizedActivations")
            out_dtype = out_dtype or self.dtype
            return mixed_matmul(x, weight, bias, out_dtype=out_dtype, implementation=self.implementation)
        out_dtype = out_dtype or x.dtype
        if isinstance(weight, PackedWeight):
            if self.activation_bits == 8:
                y = quantized_linear(
                    x.reshape(-1, x.shape[-1]),
                    weight,
                    bias,
                    out_dtype=out_dtype,
                    activation_terms=self.activation_terms,
                    implementation=self.implementation,
                )
                return y.reshape(*x.shape[:-1], y.shape[-1])
            weight = dequantize(weight)
        contracted = (((x.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, weight.astype(x.dtype), contracted, preferred_element_type=out_dtype)
        return y if bias is None else y + bias.astype(y.dtype)
