"""The quantiser end to end on tiny random models: salience, the sweep, resuming, and the direction of every claim."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.checkpoint import CheckpointReader, CheckpointWriter
from mixllm_jax.errors import CheckpointError, MixLLMError, OptionError, OutputExistsError
from mixllm_jax.models.config import LINEAR_NAMES, LINEAR_PATHS, ModelConfig
from mixllm_jax.models.decoder import Decoder, random_parameters
from mixllm_jax.quantization.driver import quantize_checkpoint
from mixllm_jax.quantization.salience import rounding_error
from mixllm_jax.quantization.salience_file import SalienceScores
from mixllm_jax.quantization.scheme import QuantizationScheme
from pallas_kernels.packing import PackedWeight, dequantize

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_position_embeddings=64,
    qkv_bias=True,
)
SAMPLES, LENGTH = 4, 48
CHANNELS = 3 * (64 + 32 + 32 + 64 + 2 * 96 + 64)


def scheme(**settings) -> QuantizationScheme:
    return QuantizationScheme(**{"group_size": 32, "samples": SAMPLES, "sequence_length": LENGTH, **settings})


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (SAMPLES, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "float"
    with CheckpointWriter(folder, {"kind": "float", "config": CONFIG.to_dict()}) as writer:
        for part in CONFIG.part_names():
            writer.write_part(part, random_parameters(CONFIG, part, seed=0, scale=0.15))
        writer.write_file("tokenizer.json", b"{}")
        writer.finish()
    return folder


def run(float_model: Path, out: Path, tokens: np.ndarray | None, settings: QuantizationScheme, **options):
    return quantize_checkpoint(CheckpointReader(float_model), out, settings, tokens, show_progress=False, **options)


@pytest.fixture(scope="module")
def quantized(float_model, tokens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "w44"
    run(float_model, folder, tokens, scheme())
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_salience_matches_gradients_of_the_whole_model(float_model, tokens, quantized) -> None:
    """Streamed block by block without weight gradients, against one jax.grad per sequence with them."""
    reader = CheckpointReader(float_model)
    parts = {name: reader.read_part(name) for name in CONFIG.part_names()}

    def loss(parts, sequence):
        logits, _ = Decoder.from_parameters(CONFIG, parts)(sequence[None])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), sequence[1:, None], axis=-1)
        return -chosen.mean()

    gradient = jax.jit(jax.grad(loss))
    expected = np.zeros(CHANNELS)
    for sequence in tokens:
        found = gradient(parts, jnp.asarray(sequence))
        first = []
        for layer in range(CONFIG.num_layers):
            for name in LINEAR_NAMES:
                path, part = f"{LINEAR_PATHS[name]}.weight", f"layer_{layer:04d}"
                delta = np.asarray(rounding_error(jnp.asarray(parts[part][path]), 32), np.float64)
                first.append((np.asarray(found[part][path], np.float64) * delta).sum(axis=1))
        change = np.concatenate(first)
        expected += np.abs(change + change**2 / 2) / SAMPLES
    scores = SalienceScores.read(quantized)
    assert scores.scores.shape == (CHANNELS,)
    assert np.allclose(scores.scores, expected, rtol=2e-3, atol=1e-6 * expected.max())


def test_result_is_the_best_scored_channels_at_eight_bits(quantized) -> None:
    scores = SalienceScores.read(quantized).scores
    reader = CheckpointReader(quantized)
    eight_bit = []
    for layer in range(CONFIG.num_layers):
        part = reader.read_part(f"layer_{layer:04d}")
        for name in LINEAR_NAMES:
            weight = part[f"{LINEAR_PATHS[name]}.weight"]
            assert isinstance(weight, PackedWeight)
            mask = np.zeros(weight.out_features, bool)
            mask[weight.channel_order[weight.n4 :]] = True
            eight_bit.append(mask)
    mask = np.concatenate(eight_bit)
    assert mask.sum() == round(0.1 * CHANNELS)
    assert scores[mask].min() >= scores[~mask].max()
    report = reader.metadata["quantization_report"]
    assert report["channel_share"] == mask.sum() / CHANNELS
    stored = sum(
        np.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize
        for name, part in reader.metadata["parts"].items()
        for path, array in part["arrays"].items()
        if ".weight." in path and not path.endswith("channel_order")
    )
    assert report["linear_bytes"] == stored
    assert report["bits_per_weight"] == pytest.approx(8 * stored / (report["linear_bytes_16bit"] / 2))
    assert (quantized / "tokenizer.json").exists()


def test_what_is_not_quantised_is_unchanged(float_model, quantized) -> None:
    before, after = CheckpointReader(float_model), CheckpointReader(quantized)
    for name in CONFIG.part_names():
        old, new = before.read_part(name), after.read_part(name)
        assert old.keys() == new.keys()
        for path, value in new.items():
            if not isinstance(value, PackedWeight):
                assert np.array_equal(value, old[path])
            else:
                assert np.abs(dequantize(value) - old[path]).max() < 0.2


def test_resuming_after_every_step_gives_the_same_bytes(float_model, tokens, quantized, tmp_path, monkeypatch) -> None:
    """The process dies in turn at every rename that marks a step as done, before and after it."""
    out = tmp_path / "w44"
    original, count, deaths = Path.rename, 0, 0

    class Killed(BaseException):
        """Like SIGKILL in that no except clause of ours handles it."""

    def dying_rename(self: Path, target):
        nonlocal count
        count += 1
        if count == 4:
            raise Killed
        result = original(self, target)
        if count == 9:
            count = 0
            raise Killed
        return result

    monkeypatch.setattr(Path, "rename", dying_rename)
    while not out.exists():
        try:
            run(float_model, out, tokens, scheme())
        except Killed:
            deaths += 1
        assert deaths < 40
    assert deaths > 5
    monkeypatch.undo()
    assert files_of(out) == files_of(quantized)


KILLED_IN_THE_SECOND_BLOCK = """
import os, signal, sys
from mixllm_jax.cli.main import main
from mixllm_jax.quantization import sweep

