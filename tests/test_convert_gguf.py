"""Converting GGUF files: row order, tensor types, configuration, tokenizers, damaged files."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from convert.__main__ import main as convert
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import MixLLMError
from mixllm_jax.models.config import ModelConfig, RopeScaling

gguf = pytest.importorskip("gguf", reason="GGUF files are read and written with the package gguf")
from gguf_files import random_tensors, write_gguf  # noqa: E402

from convert.gguf_config import read_config  # noqa: E402
from convert.gguf_reader import GGUFReader  # noqa: E402

SMALL = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    norm_epsilon=2.0**-16,
    rope_theta=500000.0,
)
# The values of a float32 metadata field, which is what GGUF has for numbers.
QWEN2 = dataclasses.replace(SMALL, architecture="qwen2", qkv_bias=True, tie_word_embeddings=True)
QWEN3 = dataclasses.replace(SMALL, architecture="qwen3", qk_norm=True, head_dim=16)
BIASED = dataclasses.replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=1)


def converted(file, out, *options):
    assert convert(["--from-gguf", str(file), "--out", str(out), *options]) == 0
    return CheckpointReader(out)


def fails(file, out, capsys):
    before = sorted(out.parent.iterdir())
    assert convert(["--from-gguf", str(file), "--out", str(out)]) == 1
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("config", [SMALL, QWEN2, QWEN3, BIASED], ids=["llama", "qwen2", "qwen3", "biases"])
def test_same_folder_as_from_the_hugging_face_checkpoint(tmp_path, config):
    """Also undoes llama.cpp's row order of q and k, weights and biases."""
    tensors = random_tensors(config)
    reader = converted(write_gguf(tmp_path / "m.gguf", config, tensors, config.architecture), tmp_path / "gguf")
    assert reader.config == config

    hf = tmp_path / "hf"
    hf.mkdir()
    save_file(tensors, hf / "model.safetensors")
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    settings = {
        "architectures": [classes[config.architecture]],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    (hf / "config.json").write_text(json.dumps(settings))
    assert convert(["--from-hf", str(hf), "--out", str(tmp_path / "out")]) == 0
    expected = CheckpointReader(tmp_path / "out")
    assert expected.config == config
    for part in config.part_names():
        found = reader.read_part(part)
        for path, value in expected.read_part(part).items():
            np.testing.assert_array_equal(found[path], value, err_msg=f"{part} {path}")


def test_mistral_file_with_a_sliding_window(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), metadata={"attention.sliding_window": 6})
    assert converted(file, tmp_path / "out").config == dataclasses.replace(SMALL, sliding_window=6)


