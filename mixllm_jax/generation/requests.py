"""What is asked of the engine, checked before any work begins, and what it gives back."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mixllm_jax.errors import OptionError
from mixllm_jax.generation.sampling import SamplingSettings

MAX_STOP_TOKENS = 16
"""A fixed number, padded, so that another one compiles no other program."""

FinishReason = Literal["stop", "length"]
"""`stop`: a stop token, or in text a stop string; `length`: as many tokens as were asked for."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """The generated tokens of one prompt (a stop token not included), and why they ended."""

    tokens: list[int]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts that run as one batch; made by `of`, which checks them.

    Attributes:
        prompts: token ids, one list a row; their lengths may differ.
        max_tokens: most tokens to generate for each row.
        sampling: how to choose tokens.
        stop_tokens: a row ends after any of these.
    """

    prompts: list[list[int]]
    max_tokens: int
    sampling: SamplingSettings
    stop_tokens: tuple[int, ...]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingSettings | None,
        stop_tokens: Sequence[int],
        vocab_size: int,
        max_length: int,
    ) -> Request:
        """Checks what was asked for against the model.

        Args:
            prompts: see `Request`; lists, tuples or integer arrays.
            max_tokens: see `Request`.
            sampling: None is greedy.
            stop_tokens: see `Request`.
            vocab_size: tokens that the model knows.
            max_length: longest context of the model, prompt and generated tokens together.

        Raises:
            OptionError: no prompt or an empty one, a token outside the vocabulary, a prompt that leaves too little room
                for `max_tokens`, no token to generate, or too many stop tokens.
            ValueError: a prompt that is no sequence of token ids.
        """
        require_max_tokens(max_tokens)
        if len(stop_tokens) > MAX_STOP_TOKENS:
            raise OptionError(f"at most {MAX_STOP_TOKENS} stop tokens are possible, got {len(stop_tokens)}")
        if len(prompts) == 0:
            raise OptionError("no prompt was given")
        rows = []
        for index, prompt in enumerate(prompts):
            name = f"prompt {index + 1} of {len(prompts)}"
            row = _token_ids(prompt, name)
            if not row:
                raise OptionError(f"{name} is empty: it must have at least one token")
            if min(row) < 0 or max(row) >= vocab_size:
                outside = next(token for token in row if not 0 <= token < vocab_size)
                raise OptionError(
                    f"{name} has a token outside the model's vocabulary of {vocab_size}, {outside}: the tokenizer "
                    "belongs to another model"
                )
            _require_room(len(row), int(max_tokens), max_length, name)
            rows.append(row)
        return cls(rows, int(max_tokens), sampling or SamplingSettings(), tuple(int(token) for token in stop_tokens))

    @property
    def positions(self) -> int:
        """Tokens of the longest row in the end."""
        return max(map(len, self.prompts)) + self.max_tokens

    def finish(self, tokens: Sequence[int]) -> Generation:
        """The result of a row that has ended: without its stop token."""
        if tokens and tokens[-1] in self.stop_tokens:
            return Generation(list(tokens[:-1]), "stop")
        return Generation(list(tokens), "length")


def require_max_tokens(max_tokens: int) -> None:
    """Checks the most tokens to generate; `OptionError` where it is no number of at least 1."""
    if not isinstance(max_tokens, numbers.Integral) or max_tokens < 1:
        raise OptionError(f"max-tokens must be a whole number of at least 1, found {max_tokens!r}")


def _token_ids(prompt: Any, name: str) -> list[int]:
    array = np.asarray(prompt)
    if array.ndim == 1 and array.size == 0:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a list of token ids, found {str(prompt)[:80]!r}")
    ids: list[int] = array.tolist()
    return ids


def _require_room(prompt: int, new_tokens: int, max_length: int, name: str) -> None:
    if prompt >= max_length:
        raise OptionError(f"{name} has {prompt} tokens, but the context has {max_length} positions: shorten the prompt")
    if prompt + new_tokens > max_length:
        raise OptionError(
            f"{name} has {prompt} tokens, which with {new_tokens} new tokens (max-tokens) need {prompt + new_tokens} "
            f"positions, but the context has {max_length}: ask for at most {max_length - prompt} new tokens, or "
            "shorten the prompt"
        )
