"""Calibration text: the embedded one, files, data sets, and what is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mixllm_jax.calibration import calibration_sequences, cut_windows, read_text
from mixllm_jax.errors import OptionError, StorageError


def test_the_embedded_text_is_there_with_its_licence() -> None:
    import importlib.resources

    text = read_text(None)
    assert 150_000 < len(text.encode()) < 250_000
    notice = importlib.resources.files("mixllm_jax").joinpath("data/NOTICE").read_text()
    assert "CC BY-SA 3.0" in notice


def test_windows_do_not_overlap_and_follow_the_seed() -> None:
    windows = cut_windows(np.arange(1000), 5, 64, seed=3, source="text")
    assert windows.shape == (5, 64)
    assert windows.dtype == np.int32
    assert (np.diff(windows, axis=1) == 1).all()
    assert (np.diff(windows[:, 0]) >= 64).all()
    assert np.array_equal(windows, cut_windows(np.arange(1000), 5, 64, seed=3, source="text"))
    assert not np.array_equal(windows, cut_windows(np.arange(1000), 5, 64, seed=4, source="text"))


def test_a_short_text_is_refused_with_what_would_fit() -> None:
    with pytest.raises(
        OptionError, match=r"--calibration x.txt has 130 tokens, enough for 2 sequences of 64, not for 3"
    ):
        cut_windows(np.arange(130), 3, 64, seed=0, source="--calibration x.txt")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_text(tmp_path / "text.txt")


def test_unknown_names_are_refused_and_the_known_listed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no such file, and not one of the data sets wikitext2, c4"):
        read_text(tmp_path / "absent.txt")


def test_data_sets_are_read_through_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: str, **options: object) -> list[dict[str, str]]:
        asked.append(arguments)
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text("wikitext2") == "one\n\ntwo"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]

    def offline(*arguments: str, **options: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(StorageError, match="no route to the hub"):
        read_text("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OptionError, match=r"pip install 'mixllm-jax\[datasets\]'"):
        read_text("c4")


def test_token_files_are_taken_as_they_are(tmp_path: Path) -> None:
    tokens = np.arange(60).reshape(4, 15)
    np.save(tmp_path / "tokens.npy", tokens)
    found = calibration_sequences(tmp_path / "tokens.npy", tmp_path, 3, 10, seed=0)
    assert np.array_equal(found, tokens[:3, :10])
    with pytest.raises(OptionError, match="holds 4 sequences of 15 tokens"):
        calibration_sequences(tmp_path / "tokens.npy", tmp_path, 5, 10, seed=0)
    np.save(tmp_path / "floats.npy", tokens / 2)
    with pytest.raises(OptionError, match="must hold integers"):
        calibration_sequences(tmp_path / "floats.npy", tmp_path, 3, 10, seed=0)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with pytest.raises(OptionError, match="cannot be read"):
        calibration_sequences(tmp_path / "broken.npy", tmp_path, 3, 10, seed=0)
