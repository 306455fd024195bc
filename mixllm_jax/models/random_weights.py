"""Models with random weights, built directly on the device in their final form: for benchmarks and tests.

A quantised model is never there in float: codes and scales are drawn at random. The scales keep the activations near
unit variance, so that nothing overflows however many layers there are.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mixllm_jax.errors import OptionError
from mixllm_jax.models.common_shapes import for_default_device
from mixllm_jax.models.config import LINEAR_NAMES, LINEAR_PATHS, ModelConfig
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.eight_bit_table import choose_bits
from mixllm_jax.models.parameters import Execution
from mixllm_jax.models.random_allocation import Channels, RandomAllocation, realistic_channels, uniform_channels
from pallas_kernels.packing import GROUP_SIZES, PackedWeight

_STD_OF_4_BIT_CODES = 4.6
"""Standard deviation of a uniform code 0..15."""
_STD_OF_8_BIT_CODES = 73.3
"""Standard deviation of a uniform code -127..127."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the weights of a random model are stored (static).

    Attributes:
        eight_bit_share: Share of 8-bit output channels, of every linear where it is uniform; None for float weights.
        group_size: Input channels that share a scale; None for the largest that fits the model.
        lm_head_bits: 8 for an output head with 8-bit weights and two int8 terms of activations, 16 for a float one.
        embedding_bits: 8 for an 8-bit embedding, 16 for a float one.
        allocation: Where the 8-bit channels are; `realistic` ones are an `eight_bit_share` of the whole model.
    """

    eight_bit_share: float | None
    group_size: int | None = None
    lm_head_bits: Literal[8, 16] = 16
    embedding_bits: Literal[8, 16] = 16
    allocation: RandomAllocation = "uniform"

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        tied: bool = False,
        lm_head_bits: int | None = None,
        embedding_bits: int | None = None,
        allocation: RandomAllocation = "uniform",
    ) -> "WeightFormat":
        """`bf16`, or `W4A8`, `W4.4A8`, ..., `W8A8`.

        Args:
            name: Of the scheme.
            tied: The model's embedding is its output head as well (matters where one of the bits is given).
            lm_head_bits: Of the output head; None for what loading a model in this scheme would take.
            embedding_bits: Likewise, of the embedding.
            allocation: Where the 8-bit channels are.

        Raises:
            OptionError: Another name, or bits that are not possible.
        """
        share: float | None = None
        if name.lower() not in ("bf16", "float"):
            try:
                weight_bits, activation_bits = name.upper().removeprefix("W").split("A")
                share = (float(weight_bits) - 4) / 4
            except ValueError:
                share, activation_bits = -1.0, ""
            if not 0 <= share <= 1 or activation_bits != "8":
                raise OptionError(f"unknown scheme {name!r}: expected bf16, or W4A8 to W8A8 such as W4.4A8")
        tables = choose_bits(lm_head_bits, embedding_bits, quantized=share is not None, tied=tied)
        return cls(share, lm_head_bits=tables.lm_head, embedding_bits=tables.embedding, allocation=allocation)


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
    names = {f"{path}.weight": name for name, path in LINEAR_PATHS.items()}
    bits = {"lm_head.weight": weights.lm_head_bits, "embed.weight": weights.embedding_bits}

    def linear(part: str, path: str, out_features: int) -> Channels:
        if weights.allocation == "uniform":
            return uniform_channels(out_features, weights.eight_bit_share or 0.0)
        layers = realistic_channels(config, weights.eight_bit_share or 0.0)
        return layers[config.part_names().index(part) - 1][names[path]]

    def read(part: str) -> dict[str, Any]:
        first = (seed * 1000 + config.part_names().index(part)) * 16
        seeds = (np.uint32(number % 2**32) for number in itertools.count(first))
        arrays: dict[str, Any] = {}
        for path, shape in config.part_shapes(part).items():
            if path in names and weights.eight_bit_share is not None:
                packed = _packed(next(seeds), linear(part, path, shape[0]), shape[1], group_size)
                # Layers that differ are loaded in a few shapes; uniform ones are measured as they are asked for.
                arrays[path] = packed if weights.allocation == "uniform" else for_default_device(packed)
            elif len(shape) == 1:
                arrays[path] = jnp.zeros(shape) if path.endswith("bias") else jnp.ones(shape)
            elif bits.get(path, 16) == 8:
                arrays[path] = _packed(next(seeds), ((shape[0], shape[0]),), shape[1], group_size)
            else:
                arrays[path] = random_array(next(seeds), shape, 1 / math.sqrt(shape[1]), jnp.dtype(dtype))
        return arrays

    execution = Execution(
        dtype=dtype,
        implementation=implementation,
        lm_head_bits=weights.lm_head_bits,
        embedding_bits=weights.embedding_bits,
    )
    return Decoder.from_parameters(config, read, execution)


def _random_bits(seed: jax.Array, stream: int, shape: tuple[int, ...]) -> jax.Array:
    """uint32 from an integer hash of each element's index.

    Elementwise, so that XLA fuses it into whatever reads it and no memory beyond the result is needed: JAX's generators
    would need several times the size of the largest weight.
    """
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = (index * jnp.uint32(0x9E3779B1)) ^ (seed + jnp.uint32(stream * 0x85EBCA6B % 2**32))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_array(seed: jax.Array, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    """Uniform values with standard deviation `scale`; `seed` is a uint32 scalar."""
    unit = _random_bits(seed, 0, shape).astype(jnp.float32) * 2.0**-32 - 0.5
    return (unit * (scale * math.sqrt(12))).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _packed(seed: jax.Array, channels: Channels, in_features: int, group_size: int) -> PackedWeight:
    """Random codes; of each part of the channels, as many as it says have 8 bits, chosen at random."""
    sizes, eight_bit = zip(*channels, strict=True)
    out_features, n8 = sum(sizes), sum(eight_bit)
    n4, groups = out_features - n8, in_features // group_size
    gain = 1 / math.sqrt(in_features)
    # The smallest of a part's random numbers are its 8-bit channels; a stable sort keeps each kind ascending.
    numbers = jnp.split(_random_bits(seed, 1, (out_features,)), list(itertools.accumulate(sizes))[:-1])
    ranks = [jnp.argsort(jnp.argsort(part, stable=True), stable=True) for part in numbers]
    has_eight_bits = jnp.concatenate([rank < count for rank, count in zip(ranks, eight_bit, strict=True)])
    codes8 = _random_bits(seed, 2, (groups, n8, group_size)) % 255
    return PackedWeight(
        codes4=_random_bits(seed, 3, (groups, n4, group_size // 2)).astype(jnp.uint8),
        scales4=jnp.full((groups, n4), gain / _STD_OF_4_BIT_CODES, jnp.float16),
        zero_points4=(7 + _random_bits(seed, 4, (groups, n4)) % 2).astype(jnp.uint8),
        codes8=(codes8.astype(jnp.int32) - 127).astype(jnp.int8),
        scales8=jnp.full((groups, n8), gain / _STD_OF_8_BIT_CODES, jnp.float16),
        channel_order=jnp.argsort(has_eight_bits, stable=True).astype(jnp.int32),
        group_size=group_size,
    )
