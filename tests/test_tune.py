"""The tuner off the GPU: which candidate it keeps, and that one that does not compile is no candidate."""

import contextlib
import types

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import make_case

from pallas_kernels import tune
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.packing import with_code_sums

CANDIDATES = [FewTokensConfig(rows, 8, 4, 1, 1, "none") for rows in (16, 32, 48, 64)]
TIMES = {16: 9.0, 32: 7.0, 64: 8.0}


def test_the_fastest_candidate_is_kept(monkeypatch: pytest.MonkeyPatch):
    def matmul(activations, weight, bias, *, out_dtype, config):
        if config.rows not in TIMES:
            raise ValueError("no such tile")
        return jnp.zeros(config.rows)

    def kernel_times(function, argument_sets, repeats):
        [rows] = function(*argument_sets[0]).shape
        return {"matmul": TIMES[rows] - 1, "another": 1.0}

    monkeypatch.setattr(tune, "MATMULS", {"triton": matmul})
    monkeypatch.setattr(tune, "candidates", lambda implementation, tokens: iter(CANDIDATES))
    monkeypatch.setattr(tune, "kernel_times", kernel_times)
    monkeypatch.setattr(tune, "copies_for", lambda nbytes: 2)
    case = tune.Case("triton", 3, 64, 256, 64, 0.25)
    [entry], report = tune.tune(case, 2, contextlib.nullcontext())
    assert (entry.case, entry.config, entry.microseconds) == ((3, 64, 256, 64, 0.25), CANDIDATES[1], 7.0)
    assert all(text in report for text in ("no such tile", "7.00", "8.00"))
    assert "9.00" not in report


def test_a_candidate_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    """As it is compiled, or at its first call, with a message or without."""

    def matmul(activations, weight, bias, *, out_dtype, config):
        if config.rows == 48:
            raise NotImplementedError
        return jnp.zeros(config.rows)

    def kernel_times(function, argument_sets, repeats):
        [rows] = function(*argument_sets[0]).shape
        if rows == 32:
            raise RuntimeError("\nillegal instruction\nat 0x0")
        return {"matmul": float(rows)}

    monkeypatch.setattr(tune, "MATMULS", {"triton": matmul})
    monkeypatch.setattr(tune, "candidates", lambda implementation, tokens: iter(CANDIDATES[1:]))
    monkeypatch.setattr(tune, "kernel_times", kernel_times)
    monkeypatch.setattr(tune, "copies_for", lambda nbytes: 1)
    [entry], report = tune.tune(tune.Case("triton", 3, 64, 256, 64, 0.25), 9, contextlib.nullcontext())
    assert entry.config == CANDIDATES[3]
    assert f"{CANDIDATES[1]}: illegal instruction\n" in report
    assert f"{CANDIDATES[2]}: NotImplementedError\n" in report


def test_without_a_configuration_that_runs_no_table_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Pool:
        """Of a machine with a GPU."""

        def __init__(self, *_):
            self.submit = lambda *_: types.SimpleNamespace(result=lambda: (9, 0))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "tune_all", lambda *_: None)
    assert tune.main(["--tokens", "1"]) == 1
    printed = capsys.readouterr()
    assert "no table was written" in printed.err
    assert "wrote" not in printed.out


def test_each_candidate_gets_the_layout_that_it_wants(monkeypatch: pytest.MonkeyPatch):
    """A pass from one layout to the other would count as time of the kernel."""
    todo = [MosaicGpuConfig(), MosaicGpuConfig(parts=1, unsigned=True), MosaicGpuSplitConfig(16, 1, 1, 8, 4)]
    seen = []

    def matmul(activations, weight, bias, *, out_dtype, config):
        seen.append((config, activations.layout))
        return jnp.zeros(1)

    weight = jax.tree.map(jnp.asarray, with_code_sums(make_case(1, 32, 256, 128, 0.5).weight))
    monkeypatch.setattr(tune, "_weights", lambda *sizes: (weight, [weight]))
    monkeypatch.setattr(tune, "MATMULS", {"mosaic_gpu": matmul})
    monkeypatch.setattr(tune, "candidates", lambda implementation, tokens: iter(todo))
    monkeypatch.setattr(tune, "kernel_times", lambda function, argument_sets, repeats: {"matmul": 1.0})
    tune.tune(tune.Case("mosaic_gpu", 3, 32, 256, 128, 0.5), 1, contextlib.nullcontext())
    assert seen == list(zip(todo, ("signed", "unsigned", "signed"), strict=True))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    assert tune.main(["--tokens", "1"]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 100, 4096])
def test_candidates_fit_the_number_of_tokens(tokens: int):
    triton, mosaic = (list(tune.candidates(name, tokens)) for name in ("triton", "mosaic_gpu"))
    assert triton
    assert mosaic
    assert all(config.tokens < 2 * max(tokens, 32) for config in triton)
    assert all(config.tile_tokens < 2 * max(tokens, 8) for config in mosaic)
