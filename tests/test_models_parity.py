"""Every model family, converted by the real command, gives the logits of the `transformers` model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import FAMILIES, reference_logits, saved_model

from convert.__main__ import main as convert
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder

pytestmark = pytest.mark.quick_compile

TOLERANCE = 1e-4
PROMPT_LENGTHS = (19, 7, 1)
NEW_TOKENS = 4


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """The torch model and ours, converted from its saved folder."""
    model, folder = saved_model(request.param)
    out = tmp_path_factory.mktemp("converted") / "model"
    assert convert(["--from-hf", str(folder), "--out", str(out)]) == 0
    reader = CheckpointReader(out)
    return model, Decoder.from_parameters(reader.config, reader.read_part)


@pytest.fixture(scope="module")
def sequences():
    """Three rows of random tokens, of different lengths: prompts, each with the tokens decoded after it."""
    generator = np.random.default_rng(1)
    vocab = 101
    return [generator.integers(0, vocab, length + NEW_TOKENS).tolist() for length in PROMPT_LENGTHS]


def padded(rows, length, fill):
    return jnp.asarray([[*row, *[fill] * (length - len(row))] for row in rows], jnp.int32)


@pytest.mark.usefixtures("exact_matmul")
def test_logits_without_cache(family, sequences):
    reference, model = family
    longest = max(map(len, sequences))
    logits, cache = jax.jit(lambda model, tokens: model(tokens))(model, padded(sequences, longest, fill=7))
    assert cache is None
    for row, tokens in enumerate(sequences):
        expected = reference_logits(reference, tokens)
        assert relative_error(logits[row, : len(tokens)], expected) < TOLERANCE


@pytest.mark.usefixtures("exact_matmul")
def test_prefill_and_decoding_through_the_cache_with_padding(family, sequences):
    reference, model = family
    step = jax.jit(lambda model, tokens, cache, lengths: model(tokens, cache, lengths=lengths))
    # No slack at all for the longest row: padding of the shorter ones must not push anything out of place.
    cache = KVCache.zeros(model.config, len(sequences), max(PROMPT_LENGTHS) + NEW_TOKENS, jnp.float32)
    lengths = jnp.asarray(PROMPT_LENGTHS, jnp.int32)
    prompts = [tokens[:length] for tokens, length in zip(sequences, PROMPT_LENGTHS, strict=True)]
    logits, cache = step(model, padded(prompts, max(PROMPT_LENGTHS), fill=3), cache, lengths)
    collected = [[logits[row, :length]] for row, length in enumerate(PROMPT_LENGTHS)]
    for i in range(NEW_TOKENS):
        tokens = jnp.asarray([[row[length + i]] for row, length in zip(sequences, PROMPT_LENGTHS, strict=True)])
        logits, cache = step(model, tokens.astype(jnp.int32), cache, jnp.ones_like(lengths))
        for row in range(len(sequences)):
            collected[row].append(logits[row])
    assert cache.lengths.tolist() == [length + NEW_TOKENS for length in PROMPT_LENGTHS]
    for row, tokens in enumerate(sequences):
        found = np.concatenate(collected[row])
        assert relative_error(found, reference_logits(reference, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2-sliding", {"full_attention_layers": ()}),
        ("llama3.1", {"rope_scaling": None}),
        ("llama-linear-rope", {"rope_scaling": None}),
    ],
)
@pytest.mark.usefixtures("exact_matmul")
def test_the_prompts_are_long_enough_to_notice_a_missing_feature(name, changes, sequences, tmp_path):
    """Guards the tests above: without the feature the logits are far off."""
    reference, folder = saved_model(name)
    assert convert(["--from-hf", str(folder), "--out", str(tmp_path / "model")]) == 0
    reader = CheckpointReader(tmp_path / "model")
    model = Decoder.from_parameters(dataclasses.replace(reader.config, **changes), reader.read_part)
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray([sequences[0]], jnp.int32))
    assert relative_error(logits[0], reference_logits(reference, sequences[0])) > 30 * TOLERANCE
