"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mixllm_jax.generation.requests import FinishReason

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so the most tokens that a character is spread over."""


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
        end = len(self._tokens)
        if hold_back and text.endswith(_REPLACEMENT):
            # What lies further back is no beginning of a character: bytes that are no text are not held back for ever,
            # and not decoded again with every token.
            end = max(self._emitted, end - _LONGEST_CHARACTER)
            certain = self._decode(self._tokens[self._context : end])
            text = certain if text.startswith(certain) else ""
        if len(text) <= len(before):
            return ""
        self._context, self._emitted = self._emitted, end
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))


class StopStrings:
    """Lets a text through up to the first of some strings, and holds back what may be the beginning of one.

    Attributes:
        found: a string was found; nothing more comes through.
    """

    def __init__(self, strings: Collection[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can no longer be part of a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        # The one that is complete first counts, so that it does not matter in which pieces the text comes.
        ends = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        beginnings = (string[:size] for string in self._strings for size in range(1, len(string)))
        held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class RowText:
    """The text of one row of a batch, as its tokens come.

    Attributes:
        tokens: the row's own tokens so far, up to the one that completed a stop string; a stop token is not among them.
        finish_reason: why the row has ended; None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_tokens: Collection[int] = (),
        stop_strings: Collection[str] = (),
        echo: Sequence[int] = (),
    ) -> None:
        """Begins a row.

        Args:
            tokenizer: a `transformers` tokenizer.
            stop_tokens: any of these ends the row.
            stop_strings: the row ends before any of these.
            echo: tokens of the prompt, where its text is to come first; stop strings in it do not count.
        """
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop_tokens = stop_tokens
        self._stop = StopStrings(stop_strings)
        self._at_once = not stop_strings  # a stop string ends the row at the token that completes it
        self._echo = echo

    def begin(self) -> str:
        """The text before the first token."""
        return self._detokenizer.add(self._echo) if self._echo else ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that became certain with these tokens; what follows the end of the row is left out."""
        pieces = []
        for part in [tokens] if self._at_once else [[token] for token in tokens]:
            if self.finish_reason is not None:
                break
            if part and part[-1] in self._stop_tokens:
                part, self.finish_reason = part[:-1], "stop"
            self.tokens += part
            pieces.append(self._stop.add(self._detokenizer.add(part)))
            if self._stop.found:
                self.finish_reason = "stop"
        return "".join(pieces)

    def flush(self) -> str:
        """What is left at the end of the row."""
        rest = "" if self._stop.found else self._stop.add(self._detokenizer.flush()) + self._stop.flush()
        self.finish_reason = self.finish_reason or ("stop" if self._stop.found else "length")
        return rest
