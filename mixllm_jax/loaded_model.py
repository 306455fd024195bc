"""A model with its tokenizer: text in, text out."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast, overload

from mixllm_jax.checkpoint import TOKENIZER_FILES
from mixllm_jax.errors import CheckpointError, OptionError
from mixllm_jax.generation import Engine, PromptCache
from mixllm_jax.generation.completion import (
    Completion,
    GenerationOptions,
    checked_options,
    complete_rows,
    default_max_tokens,
    only_row,
)
from mixllm_jax.generation.streaming import RowText
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.eight_bit_table import TableBits

Message = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": TEXT}`."""

Prompt = str | Sequence[Message]
"""A text to continue, or a conversation to answer under the chat template."""


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
        """Token ids that end a text: those of `generation_config.json` and of the tokenizer.

        Raises:
            CheckpointError: that file cannot be read.
        """
        found = _end_tokens(self.path / "generation_config.json")
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
        """Continues one text, or several in one batch; returns the new text or texts. `complete` says more.

        Raises:
            OptionError: an option is out of range, or a prompt does not fit into the context.
            OutOfDeviceMemoryError: the batch does not fit; says what would.
        """
        if isinstance(prompts, str):
            return self.complete([prompts], **options)[0].text
        return [completion.text for completion in self.complete(prompts, **options)]

    def complete(self, prompts: Sequence[Prompt], **options: Unpack[GenerationOptions]) -> list[Completion]:
        """Continues texts or answers conversations in one batch: text, tokens, why they ended, and how long it took.

        Args:
            prompts: texts, which continue or with `chat` are asked, and conversations; their lengths may differ, and
                each row stops at its own end.
            **options: see `GenerationOptions`.

        Raises:
            OptionError: an option is out of range, or a prompt does not fit into the context.
            OutOfDeviceMemoryError: the batch does not fit; says what would.
        """
        if isinstance(prompts, str):  # a sequence of texts, too, but hardly meant as one
            raise ValueError("complete takes a list of prompts, found a single text: give [text], or use generate")
        if any(isinstance(prompt, Mapping) for prompt in prompts):
            raise ValueError("complete takes a list of prompts, found a single conversation: give [conversation]")
        rows = self._start(prompts, options, float("inf"), None)
        while True:
            try:
                next(rows)
            except StopIteration as end:
                return cast(list[Completion], end.value)

    def stream(
        self, prompt: Prompt, *, prompt_cache: PromptCache | None = None, **options: Unpack[GenerationOptions]
    ) -> Generator[str, None, Completion]:
        """Like `complete` for one prompt, but yields pieces of text as they come; the generator's value is the result.

        Args:
            prompt: a text, or the messages of a conversation.
            prompt_cache: keeps the context of a conversation between calls.
            **options: see `GenerationOptions`.

        Raises:
            OptionError, OutOfDeviceMemoryError: as `complete`.
        """
        return only_row(self._start([prompt], options, None, prompt_cache))

    def _start(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        interval: float | None,
        prompt_cache: PromptCache | None,
    ) -> Generator[list[str], None, list[Completion]]:
        """Checks everything, and returns what does the work."""
        began = time.monotonic()
        stop, sampling = checked_options(options, prompts)
        tokens = [self._encode_prompt(prompt, options) for prompt in prompts]
        chunks = self.engine.stream(
            tokens,
            max_tokens=options.get("max_tokens", default_max_tokens(tokens, self.config.max_position_embeddings)),
            sampling=sampling,
            stop_tokens=self.stop_tokens,
            prompt_cache=prompt_cache,
            **({} if interval is None else {"interval": interval}),
        )
        echo = options.get("echo", False)
        rows = [
            RowText(self.tokenizer, stop_tokens=self.stop_tokens, stop_strings=stop, echo=prompt if echo else ())
            for prompt in tokens
        ]
        return complete_rows(chunks, rows, [len(prompt) for prompt in tokens], began)

    def _encode_prompt(self, prompt: Prompt, options: GenerationOptions) -> list[int]:
        """Tokens of a prompt whose options were checked."""
        if not isinstance(prompt, str):
            return self.encode_chat(prompt)
        if not options.get("chat", False):
            return self.encode(prompt)
        system = options.get("system")
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encode_chat([*messages, {"role": "user", "content": prompt}])


def _end_tokens(file: Path) -> list[int]:
    """`eos_token_id` of a generation config, which may be missing, one id or a list."""
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text()).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(isinstance(token, int) for token in ids):
            raise ValueError(f"eos_token_id must hold token ids, found {ids}")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return ids


def load_tokenizer(path: Path) -> Any:
    """The `transformers` tokenizer of a model folder; `CheckpointError` where there is none."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} has no tokenizer (tokenizer.json): convert the model again from a folder that has one."
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many types for a damaged or unknown tokenizer
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error
