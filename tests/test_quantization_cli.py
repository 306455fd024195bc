"""`mixllm quantize` and `mixllm accuracy` as a user calls them: what they print, and what they refuse."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_chat_model import save_tiny_chat_model

import mixllm_jax.evaluation.accuracy as accuracy
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.cli.main import main

pytestmark = pytest.mark.quick_compile

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. " * 9
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `float`, a converted model with a tokenizer of bytes, and `text.txt`."""
    folder = tmp_path_factory.mktemp("quantize")
    (folder / "hf").mkdir()
    save_tiny_chat_model(folder / "hf")
    assert main(["convert", "--from-hf", str(folder / "hf"), "--out", str(folder / "float")]) == 0
    (folder / "text.txt").write_text(TEXT)
    return folder


SMALL = ["--samples", "2", "--sequence-length", "32"]


def test_quantize_prints_what_it_reached(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w4.4"
    assert main(["quantize", str(folder / "float"), "--out", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "W4.4A8 by gptq, groups of 32 (the largest that divides all layers)" in printed
    assert "2 x 32 tokens of the embedded text" in printed
    report = CheckpointReader(out).metadata["quantization_report"]
    assert f"{report['bits_per_weight']:.3f} (with scales and zero points)" in printed
    assert f"{100 * report['channel_share']:.2f} % of the output channels" in printed
    for kind in ("q", "k", "v", "o", "gate", "up", "down"):
        assert f" {kind} {100 * report['share_by_kind'][kind]:.1f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3.5"], "between 4 and 8, found 3.5"),
        (["--bits", "9"], "between 4 and 8, found 9"),
        (["--eight-bit-share", "1.5"], "between 0 and 1"),
        (["--group-size", "64"], "does not divide .* use 32"),
        (["--group-size", "48"], "one of 32, 64, 128"),
        (["--bits", "nan"], "between 4 and 8, found nan"),
        (["--seed", "-1"], r"--seed must be between 0 and 2\*\*32 - 1, found -1"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--sequence-length", "400"], "exceeds the model's context of 160"),
        (["--samples", "99", "--sequence-length", "32"], "fewer --samples"),
        (["--calibration", "nothing.txt"], "no such file"),
        (["--salience", "nothing"], "no such file"),
        (["--salience", __file__], r"not the salience file of a quantized model; leave"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if "--calibration" not in options:
        options = [*options, "--calibration", str(folder / "text.txt")]
    assert main(["quantize", str(folder / "float"), "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_float_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(folder / "hf"), "--out", str(tmp_path / "out")]) == 1
    assert "convert --from-hf" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwrite(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(folder / "float"), "--out", str(tmp_path / "out"), "--method", "rtn", "--bits"]
    assert main([*command, "4"]) == 0
    before = (tmp_path / "out" / "mixllm.json").read_bytes()
    assert main([*command, "8"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mixllm.json").read_bytes() == before
    assert main([*command, "8", "--overwrite"]) == 0
    assert CheckpointReader(tmp_path / "out").metadata["quantization"]["eight_bit_share"] == 1


def test_ctrl_c_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixllm_jax.quantization import sweep

    command = ["quantize", str(folder / "float"), "--out", str(tmp_path / "out"), *SMALL, "--bits", "4"]
    original = sweep.HessianSum

    def interrupted(in_features: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "HessianSum", interrupted)
    assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sweep, "HessianSum", original)
    assert main(command) == 0
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequence-length", "400"], "exceeds the model's context of 160"),
        (["--bits", "4.4", "9"], "between 4 and 8, found 9"),
        (["--out", "{tmp_path}"], "is a folder; give the name of a file in it"),
        (["--out", "/no/such/folder/x.json"], "does not exist"),
        (["--work", "{folder}/text.txt"], "is not a folder"),
        (["--calibration", "{folder}"], "is a folder; give a text file in it"),
    ],
)
def test_accuracy_refuses_what_cannot_work_before_it_quantises(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    options = [option.format(tmp_path=tmp_path, folder=folder) for option in options]
    command = ["accuracy", str(folder / "float"), "--text", str(folder / "text.txt"), *SMALL]
    assert main([*command, "--work", str(tmp_path / "work"), *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_accuracy_of_a_quantised_folder_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(folder / "float"), "--out", str(tmp_path / "w4"), "--method", "rtn", "--bits", "4"]
    assert main(command) == 0
    assert main(["accuracy", str(tmp_path / "w4"), "--text", str(folder / "text.txt"), *SMALL]) == 1
    assert "is quantized already; accuracy needs the float model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w4"]


def test_accuracy_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RTN W4A16", "MixLLM W4.4A8", "W4.4A8, per-layer allocation")
    monkeypatch.setattr(accuracy, "ROWS", tuple(row for row in accuracy.ROWS if row.name in names))
    command = ["accuracy", str(folder / "float"), "--text", str(folder / "text.txt"), *SMALL]
    command += ["--out", str(tmp_path / "table.json"), "--work", str(tmp_path / "work")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert tuple(rows) == ("float", *names)
    assert rows["float"]["kl"] is None
    assert rows["float"]["bits_per_weight"] is None
    for name in names:
        assert rows[name]["kl"] > 0
        assert 0 < rows[name]["top1_agreement"] <= 1
        assert rows[name]["perplexity_ratio"] == rows[name]["perplexity"] / rows["float"]["perplexity"]
        assert f"{rows[name]['perplexity']:.3f}" in printed
    assert rows["RTN W4A16"]["bits_per_weight"] == 4 + 24 / 32  # a float16 scale and a uint8 zero point per 32 weights
    assert rows["RTN W4A16"]["settings"]["activation_bits"] == 16
    assert table["settings"]["samples"] == 2
    assert table["command"].startswith("mixllm accuracy float --text text.txt --samples 2")

    budgets = tmp_path / "budgets.json"
    curve = ["accuracy", str(folder / "float"), *SMALL, "--work", str(tmp_path / "work"), "--out", str(budgets)]
    assert main([*curve, "--text", str(folder / "text.txt"), "--bits", "8", "4.4", "4.4"]) == 0
    found = json.loads(budgets.read_text())
    assert [row["name"] for row in found["rows"]] == ["float", "MixLLM W4.4A8", "MixLLM W8A8"]
    assert found["rows"][1] == rows["MixLLM W4.4A8"]  # measured again, not quantised again
    assert found["rows"][2]["bits_per_weight"] == 8 + 16 / 32
    assert found["rows"][2]["kl"] < found["rows"][1]["kl"]
    assert found["command"].endswith("--seed 0 --bits 8 4.4 4.4")
    assert "(1 of 2)" not in capsys.readouterr().err

    assert main([*command, "--seed", "1"]) == 1
    assert "another model, calibration text or settings" in capsys.readouterr().err
    monkeypatch.setattr(accuracy, "quantize_checkpoint", None)  # nothing is quantised again
    assert main(command) == 0

    default = folder / "float.accuracy"
    shutil.copytree(tmp_path / "work", default)
    (default / "mine.txt").write_text("kept")
    assert main(command[: command.index("--work")]) == 0
    kept = {path.name for path in default.iterdir()}
    assert kept == {"mine.txt", "mixllm_w8a8"}  # a row of another call, and what is no row; only its own are removed
    shutil.rmtree(default)
