"""Long runs leak nothing and compile nothing; the example of the Python API runs."""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_chat_model import save_tiny_chat_model

import mixllm_jax
from mixllm_jax.cli import main as cli
from mixllm_jax.generation import Engine, SamplingSettings, decode_loop, prefill
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.random_weights import WeightFormat, random_decoder

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)
TOKENS = int(os.environ.get("MIXLLM_LONG_RUN_TOKENS", "2000"))
"""Generated in all; 20,000 is the long version."""


def test_long_runs_leak_no_memory_and_compile_nothing():
    runner = Engine(random_decoder(CONFIG, WeightFormat.from_name("W4.4A8"), dtype=jnp.float32))
    generator = np.random.default_rng(0)

    def run_batch() -> int:
        prompts = [generator.integers(0, 64, generator.integers(17, 24)).tolist() for _ in range(8)]
        sampling = SamplingSettings(temperature=0.7, seed=int(generator.integers(1000)))
        stop_tokens = (int(generator.integers(64)),)
        results = runner.generate(prompts, max_tokens=48, sampling=sampling, stop_tokens=stop_tokens)
        return sum(len(result.tokens) for result in results)

    run_batch()
    gc.collect()
    arrays = sum(array.nbytes for array in jax.live_arrays())
    programs = prefill.run_layers._cache_size(), decode_loop.decode._cache_size(), decode_loop.first_token._cache_size()
    generated = 0
    while generated < TOKENS:
        generated += run_batch()
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= arrays
    assert (
        prefill.run_layers._cache_size(),
        decode_loop.decode._cache_size(),
        decode_loop.first_token._cache_size(),
    ) == programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api")
    save_tiny_chat_model(path / "hf")
    assert cli.main(["convert", "--from-hf", str(path / "hf"), "--out", str(path / "model")]) == 0
    return path / "model"


def test_the_example_runs_and_tells_the_truth(folder, capsys, monkeypatch):
    example = Path(__file__).parents[1] / "examples" / "python_api.py"
    assert len(example.read_text().splitlines()) <= 25
    monkeypatch.setattr(sys, "argv", [str(example), str(folder)])
    capsys.readouterr()
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    loaded = mixllm_jax.load(folder)
    assert f"greedy: {loaded.generate('Once upon a time', max_tokens=12)!r}" in printed
    size = sum(array.nbytes for array in jax.tree.leaves(loaded.model))
    assert f"{size / 1e6:.1f} MB" in printed


def test_inspect_estimates_the_weights_exactly(folder, capsys):
    command = ["inspect", str(folder), "--memory", "--json", "--batch", "2", "--context", "100", "--dtype", "float32"]
    assert cli.main(command) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    loaded = mixllm_jax.load(folder, dtype="float32")
    assert memory["weights"] == sum(array.nbytes for array in jax.tree.leaves(loaded.model))
    assert memory["peak"] == memory["weights"] + memory["cache"] + memory["activations"]
    assert cli.main([*command, "--lm-head-bits", "8", "--kv-bits", "8"]) == 0
    smaller = json.loads(capsys.readouterr().out)["memory"]
    rounded = mixllm_jax.load(folder, dtype="float32", lm_head_bits=8)
    assert smaller["weights"] == sum(array.nbytes for array in jax.tree.leaves(rounded.model))
    assert smaller["cache"] < memory["cache"] / 2
    assert cli.main(["inspect", str(folder), "--memory", "--context", "100000"]) == 1
