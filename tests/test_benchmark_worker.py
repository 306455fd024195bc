"""The process that measures, on a tiny model: every case of the plan has a row, and what cannot be measured says so."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

from mixllm_jax.benchmark import worker
from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.benchmark.measurements import Bench, build_model
from mixllm_jax.device import UnsupportedDeviceError
from mixllm_jax.generation.decode_loop import DECODE_CHUNK
from mixllm_jax.models.presets import PRESETS
from mixllm_jax.models.random_weights import WeightFormat, random_decoder
from pallas_kernels import registry

pytestmark = pytest.mark.quick_compile

TINY = dataclasses.replace(
    PRESETS["smollm2-135m"], num_layers=2, vocab_size=96, hidden_size=64, intermediate_size=128, head_dim=16,
    num_heads=4, num_kv_heads=2, max_position_embeddings=256,
)  # fmt: skip
PLAN = Plan("tiny", "W4.4A8", (1, 3), (64, 96), (20, 40), decode_steps=32, allocation="realistic")


@pytest.fixture
def measure(monkeypatch, capsys):
    """Runs the worker for a plan; returns its exit code and its lines, by kind."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)

    def run(plan: Plan) -> tuple[int, list[tuple[str, dict]]]:
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        monkeypatch.setattr("sys.argv", ["worker", plan.to_json()])
        monkeypatch.setattr("sys.stdin", io.StringIO())
        monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
        try:
            with pytest.raises(SystemExit) as end:
                worker.main()
        finally:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
        return end.value.code, [
            item for line in capsys.readouterr().out.splitlines() for item in json.loads(line).items()
        ]

    return run


def test_every_case_of_the_plan_has_a_row(measure):
    code, lines = measure(PLAN)
    assert code == 0
    assert [kind for kind, _ in lines[:2]] == ["compiled", "device"]
    rows = [row for kind, row in lines if kind == "row"]
    assert all(row["allocation"] == "realistic" and row["model"] == "tiny" for row in rows)
    decoded = {(row["batch"], row["context"]) for row in rows if row["decode_tokens_per_s"] is not None}
    assert decoded == {(batch, context) for batch in PLAN.batches for context in PLAN.contexts}
    prompts = {row["context"] for row in rows if row["time_to_first_token_ms"] is not None}
    assert prompts == set(PLAN.prompts)
    for row in rows:
        assert row["decode_tokens_per_s"] is None or row["decode_tokens_per_s"] > 0 < row["roofline_share"]


def test_a_case_that_fails_costs_the_others_nothing_and_ends_with_an_error(measure, monkeypatch):
    estimate = Bench.decode_case

    def decode_case(self, batch, context, bandwidth):
        if batch == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return estimate(self, batch, context, bandwidth)

    monkeypatch.setattr(Bench, "decode_case", decode_case)
    code, lines = measure(PLAN)
    assert code == 1
    assert {row["batch"] for kind, row in lines if kind == "row"} == {1}
    assert len(lines) == 2 + len(PLAN.contexts) + len(PLAN.prompts)


@pytest.mark.parametrize("context", [64, 96, 256])
def test_the_timed_steps_are_the_last_before_the_cache_is_full(context):
    bench = Bench(jax.eval_shape(lambda: build_model(dataclasses.replace(PLAN, model="smollm2-135m"))), PLAN, {})
    steps = bench.decode_chunks(context) * DECODE_CHUNK
    assert steps == min(PLAN.decode_steps, context // 2)
    assert bench.decode_start(context) + DECODE_CHUNK + steps == context


def test_the_filled_cache_is_full_of_numbers():
    """Zeros would cost the device less power, and so less time."""
    for kv_bits in (16, 8):
        plan = dataclasses.replace(PLAN, kv_bits=kv_bits)
        bench = Bench(jax.eval_shape(lambda: random_decoder(TINY, WeightFormat(None))), plan, {})
        state = bench.filled_state(2, 64, 30)
        assert state.cache.lengths.tolist() == [30, 30]
        for array in jax.tree.leaves(state.cache.layers):
            assert (np.asarray(array, np.float32) != 0).mean() > 0.9
        scales = state.cache.layers[0].key_scales
        assert (scales is None) == (kv_bits == 16)
        assert scales is None or float(scales.min()) >= 0


def test_an_old_gpu_is_not_measured_with_the_slow_reference(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    for name, value in (("default_platform", "gpu"), ("device_kind", "Tesla T4"), ("compute_capability", (7, 5))):
        monkeypatch.setattr(registry, name, lambda value=value: value)
    with pytest.raises(UnsupportedDeviceError, match="Tesla T4"):
        build_model(PLAN)
    assert jax.eval_shape(lambda: build_model(dataclasses.replace(PLAN, scheme="bf16"))) is not None
