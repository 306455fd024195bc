"""Converting Hugging Face checkpoints: formats, dtypes, configurations."""

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from reference_models import LLAMA3_ROPE, saved_model
from safetensors.numpy import load_file, save_file

from convert import hub, names
from convert.__main__ import main as convert
from convert.hf_config import translate_config
from convert.tensors import check_finite
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import CheckpointError, StorageError, UnsupportedModelError
from mixllm_jax.models.config import ModelConfig, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def write_checkpoint(folder, config=LLAMA, dtype=np.float32, edit=None):
    """A checkpoint with random weights; `edit` may change the dictionary of tensors before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(5)
    expected = names.expected_tensors(names.HUGGING_FACE, translate_config(config))
    tensors = {name: generator.standard_normal(shape).astype(dtype) for name, shape in expected.items()}
    if edit is not None:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def converted_parts(folder, out, *options):
    assert convert(["--from-hf", str(folder), "--out", str(out), *options]) == 0
    reader = CheckpointReader(out)
    return {part: reader.read_part(part) for part in reader.config.part_names()}


def assert_same_parts(found, expected):
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        for path, value in expected[part].items():
            assert found[part][path].dtype == value.dtype
            np.testing.assert_array_equal(found[part][path].view(np.uint8), value.view(np.uint8))


def test_fused_linears_hold_q_k_v_and_gate_up_in_this_order(tmp_path):
    folder, tensors = write_checkpoint(tmp_path / "hf")
    parts = converted_parts(folder, tmp_path / "out")
    prefix = "model.layers.1."
    np.testing.assert_array_equal(
        parts["layer_0001"]["attention.qkv_proj.weight"],
        np.concatenate([tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]),
    )
    np.testing.assert_array_equal(
        parts["layer_0001"]["mlp.gate_up_proj.weight"],
        np.concatenate([tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]),
    )
    np.testing.assert_array_equal(parts["final"]["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_auto_keeps_every_bit(tmp_path, dtype):
    folder, tensors = write_checkpoint(tmp_path / "hf", dtype=dtype)
    down = converted_parts(folder, tmp_path / "out")["layer_0000"]["mlp.down_proj.weight"]
    assert down.dtype == dtype
    np.testing.assert_array_equal(down, tensors["model.layers.0.mlp.down_proj.weight"])


def test_other_dtypes_round_to_nearest(tmp_path):
    folder, tensors = write_checkpoint(tmp_path / "hf")
    down = converted_parts(folder, tmp_path / "out", "--dtype", "bfloat16")["layer_0000"]["mlp.down_proj.weight"]
    assert down.dtype == ml_dtypes.bfloat16
    expected = tensors["model.layers.0.mlp.down_proj.weight"]
    assert 0 < np.abs(down.astype(np.float32) / expected - 1).max() <= 2.0**-8


def test_segments_of_different_dtypes_become_float32(tmp_path):
    def edit(tensors):
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)

    folder, tensors = write_checkpoint(tmp_path / "hf", dtype=ml_dtypes.bfloat16, edit=edit)
    part = converted_parts(folder, tmp_path / "out")["layer_0000"]
    fused = part["attention.qkv_proj.weight"]
    assert fused.dtype == np.float32
    np.testing.assert_array_equal(fused[:8], tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32))
    np.testing.assert_array_equal(fused[8:12], tensors["model.layers.0.self_attn.k_proj.weight"].astype(np.float32))
    assert part["attention.o_proj.weight"].dtype == ml_dtypes.bfloat16


def test_shards_with_an_index_equal_one_file(tmp_path):
    single, tensors = write_checkpoint(tmp_path / "hf")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(single / "config.json", sharded)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for i, name in enumerate(sorted(tensors)) if i % 3 == shard}
        save_file(part, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_parts(
        converted_parts(sharded, tmp_path / "out_sharded"), converted_parts(single, tmp_path / "out_single")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pytorch_bin_equals_safetensors(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch .bin files need torch")
    folder, tensors = write_checkpoint(tmp_path / "hf")
    state = {name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in tensors.items()}
    binary = tmp_path / "bin"
    binary.mkdir()
    shutil.copy(folder / "config.json", binary)
    first = dict(list(state.items())[:5])
    shards = {"pytorch_model-1.bin": first, "pytorch_model-2.bin": {k: v for k, v in state.items() if k not in first}}
    for file, part in shards.items():
        torch.save(part, binary / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (binary / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_parts(
        converted_parts(binary, tmp_path / "out_bin"), converted_parts(folder, tmp_path / "out", "--dtype", dtype)
    )


def test_bin_files_that_run_code_are_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="PyTorch .bin files need torch")
    folder, _ = write_checkpoint(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    assert convert(["--from-hf", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "pytorch_model.bin is not a whole PyTorch weight file" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bin_files_without_torch(tmp_path, capsys, monkeypatch):
    folder, _ = write_checkpoint(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    assert convert(["--from-hf", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "mixllm-jax[torch]" in capsys.readouterr().err


def test_harmless_extras_are_ignored_and_companions_copied(tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = np.zeros((11, 8), np.float32)

    folder, _ = write_checkpoint(tmp_path / "hf", config=LLAMA | {"tie_word_embeddings": True}, edit=edit)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "README.md").write_text("not needed")
    parts = converted_parts(folder, tmp_path / "out")
    assert parts["final"].keys() == {"norm.weight"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"
    assert not (tmp_path / "out" / "README.md").exists()


def test_no_torch_is_imported(tmp_path):
    """Safetensors are read without torch even where it is installed."""
    folder, _ = write_checkpoint(tmp_path / "hf")
    code = (
        "import sys; from convert.__main__ import main; "
        f"code = main(['--from-hf', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}]); "
        "sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


class TestConfiguration:
    """`translate_config`: values, defaults, and both ways to write rope settings."""

    def test_old_and_new_rope_keys_agree(self):
        scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
        old = translate_config(LLAMA | {"rope_theta": 50.0, "rope_scaling": scaling})
        assert old == translate_config(LLAMA | {"rope_parameters": LLAMA3_ROPE})
        assert old.rope_theta == 50.0
        assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 12)

    def test_oldest_rope_key(self):
        config = translate_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
        assert config.rope_scaling == RopeScaling("linear", 2.0)
        assert translate_config(LLAMA | {"rope_scaling": None}).rope_scaling is None

    @pytest.mark.parametrize("family", ["llama2", "llama3.1", "mistral", "qwen2-sliding", "qwen3"])
    def test_agrees_with_transformers_on_what_it_saved(self, family):
        model, folder = saved_model(family)
        theirs, ours = model.config, translate_config(json.loads((folder / "config.json").read_text()))
        assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
        if family == "mistral":
            windows = [theirs.sliding_window] * theirs.num_hidden_layers
        assert [ours.window_of_layer(layer) for layer in range(ours.num_layers)] == windows

    def test_unused_sliding_window_of_qwen(self):
        qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 32}
        assert translate_config(qwen | {"use_sliding_window": False}).sliding_window is None
        config = translate_config(qwen | {"use_sliding_window": True, "max_window_layers": 1})
        assert [config.window_of_layer(layer) for layer in range(2)] == [None, 32]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "supported are LlamaForCausalLM"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
            ({"architectures": None, "model_type": "mixtral"}, "'mixtral'"),
            ({"hidden_act": "gelu"}, "supported is silu"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "supported are default, linear, llama3"),
            ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
            ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
            ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ],
    )
    def test_unsupported(self, changes, message):
        with pytest.raises(UnsupportedModelError, match=message):
            translate_config(LLAMA | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": None}, "hidden_size must be a positive integer, found nothing"),
            ({"hidden_size": "8"}, "found '8'"),
            ({"num_attention_heads": 0}, "num_attention_heads"),
            ({"num_attention_heads": 3, "num_key_value_heads": 2}, "multiple of num_kv_heads"),
            ({"num_hidden_layers": True}, "num_hidden_layers"),
            ({"rms_norm_eps": -1.0}, "norm_epsilon"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
            ({"rope_theta": "x"}, "rope_theta"),
            ({"head_dim": 3}, "head_dim must be even"),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
            ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ],
    )
    def test_impossible_values(self, changes, message):
        with pytest.raises(CheckpointError, match=message):
            translate_config(LLAMA | changes)

    def test_round_trip_through_json(self):
        config = translate_config(LLAMA | {"rope_parameters": LLAMA3_ROPE})
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        broken = config.to_dict() | {"colour": 1}
        del broken["head_dim"]
        with pytest.raises(CheckpointError, match=r"missing keys \['head_dim'\], unknown keys \['colour'\]"):
            ModelConfig.from_dict(broken)


class TestHub:
    """Hub ids; the hub itself is never asked."""

    def test_weights_in_safetensors_are_preferred(self, tmp_path, monkeypatch):
        asked = []

        def download(model_id, *, allow_patterns, ignore_patterns):
            asked.append([pattern for pattern in allow_patterns if pattern in ("*.safetensors", "*.bin")])
            (tmp_path / "config.json").write_text(json.dumps(LLAMA))
            if "*.bin" in allow_patterns:
                (tmp_path / "pytorch_model.bin").touch()
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        assert hub.find_checkpoint("owner/name") == tmp_path
        assert asked == [[], ["*.safetensors"], ["*.bin"]]
        (tmp_path / "model.safetensors").touch()
        asked.clear()
        hub.find_checkpoint("owner/name")
        assert asked == [[], ["*.safetensors"]]

    def test_nothing_is_downloaded_in_vain(self, tmp_path, monkeypatch, capsys):
        asked = []

        def download(model_id, *, allow_patterns, ignore_patterns):
            asked.append(allow_patterns)
            (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        assert convert(["--from-hf", "owner/name", "--out", str(tmp_path / "out")]) == 1
        assert "unsupported architecture 'MixtralForCausalLM'" in capsys.readouterr().err
        assert not {"*.safetensors", "*.bin"} & set(asked.pop())
        assert convert(["--from-hf", "owner/name", "--out", str(tmp_path)]) == 1
        assert "it is left as it is" in capsys.readouterr().err
        assert asked == []

    def test_offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(StorageError, match=r"owner/name: .* cannot be fetched from the hub .* Check the network"):
            hub.find_checkpoint("owner/name")

    def test_neither_folder_nor_id(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
            hub.find_checkpoint(str(tmp_path / "absent"))
        (tmp_path / "model.gguf").touch()
        with pytest.raises(CheckpointError, match="--from-gguf"):
            hub.find_checkpoint(str(tmp_path / "model.gguf"))

    def test_a_converted_folder(self, tmp_path, capsys):
        write_checkpoint(tmp_path / "hf")
        assert convert(["--from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "model")]) == 0
        assert convert(["--from-hf", str(tmp_path / "model"), "--out", str(tmp_path / "again")]) == 1
        assert "is a converted model folder already" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_check_finite_finds_one_bad_value(dtype, value):
    array = np.zeros((3, 5), dtype)
    array[0, 0] = np.finfo(np.float16).max if dtype != ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype).max
    check_finite(array, "w")
    array[1, 3] = value
    with pytest.raises(CheckpointError, match=r"w has NaN or infinite values, the first at \[1, 3\]"):
        check_finite(array, "w")


def test_saved_folder_of_transformers_round_trips(tmp_path):
    _, folder = saved_model("qwen2")
    parts = converted_parts(folder, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        parts["layer_0002"]["attention.qkv_proj.bias"],
        np.concatenate([tensors[f"model.layers.2.self_attn.{name}_proj.bias"] for name in "qkv"]),
    )


def peak_memory_of_conversion(folder, out):
    """Most resident bytes of a process that converts this folder."""
    code = (
        "import sys; from convert.__main__ import main; "
        f"code = main(['--from-hf', {str(folder)!r}, '--out', {str(out)!r}]); "
        "print(open('/proc/self/status').read()); sys.exit(code)"
    )
    # One heap: glibc gives threads that allocate at the same time heaps of their own, and keeps what was freed in each
    # of them, so that on a busy machine the peak would tell how often that happened.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True, env=environment
    )
    return 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    layer = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes, peaks = [], []
    for layers in (4, 24):
        folder, tensors = write_checkpoint(tmp_path / f"hf{layers}", LLAMA | layer | {"num_hidden_layers": layers})
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        peaks.append(peak_memory_of_conversion(folder, tmp_path / f"out{layers}"))
    assert sizes[1] - sizes[0] > 120e6
    assert peaks[1] - peaks[0] < 0.25 * (sizes[1] - sizes[0])
