"""Texts are judged token by token; what is no near-tie is an error. Gaps against `transformers`."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from flax import nnx
from tiny_chat_model import reference_model, save_tiny_chat_model

import mixllm_jax
from mixllm_jax.cli import main as cli
from mixllm_jax.errors import OptionError
from mixllm_jax.evaluation import same_text, text_judgement
from mixllm_jax.evaluation.text_judgement import DifferentTextError, Text, judge

LENGTH = 12
pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("same_text")
    save_tiny_chat_model(path / "hf")
    assert cli.main(["convert", "--from-hf", str(path / "hf"), "--out", str(path / "float")]) == 0
    quantize = ["quantize", str(path / "float"), "--out", str(path / "w4.4"), "--bits", "4.4", "--method", "rtn"]
    assert cli.main([*quantize, "--samples", "2", "--sequence-length", "48"]) == 0
    return path


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(same_text, "PROMPTS", same_text.PROMPTS[:3])


def load(folder):
    return mixllm_jax.load(folder, dtype="float32", lm_head_bits=16, embedding_bits=16)


@pytest.fixture(scope="module")
def quantised(folder):
    return load(folder / "w4.4")


@pytest.fixture(scope="module")
def texts(quantised):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_text, "PROMPTS", same_text.PROMPTS[:3])
        return same_text.write(quantised, LENGTH)


def test_own_text_is_the_same_up_to_near_ties(quantised, texts):
    judgement = judge(quantised, texts)
    judgement.check()
    summary = judgement.summary()
    assert (summary["texts"], summary["tokens"], summary["different"]) == (3, 3 * LENGTH, 0)
    assert summary["tokens_that_differ"] == sum(map(len, judgement.differences))
    assert 0 < summary["tokens_with_a_lead_beyond_the_limit"] <= 3 * LENGTH  # where it can fail by the runner-up
    assert text_judgement._all_logits._cache_size() <= 2  # this one, and perhaps another test's


def test_wrong_token_is_named(quantised, texts):
    clean = judge(quantised, texts)
    place = int(clean.leads[LENGTH : 2 * LENGTH].argmax())
    assert clean.leads[LENGTH + place] > clean.limit
    tokens = list(texts[1].tokens)
    right = tokens[place]
    tokens[place] = (right + 1) % 256
    judgement = judge(quantised, [texts[0], Text(texts[1].prompt, tokens), texts[2]])
    (_, worst), *_ = judgement.different()
    with pytest.raises(DifferentTextError, match=f"place {worst.place}, the text has token {worst.token}") as error:
        judgement.check()
    assert repr(texts[1].prompt) in str(error.value)
    assert f"{worst.gap:.3f}" in str(error.value)
    assert f"{judgement.noise:.3f}" in str(error.value)
    (found,) = [d for d in judgement.differences[1] if d.place == place]
    assert (found.token, found.choice) == (tokens[place], right)
    assert found.gap > clean.leads[LENGTH + place] - 1e-3


def test_changed_layer_is_different(quantised, texts):
    """The reference is what has another layer here: to the criterion it is the same."""
    model = nnx.clone(quantised.model)
    parameter = model.layers[1].mlp.down_proj.weight
    packed = parameter.get_value()
    parameter.set_value(dataclasses.replace(packed, scales4=packed.scales4 * 3, scales8=packed.scales8 * 3))
    judgement = judge(dataclasses.replace(quantised, model=model), texts)
    with pytest.raises(DifferentTextError):
        judgement.check()


def test_gaps_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    loaded = load(folder / "float")
    tokens = np.random.default_rng(0).integers(0, 256, LENGTH).tolist()
    judgement = judge(loaded, [Text("Once", tokens)])
    prompt = loaded.encode("Once")
    with torch.no_grad():
        logits = reference_model(folder / "hf")(torch.tensor([prompt + tokens])).logits[0].numpy()
    logits = logits[len(prompt) - 1 : -1]
    differences = judgement.differences[0]
    assert [d.place for d in differences] == np.flatnonzero(logits.argmax(-1) != tokens).tolist()
    assert [d.choice for d in differences] == [int(logits[d.place].argmax()) for d in differences]
    gaps = [logits[d.place].max() - logits[d.place, tokens[d.place]] for d in differences]
    np.testing.assert_allclose([d.gap for d in differences], gaps, atol=1e-3)
    np.testing.assert_allclose(judgement.leads, np.diff(np.sort(logits)[:, -2:])[:, 0], atol=1e-3)


def test_noise_is_that_of_quantised_activations(folder, quantised, texts):
    assert 0 < judge(load(folder / "float"), texts).noise < judge(quantised, texts).noise / 10


def test_nan_is_different(quantised, texts):
    judgement = judge(quantised, texts)
    nan = text_judgement.Difference(0, 1, 2, float("nan"))
    with pytest.raises(DifferentTextError):
        dataclasses.replace(judgement, differences=[[nan], [], []]).check()


def test_texts_that_do_not_suit_the_model(quantised):
    for tokens, message in (([], "without tokens"), ([257], "beyond 0 to 256"), ([0] * 160, "longer than")):
        with pytest.raises(OptionError, match=message):
            judge(quantised, [Text("Once", tokens)])


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["same_text", *map(str, words)])
    return same_text.main()


def test_command_writes_and_judges(folder, tmp_path, monkeypatch, capsys):
    texts, out = tmp_path / "texts.json", tmp_path / "results.json"
    model = folder / "w4.4"
    assert run(monkeypatch, "write", model, texts, "--length", LENGTH, "--dtype", "float32", "--kv-bits", 8) == 0
    made = json.loads(texts.read_text())
    assert (made["dtype"], made["kv_bits"], made["lm_head_bits"]) == ("float32", 8, 16)
    assert [len(text["tokens"]) for text in made["texts"]] == [LENGTH] * 3
    assert run(monkeypatch, "judge", model, texts, "--out", out) == 0
    made["texts"][2]["tokens"] = [0] * LENGTH
    texts.write_text(json.dumps(made))
    capsys.readouterr()
    assert run(monkeypatch, "judge", model, texts, "--out", out) == 1
    assert "by more than a near-tie" in capsys.readouterr().err
    good, bad = json.loads(out.read_text())
    assert good["different"] == 0 < bad["different"]
    assert good["reference"]["kv_bits"] == 8
    assert [row["tokens"] for row in bad["prompts"]] == [text["tokens"] for text in made["texts"]]


def test_file_without_texts_is_named(folder, tmp_path, monkeypatch, capsys):
    for content in ("nothing", "[]", "{}", '{"texts": [{"prompt": "Once"}]}', '{"texts": []}'):
        (tmp_path / "texts.json").write_text(content)
        assert run(monkeypatch, "judge", folder / "w4.4", tmp_path / "texts.json") == 1
        assert "texts.json has no texts of `same_text write`" in capsys.readouterr().err
