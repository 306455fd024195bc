"""Random weights whose 8-bit channels lie as the global allocation puts them, and the benchmark's rows about them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.benchmark import runner
from mixllm_jax.benchmark.cases import Plan, Results, format_table
from mixllm_jax.cli.main import main
from mixllm_jax.generation.prefill import LAYERS_OF_A_PROGRAM, PrefillModel
from mixllm_jax.models.common_shapes import common_number
from mixllm_jax.models.config import LINEAR_NAMES
from mixllm_jax.models.presets import PRESETS
from mixllm_jax.models.random_allocation import _measured, realistic_channels
from mixllm_jax.models.random_weights import WeightFormat, random_decoder
from pallas_kernels import packing

pytestmark = pytest.mark.quick_compile

SMOLLM2 = PRESETS["smollm2-135m"]
TINY = dataclasses.replace(
    SMOLLM2, num_layers=LAYERS_OF_A_PROGRAM + 2, vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32,
    num_heads=4, num_kv_heads=2, max_position_embeddings=256,
)  # fmt: skip


def total(layers) -> tuple[int, int]:
    """All channels, and the 8-bit ones."""
    parts = [part for layer in layers for linear in layer.values() for part in linear]
    return sum(channels for channels, _ in parts), sum(eight_bit for _, eight_bit in parts)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "smollm2-135m"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 1.0])
def test_the_share_of_the_whole_model_is_the_one_asked_for(name, share):
    config = PRESETS[name]
    layers = realistic_channels(config, share)
    assert len(layers) == config.num_layers
    for layer in layers:
        for linear in LINEAR_NAMES:
            assert tuple(channels for channels, _ in layer[linear]) == tuple(
                channels for _, channels in config.linear_segments(linear)
            )
            assert all(0 <= eight_bit <= channels for channels, eight_bit in layer[linear])
    channels, eight_bit = total(layers)
    assert eight_bit == round(share * channels)


def test_the_model_that_was_measured_gets_what_was_measured():
    measured = _measured()["shares"]
    for layer, linears in enumerate(realistic_channels(SMOLLM2, 0.1)):
        for name in LINEAR_NAMES:
            for (kind, _), (channels, eight_bit) in zip(SMOLLM2.linear_segments(name), linears[name], strict=True):
                assert eight_bit == pytest.approx(measured[kind][layer] * channels, abs=1.5)


def test_layers_and_projections_differ_as_they_do_in_a_checkpoint():
    layers = realistic_channels(PRESETS["llama-3.1-8b"], 0.1)
    shares = [
        {kind: eight_bit / channels for (kind, _), (channels, eight_bit) in zip(segments, layer[name], strict=True)}
        for layer in layers
        for name in ("qkv_proj", "gate_up_proj")
        for segments in (PRESETS["llama-3.1-8b"].linear_segments(name),)
    ]
    mean = {kind: np.mean([share[kind] for share in shares if kind in share]) for kind in "qkv"}
    assert mean["v"] > 3 * mean["k"] > 3 * mean["q"]
    down = [layer["down_proj"][0][1] for layer in layers]
    assert down[0] > 3 * np.median(down) < down[-1]
    assert len(set(down)) > len(down) / 2


def test_a_random_model_has_them_where_they_belong():
    model = random_decoder(TINY, WeightFormat.from_name("W4.4A8", allocation="realistic"), dtype=jnp.float32)
    layers = realistic_channels(TINY, 0.1)
    for block, wanted in zip(model.layers, layers, strict=True):
        for name, linear in block.linears().items():
            weight = linear.weight.get_value()
            packing.validate(weight, values=True)
            has_eight_bits = np.zeros(weight.out_features, bool)
            has_eight_bits[np.asarray(weight.channel_order[weight.n4 :])] = True
            bounds = np.cumsum([0, *(channels for channels, _ in wanted[name])])
            found = [int(has_eight_bits[a:b].sum()) for a, b in itertools.pairwise(bounds)]
            assert found == [eight_bit for _, eight_bit in wanted[name]]
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(model, jnp.arange(9)[None])
    assert np.isfinite(np.asarray(logits)).all()
    assert len(PrefillModel(model).segments) == 1  # layers that differ are cut once


def test_on_a_gpu_it_has_the_common_shapes_of_a_checkpoint_and_uniform_weights_stay_as_they_are(monkeypatch):
    uniform = WeightFormat.from_name("W4.4A8")
    before = jax.eval_shape(lambda: random_decoder(TINY, uniform, dtype=jnp.float32))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    after = jax.eval_shape(lambda: random_decoder(TINY, uniform, dtype=jnp.float32))
    assert jax.tree.map(jnp.shape, jax.tree.leaves(after)) == jax.tree.map(jnp.shape, jax.tree.leaves(before))
    realistic = dataclasses.replace(uniform, allocation="realistic")
    model = jax.eval_shape(lambda: random_decoder(TINY, realistic, dtype=jnp.float32))
    for block, wanted in zip(model.layers, realistic_channels(TINY, 0.1), strict=True):
        for name, linear in block.linears().items():
            exact = sum(eight_bit for _, eight_bit in wanted[name])
            assert linear.weight.get_value().n8 == common_number(exact, TINY.linear_shape(name)[0])


def test_rows_say_which_and_older_rows_were_uniform(tmp_path):
    plan = Plan("m", "W4.4A8", (1,), (512,), ())
    path = tmp_path / "results.json"
    old = {name: value for name, value in plan.row(1, 512, decode_tokens_per_s=7.0).items() if name != "allocation"}
    path.write_text(json.dumps({"rows": [old], "profiles": [{**old, "phase": "decode"}]}))
    results = Results(path, {"command": "x"})
    results.add(dataclasses.replace(plan, allocation="realistic").row(1, 512, decode_tokens_per_s=6.0))
    assert [row["decode_tokens_per_s"] for row in results.rows] == [7.0, 6.0]
    assert "realistic" in format_table(results.rows)
    results.add(plan.row(1, 512, decode_tokens_per_s=8.0))
    results.add_profile({**plan.row(1, 512), "phase": "decode", "step_us": 1.0})
    assert [(row["allocation"], row["decode_tokens_per_s"]) for row in results.rows] == [
        ("uniform", 8.0),
        ("realistic", 6.0),
    ]
    assert [profile["step_us"] for profile in results.profiles] == [1.0]
    assert "allocation" not in format_table(results.rows[:1])


def test_the_option_reaches_the_quantised_plans_and_no_others(tmp_path, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(runner, "run_plans", lambda found, *_, **__: plans.extend(found) or 0)
    command = ["benchmark", "--random-weights", "llama-3.1-8b", "--out", str(tmp_path / "out"), "--schemes"]
    assert main([*command, "bf16,W4.4A8", "--random-allocation", "realistic"]) == 0
    assert main([*command, "W8A8"]) == 0
    assert [(plan.scheme, plan.allocation) for plan in plans] == [
        ("bf16", "uniform"),
        ("W4.4A8", "realistic"),
        ("W8A8", "uniform"),
    ]
    assert Plan.from_json(plans[1].to_json()) == plans[1]
    for words in (["benchmark", "folder"], ["generate", "folder", "--prompt", "x"]):
        assert main([*words, "--random-allocation", "realistic"]) == 1
        assert "--random-allocation is for --random-weights" in capsys.readouterr().err


def test_random_weights_that_do_not_fit_say_so(monkeypatch, capsys):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 3.00GiB")

    monkeypatch.setattr("mixllm_jax.models.random_weights.random_decoder", full)
    assert main(["generate", "--random-weights", "smollm2-135m", "--prompt", "Hello"]) == 1
    assert "the weights of smollm2-135m do not fit" in capsys.readouterr().err


def test_random_weights_of_the_command_may_be_realistic(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    command = ["generate", "--random-weights", "tiny", "--prompt", "Hello", "--max-tokens", "5"]
    texts = set()
    for options in ([], ["--random-allocation", "uniform"], ["--random-allocation", "realistic"]):
        assert main([*command, *options]) == 0
        texts.add(tuple(capsys.readouterr().out.split()))
    assert len(texts) == 2
    assert main([*command, "--scheme", "bf16", "--random-allocation", "realistic"]) == 1
    assert "--scheme bf16 has no 8-bit channels" in capsys.readouterr().err


def test_random_weights_without_a_number_of_tokens_use_the_context_up(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    assert main(["generate", "--random-weights", "tiny", "--prompt", "x" * 250]) == 0
    assert len(capsys.readouterr().out.split()) == 6
