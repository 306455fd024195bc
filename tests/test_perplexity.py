"""Perplexity, divergence and agreement against float64 computations on transformers' logits."""

import json
import re

import jax
import numpy as np
import pytest
from tiny_chat_model import byte_tokenizer, reference_model, save_tiny_chat_model

from mixllm_jax.cli import main as cli
from mixllm_jax.evaluation import perplexity
from mixllm_jax.evaluation.perplexity import cut_sequences, format_table

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, and a text."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text.txt").write_text(TEXT)
    for name, seed in (("first", 0), ("second", 1)):
        save_tiny_chat_model(folder / f"hf-{name}", seed)
        assert cli.main(["convert", "--from-hf", str(folder / f"hf-{name}"), "--out", str(folder / name)]) == 0
    return folder


def log_probabilities(model, sequences: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(sequences.astype(np.int64))).logits[:, :-1]
    logits = logits.numpy().astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_command_gives_the_numbers_of_the_reference(folder, capsys):
    first, second = reference_model(folder / "hf-first"), reference_model(folder / "hf-second")
    command = ["perplexity", str(folder / "first"), str(folder / "second"), "--text", str(folder / "text.txt")]
    sizes = ["--samples", "3", "--sequence-length", str(LENGTH)]
    assert cli.main([*command, *sizes, "--json", str(folder / "out.json")]) == 0

    tokens = byte_tokenizer()(TEXT)["input_ids"][: 3 * LENGTH]
    sequences = np.asarray(tokens).reshape(3, LENGTH)
    p, q = log_probabilities(first, sequences), log_probabilities(second, sequences)
    targets = sequences[:, 1:, None]
    expected = {
        "perplexity": [np.exp(-np.take_along_axis(x, targets, -1).mean()) for x in (p, q)],
        "kl": [None, (np.exp(p) * (p - q)).sum(-1).mean()],
        "top1_agreement": [None, (p.argmax(-1) == q.argmax(-1)).mean()],
    }
    result = json.loads((folder / "out.json").read_text())
    assert result["settings"]["samples"] == 3
    for key, (of_first, of_second) in expected.items():
        found = [row[key] for row in result["rows"]]
        assert found[0] == (None if of_first is None else pytest.approx(of_first, rel=1e-4))
        assert found[1] == pytest.approx(of_second, rel=1e-4)
    table = capsys.readouterr().out
    assert f"{expected['perplexity'][1]:.2f}"[:-1] in table


def test_a_model_is_not_far_from_itself(folder, tmp_path, capsys):
    link = tmp_path / "same"
    link.symlink_to(folder / "first")
    command = ["perplexity", str(folder / "first"), str(link), "--text", str(folder / "text.txt")]
    assert cli.main([*command, "--sequence-length", "64", "--out", str(tmp_path / "out.json")]) == 0
    row = json.loads((tmp_path / "out.json").read_text())["rows"][1]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["top1_agreement"] == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--text", "{binary}"], "not UTF-8"),
        (["--text", "{text}", "--samples", "100"], "100 x 160 are needed"),
        (["--text", "{text}", "--sequence-length", "1"], "at least 2"),
        (["--text", "{text}", "--samples", "0"], "samples must be at least 1"),
        (["--text", "{text}", "--sequence-length", "200"], "context of .*160"),
        (["--text", "{text}", "--out", "/no/such/folder/x.json"], "does not exist"),
        (["--text", "{text}", "--out", "/"], "is a folder"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("mixllm_jax.loading.load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00abc")
    names = {"{binary}": str(tmp_path / "binary"), "{text}": str(folder / "text.txt")}
    assert cli.main(["perplexity", str(folder / "first"), *(names.get(option, option) for option in options)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_file_that_cannot_be_written_is_found_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # permissions do not bind root, who may run the tests
    command = ["perplexity", str(folder / "first"), "--text", str(folder / "text.txt")]
    assert cli.main([*command, "--out", str(tmp_path / "out.json")]) == 1
    assert "out.json cannot be written: no permission" in capsys.readouterr().err


def test_without_a_text_and_a_length(folder, tmp_path, capsys):
    """The text of the package, in sequences as long as the context of these models."""
    out = tmp_path / "out.json"
    assert cli.main(["perplexity", str(folder / "first"), "--samples", "2", "--out", str(out)]) == 0
    settings = json.loads(out.read_text())["settings"]
    assert (settings["text"], settings["samples"], settings["sequence_length"]) == ("embedded", 2, 160)


def test_a_pass_without_memory_says_what_to_change(folder, capsys, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(perplexity, "_compare", full)
    command = ["perplexity", str(folder / "first"), str(folder / "second"), "--text", str(folder / "text.txt")]
    assert cli.main([*command, "--sequence-length", "64"]) == 1
    assert "in a pass over 64 tokens with 2 models on it: choose a shorter" in capsys.readouterr().err


def test_sequences_do_not_overlap():
    sequences = cut_sequences(list(range(10)), None, 3, "text")
    np.testing.assert_array_equal(sequences, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(cut_sequences(list(range(10)), 2, 3, "text"), [[0, 1, 2], [3, 4, 5]])


def test_table_leaves_out_what_no_row_has():
    table = format_table([{"name": "a", "perplexity": 2.0}, {"name": "bb", "perplexity": 3.5, "kl": 0.25}])
    header, _, first, second = table.splitlines()
    assert header.split() == ["model", "perplexity", "KL", "divergence"]
    assert first.split() == ["a", "2.000", "-"]
    assert second.split() == ["bb", "3.500", "0.2500"]
