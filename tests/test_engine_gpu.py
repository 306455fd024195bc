"""The engine and the quantiser on an NVIDIA GPU, against their own float32 results on the CPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.checkpoint import CheckpointReader, CheckpointWriter
from mixllm_jax.generation import Engine, engine
from mixllm_jax.generation.memory import OutOfDeviceMemoryError, device_memory
from mixllm_jax.generation.sizes import Sizes
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import LINEAR_PATHS, layer_part_name
from mixllm_jax.models.decoder import random_parameters
from mixllm_jax.models.presets import PRESETS
from mixllm_jax.models.random_weights import WeightFormat, random_decoder
from mixllm_jax.quantization.driver import quantize_checkpoint
from mixllm_jax.quantization.scheme import QuantizationScheme
from pallas_kernels.packing import dequantize

pytestmark = pytest.mark.gpu

CONFIG = dataclasses.replace(
    PRESETS["smollm2-135m"], num_layers=5, vocab_size=512, hidden_size=256, intermediate_size=384, num_heads=4,
    num_kv_heads=2,
)  # fmt: skip


def prefilled(runner: Engine, prompts: list[list[int]], chunk: int, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Logits after the prompts, and what the cache then holds of them, in float32."""
    monkeypatch.setattr(Sizes, "prefill_chunk", lambda self, batch: chunk)
    cache = KVCache.zeros(CONFIG, len(prompts), 1024, runner.cache_dtype)
    cache, logits = runner.prefill.run(cache, prompts, held=0)
    keys, values = cache.layers[-1].read(jnp.float32)
    held = np.concatenate([np.asarray(keys), np.asarray(values)], axis=-1)
    return np.asarray(logits), np.concatenate([held[row, : len(prompt)] for row, prompt in enumerate(prompts)])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("window", [None, 200])
def test_prefill_in_chunks_is_prefill_at_once(kv_bits, window, monkeypatch):
    """A later chunk runs with an explicit mask, the first with cuDNN's own causal one."""
    config = dataclasses.replace(CONFIG, sliding_window=window)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 512, length).tolist() for length in (700, 129, 512, 3)]
    exact = random_decoder(config, WeightFormat(None), dtype=jnp.float32, implementation="xla")
    with jax.default_matmul_precision("highest"):
        expected = prefilled(Engine(exact, kv_bits=kv_bits), prompts, 1024, monkeypatch)
    model = random_decoder(config, WeightFormat(None), dtype=jnp.bfloat16)
    for chunk in (1024, 128):
        actual = prefilled(Engine(model, kv_bits=kv_bits), prompts, chunk, monkeypatch)
        assert relative_error(actual[0], expected[0]) < 3e-2
        assert relative_error(actual[1], expected[1]) < 3e-2


def test_streamed_tokens_are_the_generated_tokens():
    runner = Engine(random_decoder(CONFIG, WeightFormat.from_name("W4.4A8")))
    prompts = [[1, 2, 3], [4] * 20]
    expected = [result.tokens for result in runner.generate(prompts, max_tokens=50)]
    for interval in (0.0, 10.0):
        found: list[list[int]] = [[], []]
        for chunk in runner.stream(prompts, max_tokens=50, interval=interval):
            for row, tokens in zip(found, chunk, strict=True):
                row.extend(tokens)
        assert found == expected


def float_folder(folder: Path) -> Path:
    config = dataclasses.replace(CONFIG, max_position_embeddings=128)
    with CheckpointWriter(folder, {"kind": "float", "config": config.to_dict()}) as writer:
        for part in config.part_names():
            writer.write_part(part, random_parameters(config, part, seed=0, scale=0.1))
        writer.finish()
    return folder


def quantize(folder: str, out: str) -> None:
    """Also run by the subprocess."""
    tokens = np.random.default_rng(0).integers(0, 512, (16, 128)).astype(np.int32)
    scheme = QuantizationScheme(group_size=64, samples=16, sequence_length=128)
    quantize_checkpoint(CheckpointReader(folder), out, scheme, tokens, show_progress=False)


def test_the_quantizer_gives_on_a_gpu_what_it_gives_on_a_cpu(tmp_path):
    folder = float_folder(tmp_path / "float")
    quantize(str(folder), str(tmp_path / "gpu"))
    command = f"import test_engine_gpu; test_engine_gpu.quantize({str(folder)!r}, {str(tmp_path / 'cpu')!r})"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)
    exact, gpu, cpu = (CheckpointReader(tmp_path / name) for name in ("float", "gpu", "cpu"))
    agreeing, errors = [], []
    for layer in range(CONFIG.num_layers):
        part = layer_part_name(layer)
        weights = [reader.read_part(part) for reader in (exact, gpu, cpu)]
        for path in LINEAR_PATHS.values():
            weight, on_gpu, on_cpu = (part[f"{path}.weight"] for part in weights)
            eight = [set(packed.channel_order[packed.n4 :].tolist()) for packed in (on_gpu, on_cpu)]
            agreeing.append((len(eight[0] & eight[1]), len(eight[0] | eight[1])))
            errors.append([np.linalg.norm(dequantize(packed) - weight) for packed in (on_gpu, on_cpu)])
    # The GPU computes in bfloat16: channels of nearly the same salience may change places.
    same, either = np.sum(agreeing, axis=0)
    assert same / either > 0.9, json.dumps(agreeing)
    gpu_error, cpu_error = np.sqrt(np.sum(np.square(errors), axis=0))
    assert gpu_error == pytest.approx(cpu_error, rel=0.02)


@pytest.mark.skipif("MIXLLM_SLOW_GPU_TESTS" not in os.environ, reason="the allocator waits half a minute for memory")
def test_running_out_of_memory_says_what_would_fit(monkeypatch):
    runner = Engine(random_decoder(CONFIG, WeightFormat.from_name("W4.4A8")))
    limit = device_memory()
    assert limit is not None
    monkeypatch.setattr(engine, "require_memory", lambda *arguments: None)
    rows = 2 * limit // runner.estimate_memory(1, 8192).cache
    with pytest.raises(OutOfDeviceMemoryError, match=r"ran out of memory: .* rows of 8192 positions .*would fit"):
        runner.generate([[1]] * rows, max_tokens=8191)
