"""The time left that a quantisation shows."""

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
