"""What users ask of the engine, and get wrong: requests, interrupts, batches of unlike rows, memory that is short."""

import re
import signal
import types

import jax
import numpy as np
import pytest

import mixllm_jax.generation.engine as engine_module
from mixllm_jax.errors import OptionError
from mixllm_jax.generation import Engine, PromptCache, SamplingSettings
from mixllm_jax.generation.chunked_prefill import ChunkedPrefill
from mixllm_jax.generation.memory import (
    MemoryEstimate,
    OutOfDeviceMemoryError,
    explain_shortage,
    explain_shortage_of_weights,
    require_memory,
)
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder, random_parameters

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=96,
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Decoder.from_parameters(CONFIG, lambda part: random_parameters(CONFIG, part, seed=3, scale=0.5)))


def tokens_of(chunks) -> list[list[int]]:
    """All tokens of each row of a stream."""
    return [[token for tokens in row for token in tokens] for row in zip(*chunks, strict=True)]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1] * 96], {}, OptionError, "prompt 1 of 1 has 96 tokens, but the context has 96 positions: shorten"),
        ([[2], [1] * 90], {"max_tokens": 9}, OptionError, "prompt 2 of 2 .*need 99 .*at most 6 new tokens"),
        ([[]], {}, OptionError, "prompt 1 of 1 is empty"),
        ([np.zeros(0)], {}, OptionError, "prompt 1 of 1 is empty"),
        ([[5, -1]], {}, OptionError, "vocabulary of 61, -1"),
        ([[5, 61]], {}, OptionError, "vocabulary of 61, 61"),
        ([[5]], {"max_tokens": 0}, OptionError, "max-tokens must .* found 0"),
        ([[5]], {"max_tokens": 1.5}, OptionError, "max-tokens must .* found 1.5"),
        ([[5]], {"max_tokens": float("nan")}, OptionError, "max-tokens must .* found nan"),
        ([[5]], {"max_tokens": None}, OptionError, "max-tokens must .* found None"),
        ([[5]], {"stop_tokens": range(17)}, OptionError, "at most 16 stop tokens"),
        ("text", {}, ValueError, "prompt 1 of 4 must be a list of token ids, found 't'"),
        ([1, 2], {}, ValueError, "prompt 1 of 2 must be a list of token ids, found '1'"),
        ([[1, 2.5]], {}, ValueError, "must be a list of token ids"),
        ([[[1]]], {}, ValueError, "must be a list of token ids"),
        ([[1], [2]], {"prompt_cache": PromptCache()}, ValueError, "one prompt at a time, got 2"),
    ],
)
def test_what_cannot_work_is_refused_at_once(engine, monkeypatch, prompts, options, error, message):
    monkeypatch.setattr(engine_module, "decode", None)
    monkeypatch.setattr(engine.prefill, "run", None)
    with pytest.raises(error, match=message):
        engine.stream(prompts, **{"max_tokens": 5, **options})  # not read: refused by the call


def test_the_whole_context_can_be_used(engine):
    (result,) = engine.generate([[1] * 90], max_tokens=6)
    assert len(result.tokens) == 6


def test_prompts_may_be_arrays(engine):
    expected = engine.generate([[1, 2, 3], [4, 5, 6]], max_tokens=4)
    assert engine.generate(np.asarray([[1, 2, 3], [4, 5, 6]]), max_tokens=4) == expected
    assert engine.generate((np.asarray([1, 2, 3]), jax.numpy.asarray([4, 5, 6])), max_tokens=np.int64(4)) == expected


def test_a_row_that_ends_at_once_leaves_the_others_alone(engine):
    prompts = [[1, 2, 3], [7], [4] * 20]
    whole = [result.tokens for result in engine.generate(prompts, max_tokens=20)]
    stop = whole[1][0]
    assert stop not in (whole[0][0], whole[2][0])  # or the test shows nothing
    results = engine.generate(prompts, max_tokens=20, stop_tokens=[stop])
    assert (results[1].tokens, results[1].finish_reason) == ([], "stop")
    for row in (0, 2):
        cut = whole[row].index(stop) if stop in whole[row] else 20
        assert (len(results[row].tokens), results[row].tokens) == (cut, whole[row][:cut])
    streamed = tokens_of(engine.stream(prompts, max_tokens=20, stop_tokens=[stop], interval=0.0))
    assert streamed[1] == [stop]
    assert [row[:-1] if row[-1] == stop else row for row in streamed] == [result.tokens for result in results]


