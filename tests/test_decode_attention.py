"""The decode step of attention against float64 NumPy: every implementation, float and int8 caches."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedActivations, decode_attention
from pallas_kernels.decode_attention import pallas_triton, xla
from pallas_kernels.kv_cache import LayerCache, dequantize_heads, quantize_heads

pytestmark = pytest.mark.quick_compile

POISON = 3.0e4
"""Fills the slots that nobody may read, and the slots that nobody may overwrite."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: head layout, cache size and each row's position."""

    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    positions: tuple[int, ...]
    window: int | None = None

    def __str__(self) -> str:
        window = f"-window{self.window}" if self.window else ""
        return f"{self.heads}over{self.kv_heads}x{self.head_dim}-max{self.max_length}{window}"


CASES = [
    Case(4, 2, 16, 40, (0, 7, 39)),
    Case(9, 3, 24, 37, (1, 36), window=5),
    Case(3, 3, 64, 33, (32, 16)),
    Case(8, 1, 10, 50, (49, 17, 3), window=64),
]


def make_inputs(
    case: Case, dtype: jnp.dtype, cache_dtype: jnp.dtype, seed: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, LayerCache]:
    generator = np.random.default_rng(seed)
    batch = len(case.positions)
    qkv = generator.standard_normal((batch, case.heads + 2 * case.kv_heads, case.head_dim))
    angles = generator.uniform(-3, 3, (batch, case.head_dim // 2))
    stored = generator.standard_normal((2, batch, case.max_length, case.kv_heads, case.head_dim))
    cache = LayerCache.zeros(batch, case.max_length, case.kv_heads, case.head_dim, cache_dtype)
    slots = jnp.broadcast_to(jnp.arange(case.max_length), (batch, case.max_length))
    cache = cache.write(slots, jnp.asarray(stored[0], jnp.float32), jnp.asarray(stored[1], jnp.float32))
    unused = np.arange(case.max_length)[None, :] >= np.asarray(case.positions)[:, None]
    if case.window is not None:
        unused |= np.arange(case.max_length)[None, :] <= np.asarray(case.positions)[:, None] - case.window
    if cache.quantized:
        mask = jnp.asarray(unused[:, None, :])
        cache = dataclasses.replace(
            cache,
            key_scales=jnp.where(mask, POISON, cache.key_scales),
            value_scales=jnp.where(mask, POISON, cache.value_scales),
        )
    else:
        mask = jnp.asarray(unused[:, :, None, None])
        cache = LayerCache(
            jnp.where(mask, POISON, cache.keys).astype(cache_dtype),
            jnp.where(mask, POISON, cache.values).astype(cache_dtype),
        )
    return (
        jnp.asarray(qkv, dtype),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        jnp.asarray(case.positions, jnp.int32),
        cache,
    )


def expected_output(
    case: Case, qkv: jax.Array, cos: jax.Array, sin: jax.Array, cache: LayerCache, dtype: jnp.dtype
) -> np.ndarray:
    """Float64 attention of each row over exactly the slots that it may see."""
    values64 = np.asarray(qkv.astype(jnp.float32), np.float64)
    cos64, sin64 = np.asarray(cos, np.float64)[:, None], np.asarray(sin, np.float64)[:, None]
    first, second = np.split(values64, 2, axis=-1)
    rotated = np.concatenate([first * cos64 - second * sin64, second * cos64 + first * sin64], axis=-1)
    rotated = np.asarray(jnp.asarray(rotated, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)
    stored_keys, stored_values = (np.asarray(array, np.float64) for array in cache.read(jnp.float32))
    out = np.zeros((len(case.positions), case.heads, case.head_dim))
    group = case.heads // case.kv_heads
    for row, position in enumerate(case.positions):
        begin = 0 if case.window is None else max(0, position - case.window + 1)
        for head in range(case.heads):
            kv_head = head // group
            new_key = rotated[row, case.heads + kv_head]
            new_value = values64[row, case.heads + case.kv_heads + kv_head]
            if cache.quantized:
                new_key, new_value = (
                    np.asarray(dequantize_heads(*quantize_heads(jnp.asarray(x, jnp.float32)), jnp.float32), np.float64)
                    for x in (new_key, new_value)
                )
            keys = np.vstack([stored_keys[row, begin:position, kv_head], new_key])
            values = np.vstack([stored_values[row, begin:position, kv_head], new_value])
            scores = keys @ rotated[row, head] / np.sqrt(case.head_dim)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values / weights.sum()
    return out.reshape(len(case.positions), -1)


def check(
    run: Callable[..., tuple[jax.Array, LayerCache]], case: Case, dtype: jnp.dtype, cache_dtype: jnp.dtype
) -> None:
    qkv, cos, sin, positions, cache = make_inputs(case, dtype, cache_dtype, seed=len(str(case)))
    before = jax.tree.map(np.asarray, cache)
    expected = expected_output(case, qkv, cos, sin, cache, dtype)
    out, after = run(qkv, cos, sin, positions, cache, window=case.window)

    # One int8 code of the new token may round the other way.
    tolerance = {jnp.float32: 5e-6, jnp.float16: 2e-3, jnp.bfloat16: 1e-2}[dtype] + (5e-3 if cache.quantized else 0)
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert out.dtype == dtype
    assert error <= tolerance

    keys, values = after.read(jnp.float32)
    heads, kv_heads = case.heads, case.kv_heads
    for row, position in enumerate(case.positions):
        new_value = np.asarray(qkv[row, heads + kv_heads :].astype(jnp.float32))
        expected_value = np.asarray(cache.as_stored(jnp.asarray(new_value)))
        # A code that lies between two may be rounded either way.
        code = np.max(np.abs(new_value), axis=-1, keepdims=True) / 127 if cache.quantized else 0.0
        difference = np.abs(np.asarray(values[row, position]) - expected_value)
        assert np.all(difference <= 1.001 * code + 1e-6)
        assert np.mean(difference > 1e-5) <= 0.02
        norm = np.linalg.norm(np.asarray(qkv[row, heads : heads + kv_heads].astype(jnp.float32)))
        np.testing.assert_allclose(np.linalg.norm(np.asarray(keys[row, position])), norm, rtol=2e-2)
    others = np.arange(case.max_length)[None, :] != np.asarray(case.positions)[:, None]
    for name in ("keys", "values"):
        np.testing.assert_array_equal(
            np.asarray(getattr(after, name))[others], np.asarray(getattr(before, name))[others]
        )


def compiled(function: Callable, **settings: object) -> Callable[..., tuple[jax.Array, LayerCache]]:
    """In one piece, as the decode step has it: call by call, each operation would be compiled on its own."""
    return jax.jit(functools.partial(function, **settings), static_argnames=("window", "quantize_group_size"))


REFERENCE = compiled(xla.decode_attention)


def interpreted(splits: int) -> Callable[..., tuple[jax.Array, LayerCache]]:
    config = pallas_triton.Config(splits=splits, block=16)
    return compiled(pallas_triton.decode_attention, config=config, interpret=True)


@pytest.mark.parametrize("cache_dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", [REFERENCE, interpreted(4)], ids=["xla", "triton"])
def test_matches_numpy(run, case, cache_dtype):
    check(run, case, jnp.float32, cache_dtype)


def test_matches_numpy_in_bfloat16_without_splits():
    check(interpreted(1), CASES[1], jnp.bfloat16, jnp.bfloat16)


def check_quantized(run: Callable[..., tuple[QuantizedActivations, LayerCache]], case: Case, group_size: int) -> None:
    qkv, cos, sin, positions, cache = make_inputs(case, jnp.float32, jnp.float32, seed=1)
    expected = expected_output(case, qkv, cos, sin, cache, jnp.float32)
    out, _ = run(qkv, cos, sin, positions, cache, window=case.window, quantize_group_size=group_size)
    groups = expected.reshape(len(expected), -1, group_size)
    scales = np.abs(groups).max(-1) / 127
    np.testing.assert_allclose(np.asarray(out.scales).T, scales, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(out.codes).reshape(groups.shape), groups / scales[..., None], atol=0.501)


@pytest.mark.parametrize(("head_dim", "group_size"), [(16, 16), (16, 32), (24, 32), (64, 32)])
@pytest.mark.parametrize("run", [REFERENCE, interpreted(2)], ids=["xla", "triton"])
def test_quantizes_its_output(run, head_dim, group_size):
    check_quantized(run, Case(4, 2, head_dim, 40, (38, 5)), group_size)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 128), (64, 128), (96, 128), (128, 32), (64, 64)])
