"""The model folder: round trips, equal bytes, atomic writing, and clear errors for damaged folders."""

import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixllm_jax.checkpoint import METADATA_FILE, CheckpointReader, CheckpointWriter
from mixllm_jax.errors import CheckpointError, OptionError, OutputExistsError, StorageError
from mixllm_jax.models.config import ModelConfig
from pallas_kernels.packing import PackedWeight, with_code_sums

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=7,
    hidden_size=4,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_position_embeddings=16,
)
METADATA = {"kind": "float", "config": CONFIG.to_dict()}
PARTS = ("embedding", "layer_0000", "final")


def packed_weight(rng: np.random.Generator, n4: int = 5, n8: int = 3) -> PackedWeight:
    groups, size = 2, 32
    return PackedWeight(
        codes4=rng.integers(0, 256, (groups, n4, size // 2), np.uint8),
        scales4=rng.random((groups, n4)).astype(np.float16),
        zero_points4=rng.integers(0, 16, (groups, n4), np.uint8),
        codes8=rng.integers(-127, 128, (groups, n8, size), np.int8),
        scales8=rng.random((groups, n8)).astype(np.float16),
        channel_order=rng.permutation(n4 + n8).astype(np.int32),
        group_size=size,
    )


def example_parts(seed: int = 0) -> dict[str, dict]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": {"embed.weight": rng.standard_normal((7, 4)).astype(ml_dtypes.bfloat16)},
        "layer_0000": {
            "attention.qkv_proj.weight": packed_weight(rng),
            "mlp.down_proj.weight": packed_weight(rng, n8=0),
            "attention_norm.weight": jnp.asarray(rng.standard_normal(4), jnp.float16),
        },
        "final": {"norm.weight": rng.standard_normal(4).astype(np.float32)},
    }


def write(path: Path, seed: int = 0, **options) -> Path:
    with CheckpointWriter(path, METADATA, **options) as writer:
        for name, part in example_parts(seed).items():
            writer.write_part(name, part)
        writer.finish({"note": "done"})
    return path


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, PackedWeight):
        assert isinstance(found, PackedWeight)
        assert found.group_size == expected.group_size
        for field in ("codes4", "scales4", "zero_points4", "codes8", "scales8", "channel_order"):
            assert_same(getattr(found, field), getattr(expected, field))
    else:
        assert isinstance(found, np.ndarray)
        expected = np.asarray(expected)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_every_array_comes_back_as_it_was(tmp_path):
    reader = CheckpointReader(write(tmp_path / "model"))
    assert reader.kind == "float"
    assert reader.metadata["note"] == "done"
    for (name, found), (expected_name, expected) in zip(reader.read_parts(), example_parts().items(), strict=True):
        assert name == expected_name
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])


def test_sums_of_codes_are_not_written(tmp_path):
    weight = packed_weight(np.random.default_rng(0))
    with CheckpointWriter(tmp_path / "model", METADATA) as writer:
        for name, part in example_parts().items():
            writer.write_part(name, part | {"weight": with_code_sums(weight)} if name == "final" else part)
        writer.finish()
    assert_same(found := CheckpointReader(tmp_path / "model").read_part("final")["weight"], weight)
    assert found.code_sums4 is found.code_sums8 is None


def test_equal_models_are_equal_files(tmp_path):
    first, second = files(write(tmp_path / "a")), files(write(tmp_path / "other_name"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert not any(name.startswith((".lock", "state")) for name in first)


def test_existing_folder_is_kept_unless_overwrite(tmp_path):
    path = write(tmp_path / "model")
    before = files(path)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        CheckpointWriter(path, METADATA)
    assert files(path) == before
    assert files(write(path, seed=1, overwrite=True)) != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_overwrite_refuses_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputExistsError, match="not a model folder"):
        CheckpointWriter(tmp_path / "photos", METADATA, overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "precious"


@pytest.mark.parametrize("path", ["/", "{tmp_path}/x/..", "//"])
def test_a_path_that_ends_in_no_name_is_refused(tmp_path, path):
    with pytest.raises(OptionError, match="by its name"):
        CheckpointWriter(path.format(tmp_path=tmp_path), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"model: cannot write: .*/file/.model.partial: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "model", METADATA)


def test_more_layers_than_the_folder_lists(tmp_path):
    file = write(tmp_path / "model") / METADATA_FILE
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"config": metadata["config"] | {"num_layers": 10**12}}))
    with pytest.raises(CheckpointError, match="says 1000000000000 layers and lists 3 parts"):
        CheckpointReader(file.parent)