def test_linear_rope_scaling(tmp_path):
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), metadata=metadata)
    assert converted(file, tmp_path / "out").config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recognised(tmp_path, factor):
    """The divisors as `transformers` computes them give its settings back."""
    torch = pytest.importorskip("torch", reason="transformers computes rope frequencies with torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = dataclasses.replace(SMALL, head_dim=64)
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    tensors = random_tensors(config) | {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}
    found = converted(write_gguf(tmp_path / "m.gguf", config, tensors), tmp_path / "out").config.rope_scaling
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert dataclasses.replace(found, factor=factor) == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_other_rope_factors_are_refused(tmp_path, capsys):
    tensors = random_tensors(SMALL) | {"rope_freqs.weight": np.asarray([1, 2, 3, 4], np.float32)}
    message = fails(write_gguf(tmp_path / "m.gguf", SMALL, tensors), tmp_path / "out", capsys)
    assert "not those of Llama 3.1 and 3.2" in message


def half(raw, at):
    return float(np.frombuffer(raw, "<f2", 1, at)[0])


def decode_block(kind, raw):
    """One block of a quantised type, element by element after the description of the format in ggml."""
    if kind == "Q8_0":
        return [half(raw, 0) * struct.unpack_from("b", raw, 2 + i)[0] for i in range(32)]
    if kind in ("Q4_0", "Q4_1"):
        offset = 2 if kind == "Q4_0" else 4
        codes = [raw[offset + i % 16] >> (4 * (i // 16)) & 15 for i in range(32)]
        return [half(raw, 0) * (c - 8) if kind == "Q4_0" else half(raw, 0) * c + half(raw, 2) for c in codes]
    values = []
    if kind == "Q4_K":
        for i in range(256):
            j = i // 32
            if j < 4:
                scale, minimum = raw[4 + j] & 63, raw[8 + j] & 63
            else:
                scale = (raw[8 + j] & 15) | (raw[j] >> 6) << 4
                minimum = (raw[8 + j] >> 4) | (raw[4 + j] >> 6) << 4
            code = raw[16 + (i // 64) * 32 + i % 32] >> (4 * (j % 2)) & 15
            values.append(half(raw, 0) * scale * code - half(raw, 2) * minimum)
        return values
    for i in range(256):  # Q6_K: 128 bytes of low halves, 64 of high bits, 16 scales, the common scale
        n, r = divmod(i, 128)
        low = raw[64 * n + r % 64] >> (4 * (r // 64)) & 15
        high = raw[128 + 32 * n + r % 32] >> (2 * (r // 32)) & 3
        scale = struct.unpack_from("b", raw, 192 + i // 16)[0]
        values.append(half(raw, 208) * scale * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_quantised_types_decode_as_the_format_says(tmp_path, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[quantization]
    raw = np.random.default_rng(3).integers(0, 256, (4, size), dtype=np.uint8)
    for at in {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind]:
        raw[:, at : at + 2] = np.asarray([[0.5], [-0.03], [2e-5], [1.25]], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count(1)
    writer.add_tensor("token_embd.weight", raw.reshape(2, 2 * size), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFReader(tmp_path / "m.gguf").read("token_embd.weight")
    assert found.shape == (2, 2 * elements)
    assert found.dtype == np.float32
    expected = np.asarray([decode_block(kind, bytes(block)) for block in raw]).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_matrices_of_each_type_convert(tmp_path, kind):
    tensors = random_tensors(SMALL)
    reader = converted(write_gguf(tmp_path / "m.gguf", SMALL, tensors, kind=kind), tmp_path / "out")
    part = reader.read_part("layer_0001")
    found = part["mlp.down_proj.weight"]
    assert found.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    error = np.abs(found.astype(np.float32) - tensors["model.layers.1.mlp.down_proj.weight"]).max()
    assert 0 < error < {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 3e-2}.get(kind, 0.5)
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert np.abs(part["attention.qkv_proj.weight"][:32].astype(np.float32) - query).mean() < 0.15
    assert part["mlp_norm.weight"].dtype == np.float32


def test_unsupported_type_and_architecture(tmp_path, capsys):
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), kind="Q5_0")
    assert "(Q5_0)" in (message := fails(file, tmp_path / "out", capsys))
    assert "supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K" in message
    file = write_gguf(tmp_path / "g.gguf", SMALL, random_tensors(SMALL), architecture="gemma")
    assert "unsupported architecture 'gemma'; supported are llama, qwen2, qwen3" in fails(
        file, tmp_path / "out", capsys
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "llama.block_count must be a single int, found None"),
        ({"block_count": 3}, "missing: blk.2.attn_norm.weight [32]"),
        ({"embedding_length": 31}, "wrong shape: token_embd.weight is [64, 32], the configuration asks for [64, 31]"),
        ({"attention.head_count": "four"}, "attention.head_count must be a single int, found 'four'"),
        ({"attention.head_count": 0}, "head_count must be positive"),
        ({"attention.head_count": 6}, "wrong shape: blk.[0-1].attn_q.weight is [32, 32]"),
        ({"attention.value_length": 4}, "differs from the head size 8"),
        ({"rope.scaling.type": "yarn"}, "unsupported rope scaling 'yarn'"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"vocab_size": 60}, "[60, 32]"),
    ],
)
def test_metadata_that_contradict_the_tensors(tmp_path, capsys, metadata, message):
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), metadata=metadata)
    assert message in fails(file, tmp_path / "out", capsys)


def test_damaged_files(tmp_path, capsys):
    intact = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL)).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for content in (intact[:6], intact[:700], intact[:-1000], intact[:8] + b"\xff" * 8 + intact[16:]):
        damaged.write_bytes(content)
        message = fails(damaged, tmp_path / "out", capsys)
        assert f"damaged.gguf ({len(content)} bytes) is not a whole GGUF file" in message
    for content in (b"", intact[:3], b"GGML" + intact[4:]):
        damaged.write_bytes(content)
        assert "does not begin with GGUF" in fails(damaged, tmp_path / "out", capsys)
    assert "does not exist" in fails(tmp_path / "absent.gguf", tmp_path / "out", capsys)
    assert "is a folder; give the .gguf file in it" in fails(tmp_path, tmp_path / "out", capsys)


def test_junk_in_the_metadata_is_an_error_or_a_model(tmp_path):
    """Whatever type a value has: a configuration, or an error of ours."""
    keys = [
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "block_count", "context_length",
        "embedding_length", "feed_forward_length", "attention.layer_norm_rms_epsilon", "rope.freq_base", "vocab_size",
        "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "expert_count",
    ]  # fmt: skip
    tensors, refused = random_tensors(SMALL), 0
    for key in keys:
        for junk in (0, 10**9, 2.5, float("nan"), "x"):
            linear = {"rope.scaling.type": "linear"} if key == "rope.scaling.factor" else {}
            file = write_gguf(tmp_path / "m.gguf", SMALL, tensors, metadata={**linear, key: junk})
            try:
                read_config(GGUFReader(file))
            except MixLLMError:
                refused += 1
            else:
                assert not (isinstance(junk, float) and np.isnan(junk)), key
    assert refused > len(keys) * 3


def test_tensors_that_share_bytes(tmp_path, capsys):
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL))
    raw = bytearray(file.read_bytes())
    name = b"output_norm.weight"
    at = raw.index(name) + len(name) + 4 + 8 + 4  # number of dimensions, one dimension, type
    raw[at : at + 8] = struct.pack("<Q", 0)
    file.write_bytes(raw)
    assert "overlap" in fails(file, tmp_path / "out", capsys)


def test_nan(tmp_path, capsys):
    tensors = random_tensors(SMALL)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    message = fails(write_gguf(tmp_path / "m.gguf", SMALL, tensors), tmp_path / "out", capsys)
    assert "tensor blk.1.ffn_up.weight has NaN or infinite values, the first at [2, 3]" in message


TEXTS = [
    "The quick brown fox, aged 12345, doesn't jump.",
    "  leading and   inner spaces\n\n  and lines\r\n",
    "Ünïcödé straße 東京 🙂 e\u0301",
    "I'LL say it's <|user|>hello<|end|> 007",
    "",
]
TRAINING = [
    "The quick brown fox doesn't jump over 12 lazy dogs in 1999. " * 3,
    "straße Ünïcödé it's 東京 hello hello\n\n",
] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level(pre):
    """A tokenizer as the model families ship it, trained on a few words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")],
    }[pre]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(["<|user|>", "<|end|>"])
    return tokenizer


def add_tokenizer(tokenizer, pre, **settings):
    """Writes a trained tokenizer's vocabulary, merges and settings into a GGUF file."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocabulary)
        kinds = gguf.TokenType
        writer.add_token_types([kinds.CONTROL if "<|" in token else kinds.NORMAL for token in vocabulary])
        writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
        writer.add_bos_token_id(tokenizer.token_to_id("<|user|>"))
        writer.add_eos_token_id(tokenizer.token_to_id("<|end|>"))
        writer.add_eot_token_id(tokenizer.token_to_id(settings.get("turn_end", "<|end|>")))
        writer.add_chat_template("{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}")
        if "add_bos" in settings:
            writer.add_add_bos_token(settings["add_bos"])

    return add


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_encode_like_the_original(tmp_path, pre):
    original = train_byte_level(pre)
    config = dataclasses.replace(SMALL, vocab_size=original.get_vocab_size())
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), tokens=add_tokenizer(original, pre))
    tokenizer = load_tokenizer(converted(file, tmp_path / "out").path)
    for text in TEXTS:
        expected = original.encode(text).ids
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == original.decode(expected, skip_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|user|>", "<|end|>")
    chat = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|user|>hello<|end|>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == original.token_to_id("<|end|>")


def test_bos_token_and_end_of_turn_where_the_file_says_so(tmp_path):
    original = train_byte_level("llama-bpe")
    config = dataclasses.replace(SMALL, vocab_size=original.get_vocab_size())
    tokens = add_tokenizer(original, "llama-bpe", add_bos=True, turn_end="<|user|>")
    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), tokens=tokens)
    tokenizer = load_tokenizer(converted(file, tmp_path / "out").path)
    bos = original.token_to_id("<|user|>")
    assert tokenizer.encode("hello") == [bos, *original.encode("hello").ids]
    assert tokenizer.encode("hello", add_special_tokens=False) == original.encode("hello").ids
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [original.token_to_id("<|end|>"), bos]  # the file's end of a turn stops too


def train_sentencepiece():
    """A tokenizer of the Llama 2 kind: metaspace, byte fallback; returns it with the scores of a sentencepiece file."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    words = [word for text in TRAINING[:2] for word in text.split()] * 5
    trained.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = {token: i for i, token in enumerate(special)}
    for token in sorted({*"".join(map("".join, merges)), "▁"}):
        vocabulary.setdefault(token, len(vocabulary))
    scores = [0.0] * len(vocabulary)
    for rank, (left, right) in enumerate(merges):
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            scores.append(-float(rank))
    original = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = trained.normalizer
    original.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    original.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special[:3]])
    return original, vocabulary, scores


def test_sentencepiece_tokenizer_encodes_like_the_original(tmp_path):
    original, vocabulary, scores = train_sentencepiece()
    config = dataclasses.replace(SMALL, vocab_size=len(vocabulary))

    def add(writer):
        kinds = gguf.TokenType
        writer.add_tokenizer_model("llama")
        writer.add_token_list(list(vocabulary))
        writer.add_token_scores(scores)
        types = [kinds.BYTE if token.startswith("<0x") else kinds.NORMAL for token in vocabulary]
        writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *types[3:]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    file = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), tokens=add)
    tokenizer = load_tokenizer(converted(file, tmp_path / "out").path)
    for text in TEXTS:
        expected = original.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == original.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "unsupported tokenizer 'bert'; supported are gpt2 and llama"),
        ({"tokenizer.ggml.pre": "klingon"}, "unsupported pre-tokenizer 'klingon'; supported are llama-bpe"),
        ({"tokenizer.ggml.eos_token_id": 64}, "special tokens outside the vocabulary: {'eos_token': 64}"),
        ({"tokenizer.ggml.tokens": ["a"] * 65}, "the tokenizer has 65 tokens, the model a vocabulary of 64"),
        ({"tokenizer.ggml.tokens": None}, "the tokenizer has no tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges do not fit its vocabulary"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(tmp_path, capsys, change, message):
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [str(i) for i in range(64)],
        "tokenizer.ggml.merges": ["1 2"],
    } | change

    def add(writer):
        for key, value in values.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif value is not None:
                (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    file = write_gguf(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), tokens=add)
    assert message in fails(file, tmp_path / "out", capsys)
