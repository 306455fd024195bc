"""Generation: against a loop of full forward passes, transformers' samplers and whole-text decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny_chat_model import byte_tokenizer

from mixllm_jax.errors import OptionError
from mixllm_jax.generation import Engine, IncrementalDetokenizer, PromptCache, SamplingSettings, decode_loop, prefill
from mixllm_jax.generation.chunked_prefill import ChunkedPrefill
from mixllm_jax.generation.sampling import Sampler, keep_likely
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder, random_parameters

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=96,
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder.from_parameters(CONFIG, lambda part: random_parameters(CONFIG, part, seed=3, scale=0.5))


@pytest.fixture(scope="module")
def forward(model):
    """Logits after the last of the tokens, without a cache."""
    run = jax.jit(lambda tokens: model(tokens)[0][0])

    def last_logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, CONFIG.max_position_embeddings), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(padded))[len(tokens) - 1]

    return last_logits


def greedy_loop(forward, prompt: list[int], count: int, stops: tuple[int, ...] = ()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(tokens).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def test_greedy_batch_of_ragged_prompts_equals_full_forward_passes(model, forward):
    results = Engine(model).generate(PROMPTS, max_tokens=40)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == greedy_loop(forward, prompt, 40)
        assert result.finish_reason == "length"


def test_long_prompts_run_in_chunks(model, forward, monkeypatch):
    monkeypatch.setattr(Sizes, "prefill_chunk", lambda self, batch: 8)
    results = Engine(model).generate(PROMPTS, max_tokens=5)
    assert [r.tokens for r in results] == [greedy_loop(forward, prompt, 5) for prompt in PROMPTS]


def test_chunks_with_a_known_history_give_the_same_text(model, forward, monkeypatch):
    monkeypatch.setattr(Sizes, "prefill_chunk", lambda self, batch: 8)
    monkeypatch.setattr(Sizes, "history", lambda self, held: held)
    results = Engine(model).generate(PROMPTS, max_tokens=5)
    assert [r.tokens for r in results] == [greedy_loop(forward, prompt, 5) for prompt in PROMPTS]


def test_int8_cache_gives_the_same_text_whatever_the_chunks(model, monkeypatch):
    whole = Engine(model, kv_bits=8).generate(PROMPTS, max_tokens=8)
    monkeypatch.setattr(Sizes, "prefill_chunk", lambda self, batch: 4)
    monkeypatch.setattr(Sizes, "history", lambda self, held: held)
    assert Engine(model, kv_bits=8).generate(PROMPTS, max_tokens=8) == whole
    with pytest.raises(OptionError, match="kv-bits"):
        Engine(model, kv_bits=4)


def test_each_row_stops_at_its_own_stop_token(model, forward):
    expected = [greedy_loop(forward, prompt, 30) for prompt in PROMPTS]
    stops = (expected[0][10], expected[2][9])
    results = Engine(model).generate(PROMPTS, max_tokens=30, stop_tokens=stops)
    assert {r.finish_reason for r in results} == {"stop", "length"}  # one row goes on to the end
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens = greedy_loop(forward, prompt, 30, stops)
        stopped = tokens[-1] in stops
        assert result.tokens == (tokens[:-1] if stopped else tokens)
        assert result.finish_reason == ("stop" if stopped else "length")


def test_sampled_text_depends_on_the_seed_and_not_on_the_chunks(model):
    def run(seed: int, interval: float) -> list[int]:
        sampling = SamplingSettings(temperature=1.5, top_k=30, top_p=0.95, seed=seed)
        chunks = Engine(model).stream([[3, 4]], max_tokens=40, sampling=sampling, interval=interval)
        return [token for (tokens,) in chunks for token in tokens]

    assert run(1, 0.0) == run(1, float("inf"))
    assert len(run(1, 0.0)) == 40
    assert run(1, 0.0) != run(2, 0.0)


def test_no_program_is_compiled_twice(model):
    Engine(model).generate([[1] * 17], max_tokens=3)
    before = prefill.run_layers._cache_size(), decode_loop.decode._cache_size()
    for length in (18, 20, 24):
        for temperature in (0.3, 0.9):
            sampling = SamplingSettings(temperature=temperature, seed=length)
            Engine(model).generate([[1] * length], max_tokens=length, sampling=sampling)
    assert prefill.run_layers._cache_size() == before[0]
    assert decode_loop.decode._cache_size() <= before[1] + 1  # one for sampling beside one for greedy


def test_prompt_cache_gives_the_same_text_with_less_work(model, monkeypatch):
    prefilled: list[int] = []
    original = ChunkedPrefill.run
    monkeypatch.setattr(
        ChunkedPrefill,
        "run",
        lambda self, cache, prompts, held: prefilled.append(len(prompts[0])) or original(self, cache, prompts, held),
    )

    def turn(prompt: list[int], cache: PromptCache | None) -> list[int]:
        chunks = Engine(model).stream([prompt], max_tokens=6, interval=0.0, prompt_cache=cache)
        return [token for (tokens,) in chunks for token in tokens]

    cache = PromptCache()
    first = turn([1, 2, 3], cache)
    second_prompt = [1, 2, 3, *first, 20, 21]
    assert turn(second_prompt, cache) == turn(second_prompt, None)
    third_prompt = [1, 2, 3, 40, *range(30), *range(30)]  # another conversation from the fourth token on
    assert turn(third_prompt, cache) == turn(third_prompt, None)
    assert prefilled == [3, 3, len(second_prompt), len(third_prompt) - 3, len(third_prompt)]


def test_prompt_cache_survives_an_answer_that_was_cut_off(model):
    cache = PromptCache()
    chunks = Engine(model).stream([[1, 2, 3]], max_tokens=40, interval=0.0, prompt_cache=cache)
    begun = [*next(chunks)[0], *next(chunks)[0]]
    chunks.close()
    prompt = [1, 2, 3, *begun, 9]
    chunks = Engine(model).stream([prompt], max_tokens=5, prompt_cache=cache)
    assert [token for (tokens,) in chunks for token in tokens] == Engine(model).generate([prompt], max_tokens=5)[
        0
    ].tokens


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "message"),
    [
        ([[1] * 90], 7, "90 tokens, .* need 97 positions, .* has 96: ask for at most 6 new tokens"),
        ([[1], []], 5, "prompt 2 of 2 is empty"),
        ([[61]], 5, "vocabulary of 61"),
        ([[1]], 0, "max-tokens"),
        ([], 5, "no prompt"),
    ],
)
def test_impossible_requests_fail_before_any_work(model, prompts, max_tokens, message):
    with pytest.raises(OptionError, match=message):
        Engine(model).stream(prompts, max_tokens=max_tokens)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}],
)
def test_sampling_settings_out_of_range(options):
    with pytest.raises(OptionError, match=next(iter(options)).replace("_", "-")):
        SamplingSettings(**options)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (7, 0.6), (1, 1.0), (0, 0.01), (500, 0.99)])
def test_top_k_and_top_p_keep_what_transformers_keeps(top_k, top_p):
    torch = pytest.importorskip("torch", reason="transformers' samplers need torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (6, 200)).astype(np.float32)
    expected = torch.from_numpy(logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    kept = keep_likely(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(np.asarray(kept), np.isfinite(expected.numpy()))


def test_samples_follow_the_probabilities():
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5], np.float32)
    sampler = Sampler.from_settings(SamplingSettings(temperature=0.7, top_k=4))
    draws = 4000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(draws))
    tokens = np.asarray(sampler.sample(keys, jnp.tile(logits, (draws, 1))))
    weights = np.exp(logits.astype(np.float64) / 0.7)
    weights[2] = 0  # the fifth likeliest
    counts = np.bincount(tokens, minlength=5)
    assert counts[2] == 0
    present = weights > 0
    expected = draws * weights[present] / weights.sum()
    assert scipy.stats.chisquare(counts[present], expected).pvalue > 1e-4


@pytest.fixture(scope="module", name="byte_tokenizer")
def byte_tokenizer_fixture():
    return byte_tokenizer()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_streamed_text_is_the_text(byte_tokenizer, chunk):
    text = "Zürich, 東京 🙂🏳️‍🌈  two spaces\nand a line."
    tokens = byte_tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    pieces = [detokenizer.add(tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text
    assert detokenizer.flush() == ""


def test_incomplete_character_at_the_end_is_shown_at_last(byte_tokenizer):
    tokens = byte_tokenizer("a🙂")["input_ids"][:-1]
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    assert "".join(detokenizer.add([token]) for token in tokens) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_are_shown_and_not_decoded_again_and_again(byte_tokenizer, monkeypatch):
    decode, lengths = byte_tokenizer.decode, []
    monkeypatch.setattr(
        byte_tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options)
    )
    tokens = [byte_tokenizer("é")["input_ids"][1]] * 50 + byte_tokenizer("é")["input_ids"]
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    text = "".join(detokenizer.add([token]) for token in tokens)
    assert text == 50 * "\N{REPLACEMENT CHARACTER}" + "é"
    assert max(lengths) < 16
