"""Rebuilds a tokenizer, chat template and generation settings from the metadata of a GGUF file, without torch."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from convert.gguf_reader import GGUFReader
from mixllm_jax.errors import CheckpointError, UnsupportedModelError
from mixllm_jax.models.config import ModelConfig

# How byte-level vocabularies split text before merging, by llama.cpp's name for it; facts of the published models.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}
_DIGITS_APART = ("smollm",)
_PLAIN = ("default", "gpt-2")

_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(reader: GGUFReader, config: ModelConfig) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer, with the chat template and the generation settings, by file name.

    Raises:
        CheckpointError: The tokenizer's metadata contradict each other or the model.
        UnsupportedModelError: A kind of tokenizer, or of splitting text, that we cannot rebuild.
    """
    tokens = reader.metadata("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(tokens) != config.vocab_size:
        found = f"{len(tokens)} tokens" if isinstance(tokens, list) else "no tokens"
        raise CheckpointError(
            f"{reader.path}: the tokenizer has {found}, the model a vocabulary of {config.vocab_size}"
        )
    ids = {name: reader.metadata(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    ids = {name: token for name, token in ids.items() if token is not None}
    if out_of_range := {name: token for name, token in ids.items() if not 0 <= token < len(tokens)}:
        raise CheckpointError(f"{reader.path}: special tokens outside the vocabulary: {out_of_range}")

    tokenizer = _build(reader, tokens, ids)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **{name: tokens[token] for name, token in ids.items()},
    }
    generation: dict[str, Any] = {
        name.replace("token", "token_id"): token for name, token in ids.items() if name != "unk_token"
    }
    turn_end = reader.metadata("tokenizer.ggml.eot_token_id")
    if turn_end is not None and turn_end != ids.get("eos_token"):  # chat models may end a turn with a token of its own
        generation["eos_token_id"] = [*([ids["eos_token"]] if "eos_token" in ids else []), turn_end]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json(generation),
    }
    template = reader.metadata("tokenizer.chat_template")
    if template:
        files["chat_template.jinja"] = template.encode()
    return files


def _build(reader: GGUFReader, tokens: list[str], ids: dict[str, int]) -> Tokenizer:
    kind = reader.metadata("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(reader, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(reader, tokens, ids)
    else:
        raise UnsupportedModelError(f"{reader.path}: unsupported tokenizer {kind!r}; supported are gpt2 and llama")
    types = reader.metadata("tokenizer.ggml.token_type", [])
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=False) if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False) if k == _USER_DEFINED]
    )
    # Files of the sentencepiece kind that do not say otherwise begin a text with BOS.
    if reader.metadata("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in ids:
        bos = tokens[ids["bos_token"]]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
        byte_level = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
        tokenizer.post_processor = processors.Sequence([*byte_level, template])
    return tokenizer


def _byte_level(reader: GGUFReader, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE as in GPT-2, with the model family's way of splitting text."""
    merges = reader.metadata("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{reader.path}: the metadata have no tokenizer.ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges="llama" in _split_name(reader)))
    except Exception as error:  # the library raises plain Exception where merges and vocabulary disagree
        raise CheckpointError(f"{reader.path}: the tokenizer's merges do not fit its vocabulary: {error}") from error
    name = _split_name(reader)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in (*_DIGITS_APART, *_PLAIN))
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif name in _DIGITS_APART:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name in _PLAIN:
        tokenizer.pre_tokenizer = byte_level
    else:
        supported = ", ".join([*_SPLITS, *_DIGITS_APART, *_PLAIN])
        raise UnsupportedModelError(f"{reader.path}: unsupported pre-tokenizer {name!r}; supported are {supported}")
    if "qwen" in name:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_name(reader: GGUFReader) -> str:
    return str(reader.metadata("tokenizer.ggml.pre", "default"))


def _sentencepiece(reader: GGUFReader, tokens: list[str], ids: dict[str, int]) -> Tokenizer:
    """Sentencepiece BPE (Llama 2, Mistral, TinyLlama): merges follow from the scores."""
    scores = reader.metadata("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{reader.path}: the metadata have no tokenizer.ggml.scores for each token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[ids.get("unk_token", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if reader.metadata("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best result first.

    Sentencepiece merges whatever pair gives the token of the highest score; ranks in this order say the same. Between
    two ways to the same token the one that starts with the earlier token goes first.
    """
    ways = [
        (-scores[index], index, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