def test_all_rows_may_end_at_once(engine):
    first = engine.generate([[1, 2], [1, 2]], max_tokens=1)
    assert [(len(row.tokens), row.finish_reason) for row in first] == [(1, "length")] * 2
    ended = engine.generate([[1, 2], [1, 2]], max_tokens=9, stop_tokens=first[0].tokens)
    assert [(row.tokens, row.finish_reason) for row in ended] == [([], "stop")] * 2


def test_256_tiny_prompts(engine):
    prompts = [[1 + index % 60] * (1 + index % 3) for index in range(256)]
    results = engine.generate(prompts, max_tokens=3)
    for index in (0, 1, 77, 255):
        assert results[index] == engine.generate([prompts[index]], max_tokens=3)[0]


def test_sampled_text_does_not_depend_on_the_other_rows(engine):
    sampling = SamplingSettings(temperature=1.2, top_p=0.9, seed=7)
    alone = engine.generate([[5, 6, 7]], max_tokens=24, sampling=sampling)[0]
    others = ([[9] * 40], [[1], [2, 3], [4] * 17])
    for mates in others:
        assert engine.generate([[5, 6, 7], *mates], max_tokens=24, sampling=sampling)[0] == alone
    same = engine.generate([[5, 6, 7]] * 3, max_tokens=24, sampling=sampling)
    assert same[0] == alone
    assert len({tuple(row.tokens) for row in same}) == 3  # rows draw their own numbers


def test_a_temperature_near_zero_is_greedy(engine):
    greedy = engine.generate([[5, 6]], max_tokens=12)
    for temperature in (1e-6, 1e-30, 1e-300):
        sampling = SamplingSettings(temperature=temperature, seed=3)
        assert engine.generate([[5, 6]], max_tokens=12, sampling=sampling) == greedy


def test_an_interrupt_keeps_the_conversation(engine, monkeypatch):
    """Ctrl-C mostly comes while the host waits for tokens, not while the caller handles them."""
    ran: list[int] = []
    run = ChunkedPrefill.run
    monkeypatch.setattr(
        ChunkedPrefill,
        "run",
        lambda self, cache, prompts, held: ran.append(len(prompts[0])) or run(self, cache, prompts, held),
    )
    cache = PromptCache()
    chunks = engine.stream([[1, 2, 3]], max_tokens=40, interval=0.0, prompt_cache=cache)
    begun = [*next(chunks)[0], *next(chunks)[0]]

    def waiting(*_):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "np", types.SimpleNamespace(asarray=waiting))
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
    prompt = [1, 2, 3, *begun, 9]
    again = tokens_of(engine.stream([prompt], max_tokens=5, prompt_cache=cache))
    assert ran == [3, 2]  # the last token before the interrupt, and the new one
    assert again == [engine.generate([prompt], max_tokens=5)[0].tokens]


def test_an_interrupt_between_donation_and_result_keeps_nothing_broken(engine, monkeypatch):
    cache = PromptCache()
    decode = engine_module.decode

    def interrupted(*arguments):
        decode(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream([[1, 2, 3]], max_tokens=40, prompt_cache=cache))
    monkeypatch.undo()
    found = tokens_of(engine.stream([[1, 2, 3]], max_tokens=4, prompt_cache=cache))
    assert found == [engine.generate([[1, 2, 3]], max_tokens=4)[0].tokens]


def test_a_prompt_cache_of_another_model_is_refused(engine):
    cache = PromptCache()
    list(engine.stream([[1, 2, 3]], max_tokens=3, prompt_cache=cache))
    for other in (
        Engine(Decoder.from_parameters(CONFIG, lambda part: random_parameters(CONFIG, part, seed=4, scale=0.5))),
        Engine(engine.model, kv_bits=8),
    ):
        with pytest.raises(ValueError, match="belongs to the model that filled it"):
            list(other.stream([[1, 2, 3, 4]], max_tokens=3, prompt_cache=cache))
    assert tokens_of(Engine(engine.model).stream([[1, 2, 3, 4]], max_tokens=3, prompt_cache=cache))


@pytest.mark.parametrize(
    ("length", "size"), [(1, 128), (129, 192), (193, 256), (3000, 3072), (4000, 4096), (5000, 5000)]
)
def test_lengths_are_rounded_to_few_sizes(length, size):
    assert Sizes(5000, flash_attention=True).cache_length(length) == size