def test_quantizes_its_output_on_the_gpu(head_dim, group_size):
    run = functools.partial(decode_attention, implementation="triton")
    check_quantized(run, Case(8, 2, head_dim, 1000, (38, 999)), group_size)
    check_quantized(run, Case(8, 2, head_dim, 100, tuple(range(100, 0, -1)) * 2), group_size)


GPU_CASES = [
    *CASES,
    Case(32, 8, 128, 4096, (511, 4095, 0, 1000)),
    Case(32, 8, 128, 700, tuple(range(600, 664))),
    Case(9, 3, 64, 1024, (1023,)),
    Case(12, 12, 96, 300, (299, 5), window=100),
    Case(28, 4, 128, 32768, (32767,), window=4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.bfloat16, jnp.int8)],
    ids=["float32", "bfloat16", "float16", "bfloat16-int8"],
)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_numpy_on_the_gpu(case, dtype, cache_dtype):
    check(functools.partial(decode_attention, implementation="triton"), case, dtype, cache_dtype)


def test_a_quantized_cache_reads_back_what_it_says():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 8)), jnp.float32).at[0, 0, 0].set(0.0)
    cache = LayerCache.zeros(2, 6, 3, 8, jnp.int8).write_first(x, 2 * x)
    keys, values = cache.read(jnp.float32)
    np.testing.assert_allclose(keys[:, :5], x, atol=float(jnp.max(jnp.abs(x))) / 254)
    np.testing.assert_array_equal(keys[:, :5], cache.as_stored(x))
    np.testing.assert_array_equal(values[:, :5], cache.as_stored(2 * x))
    assert not np.any(np.asarray(keys[:, 5:]))
    scattered = LayerCache.zeros(2, 6, 3, 8, jnp.int8).write(jnp.tile(jnp.arange(5), (2, 1)), x, 2 * x)
    jax.tree.map(np.testing.assert_array_equal, cache, scattered)


