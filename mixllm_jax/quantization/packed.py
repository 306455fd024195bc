"""From the quantiser's channel-major codes to the packed weight of the checkpoint and of the kernels."""

import jax.numpy as jnp
import numpy as np

from mixllm_jax.quantization.rounding import QuantizedWeight
from pallas_kernels.packing import PackedWeight, pack


def pack_weight(weight: QuantizedWeight) -> PackedWeight:
    """The packed weight (NumPy arrays), rows ascending in output channel within each bit width.

    Raises:
        ValueError: a 4-bit code that is not 0..15 with its zero point.
    """
    codes, scales, zero_points, eight_bit = (np.asarray(part) for part in weight)
    group_size = codes.shape[1] // scales.shape[1]
    rows4, rows8 = np.flatnonzero(~eight_bit), np.flatnonzero(eight_bit)
    stored4 = codes[rows4] + np.repeat(zero_points[rows4], group_size, axis=1).astype(np.int8)
    if stored4.size and not (stored4.min() >= 0 and stored4.max() <= 15):
        raise ValueError(f"4-bit codes with their zero point must be 0..15, found {stored4.min()}..{stored4.max()}")
    return pack(
        stored4.astype(np.uint8),
        scales[rows4],
        zero_points[rows4],
        codes[rows8],
        scales[rows8],
        np.concatenate([rows4, rows8]),
        group_size=group_size,
    )


def pack_for_calibration(weight: QuantizedWeight) -> PackedWeight:
    """The same linear map with the same arithmetic, all channels in the 8-bit form and in natural order.

    A centred 4-bit code (-15..15) is a valid 8-bit code, and both forms do the same integer dot and the same scaling,
    so the outputs are equal bit for bit. But the shapes no longer depend on how many channels got 8 bits: while
    calibrating, one compilation serves the same linear of all blocks.
    """
    out_features, in_features = weight.codes.shape
    num_groups = weight.scales.shape[1]
    return pack(
        jnp.zeros((0, in_features), jnp.uint8),
        jnp.zeros((0, num_groups), jnp.float16),
        jnp.zeros((0, num_groups), jnp.uint8),
        weight.codes,
        weight.scales,
        jnp.arange(out_features),
        group_size=in_features // num_groups,
    )