def test_failed_write_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    path = write(tmp_path / "model")
    before = files(path)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(path, METADATA, overwrite=True) as writer:  # noqa: PT012
        writer.write_part("embedding", example_parts(1)["embedding"])
        raise KeyboardInterrupt
    assert files(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_interrupted_run_resumes_with_equal_settings_only(tmp_path):
    parts = example_parts()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "model", METADATA, resume=True) as writer:  # noqa: PT012
        writer.write_part("embedding", parts["embedding"])
        raise KeyboardInterrupt
    assert not (tmp_path / "model").exists()
    other = {**METADATA, "quantization": {"bits": 4.8}}
    with pytest.raises(OptionError, match="quantization"):
        CheckpointWriter(tmp_path / "model", other, resume=True)
    with CheckpointWriter(tmp_path / "model", METADATA, resume=True) as writer:
        assert [writer.has_part(name) for name in PARTS] == [True, False, False]
        writer.write_part("layer_0000", parts["layer_0000"])
        writer.write_part("final", parts["final"])
        writer.finish({"note": "done"})
    assert files(tmp_path / "model") == files(write(tmp_path / "uninterrupted"))


def test_kill_in_the_middle_leaves_no_model_folder(tmp_path):
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "import test_checkpoint as t\n"
        "w = t.CheckpointWriter(sys.argv[1], t.METADATA)\n"
        "w.write_part('embedding', t.example_parts()['embedding'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    write(tmp_path / "model")  # the next run clears what was left
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_writers_at_once(tmp_path):
    with CheckpointWriter(tmp_path / "model", METADATA), pytest.raises(StorageError, match="another process"):
        CheckpointWriter(tmp_path / "model", METADATA)


def test_finish_without_all_parts(tmp_path):
    with CheckpointWriter(tmp_path / "model", METADATA) as writer:
        writer.write_part("embedding", example_parts()["embedding"])
        with pytest.raises(ValueError, match="layer_0000, final"):
            writer.finish()


def test_a_write_that_fails_gives_one_message_and_no_traceback_of_orbax(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(tmp_path / "model", METADATA) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            with pytest.raises(StorageError, match=r"model: cannot write: .*File too large.*Choose an --out"):
                writer.write_part("embedding", {"embed.weight": np.zeros((64, 64), np.float32)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_full_disk_before_and_while_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match="disk is full"):
        write(tmp_path / "model")
    monkeypatch.undo()

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    monkeypatch.setattr("mixllm_jax.checkpoint.writer.save_arrays", full)
    with pytest.raises(StorageError, match="disk is full"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def data_file(path: Path, part: str, array: str) -> Path:
    return next(
        p for p in (path / "parts" / part / "state" / array).rglob("*") if p.is_file() and p.name != "zarr.json"
    )


def test_truncated_array_file(tmp_path):
    path = write(tmp_path / "model")
    file = data_file(path, "layer_0000", "attention.qkv_proj.weight.codes4")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"layer_0000.*attention\.qkv_proj\.weight\.codes4.*damaged"):
        CheckpointReader(path).read_part("layer_0000")


def test_missing_array_file(tmp_path):
    path = write(tmp_path / "model")
    data_file(path, "embedding", "embed.weight").unlink()
    with pytest.raises(CheckpointError, match=r"embedding.*embed\.weight"):
        CheckpointReader(path).read_part("embedding")


def test_part_of_another_model(tmp_path):
    path, other = write(tmp_path / "model"), write(tmp_path / "other", seed=1)
    shutil.rmtree(path / "parts" / "final")
    shutil.copytree(other / "parts" / "final", path / "parts" / "final")
    with pytest.raises(CheckpointError, match=r"norm\.weight.*mixed"):
        CheckpointReader(path).read_part("final")


def test_missing_parts_are_listed_together(tmp_path):
    path = write(tmp_path / "model")
    shutil.rmtree(path / "parts" / "final")
    shutil.rmtree(path / "parts" / "embedding")
    with pytest.raises(CheckpointError, match="embedding, final"):
        CheckpointReader(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "version 2.*pip install -U"),
        ({"kind": "ternary"}, "ternary.*float, quantized"),
        ({"parts": None}, "damaged"),
        ({"config": {}}, "mixllm.json.*num_layers"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path, change, message):
    file = write(tmp_path / "model") / METADATA_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(file.parent)


def test_metadata_cut_short(tmp_path):
    file = write(tmp_path / "model") / METADATA_FILE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        CheckpointReader(file.parent)


def test_not_a_model_folder(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no mixllm\.json"):
        CheckpointReader(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert --from-hf"):
        CheckpointReader(tmp_path)


def test_orbax_is_quiet_about_the_storage_we_chose(tmp_path, caplog):
    CheckpointReader(write(tmp_path / "model")).read_part("final")
    assert [record.getMessage() for record in caplog.records] == []
