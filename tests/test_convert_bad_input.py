"""Damaged, incomplete and contradictory checkpoints: one clear error, and nothing left behind."""

import copy
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import LLAMA, write_checkpoint

from convert.__main__ import main as convert
from convert.hf_config import translate_config
from convert.safetensors_reader import SafetensorsReader
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import MixLLMError


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "hf")[0]


def fails(folder, out, capsys, *options):
    """Runs the command, which must fail and leave no trace; returns the message."""
    before = sorted(out.parent.iterdir())
    assert convert(["--from-hf", str(folder), "--out", str(out), *options]) == 1
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def rewrite_header(file, edit):
    """Replaces the JSON header of a safetensors file by `edit(header)`; the data stay where they are."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edited = json.dumps(edit(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(edited)) + edited + raw[8 + length :])


def edit_entry(**changes):
    def edit(header):
        header["model.norm.weight"] |= changes

    return edit


def test_all_mismatches_in_one_error(tmp_path, capsys):
    def edit(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
            name = f"model.layers.{layer}.self_attn.k_proj.weight"
            tensors[name] = np.zeros((6, 8), np.float32)
        del tensors["lm_head.weight"]
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(8, np.float32)

    folder, _ = write_checkpoint(tmp_path / "hf", edit=edit)
    message = fails(folder, tmp_path / "out", capsys)
    assert "(3 missing, 1 unexpected, 2 of wrong shape)" in message
    assert "missing: lm_head.weight [11, 8]" in message
    assert "missing: model.layers.[0-1].mlp.up_proj.weight [12, 8]" in message
    assert "unexpected: model.layers.1.self_attn.q_proj.bias [8]" in message
    assert "model.layers.[0-1].self_attn.k_proj.weight is [6, 8], the configuration asks for [4, 8]" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1.input_layernorm.weight"),
        ({"vocab_size": 12}, "model.embed_tokens.weight is [11, 8], the configuration asks for [12, 8]"),
        ({"num_key_value_heads": 2}, "self_attn.v_proj.weight is [4, 8], the configuration asks for [8, 8]"),
        ({"attention_bias": True}, "missing: model.layers.[0-1].self_attn.o_proj.bias [8]"),
        ({"hidden_act": "gelu"}, "config.json: unsupported activation function 'gelu'"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "supported are LlamaForCausalLM"),
        ({"model_type": "mixtral"}, "unsupported model_type 'mixtral' of architecture 'LlamaForCausalLM'"),
        ({"num_hidden_layers": 10**9}, "says 1000000000 layers, but there are only 21 tensors"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, found 'false'"),
    ],
)
def test_config_that_contradicts_the_tensors(checkpoint, tmp_path, capsys, changes, message):
    (checkpoint / "config.json").write_text(json.dumps(LLAMA | changes))
    assert message in fails(checkpoint, tmp_path / "out", capsys)


JUNK = [None, True, 0, -1, 2.5, 10**400, float("inf"), float("nan"), "", "x", [], [3], ["x"], {}, {"x": {}}]
VARIANTS = [
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
]
OPTIONAL = ("head_dim", "mlp_bias", "quantization_config", "partial_rotary_factor", "rope_theta", "rope_parameters")


@pytest.mark.parametrize("variant", VARIANTS)
def test_junk_for_any_value_of_the_config_is_an_error_or_a_model(variant):
    """What comes out is a configuration whose numbers are numbers, or an error of ours."""
    values = LLAMA | variant
    places = [(key,) for key in {*values, *OPTIONAL}]
    places += [("rope_scaling", key) for key in values.get("rope_scaling", ())]
    refused = 0
    for place in places:
        for junk in JUNK:
            changed = copy.deepcopy(values)
            owner = changed[place[0]] if len(place) == 2 else changed
            owner[place[-1]] = junk
            try:
                config = translate_config(changed)
            except MixLLMError:
                refused += 1
            else:
                assert math.isfinite(config.rope_theta * config.norm_epsilon), (place, junk)
    assert refused > len(places) * len(JUNK) / 3


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object")])
def test_broken_config(checkpoint, tmp_path, capsys, content, message):
    (checkpoint / "config.json").write_text(content)
    assert message in fails(checkpoint, tmp_path / "out", capsys)


def test_folders_without_a_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fails(tmp_path / "empty", tmp_path / "out", capsys)
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    assert "holds no weights: expected model.safetensors" in fails(tmp_path / "empty", tmp_path / "out", capsys)


def test_missing_shards_are_all_named(checkpoint, tmp_path, capsys):
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model.safetensors"}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    message = fails(checkpoint, tmp_path / "out", capsys)
    assert "2 of 3 shards are missing: model-1.safetensors, model-2.safetensors" in message
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors", "x": "model.safetensors"}}))
    assert "1 tensors are in no shard: x" in fails(checkpoint, tmp_path / "out", capsys)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    assert "file names in the same folder" in fails(checkpoint, tmp_path / "out", capsys)
    index.write_text('{"weight_map": 3}')
    assert "not a valid index" in fails(checkpoint, tmp_path / "out", capsys)


def test_shards_without_their_index(checkpoint, tmp_path, capsys):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    assert "not their index model.safetensors.index.json" in fails(checkpoint, tmp_path / "out", capsys)


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_file_cut_short(checkpoint, tmp_path, capsys, kept):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = fails(checkpoint, tmp_path / "out", capsys)
    assert f"model.safetensors ({file.stat().st_size} bytes) is not a whole safetensors file" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    "edit",
    [
        edit_entry(data_offsets=[0, 1 << 50]),
        edit_entry(data_offsets=[32, 0]),
        edit_entry(data_offsets=[0, 32]),  # overlaps another tensor
        edit_entry(shape=[9]),
        edit_entry(shape=[1 << 62, 8]),
        edit_entry(dtype="F16"),
        edit_entry(dtype="F99"),
        lambda header: header.pop("model.norm.weight") and None,  # leaves a gap
        lambda header: {"model.norm.weight": 3},
    ],
)
def test_lying_header(checkpoint, tmp_path, capsys, edit):
    rewrite_header(checkpoint / "model.safetensors", edit)
    assert "is not a whole safetensors file" in fails(checkpoint, tmp_path / "out", capsys)


@pytest.mark.parametrize("length", [0, 1 << 40, (1 << 64) - 1])
def test_absurd_header_length(checkpoint, tmp_path, capsys, length):
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert "is not a whole safetensors file" in fails(checkpoint, tmp_path / "out", capsys)


def test_integer_tensors(tmp_path, capsys):
    def edit(tensors):
        tensors["model.norm.weight"] = np.ones(8, np.int32)

    folder, _ = write_checkpoint(tmp_path / "hf", edit=edit)
    assert "model.norm.weight (I32); supported are float32" in fails(folder, tmp_path / "out", capsys)


@pytest.fixture(scope="module")
def intact_file(tmp_path_factory):
    folder, _ = write_checkpoint(tmp_path_factory.mktemp("intact"))
    return (folder / "model.safetensors").read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_headers_never_crash_nor_read_outside(intact_file, tmp_path_factory, data):
    """Whatever bytes of the header change: a clear error, or tensors that the file really holds."""
    header_end = 8 + struct.unpack("<Q", intact_file[:8])[0]
    raw = bytearray(intact_file)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, header_end - 1))
        raw[position] = data.draw(st.sampled_from(b'0123456789{}[]",:FB\xff\x00') | st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(raw)
    try:
        reader = SafetensorsReader([file])
        tensors = {name: reader.read(name) for name in reader.shapes}
    except MixLLMError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]
    assert all(tensor.shape == reader.shapes[name] for name, tensor in tensors.items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_name_the_tensor(tmp_path, capsys, value):
    def edit(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 2] = value

    folder, _ = write_checkpoint(tmp_path / "hf", edit=edit)
    message = fails(folder, tmp_path / "out", capsys)
    assert "tensor model.layers.1.mlp.down_proj.weight has NaN or infinite values, the first at [3, 2]" in message


def test_values_beyond_float16(tmp_path, capsys):
    def edit(tensors):
        tensors["model.norm.weight"][0] = 1e6

    folder, _ = write_checkpoint(tmp_path / "hf", edit=edit)
    message = fails(folder, tmp_path / "out", capsys, "--dtype", "float16")
    assert "tensor model.norm.weight has values beyond the range of float16" in message


def test_existing_output_is_kept_unless_overwritten(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(["--from-hf", str(checkpoint), "--out", str(out)]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "--overwrite" in fails(checkpoint, out, capsys)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    write_checkpoint(checkpoint, config=LLAMA | {"rms_norm_eps": 1e-3})
    assert convert(["--from-hf", str(checkpoint), "--out", str(out), "--overwrite"]) == 0
    assert CheckpointReader(out).config.norm_epsilon == 1e-3


def test_a_failed_overwrite_keeps_the_old_model(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(["--from-hf", str(checkpoint), "--out", str(out)]) == 0

    def edit(tensors):
        tensors["lm_head.weight"][0, 0] = np.nan  # in the last part, when all others are written

    write_checkpoint(checkpoint, edit=edit)
    assert "lm_head.weight" in fails(checkpoint, out, capsys, "--overwrite")
    assert CheckpointReader(out).read_part("final")["lm_head.weight"].shape == (11, 8)


def test_a_folder_of_something_else_is_never_replaced(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "is not a model folder" in fails(checkpoint, out, capsys, "--overwrite")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_full_disk(checkpoint, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "the disk is full" in fails(checkpoint, tmp_path / "out", capsys)


def test_disk_that_fills_up_while_writing(checkpoint, tmp_path, capsys, monkeypatch):
    """The system's own refusal, in the third part."""
    from mixllm_jax.checkpoint import writer

    written = []

    def save(*args, **options):
        written.append(args)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return original(*args, **options)

    original = writer.save_arrays
    monkeypatch.setattr(writer, "save_arrays", save)
    assert "the disk is full" in fails(checkpoint, tmp_path / "out", capsys)


INTERRUPTED_WHILE_SAVING = """
import os, signal, sys
from convert.__main__ import main
from orbax.checkpoint import v1
original, saved = v1.save, 0

def save(*arguments, **options):  # in a thread of its own, for which the main thread waits
    global saved
    saved += 1
    if saved == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **options)

v1.save = save
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_leaves_nothing_behind(checkpoint, tmp_path):
    """A real SIGINT to a real process while a part is being written."""
    out = tmp_path / "models" / "out"
    command = [sys.executable, "-c", INTERRUPTED_WHILE_SAVING, "--from-hf", str(checkpoint), "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 130
    assert "Traceback" not in process.stderr
    assert "interrupted" in process.stderr
    assert list(out.parent.iterdir()) == []


def test_a_checkpoint_without_a_tokenizer_is_converted_and_says_so(checkpoint, tmp_path, capsys):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    assert convert(["--from-hf", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert "note: the checkpoint has no tokenizer" in capsys.readouterr().err
    (checkpoint / "tokenizer.json").write_text("{}")
    assert convert(["--from-hf", str(checkpoint), "--out", str(tmp_path / "with")]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
