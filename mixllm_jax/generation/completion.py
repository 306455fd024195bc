"""Text of a batch as its tokens come, and what became of every prompt in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterable, Sequence
from typing import TypedDict, cast

from mixllm_jax.errors import OptionError
from mixllm_jax.generation.requests import FinishReason, require_max_tokens
from mixllm_jax.generation.sampling import SamplingSettings
from mixllm_jax.generation.streaming import RowText

_DEFAULT_MAX_TOKENS = 256


class GenerationOptions(TypedDict, total=False):
    """Options of `LoadedModel.generate`, `complete` and `stream`; all may be left out.

    Attributes:
        max_tokens: most tokens to generate for each prompt; by default 256, or what the context has room for.
        temperature: 0 (the default) is greedy.
        top_k: only the k most likely tokens; 0 (the default) for all.
        top_p: only the most likely tokens that sum to this probability; 1 (the default) for all.
        seed: the same seed gives the same text; 0 by default.
        stop: a text, or several; generating ends before any of them.
        echo: begin with the text of the prompt.
        chat: ask under the model's chat template.
        system: system message of the chat.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Sequence[str]
    echo: bool
    chat: bool
    system: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    Attributes:
        text: the new text, behind that of the prompt where this was to be echoed.
        tokens: its token ids: without a stop token, up to the one that completed a stop string.
        finish_reason: `stop` (a stop token or a stop string), or `length` (as many tokens as were asked for).
        prompt_tokens: how many tokens the prompt has.
        first_token_seconds: from the call to the first tokens of the batch; the first call of a size compiles, too.
        seconds: from the call to the end of the batch.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of this row after the first token; None where there was no other."""
        seconds = self.seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / seconds if len(self.tokens) > 1 and seconds > 0 else None


def default_max_tokens(prompts: Iterable[Sequence[int]], max_length: int) -> int:
    """How many tokens to generate where nobody says: 256, or what the longest prompt leaves of the context."""
    return max(1, min(_DEFAULT_MAX_TOKENS, max_length - max(map(len, prompts), default=0)))


def checked_options(options: GenerationOptions, prompts: Sequence[object]) -> tuple[tuple[str, ...], SamplingSettings]:
    """The stop strings, and the settings of sampling; needs no model, so that it can complain before one is loaded.

    Args:
        options: what was asked for.
        prompts: of what: texts, and conversations, which are anything else.

    Raises:
        OptionError: a value is out of range, or an option is for another kind of prompt.
        TypeError: there is no such option.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        known = ", ".join(GenerationOptions.__annotations__)
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}: there are {known}")
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise OptionError("a stop string is empty: it would end every text before it begins")
    sampling = SamplingSettings(
        temperature=options.get("temperature", 0.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        seed=options.get("seed", 0),
    )
    if "max_tokens" in options:
        require_max_tokens(options["max_tokens"])
    _check_chat_options(options, prompts)
    return stop, sampling


def _check_chat_options(options: GenerationOptions, prompts: Sequence[object]) -> None:
    chat, system = options.get("chat", False), options.get("system")
    conversations = not all(isinstance(prompt, str) for prompt in prompts)
    if options.get("echo", False) and (chat or conversations):
        raise OptionError("a question under the chat template has no text to begin with: leave out chat or echo")
    if system is not None and conversations:
        raise OptionError("a conversation holds its own system message: make it the first one")
    if system is not None and not chat:
        raise OptionError("a system message needs the chat template: add --chat (in Python, chat=True).")


def complete_rows(
    chunks: Generator[list[list[int]], None, None], rows: list[RowText], prompt_tokens: list[int], began: float
) -> Generator[list[str], None, list[Completion]]:
    """Yields the new text of every row, and returns what became of all of them.

    Args:
        chunks: new tokens of every row, as `Engine.stream` yields them; closed as soon as no row goes on.
        rows: collect the text.
        prompt_tokens: how many tokens each prompt has.
        began: when, by `time.monotonic`, the work began.
    """
    texts = [row.begin() for row in rows]
    if any(texts):
        yield list(texts)
    first_token = 0.0
    with contextlib.closing(chunks):  # rows that found a stop string are still under way on the device
        for chunk in chunks:
            first_token = first_token or time.monotonic() - began
            pieces = [row.add(tokens) for row, tokens in zip(rows, chunk, strict=True)]
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if any(pieces):
                yield pieces
            if all(row.finish_reason for row in rows):
                break
    pieces = [row.flush() for row in rows]
    if any(pieces):
        yield pieces
    seconds = time.monotonic() - began
    return [
        Completion(text + piece, row.tokens, row.finish_reason or "length", length, first_token, seconds)
        for row, text, piece, length in zip(rows, texts, pieces, prompt_tokens, strict=True)
    ]


def only_row(rows: Generator[list[str], None, list[Completion]]) -> Generator[str, None, Completion]:
    """The same of a batch of one."""
    with contextlib.closing(rows):
        while True:
            try:
                (piece,) = next(rows)
            except StopIteration as end:
                (completion,) = end.value
                return cast(Completion, completion)
            yield piece
