"""Options of the engine: the int8 cache, the 8-bit head, memory estimates and devices that will not do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax import device
from mixllm_jax.benchmark.profile import Kernel, summarize
from mixllm_jax.benchmark.roofline import bytes_per_step
from mixllm_jax.device import UnsupportedDeviceError, require_kernels
from mixllm_jax.errors import OptionError
from mixllm_jax.evaluation.cached import ThroughInt8Cache
from mixllm_jax.generation import Engine
from mixllm_jax.generation.memory import OutOfDeviceMemoryError, weight_bytes
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder, random_parameters
from mixllm_jax.models.eight_bit_table import choose_bits, eight_bit_table
from mixllm_jax.models.parameters import Execution
from mixllm_jax.models.presets import PRESETS, preset
from mixllm_jax.models.random_weights import WeightFormat, random_decoder
from pallas_kernels import packing, registry
from pallas_kernels.shapes import MODELS

pytestmark = pytest.mark.quick_compile

CONFIG = dataclasses.replace(
    PRESETS["smollm2-135m"], num_layers=2, vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16,
    num_heads=4, num_kv_heads=2, max_position_embeddings=4096,
)  # fmt: skip


def test_presets_have_the_shapes_of_the_kernel_benchmark():
    for name, shapes in MODELS.items():
        for linear, shape in shapes.as_dict().items():
            assert PRESETS[name].linear_shape(linear) == shape
    with pytest.raises(OptionError, match=r"llama-3\.1-8b"):
        preset("llama-9")


@pytest.mark.parametrize(("scheme", "share"), [("bf16", None), ("W4A8", 0.0), ("W4.4A8", 0.1), ("W8A8", 1.0)])
def test_random_weights_have_the_format_asked_for_and_finite_logits(scheme, share):
    weights = WeightFormat.from_name(scheme, tied=True)
    assert (weights.lm_head_bits, weights.embedding_bits) == ((16, 16) if share is None else (8, 8))
    model = random_decoder(CONFIG, weights, dtype=jnp.float32)
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(model, jnp.arange(12)[None] % 96)
    assert 0.3 < float(jnp.std(logits)) < 3
    for block in model.layers:
        for name, linear in block.linears().items():
            weight = linear.weight.get_value()
            if share is None:
                assert weight.shape == CONFIG.linear_shape(name)
            else:
                packing.validate(weight, values=True)
                assert weight.n8 == round(share * CONFIG.linear_shape(name)[0])
                assert 0.5 < float(jnp.std(packing.dequantize(weight))) * weight.in_features**0.5 < 2


@pytest.mark.parametrize("name", ["W3A8", "W4A16", "int4", "W9A8"])
def test_an_unknown_scheme_is_refused(name):
    with pytest.raises(OptionError, match=r"W4\.4A8"):
        WeightFormat.from_name(name, tied=True)


def test_an_eight_bit_table_is_close_and_a_tied_one_gets_weights_of_its_own():
    parts = {part: random_parameters(CONFIG, part, 0) for part in CONFIG.part_names()}
    exact = Decoder.from_parameters(CONFIG, parts)
    rounded = Decoder.from_parameters(CONFIG, parts, Execution(lm_head_bits=8))
    assert exact.final.lm_head is None
    assert rounded.final.lm_head is not None
    tokens = jnp.arange(20)[None]
    expected, actual = (np.asarray(model(tokens)[0]) for model in (exact, rounded))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 2e-2
    weight = parts["embedding"]["embed.weight"]
    np.testing.assert_allclose(packing.dequantize(eight_bit_table(weight)), weight, atol=np.abs(weight).max() / 200)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_models_get_an_eight_bit_head_and_embedding_unless_told_otherwise(tied):
    assert choose_bits(None, None, quantized=True, tied=tied) == (8, 8)
    assert choose_bits(None, None, quantized=False, tied=tied) == (16, 16)
    assert choose_bits(16, None, quantized=True, tied=tied) == (16, 16 if tied else 8)
    assert choose_bits(None, 16, quantized=True, tied=tied) == (8, 16)
    assert choose_bits(8, None, quantized=False, tied=tied) == (8, 16)
    with pytest.raises(OptionError, match="lm-head-bits must be 8 or 16, found 4"):
        choose_bits(4, None, quantized=True, tied=tied)


def test_an_eight_bit_embedding_is_close_and_shared_with_a_tied_head():
    parts = {part: random_parameters(CONFIG, part, 0) for part in CONFIG.part_names()}
    with pytest.raises(OptionError, match="--lm-head-bits 8"):
        Decoder.from_parameters(CONFIG, parts, Execution(embedding_bits=8))
    rounded = Decoder.from_parameters(CONFIG, parts, Execution(lm_head_bits=8, embedding_bits=8))
    table = rounded.embedding.weight.get_value()
    assert rounded.final.lm_head is None
    assert sum(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(rounded)) == 1
    apart = Decoder.from_parameters(CONFIG, parts, Execution(lm_head_bits=8))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, CONFIG.hidden_size)), jnp.float32)
    np.testing.assert_array_equal(rounded.head(x), apart.head(x))
    weight = parts["embedding"]["embed.weight"]
    tokens = jnp.asarray([[0, 5, 95], [7, 7, 96]])
    expected = weight[np.minimum(np.asarray(tokens), 95)]
    np.testing.assert_allclose(rounded.embed(tokens), expected, atol=np.abs(weight).max() / 200)
    np.testing.assert_array_equal(rounded.embed(tokens)[0, 1], packing.dequantize(table)[5])


def test_an_eight_bit_embedding_changes_nothing_but_the_embedding():
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    weights = WeightFormat.from_name("W4.4A8", tied=False, lm_head_bits=16)
    model = random_decoder(untied, weights, dtype=jnp.float32)
    assert model.final.lm_head is not None
    assert model.final.lm_head.weight.get_value().shape == (96, untied.hidden_size)
    assert isinstance(model.embedding.weight.get_value(), packing.PackedWeight)
    assert model.embed(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float32
    assert 0.3 < float(jnp.std(model(jnp.arange(12)[None])[0])) < 3
    whole = random_decoder(untied, dataclasses.replace(weights, embedding_bits=16), dtype=jnp.float32)
    assert not isinstance(whole.embedding.weight.get_value(), packing.PackedWeight)
    for part in ("layers", "final"):
        jax.tree.map(np.testing.assert_array_equal, getattr(model, part), getattr(whole, part))


def test_float_linears_can_have_an_eight_bit_head_and_embedding():
    weights = WeightFormat.from_name("bf16", tied=False, lm_head_bits=8, embedding_bits=8)
    assert weights.eight_bit_share is None
    model = random_decoder(dataclasses.replace(CONFIG, tie_word_embeddings=False), weights)
    assert isinstance(model.embedding.weight.get_value(), packing.PackedWeight)
    assert isinstance(model.final.lm_head.weight.get_value(), packing.PackedWeight)
    assert not any(
        isinstance(linear.weight.get_value(), packing.PackedWeight) for linear in model.layers[0].linears().values()
    )


def test_logits_through_an_int8_cache_are_those_of_decoding_with_one():
    model = Decoder.from_parameters(
        CONFIG, {part: random_parameters(CONFIG, part, 1, 0.1) for part in CONFIG.part_names()}
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (1, 10)))
    whole, _ = ThroughInt8Cache(model)(tokens)
    cache = KVCache.zeros(CONFIG, 1, 10, jnp.int8)
    for position in range(10):
        logits, cache = model(tokens[:, position : position + 1], cache)
        # Equal but for sums in another order; a code that rounds the other way for it would still be within the limit.
        np.testing.assert_allclose(logits[0, 0], whole[0, position], atol=2e-3)
        assert float(jnp.mean(jnp.abs(logits[0, 0] - whole[0, position]))) < 1e-4
    assert float(jnp.max(jnp.abs(whole - model(tokens)[0]))) > 1e-2  # what rounding does is far beyond it


def test_the_memory_estimate_is_exact_for_weights_and_cache():
    model = random_decoder(CONFIG, WeightFormat.from_name("W4.4A8"))
    for kv_bits in (16, 8):
        engine = Engine(model, kv_bits=kv_bits)
        estimate = engine.estimate_memory(3, 100)
        cache = KVCache.zeros(CONFIG, 3, 100, engine.cache_dtype)
        assert estimate.cache == weight_bytes(cache.layers)
        assert estimate.weights == sum(array.nbytes for array in jax.tree.leaves(model))
        assert estimate.peak > estimate.weights + estimate.cache


def test_sums_of_codes_count_as_memory_but_not_as_bytes_of_a_decode_step(monkeypatch):
    weights = WeightFormat.from_name("W4.4A8", tied=True, embedding_bits=16)
    plain = random_decoder(CONFIG, weights)
    shared = random_decoder(CONFIG, WeightFormat.from_name("W4.4A8"))  # one table for embedding and head
    monkeypatch.setattr("mixllm_jax.models.linear.prepare_weight", lambda weight, _: packing.with_code_sums(weight))
    summed = random_decoder(CONFIG, weights)
    linears = [linear for block in summed.layers for linear in block.linears().values()] + [summed.final.lm_head]
    sums = sum(2 * linear.weight.get_value().scales4.size for linear in linears)
    sums += sum(2 * linear.weight.get_value().scales8.size for linear in linears)
    assert weight_bytes(summed) == weight_bytes(plain) + sums
    assert bytes_per_step(summed, 2, 10, jnp.bfloat16) == bytes_per_step(plain, 2, 10, jnp.bfloat16)
    assert bytes_per_step(plain, 1, 0, jnp.bfloat16) == weight_bytes((plain.layers, plain.final))
    assert bytes_per_step(shared, 1, 0, jnp.bfloat16) == weight_bytes(shared)


def test_a_batch_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    engine = Engine(random_decoder(CONFIG, WeightFormat.from_name("W4.4A8")))
    available = engine.estimate_memory(5, 256).peak
    monkeypatch.setattr("mixllm_jax.generation.engine.device_memory", lambda: available)
    with pytest.raises(OutOfDeviceMemoryError, match=r"5 rows of 256 positions or 8 rows of .* would fit"):
        engine.generate([[1, 2, 3]] * 8, max_tokens=200)
    monkeypatch.setattr("mixllm_jax.generation.engine.device_memory", lambda: 1000)
    with pytest.raises(OutOfDeviceMemoryError, match="not even one row"):
        engine.generate([[1, 2, 3]], max_tokens=200)


def test_running_out_of_memory_on_the_way_says_what_would_fit(monkeypatch):
    engine = Engine(random_decoder(CONFIG, WeightFormat.from_name("W4.4A8")))
    monkeypatch.setattr("mixllm_jax.generation.engine.device_memory", lambda: 10**12)

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(engine.prefill, "run", fail)
    with pytest.raises(OutOfDeviceMemoryError, match="ran out of memory: 4 rows of 256 positions should need"):
        engine.generate([[1, 2, 3]] * 4, max_tokens=200)


def test_a_gpu_without_kernels_is_refused(monkeypatch):
    require_kernels(48, "auto")  # the CPU's reference takes any
    monkeypatch.setattr(registry, "default_platform", lambda: "gpu")
    monkeypatch.setattr(registry, "device_kind", lambda: "Tesla T4")
    monkeypatch.setattr(registry, "compute_capability", lambda: (7, 5))
    with pytest.raises(UnsupportedDeviceError, match=r"Tesla T4 has compute capability 7\.5"):
        require_kernels(64, "auto")
    require_kernels(64, "xla")
    monkeypatch.setattr(registry, "compute_capability", lambda: device.OLDEST_CAPABILITY)
    require_kernels(64, "auto")
    with pytest.raises(UnsupportedDeviceError, match="groups of 48"):
        require_kernels(48, "auto")


def test_a_profile_counts_time_once_and_finds_the_gaps():
    kernels = [
        Kernel("mixed_matmul_few_tokens", 0, 400),
        Kernel("decode_attention", 300, 200),  # overlaps the last 100
        Kernel("rms_norm_quantize", 600, 100),
        Kernel("loop_add_fusion", 900, 100),
    ]
    found = summarize(kernels, 3, steps=1)
    assert found["step_us"] == 1.0
    assert found["shares"] == {
        "weight matmul": 0.4,
        "attention": 0.1,
        "quantize, norm, activation": 0.1,
        "rest": 0.1,
        "gaps": 0.3,
    }
    assert found["longest_gaps_us"] == [["loop_add_fusion", 0.2], ["rms_norm_quantize", 0.1]]
    assert found["graph_launches_per_step"] == 3