class HessianSum(sweep.HessianSum):
    count = 0

    def mean(self):
        HessianSum.count += 1
        if HessianSum.count == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().mean()

sweep.HessianSum = HessianSum
main(sys.argv[1:])
"""


def test_killed_command_resumes_to_the_same_bytes(float_model, tokens, tmp_path) -> None:
    """SIGKILL to the command in the middle of the sweep, then the same command again."""
    np.save(tmp_path / "tokens.npy", tokens)
    out, partial = tmp_path / "killed", tmp_path / ".killed.partial"
    options = ["--bits", "4.8", "--group-size", "32", "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    options += ["--calibration", str(tmp_path / "tokens.npy"), "--out", str(out)]

    def command(*program: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *program, "quantize", str(float_model), *options]
        return subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)

    assert command("-c", KILLED_IN_THE_SECOND_BLOCK).returncode == -signal.SIGKILL
    assert not out.exists()

    def first_block(folder: Path) -> dict[str, int]:
        files = (folder / "parts" / "layer_0000").rglob("*")
        return {path.name: path.stat().st_mtime_ns for path in files if path.is_file()}

    assert not (partial / "parts" / "layer_0001").exists()
    written = first_block(partial)
    resumed = command("-m", "mixllm_jax.cli.main")
    assert resumed.returncode == 0, resumed.stderr
    assert "bits per weight" in resumed.stdout
    assert not partial.exists()
    assert first_block(out) == written  # it was not done again
    whole = tmp_path / "whole"
    run(float_model, whole, tokens, scheme(eight_bit_share=0.2))
    assert files_of(out) == files_of(whole)


def test_scores_serve_another_budget(float_model, tokens, quantized, tmp_path) -> None:
    run(float_model, tmp_path / "reused", tokens, scheme(eight_bit_share=0.2), salience=SalienceScores.read(quantized))
    run(float_model, tmp_path / "scored", tokens, scheme(eight_bit_share=0.2))
    reused, scored = files_of(tmp_path / "reused"), files_of(tmp_path / "scored")
    differing = {name for name in scored if scored[name] != reused.get(name)}
    assert differing == {"mixllm.json"}  # it says where the scores came from
    assert reused.keys() == scored.keys()


def test_one_compilation_serves_all_blocks(float_model, tokens, tmp_path) -> None:
    from mixllm_jax.quantization import block_passes, gptq

    jax.clear_caches()
    run(float_model, tmp_path / "out", tokens, scheme(eight_bit_share=0.3))
    assert block_passes.forward._cache_size() == 1
    assert block_passes.backward._cache_size() == 1
    assert block_passes.linear_input._cache_size() == 4
    assert gptq._sweep._cache_size() == 2 * 4  # with and without clip search, for each linear


def test_bad_input_is_refused_and_nothing_is_lost(float_model, tokens, quantized, tmp_path) -> None:
    before, source = files_of(quantized), files_of(float_model)
    with pytest.raises(CheckpointError, match="quantized already"):
        run(quantized, tmp_path / "twice", tokens, scheme())
    with pytest.raises(OutputExistsError, match="exists already"):
        run(float_model, quantized, tokens, scheme())
    for overwrite in (False, True):
        with pytest.raises(OptionError, match="is the float model itself"):
            run(float_model, float_model.parent / "x" / ".." / "float", tokens, scheme(), overwrite=overwrite)
    with pytest.raises(OptionError, match="96 tokens"):
        run(float_model, tmp_path / "vocabulary", tokens + 60, scheme())
    with pytest.raises(OptionError, match="needs calibration"):
        run(float_model, tmp_path / "none", None, scheme())
    scores = SalienceScores.read(quantized)
    with pytest.raises(OptionError, match="another model"):
        scores.check_fits("other", CHANNELS, 32)
    with pytest.raises(OptionError, match="groups of 32, not 64"):
        scores.check_fits(scores.model, CHANNELS, 64)
    (tmp_path / "salience.npz").write_bytes(scores.to_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        SalienceScores.read(tmp_path / "salience.npz")
    with pytest.raises(CheckpointError, match="no such file"):
        SalienceScores.read(float_model)
    assert files_of(quantized) == before
    assert files_of(float_model) == source


def test_a_broken_model_is_reported_with_its_folder(tokens, tmp_path) -> None:
    folder = tmp_path / "nan"
    with CheckpointWriter(folder, {"kind": "float", "config": CONFIG.to_dict()}) as writer:
        for part in CONFIG.part_names():
            parameters = random_parameters(CONFIG, part, seed=0)
            if part == "layer_0001":
                parameters["mlp.down_proj.weight"][3, 5] = np.nan
            writer.write_part(part, parameters)
        writer.finish()
    for settings in (scheme(), scheme(eight_bit_share=0.0)):
        with pytest.raises(MixLLMError, match=r"nan.*not finite"):
            run(folder, tmp_path / f"out{settings.eight_bit_share}", tokens, settings)


def test_full_disk_says_so_and_the_same_command_goes_on(float_model, tokens, quantized, tmp_path, monkeypatch) -> None:
    import errno
    import os

    original, calls = os.fsync, 0

    def failing_fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(MixLLMError, match=r"[Ss]pace"):
        run(float_model, tmp_path / "full", tokens, scheme())
    monkeypatch.undo()
    run(float_model, tmp_path / "full", tokens, scheme())
    assert files_of(tmp_path / "full") == files_of(quantized)


def test_too_small_a_disk_is_found_before_the_work_starts(float_model, tokens, tmp_path, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(MixLLMError, match=r"at all blocks need 1\d\d\.\d kB of disk, 1\.0 kB are free.*--samples"):
        run(float_model, tmp_path / "out", tokens, scheme())
    with pytest.raises(MixLLMError, match=r"the quantized model needs \d\d\.\d kB of disk, 1\.0 kB are free"):
        run(float_model, tmp_path / "out", None, scheme(eight_bit_share=0.0, method="rtn"))
    assert list(tmp_path.iterdir()) == []


def test_settings_are_in_the_folder(quantized) -> None:
    metadata = json.loads((quantized / "mixllm.json").read_text())
    assert QuantizationScheme.from_dict(metadata["quantization"]) == scheme()