def test_says_what_does_not_fit():
    qkv, cos, sin, positions, cache = make_inputs(CASES[0], jnp.float32, jnp.float32, 0)
    with pytest.raises(ValueError, match="does not fit a cache"):
        decode_attention(qkv[:, :3], cos, sin, positions, cache)
    with pytest.raises(ValueError, match="cos and sin"):
        decode_attention(qkv, cos[:, :1], sin, positions, cache)
    with pytest.raises(ValueError, match="window"):
        decode_attention(qkv, cos, sin, positions, cache, window=0)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="GPU"):
            decode_attention(qkv, cos, sin, positions, cache, implementation="triton")


@pytest.mark.parametrize(
    ("batch", "max_length", "position_bytes", "expected"),
    [
        (1, 128, 512, (2, 2)),
        (1, 512, 512, (8, 2)),
        (1, 4096, 512, (16, 3)),
        (1, 32768, 512, (16, 4)),
        (1, 32768, 1024, (16, 2)),  # float32: two blocks of 64 KB
        (16, 512, 512, (1, 3)),
        (64, 512, 512, (1, 2)),
        (64, 4096, 256, (1, 4)),
        (256, 512, 512, (1, 2)),
    ],
)
def test_the_rule_gives_what_measured_fastest(batch, max_length, position_bytes, expected, monkeypatch):
    monkeypatch.setattr(pallas_triton.registry, "compute_capability", lambda: (9, 0))
    config = pallas_triton.default_config(batch, 8, max_length, position_bytes)
    assert (config.splits, config.num_stages) == expected
    monkeypatch.setattr(pallas_triton.registry, "compute_capability", lambda: (8, 9))
    config = pallas_triton.default_config(batch, 8, max_length, position_bytes)
    assert config.num_stages * config.block * position_bytes <= 96 << 10
