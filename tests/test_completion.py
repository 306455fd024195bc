"""Text in, text out: stop strings, echo, why a text ended, options that there are not; the rest of loading a folder."""

import json
import re
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_chat_model import byte_tokenizer, save_tiny_chat_model

import mixllm_jax
from mixllm_jax import Completion, loading
from mixllm_jax.cli import main as cli
from mixllm_jax.device import UnsupportedDeviceError
from mixllm_jax.errors import CheckpointError, OptionError
from mixllm_jax.generation.memory import OutOfDeviceMemoryError
from mixllm_jax.generation.streaming import RowText, StopStrings
from pallas_kernels import registry

ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU computes in float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion")
    save_tiny_chat_model(path / "hf", seed=5)
    assert cli.main(["convert", "--from-hf", str(path / "hf"), "--out", str(path / "model")]) == 0
    return path / "model"


@pytest.fixture(scope="module")
def loaded(folder):
    return mixllm_jax.load(folder)


def read(stream) -> tuple[list[str], Completion]:
    """The pieces of a stream and its result."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


class TestStopStrings:
    """On text alone."""

    @pytest.mark.parametrize(
        ("strings", "text", "expected"),
        [
            (("cd",), "abcdef", "ab"),
            (("xyz",), "abcdef", "abcdef"),
            (("abab",), "ababab", ""),
            (("aab",), "aaab", "a"),  # the beginning that is held back is not always the longest text held
            (("bcd", "c"), "abcd", "ab"),  # the one that is complete first
            (("cd", "bcd"), "abcd", "a"),
            (("end",), "the en", "the en"),
            ((), "abc", "abc"),
        ],
    )
    @pytest.mark.parametrize("size", [1, 2, 3, 9])
    def test_the_text_ends_before_them_whatever_the_pieces(self, strings, text, expected, size):
        stop = StopStrings(strings)
        pieces = [stop.add(text[start : start + size]) for start in range(0, len(text), size)]
        assert stop.found == (expected != text)
        assert "".join(pieces) + stop.flush() == expected

    def test_nothing_is_shown_that_may_be_taken_back(self):
        stop = StopStrings(["STOP"])
        assert [stop.add(piece) for piece in ("a S", "TO", "ST", "OP", "b")] == ["a ", "", "STO", "", ""]
        assert stop.flush() == ""


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_row_ends_at_the_token_that_completes_a_stop_string(size):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("Zürich und Genf")["input_ids"]
    row = RowText(tokenizer, stop_tokens=(256,), stop_strings=["ich"])
    text = "".join(row.add(tokens[start : start + size]) for start in range(0, len(tokens), size)) + row.flush()
    assert (text, row.finish_reason) == ("Zür", "stop")
    assert tokenizer.decode(row.tokens) == "Zürich"


@pytest.mark.parametrize("strings", [(), ("never",)])
def test_a_stop_token_is_neither_text_nor_token(strings):
    tokenizer = byte_tokenizer()
    *tokens, stop = tokenizer("abcd")["input_ids"]  # an ordinary token: it would be visible
    row = RowText(tokenizer, stop_tokens=[stop], stop_strings=strings)
    assert row.add([*tokens, stop]) + row.flush() == "abc"
    assert (row.tokens, row.finish_reason) == (tokens, "stop")


def test_a_completion_says_what_became_of_each_prompt(loaded):
    prompts = ["Once upon a time", "Hi"]
    texts = loaded.generate(prompts, max_tokens=20)
    stop = texts[0][4:7]
    completions = loaded.complete(prompts, max_tokens=20, stop=stop)
    for prompt, text, completion in zip(prompts, texts, completions, strict=True):
        stopped = stop in text
        assert completion.text == text.split(stop)[0]
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert completion.prompt_tokens == len(loaded.encode(prompt))
        assert loaded.tokenizer.decode(completion.tokens) == (completion.text + stop if stopped else text)
        assert 0 < completion.first_token_seconds <= completion.seconds
    assert completions[0].finish_reason == "stop"
    assert loaded.generate(prompts, max_tokens=20, stop=[stop]) == [completion.text for completion in completions]


def test_streaming_gives_the_same_in_pieces(loaded):
    (whole,) = loaded.complete(["Once upon a time"], max_tokens=20, temperature=0.9, seed=3)
    pieces, result = read(loaded.stream("Once upon a time", max_tokens=20, temperature=0.9, seed=3))
    assert len(pieces) > 1
    assert "".join(pieces) == result.text == whole.text
    assert (result.tokens, result.finish_reason) == (whole.tokens, whole.finish_reason)
    stop = whole.text[5:8]
    pieces, result = read(loaded.stream("Once upon a time", max_tokens=20, temperature=0.9, seed=3, stop=stop))
    assert "".join(pieces) == result.text == whole.text.split(stop)[0]


def test_no_step_runs_once_all_rows_have_found_a_stop_string(loaded, monkeypatch):
    text = loaded.generate("Once upon a time", max_tokens=4)
    chunks = []
    stream = loaded.engine.stream

    def counted(*arguments, **options):
        for chunk in stream(*arguments, **options):
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(loaded.engine, "stream", counted)
    assert loaded.generate(["Once upon a time"] * 2, max_tokens=140, stop=text[0]) == ["", ""]
    assert len(chunks) == 1


def test_echo_begins_with_the_prompt(loaded):
    text = loaded.generate("Zürich ist", max_tokens=8)
    assert loaded.generate("Zürich ist", max_tokens=8, echo=True) == "Zürich ist" + text
    pieces, result = read(loaded.stream("Zürich ist", max_tokens=8, echo=True, stop="ist"))
    assert pieces[0] == "Zürich ist"  # at once; a stop string in the prompt does not count
    assert result.text == "".join(pieces) == "Zürich ist" + text.split("ist")[0]


def test_the_code_of_the_page_runs(loaded, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "python_api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.setattr(mixllm_jax, "load", lambda path: loaded, raising=False)
    page_names: dict = {}
    for block in blocks:
        exec(compile(block, "python_api.md", "exec"), page_names)
    assert "length" in capsys.readouterr().out
    found = page_names["log_probabilities"]
    logits = np.asarray(loaded.model(page_names["tokens"])[0][0, :-1], np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, expected[np.arange(len(found)), page_names["tokens"][0, 1:]], atol=1e-4)
    assert page_names["cache"].lengths.tolist() == [page_names["tokens"].shape[1] + 1]


def test_conversations_are_answered_in_a_batch(loaded):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    first, second = loaded.complete([conversation, conversation[1:]], max_tokens=8)
    assert first.text == loaded.generate("Hi?", chat=True, system="Be brief.", max_tokens=8)
    assert second.text == loaded.generate("Hi?", chat=True, max_tokens=8)
    assert first.prompt_tokens > second.prompt_tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_token": 3}, TypeError, "unknown option max_token: there are max_tokens"),
        ({"stop": ""}, OptionError, "stop string is empty"),
        ({"stop": ["a", ""]}, OptionError, "stop string is empty"),
        ({"chat": True, "echo": True}, OptionError, "leave out chat or echo"),
        ({"max_tokens": 160}, OptionError, "prompt 1 of 1 has 1 tokens, .* at most 159 new tokens"),
        ({"max_tokens": 0}, OptionError, "max-tokens"),
        ({"top_k": 1.5}, OptionError, "top-k must be .* found 1.5"),
        ({"seed": 0.5}, OptionError, "seed must be .* found 0.5"),
    ],
)
def test_options_that_cannot_work(loaded, options, error, message):
    with pytest.raises(error, match=message):
        loaded.generate("x", **options)
    with pytest.raises(error, match=message):
        loaded.stream("x", **options)  # not read: refused by the call


def test_without_a_number_of_tokens_the_context_is_used_up(loaded):
    (completion,) = loaded.complete(["x" * 150])
    assert (len(completion.tokens), completion.finish_reason) == (10, "length")
    with pytest.raises(OptionError, match="at most 10 new tokens"):
        loaded.generate("x" * 150, max_tokens=11)


def test_prompts_that_cannot_work(loaded):
    with pytest.raises(ValueError, match="a single text"):
        loaded.complete("x")
    with pytest.raises(ValueError, match="a single conversation"):
        loaded.complete([{"role": "user", "content": "x"}])
    with pytest.raises(OptionError, match="no prompt"):
        loaded.complete([])
    with pytest.raises(OptionError, match="prompt 1 of 1 is empty"):
        loaded.generate("")
    with pytest.raises(OptionError, match="prompt 1 of 1 has 200 tokens, but the context has 160"):
        loaded.generate("x" * 200)
    with pytest.raises(OptionError, match="its own system message"):
        loaded.complete([[{"role": "user", "content": "x"}]], system="y")


def test_the_command_stops_and_echoes(folder, loaded, capsys):
    text = loaded.generate("Hi", max_tokens=12)
    command = ["generate", str(folder), "--prompt", "Hi", "--max-tokens", "12"]
    assert cli.main([*command, "--stop", text[3:5], "--stop", "unlikely", "--echo"]) == 0
    assert capsys.readouterr().out == "Hi" + text.split(text[3:5])[0] + "\n"
    assert cli.main(["generate", "nowhere", "--prompt", "Hi", "--stop", ""]) == 1
    assert "stop string is empty" in capsys.readouterr().err  # before a model is looked for


@pytest.mark.parametrize("content", ["[", "[]", '{"eos_token_id": "end"}', '{"eos_token_id": [1, null]}'])
def test_a_damaged_generation_config_is_named(folder, tmp_path, content):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        mixllm_jax.load(copy).generate("x")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 256]}))
    assert mixllm_jax.load(copy).stop_tokens == (7, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be .* found 'int8'"),
        ({"dtype": "float64"}, "dtype must be .* found 'float64'"),
        pytest.param({"dtype": "float16"}, "float16 cannot .* on a CPU", marks=ON_CPU),
        ({"dtype": "half-full"}, "dtype must be .* found 'half-full'"),
        ({"implementation": "cuda"}, "implementation must be one of auto, xla.* found 'cuda'"),
        ({"kv_bits": 4}, "kv-bits must be 8 or 16, found 4"),
        ({"kv_bits": "8"}, "kv-bits must be 8 or 16, found '8'"),
        ({"lm_head_bits": 4}, "lm-head-bits must be 8 or 16, found 4"),
    ],
)
def test_loading_options_are_checked_before_the_folder_is_read(folder, monkeypatch, options, message):
    monkeypatch.setattr(loading.Decoder, "from_parameters", None)
    with pytest.raises(OptionError, match=message):
        mixllm_jax.load(folder, **options)


def test_a_kernel_asked_for_that_cannot_run_is_refused_before_the_weights_are_read(folder, monkeypatch):
    if jax.default_backend() == "gpu":
        pytest.skip("Triton's kernels run here")
    monkeypatch.setattr(loading.Decoder, "from_parameters", None)
    with pytest.raises(NotImplementedError, match="triton"):
        mixllm_jax.load(folder, implementation="triton", lm_head_bits=8)


def test_an_old_gpu_takes_a_float_model_but_no_eight_bit_head(folder, monkeypatch):
    for name, value in (("default_platform", "gpu"), ("device_kind", "Tesla T4"), ("compute_capability", (7, 5))):
        monkeypatch.setattr(registry, name, lambda value=value: value)
    monkeypatch.setattr(loading.Decoder, "from_parameters", lambda *_: "model")
    assert mixllm_jax.load(folder).model == "model"
    with pytest.raises(UnsupportedDeviceError, match=r"Tesla T4 has compute capability 7\.5"):
        mixllm_jax.load(folder, lm_head_bits=8)


def test_a_folder_quantised_in_groups_that_no_kernel_takes_is_refused(folder, monkeypatch):
    reader = loading.CheckpointReader(folder)
    metadata = {**reader.metadata, "kind": "quantized", "quantization": {"group_size": 48, "activation_bits": 8}}
    stub = types.SimpleNamespace(metadata=metadata, config=reader.config, kind="quantized", path=folder)
    monkeypatch.setattr(loading, "CheckpointReader", lambda _: stub)
    for name, value in (("default_platform", "gpu"), ("compute_capability", (9, 0))):
        monkeypatch.setattr(registry, name, lambda value=value: value)
    with pytest.raises(UnsupportedDeviceError, match="groups of 48, but the kernels take groups of 32, 64, 128"):
        mixllm_jax.load(folder)


def test_weights_that_do_not_fit_say_so(folder, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 3.00GiB")

    monkeypatch.setattr(loading.Decoder, "from_parameters", full)
    with pytest.raises(OutOfDeviceMemoryError, match=f"weights of {folder} do not fit"):
        mixllm_jax.load(folder)


def test_loading_keeps_compiled_programs_unless_told_where(folder, tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        mixllm_jax.load(folder)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mixllm" / "compiled")
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        mixllm_jax.load(folder)
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_chat_survives_a_turn_without_memory_and_one_that_is_stopped(folder, capsys, monkeypatch):
    lines = iter(["Hi", "Hello?", "And?", "/exit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    asked = []
    stream = mixllm_jax.LoadedModel.stream

    def failing(self, messages, **options):
        asked.append([message["content"] for message in messages])
        for index, piece in enumerate(stream(self, messages, **options)):
            if len(asked) == 1:
                raise OutOfDeviceMemoryError("the device ran out of memory")
            if len(asked) == 2 and index == 1:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(mixllm_jax.LoadedModel, "stream", failing)
    assert cli.main(["chat", str(folder), "--temperature", "0", "--max-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "error: the device ran out of memory" in out
    assert "(stopped)" in out
    assert asked[1] == ["Hello?"]  # the failed turn is forgotten
    assert asked[2][::2] == ["Hello?", "And?"]
    assert asked[2][1]  # what was read of the stopped answer is kept
