"""The comparison with `transformers`: that it runs, on the shapes it says, and stores rows like ours."""

import dataclasses
import json
import math
import types

import pytest

from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.benchmark.measurements import Bench
from mixllm_jax.cli.main import main
from mixllm_jax.generation.decode_loop import DECODE_CHUNK
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


def test_it_times_every_generated_token(monkeypatch):
    model, prompts = baseline.build(tiny("llama-3.1-8b"), "cpu"), []
    generate = model.generate

    def counted(tokens, *, max_new_tokens, past_key_values, **options):
        prompts.append((*tokens.shape, max_new_tokens, past_key_values.layers[0].max_cache_len))
        return generate(tokens, max_new_tokens=max_new_tokens, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model, "generate", counted)
    for batch in (1, 3):
        timing = baseline.measure(model, batch, context=24, timed=4)
        assert 0 < timing.step < 60
        # The steps fill the cache that ours fill; the first token is that of a prompt as long as our row says.
        assert set(prompts) == {(batch, 4, 20, 24)} | ({(1, 24, 1, 25)} if batch == 1 else set())
        assert (timing.first_token is not None) == (batch == 1)
        prompts.clear()


def test_it_times_the_steps_that_our_rows_time():
    plan = Plan("llama-3.1-8b", "bf16", (1,), (baseline.CONTEXT,), ())
    bench = types.SimpleNamespace(plan=plan)
    assert DECODE_CHUNK * Bench.decode_chunks(bench, baseline.CONTEXT) == baseline.TIMED_STEPS


def test_a_timing_ignores_the_first_steps_in_which_a_graph_may_be_recorded():
    streamer = baseline.TokenTimes()
    streamer.times = [10.0, 10.5, 17.0, 18.0, 18.25, 18.5, 18.75]
    assert streamer.first_token() == 0.5
    assert streamer.step(3) == 0.25


def test_a_batch_that_does_not_fit_has_a_row_that_says_so_and_ends_with_an_error(monkeypatch, capsys):
    import torch

    def measure(model, batch):
        if batch == 64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return baseline.Timing(0.04, 0.01)

    monkeypatch.setattr(baseline, "build", lambda *_: None)
    monkeypatch.setattr(baseline, "measure", measure)
    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(baseline, "require_torch", lambda: None)
    monkeypatch.setattr(baseline.signal, "signal", lambda *_: None)
    monkeypatch.setattr(baseline.signal, "alarm", lambda *_: None)

    def rows(batches):
        monkeypatch.setattr("sys.argv", ["x", json.dumps({"model": "llama-3.1-8b", "batches": batches})])
        with pytest.raises(SystemExit) as end:
            baseline.main()
        return end.value.code, [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()]

    code, (first, second, third) = rows([1, 64, 4])
    assert code == 1
    assert "memory" in second["error"]
    assert second["decode_tokens_per_s"] is None
    assert first["decode_tokens_per_s"] == 100
    assert third["decode_tokens_per_s"] == 400
    assert "error" not in first
    assert rows([1])[0] == 0


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
