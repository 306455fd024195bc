"""The commands, end to end on a tiny converted model, against transformers' own text."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from tiny_chat_model import byte_tokenizer, reference_model, save_tiny_chat_model

import mixllm_jax
from mixllm_jax import loading
from mixllm_jax.cli import main as cli
from mixllm_jax.cli.main import VERBS
from mixllm_jax.cli.runner import run_command
from mixllm_jax.errors import CheckpointError
from mixllm_jax.models.presets import PRESETS

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved model in `hf`, and `model` converted from it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_chat_model(folder / "hf")
    assert cli.main(["convert", "--from-hf", str(folder / "hf"), "--out", str(folder / "model")]) == 0
    return folder


@pytest.fixture(scope="session")
def folder(tiny):
    return str(tiny / "model")


@pytest.fixture(scope="session")
def reference(tiny):
    return reference_model(tiny / "hf")


def reference_text(model, prompt: str, max_tokens: int) -> str:
    """What transformers continues greedily."""
    import torch

    tokenizer = byte_tokenizer()
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(tokens, max_new_tokens=max_tokens, do_sample=False, attention_mask=torch.ones_like(tokens))
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def test_generate_one_prompt(reference, folder, capsys):
    assert cli.main(["generate", folder, "--prompt", "Once upon", "--max-tokens", "20"]) == 0
    assert capsys.readouterr().out == reference_text(reference, "Once upon", 20) + "\n"


def test_generate_a_batch(reference, folder, capsys):
    prompts = ["One", "A longer second prompt"]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert cli.main(["generate", folder, *options, "--max-tokens", "12"]) == 0
    expected = "".join(f"=== {prompt}\n{reference_text(reference, prompt, 12)}\n\n" for prompt in prompts)
    assert capsys.readouterr().out == expected


def test_generate_under_the_chat_template(reference, folder, capsys):
    command = ["generate", folder, "--chat", "--system", "Be brief.", "--prompt", "Hi?", "--max-tokens", "12"]
    assert cli.main(command) == 0
    prompt = "<system>Be brief.\n<user>Hi?\n<assistant>"
    assert capsys.readouterr().out == reference_text(reference, prompt, 12) + "\n"


def test_generate_with_a_seed(folder, capsys):
    def text(seed: str) -> str:
        options = ["--temperature", "1.3", "--top-k", "50", "--top-p", "0.9", "--max-tokens", "16"]
        assert cli.main(["generate", folder, "--prompt", "x", "--seed", seed, *options]) == 0
        return capsys.readouterr().out

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_python_interface_streams_what_it_generates(reference, folder):
    model = mixllm_jax.load(folder)
    assert model.metadata["kind"] == "float"
    expected = reference_text(reference, "Hello", 16)
    assert model.generate("Hello", max_tokens=16) == expected
    assert model.generate(["Hello"], max_tokens=16) == [expected]
    assert "".join(model.stream("Hello", max_tokens=16)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x" * 100, "--max-tokens", "100"], "200 positions.*160"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--system", "y"], "--chat"),
        (["--prompt", "x", "--max-tokens", "0"], "max-tokens"),
    ],
)
def test_generate_with_bad_options(folder, capsys, arguments, message):
    assert cli.main(["generate", folder, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.parametrize("option", ["batch", "context", "kv-bits", "lm-head-bits"])
def test_inspect_does_not_ignore_options_of_an_estimate_that_nobody_asked_for(folder, capsys, option):
    assert cli.main(["inspect", folder, f"--{option}", "8"]) == 1
    assert f"--{option} is for the estimate of memory: add --memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--prompt", "x", "--system", "y"], "add --chat"),
        (["generate", "--prompt", "x", "--chat", "--echo"], "leave out chat or echo"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "max-tokens"),
        (["chat", "--max-tokens", "0"], "max-tokens"),
    ],
)
def test_options_are_refused_before_the_model_is_loaded(folder, capsys, monkeypatch, command, message):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load", load)
    assert cli.main([*command, folder]) == 1
    assert message in capsys.readouterr().err


def test_inspect_a_float_model(folder, capsys):
    assert cli.main(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "float llama" in out
    assert "160 tokens" in out
    assert cli.main(["inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "float"
    assert facts["config"]["hidden_size"] == 64
    assert cli.main(["inspect", folder, "--layers"]) == 1
    assert "no 8-bit shares" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "chat", "inspect", "perplexity"])
def test_folder_that_is_no_model(tmp_path, capsys, verb):
    (tmp_path / "text").write_text("some text " * 200)
    options = {"generate": ["--prompt", "x"], "perplexity": ["--text", str(tmp_path / "text")]}.get(verb, [])
    assert cli.main([verb, str(tmp_path), *options]) == 1
    assert "not a model folder" in capsys.readouterr().err


def test_folder_without_tokenizer(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert cli.main(["generate", str(copy), "--prompt", "x"]) == 1
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ([], "quantize a model folder"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate"], "mixllm generate"),
        (["generate", "x", "--prompt", "y", "--no-such-option"], "mixllm generate: error: unrecognized arguments"),
        (["--no-such-option", "generate", "x", "--prompt", "y"], "mixllm generate: error: unrecognized arguments"),
    ],
)
def test_usage_errors_exit_with_2_and_show_the_usage(capsys, command, shown):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(command)
    assert exit_info.value.code == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_spells_as_the_verbs_do(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    shown = capsys.readouterr().out
    assert f"usage: mixllm {verb}" in shown
    assert "quantis" not in shown


def test_help_imports_no_jax():
    code = (
        "import sys\nfrom mixllm_jax.cli.main import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "quantize" in done.stdout


def test_exit_codes(capsys):
    def fail(error: BaseException) -> int:
        def command() -> None:
            raise error

        return run_command(command)

    assert run_command(lambda: None) == 0
    assert fail(CheckpointError("what and why")) == 1
    assert capsys.readouterr().err == "error: what and why\n"
    assert fail(NotImplementedError("no GPU here")) == 1
    assert fail(KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert fail(PermissionError(13, "Permission denied", "/no/entry")) == 1
    assert capsys.readouterr().err == "error: /no/entry: Permission denied\n"
    with pytest.raises(OSError, match="of no file"):
        fail(OSError("of no file"))
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        fail(ZeroDivisionError())


def test_chat_remembers_and_begins_anew(reference, folder, capsys, monkeypatch):
    lines = iter(["Hi", "And?", "/reset", "Hi", "/exit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    assert cli.main(["chat", folder, "--temperature", "0", "--max-tokens", "5"]) == 0
    out = capsys.readouterr().out
    first = reference_text(reference, "<user>Hi\n<assistant>", 5)
    second = reference_text(reference, f"<user>Hi\n<assistant>{first}\n<user>And?\n<assistant>", 5)
    assert out.count(first) >= 2
    assert second in out


def test_every_verb_has_its_two_functions():
    for name, (module, _) in cli.VERBS.items():
        verb = importlib.import_module(module)
        assert callable(verb.add_arguments), name
        assert callable(verb.run), name


def test_generate_with_random_weights(capsys, monkeypatch):
    tiny = dataclasses.replace(
        PRESETS["llama-3.1-8b"], num_layers=1, hidden_size=64, intermediate_size=64, num_heads=2, num_kv_heads=1,
        head_dim=32, vocab_size=80,
    )  # fmt: skip
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    command = ["generate", "--random-weights", "tiny", "--prompt", "Hello, you", "--max-tokens", "9"]
    assert cli.main(command) == 0
    tokens = [int(word) for word in capsys.readouterr().out.split()]
    assert len(tokens) == 9
    assert all(0 <= token < 80 for token in tokens)
    assert cli.main([*command, "--prompt", "x", "--scheme", "bf16"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"1:", "2:"}
    assert cli.main([*command, "--chat"]) == 1
    assert "chat template" in capsys.readouterr().err
    assert cli.main(["generate", "--prompt", "x"]) == 1
    assert "--random-weights" in capsys.readouterr().err
    assert cli.main(["generate", "folder", "--prompt", "x", "--scheme", "W8A8"]) == 1
    assert "leave --scheme out" in capsys.readouterr().err


def test_an_interrupt_during_an_import_ends_at_once_even_where_the_module_hides_it(tmp_path):
    (tmp_path / "native.py").write_text(
        "import signal\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n"
        "except BaseException:\n    raise ImportError('while initializing the extension')\n"
    )
    code = (
        "import sys; from mixllm_jax.cli.runner import run_command; sys.exit(run_command(lambda: __import__('native')))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")


def test_an_interrupt_elsewhere_is_an_exception_that_can_be_cleaned_up_after():
    cleaned = []

    def command():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            cleaned.append(True)

    assert run_command(command) == 130
    assert cleaned
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
