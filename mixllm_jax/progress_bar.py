"""A progress bar on stderr, or now and then a line of it where stderr is a file, as under nohup or in CI."""

from __future__ import annotations

import sys
from typing import Any, TextIO, cast

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def progress_bar(*arguments: Any, **options: Any) -> tqdm[Any]:
    """`tqdm(...)` with these options, drawn on stderr as it suits it."""
    if sys.stderr.isatty():
        return tqdm(*arguments, file=sys.stderr, dynamic_ncols=True, **options)
    rarely: Any = {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 0, "delay": SECONDS_BETWEEN_LINES}
    return tqdm(*arguments, file=cast(Any, _Lines(sys.stderr)), ncols=100, ascii=True, **rarely, **options)


class _Lines:
    """A stream on which each drawing of a bar is a line: in a file it would stand beside the last one for ever."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        drawing = text.strip("\r\n ")
        if drawing not in ("", self._last):  # the end draws what may stand there already
            self._stream.write(f"{drawing}\n")
            self._last = drawing

    def flush(self) -> None:
        self._stream.flush()
