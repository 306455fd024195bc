"""Triton kernels of the decode step of attention: flash decoding, split over the cached positions.

Grid (splits, kv_heads, batch). A program holds the query heads of one kv head (grouped-query attention: the cache is
read once for all of them) and walks over its share of the row's cached positions with an online softmax. The share
follows from the row's length at run time, so that the splits are balanced however full the cache is. The new token's
key and value come from the projection, not from the cache, so no program waits for another: split 0 adds them to its
sum and stores them. The partial results of the splits are combined by a second, small kernel, which can quantise its
output for the next linear.

The two halves of a head are separate operands throughout, since the rotary embedding pairs channel i with
i + head_dim / 2: half-size dots need no concatenation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import registry
from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.quantize_activations import pallas_triton as quantize_triton
from pallas_kernels.triton_common import clear_counters, counters_shape
from pallas_kernels.triton_primitives import round_to_int8

_MASKED = -1e30
"""Score of a slot that a query does not see; finite, so that differences of maxima are never NaN."""
_SMALLEST_DOT = 16
"""Least size of any side of a Triton dot."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut (static).

    Attributes:
        splits: Programs among which one row's positions are divided.
        block: Positions that a program reads at a time.
        num_warps: Warps of a program.
        num_stages: Blocks in flight.
    """

    splits: int
    block: int = 64
    num_warps: int = 4
    num_stages: int = 3


_TARGET_PROGRAMS = 264
"""Two programs for each of an H100's 132 multiprocessors: less leaves some idle, more only adds partial results."""


