"""Prefill in programs of a few layers: the logits and the cache of a pass through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.generation import Engine, prefill
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.random_weights import WeightFormat, random_decoder

pytestmark = pytest.mark.quick_compile

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2 * prefill.LAYERS_OF_A_PROGRAM + 2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7], [1, 8, 2]]


def model_of(num_layers: int, scheme: str = "bf16"):
    """Float weights by default: int8 activations would carry a difference in the last bit on as one of a step."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    return random_decoder(config, WeightFormat.from_name(scheme), dtype=jnp.float32)


@pytest.mark.parametrize("num_layers", [1, prefill.LAYERS_OF_A_PROGRAM, CONFIG.num_layers])
def test_it_gives_the_logits_and_the_cache_of_the_whole_model(num_layers):
    model = model_of(num_layers)
    tokens, lengths = np.zeros((3, 16), np.int32), np.asarray([len(prompt) for prompt in PROMPTS], np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    empty = KVCache.zeros(model.config, 3, 32, jnp.float32)
    expected, expected_cache = model(jnp.asarray(tokens), empty, lengths=jnp.asarray(lengths), last_only=True)
    cache, logits = prefill.PrefillModel(model).step(
        KVCache.zeros(model.config, 3, 32, jnp.float32), tokens, lengths, None
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [10, 2, 3]
    for layer, expected_layer in zip(cache.layers, expected_cache.layers, strict=True):
        for row, prompt in enumerate(PROMPTS):
            for found, wanted in ((layer.keys, expected_layer.keys), (layer.values, expected_layer.values)):
                held = np.asarray(wanted[row, : len(prompt)])
                np.testing.assert_allclose(found[row, : len(prompt)], held, rtol=1e-4, atol=1e-4)
                assert np.abs(held).max(-1).min() > 0.01  # every position of every head was written


def test_layers_of_one_shape_are_one_program_and_are_compiled_ahead():
    runner = Engine(model_of(CONFIG.num_layers, "W8A8"))
    prefill.run_layers.clear_cache()
    cache = jax.eval_shape(lambda: KVCache.zeros(CONFIG, 1, 128, jnp.float32))
    assert len(list(runner.prefill.lower(cache, 20))) == 3
    runner.generate([[1] * 20], max_tokens=3)
    assert prefill.run_layers._cache_size() == 1


def test_a_model_whose_layers_differ_is_cut_once():
    model, packed = model_of(CONFIG.num_layers), model_of(CONFIG.num_layers, "W4A8")
    model.layers[-1] = packed.layers[-1]
    cut = prefill.PrefillModel(model)
    assert len(cut.segments) == 1
    assert len(cut.rest.tree()[0]) == CONFIG.num_layers - prefill.LAYERS_OF_A_PROGRAM
    tokens, lengths = np.asarray([[5] * 16], np.int32), np.asarray([16], np.int32)
    cache, logits = cut.step(KVCache.zeros(CONFIG, 1, 32, jnp.float32), tokens, lengths, 0)
    expected, _ = model(jnp.asarray(tokens), KVCache.zeros(CONFIG, 1, 32, jnp.float32), last_only=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == CONFIG.num_layers


def test_rows_without_tokens_in_the_last_chunk_keep_their_logits(monkeypatch):
    model = model_of(2)
    whole = Engine(model).prefill.run(KVCache.zeros(model.config, 3, 32, jnp.float32), PROMPTS, 0)[1]
    monkeypatch.setattr(Sizes, "prefill_chunk", lambda self, batch: 4)
    chunks = Engine(model).prefill.run(KVCache.zeros(model.config, 3, 32, jnp.float32), PROMPTS, 0)[1]
    np.testing.assert_allclose(chunks, whole, rtol=1e-4, atol=1e-4)


def test_every_array_of_an_empty_cache_has_memory_of_its_own():
    arrays = jax.tree.leaves(KVCache.zeros(CONFIG, 2, 32, jnp.int8))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays) == 4 * CONFIG.num_layers + 1
