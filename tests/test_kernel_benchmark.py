"""The benchmark of the kernels off the GPU: all of it but the times."""

import json
from pathlib import Path

import pytest

from pallas_kernels import benchmark, registry
from pallas_kernels.benchmark_report import Ceilings

COMMAND = ["--shapes", "48x256", "32x128", "--tokens", "1", "3", "--shares", "0", "0.25", "--implementation", "xla"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command with these times; returns its exit code and what it stored."""

    def run_with(kernel_times) -> tuple[int, list[dict]]:
        monkeypatch.setattr(benchmark, "kernel_times", kernel_times)
        code = benchmark.main([*COMMAND, "--out", str(tmp_path / "results" / "table.json")])
        return code, json.loads((tmp_path / "results" / "table.json").read_text())["rows"]

    monkeypatch.setattr(registry, "compute_capability", lambda: (8, 0))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda: Ceilings(1e12, 1e15))
    monkeypatch.setattr(benchmark, "copies_for", lambda nbytes: 2)
    return run_with


def test_every_case_has_a_row_and_there_is_a_plot(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def kernel_times(function, argument_sets, repeats):
        out = [function(*arguments) for arguments in argument_sets]
        assert len(out) == 2
        is_float = not hasattr(argument_sets[0][1], "codes4")
        return {"dot": 8.0} if is_float else {"quantize_activations": 1.5, "mixed_matmul": 2.5}

    code, rows = run(kernel_times)
    assert code == 0
    found = [(row["n"], row["k"], row["share_8bit"], row["m"]) for row in rows]
    assert found == [(n, k, share, m) for n, k in ((48, 256), (32, 128)) for share in (0, 0.25) for m in (1, 3)]
    times = {(row["quantize_matmul_us"], row["matmul_us"], row["bf16_us"], row["implementation"]) for row in rows}
    assert times == {(4.0, 2.5, 8.0, "xla")}
    assert (tmp_path / "results" / "table.png").stat().st_size > 1000
    assert "2.00" in capsys.readouterr().out  # the speed-up


def test_a_case_that_fails_without_a_message_leaves_the_others(run, capsys: pytest.CaptureFixture[str]):
    def kernel_times(function, argument_sets, repeats):
        x, weight = argument_sets[0]
        if x.shape == (3, 256) and getattr(weight, "n8", 0):
            raise NotImplementedError
        return {"quantize_activations": 1.0, "mixed_matmul": 1.0}

    code, rows = run(kernel_times)
    printed = capsys.readouterr()
    assert (code, len(rows)) == (1, 7)
    assert "FAILED, left out: 48 x 256, M = 3, share 0.25: NotImplementedError" in printed.out
    assert "only 7 of 8 rows" in printed.err


def test_where_every_case_fails_it_says_so(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def kernel_times(function, argument_sets, repeats):
        raise RuntimeError("no timings")

    assert run(kernel_times) == (1, [])
    assert "only 0 of 8 rows" in capsys.readouterr().err
    assert not (tmp_path / "results" / "table.png").exists()
