"""inspect, generate and perplexity on quantised folders, checked against the arrays and the float model."""

import json
import shlex
import sys

import numpy as np
import pytest
from tiny_chat_model import save_tiny_chat_model

import mixllm_jax
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.cli import main as cli
from pallas_kernels.packing import PackedWeight

pytestmark = pytest.mark.quick_compile

BITS = {"w4": "4", "w5": "5", "w8": "8"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model and three quantisations of it."""
    folder = tmp_path_factory.mktemp("quantized")
    save_tiny_chat_model(folder / "hf")
    assert cli.main(["convert", "--from-hf", str(folder / "hf"), "--out", str(folder / "float")]) == 0
    calibration = ["--samples", "2", "--sequence-length", "48"]
    for name, bits in BITS.items():
        command = ["quantize", str(folder / "float"), "--out", str(folder / name), "--bits", bits, "--method", "rtn"]
        assert cli.main([*command, *calibration]) == 0
    return folder


def test_inspect_counts_what_the_arrays_hold(folders, capsys):
    capsys.readouterr()
    assert cli.main(["inspect", str(folders / "w5"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    linears = [
        (name, value)
        for _, part in CheckpointReader(folders / "w5").read_parts()
        for name, value in part.items()
        if isinstance(value, PackedWeight)
    ]
    assert len(linears) == 8
    bits = sum(
        8 * array.nbytes
        for _, weight in linears
        for array in (weight.codes4, weight.codes8, weight.scales4, weight.scales8, weight.zero_points4)
    )
    weights = sum(weight.out_features * weight.in_features for _, weight in linears)
    eight_bit = sum(weight.n8 for _, weight in linears)
    report = facts["quantization_report"]
    assert report["bits_per_weight"] == pytest.approx(bits / weights)
    assert report["channel_share"] == pytest.approx(eight_bit / sum(weight.out_features for _, weight in linears))
    assert report["channel_share"] == pytest.approx(0.25, abs=0.005)
    down = [weight.n8 / weight.out_features for name, weight in linears if name == "mlp.down_proj.weight"]
    assert [layer["down"] for layer in report["share_by_layer"]] == pytest.approx(down)


def test_inspect_prints_layers_and_draws_them(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs the plot extra")
    capsys.readouterr()
    plot = tmp_path / "shares.png"
    assert cli.main(["inspect", str(folders / "w5"), "--layers", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[header].split()[1:] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["0", "1"]
    assert any(line.startswith("bits per weight") for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(folders / "w5"), "--plot", str(tmp_path / "no" / "folder.png")]) == 1
    assert "--plot" in capsys.readouterr().err


def test_plot_without_matplotlib_names_the_extra(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["inspect", str(folders / "w5"), "--plot", str(tmp_path / "shares.png")]) == 1
    assert "mixllm-jax[plot]" in capsys.readouterr().err


def test_one_call_loads_float_and_quantised_models(folders):
    loaded = {name: mixllm_jax.load(folders / name) for name in ("float", "w5")}
    assert {name: model.metadata["kind"] for name, model in loaded.items()} == {"float": "float", "w5": "quantized"}
    assert {name: model.table_bits for name, model in loaded.items()} == {"float": (16, 16), "w5": (8, 8)}
    whole = mixllm_jax.load(folders / "w5", lm_head_bits=16)
    assert whole.table_bits == (16, 16)  # the embedding of this model is its output head
    assert isinstance(loaded["w5"].model.embedding.weight.get_value(), PackedWeight)
    assert whole.model.embedding.weight.get_value().shape == (257, 64)


def test_generation_from_packed_weights(folders, capsys):
    """Eight bits change logits so little that most greedy choices stay; a wrong unpacking would change them all."""
    texts = {}
    for name in ("float", "w8"):
        capsys.readouterr()
        assert cli.main(["generate", str(folders / name), "--prompt", "Hello there", "--max-tokens", "8"]) == 0
        texts[name] = capsys.readouterr().out
    assert texts["w8"][:3] == texts["float"][:3]


def test_more_bits_are_closer_to_the_float_model(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    names = [str(folders / name) for name in ("float", *BITS)]
    command = ["perplexity", *names, "--text", str(tmp_path / "text.txt"), "--sequence-length", "96"]
    command += ["--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["mixllm", *command])
    assert cli.main(command) == 0
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["command"] == shlex.join(["mixllm", *command])
    rows = stored["rows"]
    assert [(row["lm_head_bits"], row["embedding_bits"]) for row in rows] == [(16, 16), (8, 8), (8, 8), (8, 8)]
    kl = [row["kl"] for row in rows[1:]]
    assert kl[0] > kl[1] > kl[2] > 0
    bits = [row["bits_per_weight"] for row in rows]
    assert bits[0] is None
    np.testing.assert_array_less(bits[1:3], bits[2:4])
    assert "bits per weight" in capsys.readouterr().out