def default_config(batch: int, kv_heads: int, max_length: int) -> Config:
    """Enough splits to fill the device, none smaller than a block of a full row."""
    block = 32 if max_length <= 1024 else 64
    wanted = round(math.log2(max(1.0, _TARGET_PROGRAMS / (batch * kv_heads))))
    return Config(min(1 << wanted, _next_power_of_two(pl.cdiv(max_length, block)), 64), block)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a call."""

    heads_per_kv: int
    kv_heads: int
    head_dim: int
    max_length: int
    window: int | None

    @property
    def rows(self) -> int:
        """Query heads of a program, padded for the dot."""
        return max(_SMALLEST_DOT, _next_power_of_two(self.heads_per_kv))

    @property
    def half(self) -> int:
        """Half a head, padded for the dot."""
        return max(_SMALLEST_DOT, _next_power_of_two(self.head_dim // 2))


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _split_kernel(refs: dict[str, Any], *, shape: _Shape, config: Config, quantized: bool) -> None:
    """One split of one kv head of one row; `refs` as named in `decode_attention`."""
    split, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
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
    maximum = jnp.sum(products, axis=1) * (own * scale) + (1.0 - own) * _MASKED
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
        scores = jnp.where(slot_exists[None, :], scores, _MASKED)
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

    if config.splits == 1:
        out = refs["out"]
        rows = kv_head * shape.heads_per_kv + head[:, None]
        for offset, mixed in ((0, mixed_first), (half_dim, mixed_second)):
            normalised = (mixed / total[:, None]).astype(out.dtype)
            plgpu.store(out.at[row, rows, offset + channel[None, :]], normalised, mask=heads_mask)
        return
    rows = kv_head * shape.heads_per_kv + head
    for offset, mixed in ((0, mixed_first), (half_dim, mixed_second)):
        plgpu.store(refs["partial"].at[row, rows[:, None], split, offset + channel[None, :]], mixed, mask=heads_mask)
    plgpu.store(refs["maxima"].at[row, rows, split], maximum, mask=head_exists)
    plgpu.store(refs["totals"].at[row, rows, split], total, mask=head_exists)


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


def _combine_kernel(
    partial: Any,
    maxima: Any,
    totals: Any,
    out: Any,
    scales: Any = None,
    *counters: Any,
    splits: int,
    group: int,
    groups: int,
) -> None:
    """Weighs the splits by their share of the softmax; grid (channels / (group * groups), batch).

    A program makes `groups` groups of `group` output channels: with `scales`, they are quantised to int8 on the way
    out, each with a scale of its own.
    """
    first, row = pl.program_id(0) * groups, pl.program_id(1)
    clear_counters(counters, (first == 0) & (row == 0))
    head_dim = partial.shape[-1]
    index = jnp.arange(_next_power_of_two(groups))
    member = jnp.arange(_next_power_of_two(group))
    exists = (index < groups)[:, None] & (member < group)[None, :]
    channel = (first + index)[:, None] * group + member[None, :]
    head, split = (channel // head_dim)[None], jnp.arange(splits)[:, None, None]
    mask = exists[None] & (split >= 0)
    maximum = plgpu.load(maxima.at[row, head, split], mask=mask, other=_MASKED)
    share = jnp.exp2(maximum - jnp.max(maximum, axis=0)[None])
    total = jnp.sum(share * plgpu.load(totals.at[row, head, split], mask=mask, other=1.0), axis=0)
    mixed = plgpu.load(partial.at[row, head, split, (channel % head_dim)[None]], mask=mask, other=0.0)
    combined = jnp.sum(mixed * share, axis=0) / total
    if scales is not None:
        scale = jnp.max(jnp.abs(combined), axis=1) / 127.0
        inverse = jnp.where(scale > 0, 1.0 / scale, 0.0)
        combined = round_to_int8(combined * inverse[:, None])
        plgpu.store(scales.at[first + index, row], scale, mask=index < groups)
    plgpu.store(out.at[row, channel], combined.astype(out.dtype), mask=exists)


def _combine(
    partial: jax.Array,
    maxima: jax.Array,
    totals: jax.Array,
    dtype: jax.typing.DTypeLike,
    group_size: int | None,
    interpret: bool,
) -> jax.Array | QuantizedActivations:
    batch, heads, splits, head_dim = partial.shape
    channels = heads * head_dim
    group = group_size or head_dim
    # A program loads whole heads where groups are smaller than one.
    groups = max(1, head_dim // group)
    out = jax.ShapeDtypeStruct((batch, channels), jnp.int8 if group_size else dtype)
    scales = jax.ShapeDtypeStruct((channels // group, batch), jnp.float32)

    results = pl.pallas_call(
        functools.partial(_combine_kernel, splits=splits, group=group, groups=groups),
        out_shape=(out, scales, *counters_shape(batch)) if group_size else (out,),
        grid=(channels // (group * groups), batch),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="decode_attention_combine",
    )(partial, maxima, totals)
    if not group_size:
        return results[0]
    codes, activation_scales, *counters = results
    return QuantizedActivations(codes, activation_scales, group_size, *counters)


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
    config = config or default_config(batch, kv_heads, max_length)
    shape = _Shape(heads // kv_heads, kv_heads, head_dim, max_length, window)

    caches = {"keys": cache.keys, "values": cache.values}
    if cache.quantized:
        caches |= {"key_scales": cache.key_scales, "value_scales": cache.value_scales}
    inputs = {"qkv": qkv, "cos": cos, "sin": sin, "positions": positions} | caches
    outputs = {f"new_{name}": jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in caches.items()}
    if config.splits == 1:
        outputs["out"] = jax.ShapeDtypeStruct((batch, heads, head_dim), qkv.dtype)
    else:
        outputs["partial"] = jax.ShapeDtypeStruct((batch, heads, config.splits, head_dim), jnp.float32)
        outputs["maxima"] = jax.ShapeDtypeStruct((batch, heads, config.splits), jnp.float32)
        outputs["totals"] = jax.ShapeDtypeStruct((batch, heads, config.splits), jnp.float32)

    names = [*inputs, *outputs]

    def kernel(*refs: Any) -> None:
        _split_kernel(dict(zip(names, refs, strict=True)), shape=shape, config=config, quantized=cache.quantized)

    first_cache = len(inputs) - len(caches)
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
    if config.splits == 1:
        mixed = named["out"].reshape(batch, heads * head_dim)
        if quantize_group_size is None:
            return mixed, new_cache
        return quantize_triton.quantize_activations(mixed, group_size=quantize_group_size), new_cache
    partial = named["partial"], named["maxima"], named["totals"]
    return _combine(*partial, qkv.dtype, quantize_group_size, interpret), new_cache


def refuses(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array, cache: LayerCache, **settings: Any
) -> str | None:
    """Why the kernels cannot run these arguments here, or None."""
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
