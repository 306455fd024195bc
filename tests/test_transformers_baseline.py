"""The comparison with `transformers`: that it runs, on the shapes it says, and stores rows like ours."""

import dataclasses
import math

import pytest

from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.cli.main import main
from mixllm_jax.models.config import LINEAR_NAMES
from mixllm_jax.models.presets import PRESETS

pytest.importorskip("torch", reason="the baseline is PyTorch")
from mixllm_jax.benchmark import transformers_baseline as baseline


def tiny(name):
    return dataclasses.replace(
        PRESETS[name],
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=100,
    )


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"])
def test_the_model_has_the_shapes_of_the_preset(name):
    config = tiny(name)
    parameters = {
        name: parameter.shape
        for name, parameter in baseline.build(config, "cpu").named_parameters()
        if "layers.0" in name and "proj.weight" in name
    }
    assert len(parameters) == 7
    assert sum(math.prod(shape) for shape in parameters.values()) == sum(
        math.prod(config.linear_shape(name)) for name in LINEAR_NAMES
    )


def test_it_times_every_generated_token():
    model = baseline.build(tiny("llama-3.1-8b"), "cpu")
    for batch in (1, 3):
        timing = baseline.measure(model, batch, prompt=7, new_tokens=6)
        assert 0 < timing.first_token < 60
        assert 0 < timing.step < 60


def test_a_timing_ignores_the_first_steps_in_which_a_graph_may_be_recorded():
    streamer = baseline.TokenTimes()
    streamer.times = [10.0, 10.5, 17.0, 18.0, 18.25, 18.5, 18.75]
    assert streamer.timing() == baseline.Timing(0.5, 0.25)


def test_a_row_is_like_ours():
    config = PRESETS["llama-3.1-8b"]
    plan = Plan("llama-3.1-8b", "transformers bf16", (), (), ())
    row = baseline.row(plan, config, 1, baseline.Timing(0.04, 0.01), int(17e9), 3e12)
    assert row.keys() == plan.row(1, 512).keys()
    assert row["decode_tokens_per_s"] == 100
    assert row["time_to_first_token_ms"] == 40
    # 7.5e9 parameters without the embedding, read at 3 TB/s, take 5 ms of the 10.
    assert row["roofline_share"] == pytest.approx(0.503, abs=0.003)
    assert baseline.row(plan, config, 1, baseline.Timing(0.04, 0.01), 1, None)["roofline_share"] is None


def test_it_asks_for_a_gpu_and_random_weights_before_any_work(tmp_path, capsys):
    import torch

    out = str(tmp_path / "engine.json")
    assert main(["benchmark", "folder", "--compare-transformers", "--out", out]) == 1
    assert "--random-weights" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["benchmark", "--random-weights", "llama-3.1-8b", "--compare-transformers", "--out", out]) == 1
        assert "GPU" in capsys.readouterr().err
