"""`decode_attention`: checks its arguments and picks an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.decode_attention import pallas_triton, xla
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.registry import Implementation, Operation, never_refuses

OPERATION = Operation(
    name="decode_attention",
    implementations={
        "xla": Implementation(xla.decode_attention, never_refuses),
        "triton": Implementation(pallas_triton.decode_attention, pallas_triton.refuses),
    },
    prefer=lambda *args, **kwargs: ("triton",),
)


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    *,
    window: int | None = None,
    quantize_group_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array | QuantizedActivations, LayerCache]:
    """Attention of one new token a row, from the output of the qkv projection to the input of the output projection.

    The queries and keys are rotated, the key and value are stored at the row's position, and the token attends to slots
    `max(0, position - window + 1) .. position` of its row. On the GPU the cache is updated in place where the caller
    has given it up (donation).

    Args:
        qkv: Float `[batch, heads + 2 * kv_heads, head_dim]`: queries, keys, values.
        cos: float32 `[batch, head_dim / 2]`, the rotation of each row's position.
        sin: Like `cos`.
        positions: int32 `[batch]`, where each row's token goes. A row that is full already (`max_length` or beyond)
            stores nothing, and its result means nothing.
        cache: What came before.
        window: Sliding window in positions, None for everything before.
        quantize_group_size: Quantise the result in groups of this many channels, for a linear with int8 activations.
        implementation: `auto`, or a name from the registry.

    Returns:
        `[batch, heads * head_dim]` in the dtype of `qkv`, or quantised, and the cache with the new key and value.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or an unknown implementation.
        NotImplementedError: The implementation asked for cannot run here, or a gradient is asked for.
    """
    batch, channels, head_dim = qkv.shape
    cache_batch, _, kv_heads, cache_head_dim = cache.keys.shape
    heads = channels - 2 * kv_heads
    if (cache_batch, cache_head_dim) != (batch, head_dim) or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"qkv {list(qkv.shape)} does not fit a cache of {list(cache.keys.shape)}: expected [batch, heads + 2 * "
            "kv_heads, head_dim] with heads a multiple of kv_heads"
        )
    if cos.shape != (batch, head_dim // 2) or sin.shape != cos.shape or positions.shape != (batch,):
        raise ValueError(
            f"cos and sin must be [{batch}, {head_dim // 2}] and positions [{batch}], found {list(cos.shape)}, "
            f"{list(sin.shape)} and {list(positions.shape)}"
        )
    if not jnp.issubdtype(qkv.dtype, jnp.floating):
        raise ValueError(f"qkv must be float, found {qkv.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    if quantize_group_size is not None and (heads * head_dim) % quantize_group_size:
        raise ValueError(f"{heads * head_dim} channels are not a multiple of the group size {quantize_group_size}")
    mixed, cache = OPERATION(
        implementation, qkv, cos, sin, positions, cache, window=window, quantize_group_size=quantize_group_size
    )
    return mixed, cache
