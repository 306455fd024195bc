"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Turns a growing list of tokens into pieces of text whose concatenation is the text of all tokens.

    A token may hold part of a character (byte-level vocabularies) or a space that depends on the token before it
    (SentencePiece). So each piece is the difference of two decodings that start a few tokens back, and text that ends
    in an incomplete character waits for the next token.

    Args:
        tokenizer: a `transformers` tokenizer.
        skip_special_tokens: leave out tokens such as the end of the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._context = 0  # the decodings start here
        self._emitted = 0  # tokens before this one have been returned as text

    def add(self, tokens: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        self._tokens += tokens
        return self._advance(hold_back=True)

    def flush(self) -> str:
        """What is left at the end: characters that were never completed."""
        return self._advance(hold_back=False)

    def _advance(self, *, hold_back: bool) -> str:
        before = self._decode(self._tokens[self._context : self._emitted])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(before) or (hold_back and text.endswith(_REPLACEMENT)):
            return ""
        self._context, self._emitted = self._emitted, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))
