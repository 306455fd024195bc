"""Triton kernel of the decode step of attention: flash decoding, split over the cached positions.

Grid (splits, kv_heads, batch). A program holds the query heads of one kv head (grouped-query attention: the cache is
read once for all of them) and walks over its share of the row's cached positions with an online softmax. The share
follows from the row's length at run time, so that the splits are balanced however full the cache is. The new token's
key and value come from the projection, not from the cache, so no program waits for another: split 0 adds them to its
sum and stores them.

The programs of a row and kv head count themselves as they finish, and the last one combines the partial results of
all: at batch 1, a second kernel for that would take nearly as long as the first. The result can be quantised for the
next linear on the way out.

The two halves of a head are separate operands throughout, since the rotary embedding pairs channel i with
i + head_dim / 2: half-size dots need no concatenation.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import registry
from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.decode_attention.config import Config, default_config
from pallas_kernels.decode_attention.triton_output import NOTHING, Output, Shape
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.quantize_activations import pallas_triton as quantize_triton
from pallas_kernels.triton_common import clear_counters, counters_shape
from pallas_kernels.triton_primitives import round_to_int8


def _kernel(refs: dict[str, Any], *, shape: Shape, config: Config, quantized: bool, group_size: int | None) -> None:
    """One split of one kv head of one row; `refs` as named in `decode_attention`."""
    split, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if "counters" in refs:
        clear_counters([refs["counters"]], (split == 0) & (kv_head == 0) & (row == 0))
    head_dim, half_dim = shape.head_dim, shape.head_dim // 2
    qkv = refs["qkv"]
    dtype = qkv.dtype
    query_heads = shape.heads_per_kv * shape.kv_heads

    head = jnp.arange(shape.rows)
    channel = jnp.arange(shape.half)
    head_exists = head < shape.heads_per_kv
    channel_exists = channel < half_dim
    heads_mask = head_exists[:, None] & channel_exists[None, :]

    position = refs["positions"][row]
    cos = plgpu.load(refs["cos"].at[row, channel], mask=channel_exists, other=0.0)
    sin = plgpu.load(refs["sin"].at[row, channel], mask=channel_exists, other=0.0)

    def rotated(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)

    def queries_of(offset: int) -> jax.Array:
        rows = kv_head * shape.heads_per_kv + head[:, None]
        return plgpu.load(qkv.at[row, rows, offset + channel[None, :]], mask=heads_mask, other=0.0)

    def new_of(index: jax.Array, offset: int) -> jax.Array:
        return plgpu.load(qkv.at[row, index, offset + channel], mask=channel_exists, other=0.0)

    query_first, query_second = rotated(queries_of(0), queries_of(half_dim))
    new_key = rotated(new_of(query_heads + kv_head, 0), new_of(query_heads + kv_head, half_dim))
    new_value = (
        new_of(query_heads + shape.kv_heads + kv_head, 0),
        new_of(query_heads + shape.kv_heads + kv_head, half_dim),
    )

    store = (split == 0) & (position < shape.max_length)
    key_first, key_second = _store_new(refs, "key", new_key, row, position, kv_head, channel, store)
    value_first, value_second = _store_new(refs, "value", new_value, row, position, kv_head, channel, store)

    # exp2 is the hardware's exponential: the scores carry the factor log2(e).
    scale = math.log2(math.e) / math.sqrt(head_dim)
    products = query_first.astype(jnp.float32) * key_first + query_second.astype(jnp.float32) * key_second
    own = (split == 0).astype(jnp.float32)
    maximum = jnp.sum(products, axis=1) * (own * scale) + (1.0 - own) * NOTHING
    total = jnp.full((shape.rows,), 0.0, jnp.float32) + own
    share = jnp.full((shape.rows, 1), 0.0, jnp.float32) + own
    mixed_first, mixed_second = share * value_first[None, :], share * value_second[None, :]

    end = jnp.minimum(position, shape.max_length)
    begin = jnp.int32(0) if shape.window is None else jnp.maximum(position - shape.window + 1, 0)
    blocks = pl.cdiv(pl.cdiv(jnp.maximum(end - begin, 0), config.block), config.splits)
    lower = begin + split * blocks * config.block
    upper = jnp.minimum(lower + blocks * config.block, end)

    def dot(left: jax.Array, right: jax.Array, contract: int) -> jax.Array:
        return jax.lax.dot_general(
            left,
            right,
            (((1,), (contract,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    def add_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, mixed_first, mixed_second = carry
        slot = lower + index * config.block + jnp.arange(config.block)
        slot_exists = slot < upper
        mask = slot_exists[:, None] & channel_exists[None, :]

        def cached(name: str, offset: int) -> jax.Array:
            codes = plgpu.load(
                refs[name].at[row, slot[:, None], kv_head, offset + channel[None, :]], mask=mask, other=0
            )
            return codes.astype(dtype)

        scores = dot(query_first, cached("keys", 0), contract=1)
        scores += dot(query_second, cached("keys", half_dim), contract=1)
        if quantized:
            key_scale = plgpu.load(refs["key_scales"].at[row, kv_head, slot], mask=slot_exists, other=0.0)
            scores *= (key_scale * scale)[None, :]
        else:
            scores *= scale
        scores = jnp.where(slot_exists[None, :], scores, NOTHING)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_maximum[:, None])
        rescale = jnp.exp2(maximum - new_maximum)
        total = total * rescale + jnp.sum(weights, axis=1)
        if quantized:
            value_scale = plgpu.load(refs["value_scales"].at[row, kv_head, slot], mask=slot_exists, other=0.0)
            weights *= value_scale[None, :]
        weights = weights.astype(dtype)
        mixed_first = mixed_first * rescale[:, None] + dot(weights, cached("values", 0), contract=0)
        mixed_second = mixed_second * rescale[:, None] + dot(weights, cached("values", half_dim), contract=0)
        return new_maximum, total, mixed_first, mixed_second

    steps = pl.cdiv(jnp.maximum(upper - lower, 0), config.block)
    maximum, total, mixed_first, mixed_second = jax.lax.fori_loop(
        0, steps, add_block, (maximum, total, mixed_first, mixed_second)
    )

    output = Output(refs, row, kv_head, shape, group_size)
    if config.splits == 1:
        output.store([mixed_first / total[:, None], mixed_second / total[:, None]])
    else:
        output.combine(split, config.splits, [mixed_first, mixed_second], maximum, total)


def _store_new(
    refs: dict[str, Any],
    name: str,
    halves: tuple[jax.Array, jax.Array],
    row: jax.Array,
    position: jax.Array,
    kv_head: jax.Array,
    channel: jax.Array,
    store: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Stores the new key or value where `store` says so; returns it in float32 as a later step will read it."""
    out = refs[f"new_{name}s"]
    half_dim = out.shape[-1] // 2
    mask = store & (channel < half_dim)
    first, second = (half.astype(jnp.float32) for half in halves)
    if f"new_{name}_scales" in refs:
        absmax = jnp.maximum(jnp.max(jnp.abs(first)), jnp.max(jnp.abs(second)))
        scale = absmax / 127.0
        inverse = jnp.where(scale > 0, 1.0 / scale, 0.0)
        first, second = (round_to_int8(half * inverse).astype(jnp.float32) for half in (first, second))
        plgpu.store(refs[f"new_{name}_scales"].at[row, kv_head, position], scale, mask=store)
    for offset, half in ((0, first), (half_dim, second)):
        plgpu.store(out.at[row, position, kv_head, offset + channel], half.astype(out.dtype), mask=mask)
    if f"new_{name}_scales" in refs:
        return first * scale, second * scale
    return first, second


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    *,
    window: int | None,
    quantize_group_size: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array | QuantizedActivations, LayerCache]:
    """See `pallas_kernels.decode_attention.api`; `config` and `interpret` are for tuning and tests."""
    batch, channels, head_dim = qkv.shape
    _, max_length, kv_heads, _ = cache.keys.shape
    heads = channels - 2 * kv_heads
    shape = Shape(heads // kv_heads, kv_heads, head_dim, max_length, window)
    position_bytes = 4 * shape.half * jnp.dtype(cache.keys.dtype).itemsize
    config = config or default_config(batch, kv_heads, max_length, position_bytes)

    fused_group_size = quantize_group_size if quantize_group_size and shape.quantizes(quantize_group_size) else None

    caches = {"keys": cache.keys, "values": cache.values}
    if cache.quantized:
        caches |= {"key_scales": cache.key_scales, "value_scales": cache.value_scales}
    inputs = {"qkv": qkv, "cos": cos, "sin": sin, "positions": positions} | caches
    outputs = {f"new_{name}": jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in caches.items()}
    outputs["out"] = jax.ShapeDtypeStruct((batch, heads * head_dim), jnp.int8 if fused_group_size else qkv.dtype)
    if fused_group_size:
        outputs["scales"] = jax.ShapeDtypeStruct((heads * head_dim // fused_group_size, batch), jnp.float32)
        if counters := counters_shape(batch):
            [outputs["counters"]] = counters
    first_cache = len(inputs) - len(caches)
    if config.splits > 1:
        # Every call leaves the zeros as it found them, so that all layers of a step share them, and no launch clears
        # some for each.
        inputs["finished"] = jnp.zeros((batch, kv_heads), jnp.int32)
        outputs["partial"] = jax.ShapeDtypeStruct((batch, heads, config.splits, head_dim), jnp.float32)
        outputs["log_totals"] = jax.ShapeDtypeStruct((batch, heads, config.splits), jnp.float32)
    names = [*inputs, *outputs]

    def kernel(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        _kernel(named, shape=shape, config=config, quantized=cache.quantized, group_size=fused_group_size)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(outputs.values()),
        grid=(config.splits, kv_heads, batch),
        input_output_aliases={first_cache + index: index for index in range(len(caches))},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(*inputs.values())
    named = dict(zip(outputs, results, strict=True))
    new_cache = LayerCache(**{name: named[f"new_{name}"] for name in caches})
    out = named["out"]
    if fused_group_size:
        return QuantizedActivations(out, named["scales"], fused_group_size, named.get("counters")), new_cache
    if quantize_group_size:
        quantize = functools.partial(quantize_triton.quantize_activations, interpret=interpret)
        return quantize(out, group_size=quantize_group_size), new_cache
    return out, new_cache


def refuses(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array, cache: LayerCache, **settings: Any
) -> str | None:
    """Why the kernel cannot run these arguments here, or None."""
    if registry.default_platform() != "gpu":
        return f"it needs an NVIDIA GPU; the default device is a {registry.default_platform()}"
    capability = registry.compute_capability()
    if capability is None or capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if qkv.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {qkv.dtype}"
    if qkv.shape[2] > 256:
        return f"heads of {qkv.shape[2]} channels do not fit into registers; up to 256 do"
    return None
