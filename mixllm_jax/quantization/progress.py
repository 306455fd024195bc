"""One progress bar over all phases of a job, so that the time left is that of the whole job."""

import sys
from types import TracebackType
from typing import Self

from mixllm_jax.progress_bar import progress_bar


class Progress:
    """A bar whose unit is the work of one plain forward pass through one block.

    Args:
        total: units of the whole job.
        show: draw it on stderr.
    """

    def __init__(self, total: float, *, show: bool = True) -> None:
        self._bar = progress_bar(
            total=total,
            disable=not show,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def describe(self, text: str) -> None:
        """Names what is being done now."""
        self._bar.set_description_str(text, refresh=sys.stderr.isatty())

    def advance(self, units: float) -> None:
        """Counts work just done."""
        self._bar.update(units)

    def skip(self, units: float) -> None:
        """Counts work that an earlier run did; it does not make the rate look faster."""
        if self._bar.disable:  # a bar that is not drawn keeps no count
            return
        # Not by update(): its moving average would take this for work done in no time.
        self._bar.initial += units
        self._bar.n += units
        self._bar.last_print_n += units
        if sys.stderr.isatty():
            self._bar.refresh()
