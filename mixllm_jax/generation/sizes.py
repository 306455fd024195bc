"""Sizes of what the engine's programs take, rounded so that prompts of any length meet programs compiled already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

PREFILL_TOKENS = 4096
"""Most tokens of the whole batch in one prefill step: bounds the activations of long prompts and large batches."""
_PREFILL_TOKENS_OF_A_ROW = 512
"""The same for a row where attention makes the whole matrix of scores (no flash attention)."""
_SMALLEST_BUCKET = 16
_SMALLEST_CACHE = 128
_SMALLEST_HISTORY = 512


def round_up_length(length: int, smallest: int, largest: int) -> int:
    """The next of 2^i and 1.5 * 2^i from `smallest` on, at most `largest`: few shapes, at most a third of it unused."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, largest)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one model on one device.

    Attributes:
        max_length: the longest context, prompt and generated tokens together.
        flash_attention: prefill runs in an attention whose memory does not grow with the length squared.
    """

    max_length: int
    flash_attention: bool

    def cache_length(self, positions: int) -> int:
        """Size of the cache in which `positions` tokens of a row are kept."""
        return round_up_length(positions, _SMALLEST_CACHE, self.max_length)

    def prefill_chunk(self, batch: int) -> int:
        """Tokens of each row in one prefill step: a power of two."""
        chunk = PREFILL_TOKENS >> (batch - 1).bit_length()
        return max(_SMALLEST_BUCKET, chunk if self.flash_attention else min(chunk, _PREFILL_TOKENS_OF_A_ROW))

    def prefill_steps(self, length: int, batch: int, cache_length: int) -> Iterator[tuple[int, int]]:
        """First token and padded size of each chunk of the longest prompt, which has `length` tokens."""
        chunk = self.prefill_chunk(batch)
        for offset in range(0, length, chunk):
            yield offset, round_up_length(min(length - offset, chunk), _SMALLEST_BUCKET, cache_length)

    def history(self, held: int) -> int | None:
        """A bound of the tokens in the cache, from a short list; None where it would save nothing."""
        if not self.flash_attention:
            return None
        return 0 if held == 0 else max(_SMALLEST_HISTORY, 1 << (held - 1).bit_length())
