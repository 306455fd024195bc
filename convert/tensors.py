"""What every reader of foreign checkpoints offers, and checks on the tensors it gives."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from mixllm_jax.errors import CheckpointError

Shape = tuple[int, ...]

FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that a converted folder may hold."""

# Integer view and mask of the exponent bits: all ones means infinity or not-a-number.
_EXPONENT = {
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}
_CHECK_ELEMENTS = 1 << 22


class TensorReader(Protocol):
    """A foreign checkpoint, read one tensor at a time."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor's shape, known without reading any data."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, bfloat16 or float16; `CheckpointError` where its bytes cannot be right."""
        ...


def check_finite(values: np.ndarray, what: str) -> None:
    """Checks that no element is infinite or not a number, in bounded memory.

    Raises:
        CheckpointError: Naming the tensor (`what`), the number of such elements and the first one's place.
    """
    integer, mask = _EXPONENT[values.dtype.name]
    flat = values.reshape(-1).view(integer)
    for start in range(0, flat.size, _CHECK_ELEMENTS):
        chunk = flat[start : start + _CHECK_ELEMENTS]
        bad = (chunk & mask) == mask
        if bad.any():
            place = tuple(int(i) for i in np.unravel_index(start + int(bad.argmax()), values.shape))
            raise CheckpointError(
                f"{what} has NaN or infinite values, the first at {list(place)}: the checkpoint is damaged or was "
                "saved from a diverged run; download it again or use another one"
            )


def check_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], ignored: Iterable[str], where: str
) -> None:
    """Checks names and shapes of a whole checkpoint before anything is read.

    Args:
        expected: Tensors the model configuration asks for.
        found: Tensors that are there.
        ignored: Regular expressions of tensors that may be there and carry no information.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: Lists all missing, unexpected and mis-shaped tensors; those that differ in the layer number
            alone share a line.
    """
    harmless = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))
    missing = [(name, f"{list(shape)}") for name, shape in expected.items() if name not in found]
    unexpected = [
        (name, f"{list(shape)}")
        for name, shape in found.items()
        if name not in expected and not harmless.fullmatch(name)
    ]
    misshaped = [
        (name, f"is {list(found[name])}, the configuration asks for {list(shape)}")
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    lines = [
        f"  {kind}: {name} {detail}"
        for kind, entries in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshaped))
        for name, detail in _collapse_layers(entries)
    ]
    if lines:
        raise CheckpointError(
            f"{where}: the tensors do not fit the model configuration "
            f"({len(missing)} missing, {len(unexpected)} unexpected, {len(misshaped)} of wrong shape):\n"
            + "\n".join(lines)
        )


def _collapse_layers(entries: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Joins entries that differ in the layer number alone: `model.layers.[0-31].mlp.up_proj.weight`."""
    groups: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    plain: dict[tuple[str, str], None] = {}
    for name, detail in entries:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if match:
            groups[match[1], match[3], detail].append(int(match[2]))
        else:
            plain[name, detail] = None
    return [
        *plain,
        *((f"{head}{_ranges(numbers)}{tail}", detail) for (head, tail, detail), numbers in groups.items()),
    ]


def _ranges(numbers: list[int]) -> str:
    """`[0-3,7]` for 0, 1, 2, 3, 7; a single number stays as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs)
    return text if len(numbers) == 1 else f"[{text}]"