def test_chunks_cover_the_prompt_and_fit_the_cache():
    for flash_attention in (True, False):
        sizes = Sizes(8192, flash_attention)
        for batch, length in ((1, 8191), (3, 5000), (64, 100), (256, 40), (300, 7)):
            chunk, cache_length = sizes.prefill_chunk(batch), sizes.cache_length(length + 1)
            steps = list(sizes.prefill_steps(length, batch, cache_length))
            assert [offset for offset, _ in steps] == list(range(0, length, chunk))
            assert all(min(length - offset, chunk) <= bucket <= cache_length for offset, bucket in steps)
            assert batch * chunk <= max(4096, 16 * batch)
            assert all(held <= (sizes.history(held) or cache_length) for held, _ in steps)


def shortage(error: OutOfDeviceMemoryError) -> tuple[int, int, int, int]:
    """Rows and positions that the message says would fit: of fewer rows, and of shorter ones."""
    found = re.search(r"(\d+) rows of (\d+) positions or (\d+) rows of (\d+) positions would fit", str(error))
    assert found is not None, str(error)
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize("tenths", [3, 5, 8])
def test_what_is_said_to_fit_does_fit(engine, monkeypatch, tenths):
    """Also after the lengths are rounded up, and one row more does not."""
    wide = Engine(engine.model)
    wide.sizes = Sizes(4096, flash_attention=True)
    batch, prompt, new = 12, 30, 2000
    whole = wide.estimate_memory(batch, wide.sizes.cache_length(prompt + new)).peak
    weights = wide.estimate_memory(1, 1).weights
    available = weights + (whole - weights) * tenths // 10
    monkeypatch.setattr(engine_module, "device_memory", lambda: available)
    with pytest.raises(OutOfDeviceMemoryError) as refused:
        wide.generate([[1] * prompt] * batch, max_tokens=new)
    rows, positions, all_rows, fewer = shortage(refused.value)
    assert (positions, all_rows) == (wide.sizes.cache_length(prompt + new), batch)
    assert wide.estimate_memory(rows, positions).peak <= available
    assert wide.estimate_memory(rows + 1, positions).peak > available
    assert wide.estimate_memory(batch, wide.sizes.cache_length(fewer)).peak <= available
    assert wide.estimate_memory(batch, wide.sizes.cache_length(fewer + 1)).peak > available
    assert "--kv-bits 8" in str(refused.value)


def test_an_int8_cache_is_no_advice_to_one_who_has_it(engine, monkeypatch):
    eight = Engine(engine.model, kv_bits=8)
    monkeypatch.setattr(engine_module, "device_memory", lambda: eight.estimate_memory(2, 96).peak)
    with pytest.raises(OutOfDeviceMemoryError, match=r"2 rows of 96 positions would fit$"):
        eight.generate([[1, 2, 3]] * 3, max_tokens=50)


def running_out(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes")


@pytest.mark.parametrize("where", ["cache", "prefill", "first_token", "decode"])
def test_running_out_of_memory_anywhere_says_what_would_fit(engine, monkeypatch, where):
    if where == "cache":
        monkeypatch.setattr(engine_module.KVCache, "zeros", running_out)
    elif where == "prefill":
        monkeypatch.setattr(engine.prefill, "run", running_out)
    else:
        monkeypatch.setattr(engine_module, where, running_out)
    message = "ran out of memory: 8 rows of 96 positions should need .* 7 rows of 96 positions would fit"
    with pytest.raises(OutOfDeviceMemoryError, match=message):
        engine.generate([[1, 2, 3]] * 8, max_tokens=50)


def test_a_batch_that_ran_out_can_be_tried_smaller(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "decode", running_out)
        with pytest.raises(OutOfDeviceMemoryError):
            engine.generate([[1, 2, 3]] * 3, max_tokens=5)
    assert len(engine.generate([[1, 2, 3]], max_tokens=5)[0].tokens) == 5


def test_other_errors_of_the_device_stay_what_they_are():
    def estimate(batch: int, context: int) -> MemoryEstimate:
        return MemoryEstimate(1, 1, 1)

    for message in (
        "INTERNAL: misaligned address",
        # A kernel asks for more of it than a multiprocessor has: fewer rows would not help.
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 163840, available: 101376",
    ):
        for manager in (explain_shortage(estimate, 1, 1), explain_shortage_of_weights("x")):
            with pytest.raises(jax.errors.JaxRuntimeError, match=message), manager:
                raise jax.errors.JaxRuntimeError(message)
    with (
        pytest.raises(OutOfDeviceMemoryError, match="weights of somewhere do not fit"),
        explain_shortage_of_weights("somewhere"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    require_memory(estimate, 1, 1, 3)
    with pytest.raises(OutOfDeviceMemoryError, match="not even one row"):
        require_memory(estimate, 1, 1, 2)
