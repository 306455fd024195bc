"""The time left that a quantisation shows, on a terminal and in a file."""

import io

import pytest

from mixllm_jax.quantization.progress import Progress


def test_work_of_an_earlier_run_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Progress(200) as progress:
        progress.skip(100)
        now += 10
        progress.advance(1)
        assert "16:30 left" in str(progress._bar)  # 99 units at one in ten seconds


def test_a_hidden_bar_counts_nothing():
    with Progress(2, show=False) as progress:
        progress.skip(1)
        progress.advance(1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_file_gets_a_line_now_and_then_and_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch, stream: type):
    now, file = 1000.0, stream()
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr("sys.stderr", file)
    with Progress(100) as progress:
        for block in range(100):
            progress.describe(f"block {block + 1}/100")
            now += 0.5
            progress.advance(1)
    drawn = file.getvalue()
    if stream is Terminal:
        assert drawn.count("\r") >= 100
        return
    lines = drawn.splitlines()
    assert lines[0].startswith("block 20/100:  20%|##")
    assert "00:10 elapsed, 00:40 left" in lines[0]
    assert len(lines) == 5
    assert "\r" not in drawn
    assert drawn.endswith("left\n")


def test_a_job_of_seconds_writes_nothing_to_a_file(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with Progress(2) as progress:
        progress.describe("block 1/1")
        progress.advance(2)
    assert file.getvalue() == ""
