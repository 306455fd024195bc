"""`mixllm_jax.load`: a model folder, float or quantised, ready to run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.device import require_kernels
from mixllm_jax.errors import CheckpointError, OptionError
from mixllm_jax.generation import Engine, IncrementalDetokenizer, PromptCache, SamplingSettings
from mixllm_jax.models.common_shapes import with_common_shape
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.eight_bit_table import TableBits, choose_bits
from mixllm_jax.models.parameters import Execution
from pallas_kernels.packing import PackedWeight

Message = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": TEXT}`."""


DEFAULT_MAX_TOKENS = 256


class GenerationOptions(TypedDict, total=False):
    """Options of `LoadedModel.generate` and `stream`; all may be left out.

    Attributes:
        max_tokens: most tokens to generate for each prompt; 256 by default.
        temperature: 0 (the default) is greedy.
        top_k: only the k most likely tokens; 0 (the default) for all.
        top_p: only the most likely tokens that sum to this probability; 1 (the default) for all.
        seed: the same seed gives the same text; 0 by default.
        chat: ask under the model's chat template.
        system: system message of the chat.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    chat: bool
    system: str | None


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | Literal["auto"] = "auto",
    implementation: str = "auto",
    kv_bits: int = 16,
    lm_head_bits: int | None = None,
    embedding_bits: int | None = None,
) -> LoadedModel:
    """Loads a converted or quantised model.

    Args:
        path: the model folder.
        dtype: compute dtype of activations and float weights; `auto` is bfloat16 on a GPU and float32 on a CPU.
        implementation: of the quantised operations: `auto`, `xla`, or a kernel's name (see `pallas_kernels`).
        kv_bits: 8 keeps keys and values of generation as int8, one scale a token and head; 16 in the compute dtype.
        lm_head_bits: 8 rounds the output head to 8 bits and runs it on int8 tensor cores, its input as a sum of two
            int8 terms; 16 leaves it as it is. None is 8 for a quantised model (with int8 activations), else 16.
        embedding_bits: 8 rounds the embedding to 8 bits; 16 leaves it as it is; None as for the head. A tied one needs
            `lm_head_bits` 8 too, and follows it by default.

    Raises:
        CheckpointError: not a model folder, or it is damaged or of a newer format.
        OptionError: a number of bits that is neither 8 nor 16, or an 8-bit embedding tied to a 16-bit output head.
        UnsupportedDeviceError: the GPU has no kernels for this quantised model.
        NotImplementedError: the implementation asked for cannot run here.
    """
    reader = CheckpointReader(path)
    config = reader.config
    if kv_bits not in (8, 16):
        raise OptionError(f"kv-bits must be 8 or 16, found {kv_bits}")
    quantization = reader.metadata.get("quantization", {})
    tables = table_bits(reader, lm_head_bits, embedding_bits)
    bits = quantization.get("activation_bits", 8)
    if bits == 8 and "group_size" in quantization:
        require_kernels(quantization["group_size"], implementation)
    execution = Execution(
        dtype=compute_dtype(dtype),
        activation_bits=cast(Any, bits),
        implementation=implementation,
        lm_head_bits=tables.lm_head,
        embedding_bits=tables.embedding,
    )
    parts = reader.read_parts()  # in the order in which the decoder asks for them
    model = Decoder.from_parameters(config, lambda name: _next_part(parts, name), execution)
    return LoadedModel(model, config, reader.metadata, reader.path, kv_bits, tables)


def table_bits(reader: CheckpointReader, lm_head_bits: int | None, embedding_bits: int | None) -> TableBits:
    """Bits with which the output head and the embedding of a folder are loaded, where these are asked for.

    Raises:
        OptionError: as `choose_bits`.
    """
    integer = reader.kind == "quantized" and reader.metadata.get("quantization", {}).get("activation_bits", 8) == 8
    tied = reader.config.tie_word_embeddings
    return choose_bits(lm_head_bits, embedding_bits, quantized=integer, tied=tied)


def compute_dtype(dtype: DTypeLike | Literal["auto"]) -> jnp.dtype[Any]:
    """The dtype meant; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if isinstance(dtype, str) and dtype == "auto":
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(dtype)


