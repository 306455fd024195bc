"""A trained model answers as it is known to: float, and from packed weights."""

import pytest

import mixllm_jax
from mixllm_jax.cli import main as cli

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("smollm2")]  # one worker converts the model
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."  # of llama.cpp and of transformers, greedily


def test_float_model_by_command_and_by_python(smollm2_folder, capsys):
    capsys.readouterr()
    assert cli.main(["generate", str(smollm2_folder), "--chat", "--prompt", QUESTION, "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert "Paris" in mixllm_jax.load(smollm2_folder).generate(QUESTION, chat=True, max_tokens=24)


def test_quantised_model(smollm2_folder, tmp_path, capsys):
    out = str(tmp_path / "w8a8")
    assert cli.main(["quantize", str(smollm2_folder), "--out", out, "--bits", "8", "--method", "rtn"]) == 0
    capsys.readouterr()
    # Prompts whose answer is certain: the question above is a near-tie between languages even for the float model.
    prompts = ["--prompt", "The capital of France is", "--prompt", "To be or not to"]
    assert cli.main(["generate", out, *prompts, "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out == "=== The capital of France is\n Paris\n\n=== To be or not to\n be\n\n"
