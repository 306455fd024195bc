"""Models with random weights, built directly on the device in their final form: for benchmarks and tests.

A quantised model is never there in float: codes and scales are drawn at random. The scales keep the activations near
unit variance, so that nothing overflows however many layers there are.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixllm_jax.errors import OptionError
from mixllm_jax.models.config import LINEAR_NAMES, LINEAR_PATHS, ModelConfig
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.parameters import Execution
from pallas_kernels.packing import GROUP_SIZES, PackedWeight

_STD_OF_4_BIT_CODES = 4.6
"""Standard deviation of a uniform code 0..15."""
_STD_OF_8_BIT_CODES = 73.3
"""Standard deviation of a uniform code -127..127."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the weights of a random model are stored (static).

    Attributes:
        eight_bit_share: Share of 8-bit output channels of every linear; None for float weights.
        group_size: Input channels that share a scale; None for the largest that fits the model.
        lm_head_bits: 8 for an output head with 8-bit weights and activations, 16 for a float one.
    """

    eight_bit_share: float | None
    group_size: int | None = None
    lm_head_bits: int = 16

    @classmethod
    def from_name(cls, name: str, *, lm_head_bits: int = 16) -> "WeightFormat":
        """`bf16`, or `W4A8`, `W4.4A8`, ..., `W8A8`.

        Raises:
            OptionError: Another name.
        """
        if name.lower() in ("bf16", "float"):
            return cls(None, lm_head_bits=16)
        try:
            weight_bits, activation_bits = name.upper().removeprefix("W").split("A")
            share = (float(weight_bits) - 4) / 4
        except ValueError:
            share, activation_bits = -1.0, ""
        if not 0 <= share <= 1 or activation_bits != "8":
            raise OptionError(f"unknown scheme {name!r}: expected bf16, or W4A8 to W8A8 such as W4.4A8")
        return cls(share, lm_head_bits=lm_head_bits)


def fitting_group_size(config: ModelConfig) -> int:
    """The largest group size that divides the inputs of every linear.

    Raises:
        OptionError: None does.
    """
    inputs = [config.linear_shape(name)[1] for name in LINEAR_NAMES]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if not any(features % group_size for features in inputs):
            return group_size
    raise OptionError(f"no group size of {GROUP_SIZES} divides the input channels {sorted(set(inputs))}")


def random_decoder(
    config: ModelConfig,
    weights: WeightFormat,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str = "auto",
    seed: int = 0,
) -> Decoder:
    """A model with random weights on the default device.

    Args:
        config: Its shapes.
        weights: How its linears are stored.
        dtype: Compute dtype, also that of float weights.
        implementation: Of the quantised operations.
        seed: The same seed gives the same weights.

    Raises:
        OptionError: No group size fits.
    """
    group_size = weights.group_size or fitting_group_size(config)
    root = jax.random.key(seed)

    def read(part: str) -> dict[str, Any]:
        keys = iter(jax.random.split(jax.random.fold_in(root, config.part_names().index(part)), 16))
        arrays: dict[str, Any] = {}
        quantized = (
            {f"{path}.weight" for path in LINEAR_PATHS.values()} if weights.eight_bit_share is not None else set()
        )
        for path, shape in config.part_shapes(part).items():
            if path in quantized:
                share = weights.eight_bit_share or 0.0
                arrays[path] = _packed(next(keys), *shape, round(share * shape[0]), group_size)
            elif len(shape) == 1:
                arrays[path] = jnp.zeros(shape) if path.endswith("bias") else jnp.ones(shape)
            elif path != "lm_head.weight" or weights.lm_head_bits == 16:
                arrays[path] = _normal(next(keys), shape, 1 / math.sqrt(shape[1]), jnp.dtype(dtype))
        if part == "final" and weights.lm_head_bits == 8:
            vocab, hidden = config.vocab_size, config.hidden_size
            arrays["lm_head.weight"] = _packed(next(keys), vocab, hidden, vocab, group_size)
        return arrays

    return Decoder.from_parameters(config, read, Execution(dtype=dtype, implementation=implementation))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _packed(key: jax.Array, out_features: int, in_features: int, n8: int, group_size: int) -> PackedWeight:
    """Random codes; `n8` channels chosen at random have 8 bits."""
    n4, groups = out_features - n8, in_features // group_size
    key4, zero_key, key8, order_key = jax.random.split(key, 4)
    gain = 1 / math.sqrt(in_features)
    # The low ranks of a random permutation are the 8-bit channels; a stable sort keeps each kind ascending.
    eight_bit = jax.random.permutation(order_key, out_features) < n8
    codes8 = jax.random.bits(key8, (groups, n8, group_size), jnp.uint8)
    return PackedWeight(
        codes4=jax.random.bits(key4, (groups, n4, group_size // 2), jnp.uint8),
        scales4=jnp.full((groups, n4), gain / _STD_OF_4_BIT_CODES, jnp.float16),
        zero_points4=7 + jax.random.bits(zero_key, (groups, n4), jnp.uint8) % jnp.uint8(2),
        codes8=jnp.maximum(jax.lax.bitcast_convert_type(codes8, jnp.int8), jnp.int8(-127)),
        scales8=jnp.full((groups, n8), gain / _STD_OF_8_BIT_CODES, jnp.float16),
        channel_order=jnp.argsort(eight_bit, stable=True).astype(jnp.int32),
        group_size=group_size,
    )