def _next_part(parts: Iterator[tuple[str, Any]], wanted: str) -> Any:
    name, part = next(parts)
    if name != wanted:
        raise AssertionError(f"the decoder asked for part {wanted!r} where {name!r} comes next")
    if jax.default_backend() == "cpu":  # XLA compiles nothing for a layer's number of 8-bit channels that takes long
        return part
    return {
        path: with_common_shape(value) if isinstance(value, PackedWeight) else value for path, value in part.items()
    }


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model: the decoder; `model(tokens)` gives logits, and it is a pytree of parameters.
        config: its configuration.
        metadata: the content of the folder's `mixllm.json`.
        path: the folder.
        kv_bits: of the key/value cache.
        table_bits: of the output head and the embedding.
    """

    model: Decoder
    config: ModelConfig
    metadata: dict[str, Any]
    path: Path
    kv_bits: int
    table_bits: TableBits

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer of the folder (imported on first use: that takes a second).

        Raises:
            CheckpointError: the folder has no tokenizer, or it cannot be read.
        """
        return load_tokenizer(self.path)

    @functools.cached_property
    def engine(self) -> Engine:
        """Generation on token ids."""
        return Engine(self.model, kv_bits=self.kv_bits)

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Token ids that end a text: those of `generation_config.json` and of the tokenizer."""
        found: list[int] = []
        file = self.path / "generation_config.json"
        if file.is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(found))

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a text, with the tokens that the tokenizer puts before one."""
        return list(self.tokenizer(prompt, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation under the chat template, up to where the model's answer begins.

        Raises:
            OptionError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise OptionError(f"{self.path} has no chat template: give the prompt without --chat.")
        tokens = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(tokens)

    @overload
    def generate(self, prompts: str, **options: Unpack[GenerationOptions]) -> str: ...

    @overload
    def generate(self, prompts: list[str], **options: Unpack[GenerationOptions]) -> list[str]: ...

    def generate(self, prompts: str | list[str], **options: Unpack[GenerationOptions]) -> str | list[str]:
        """Continues one text, or several in one batch; returns the new text or texts, without the prompts.

        Raises:
            OptionError: an option is out of range, or a prompt does not fit into the context.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        max_tokens, sampling = _generation_settings(options)
        results = self.engine.generate(
            [self._encode_prompt(text, options) for text in texts],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_tokens=self.stop_tokens,
        )
        answers = [str(self.tokenizer.decode(result.tokens, skip_special_tokens=True)) for result in results]
        return answers[0] if isinstance(prompts, str) else answers

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        prompt_cache: PromptCache | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[str, None, None]:
        """Like `generate` for one prompt, but yields pieces of text as they come.

        Args:
            prompt: a text, or the messages of a conversation.
            prompt_cache: keeps the context of a conversation between calls.
            **options: see `GenerationOptions`.
        """
        max_tokens, sampling = _generation_settings(options)
        chunks = self.engine.stream(
            [self._encode_prompt(prompt, options) if isinstance(prompt, str) else self.encode_chat(prompt)],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_tokens=self.stop_tokens,
            prompt_cache=prompt_cache,
        )
        return self._stream_text(chunks)

    def _stream_text(self, chunks: Generator[list[list[int]], None, None]) -> Generator[str, None, None]:
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        with contextlib.closing(chunks):
            for (tokens,) in chunks:
                if text := detokenizer.add(tokens):
                    yield text
        if text := detokenizer.flush():
            yield text

    def _encode_prompt(self, prompt: str, options: GenerationOptions) -> list[int]:
        system = options.get("system")
        if not options.get("chat", False):
            if system is not None:
                raise OptionError("a system message needs the chat template: add --chat (in Python, chat=True).")
            return self.encode(prompt)
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encode_chat([*messages, {"role": "user", "content": prompt}])


def _generation_settings(options: GenerationOptions) -> tuple[int, SamplingSettings]:
    sampling = SamplingSettings(
        temperature=options.get("temperature", 0.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        seed=options.get("seed", 0),
    )
    return options.get("max_tokens", DEFAULT_MAX_TOKENS), sampling


def load_tokenizer(path: Path) -> Any:
    """The `transformers` tokenizer of a model folder; `CheckpointError` where there is none."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{path} has no tokenizer (tokenizer.json): convert the model again from a folder that has one."
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many types for a damaged or unknown tokenizer
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error
