"""What the engine benchmark measures, and the rows it stores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from mixllm_jax.errors import OptionError
from mixllm_jax.models.random_allocation import RandomAllocation

KEY = ("model", "scheme", "allocation", "batch", "context", "kv_bits", "lm_head_bits", "embedding_bits", "phase")
"""The fields that identify a row or a profile. `phase` is a profile's, `decode` or `prefill`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases of one model in one scheme, measured in one process.

    Attributes:
        model: Name of a preset (random weights), or a model folder.
        scheme: `bf16`, `W4A8`, ... for random weights; `stored` for a folder.
        batches: Rows of the decode cases.
        contexts: Positions of the decode cases; the last `decode_steps` of them are decoded.
        prompts: Prompt lengths whose time to the first token is measured, one row.
        kv_bits: 16 or 8.
        lm_head_bits: 16 or 8.
        embedding_bits: 16 or 8.
        decode_steps: Timed decode steps.
        allocation: Where random weights have their 8-bit channels.
        profile: Whether to profile a decode step of the first and the last batch at the first context, and one prefill.
    """

    model: str
    scheme: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    kv_bits: int = 16
    lm_head_bits: Literal[8, 16] = 16
    embedding_bits: Literal[8, 16] = 16
    decode_steps: int = 128
    allocation: RandomAllocation = "uniform"
    profile: bool = False

    def to_json(self) -> str:
        """For the command line of the worker process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        for name in ("batches", "contexts", "prompts"):
            values[name] = tuple(values[name])
        return cls(**values)

    def row(self, batch: int, context: int, **measured: Any) -> dict[str, Any]:
        """A row of the results; what was not measured is null, and where measuring failed, `error` says why."""
        return {
            "model": Path(self.model).name,
            "scheme": self.scheme,
            "allocation": self.allocation,
            "batch": batch,
            "context": context,
            "kv_bits": self.kv_bits,
            "lm_head_bits": self.lm_head_bits,
            "embedding_bits": self.embedding_bits,
            "decode_tokens_per_s": None,
            "time_to_first_token_ms": None,
            "peak_memory_gb": None,
            "roofline_share": None,
        } | measured


class Results:
    """The JSON file of rows: every row is stored as soon as it is there, and replaces an older one of the same case.

    Raises:
        OptionError: There is a file that is not JSON.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        try:
            stored = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise OptionError(
                f"{path} should hold results of a benchmark, to which rows are added, but is no JSON ({error}): "
                "remove it or give another file with --out"
            ) from error
        self.rows: list[dict[str, Any]] = stored.get("rows", [])
        self.profiles: list[dict[str, Any]] = stored.get("profiles", [])

    def add(self, row: dict[str, Any]) -> None:
        """Stores a row; values that are null in it keep what an earlier one of this run found.

        A case that failed keeps nothing, and its `error` ends with the next row of the case.
        """
        older = [old for old in self.rows if _key(old) == _key(row)]
        keeps = older and "error" not in row and "error" not in older[0]
        kept = {name: value for name, value in older[0].items() if row.get(name) is None} if keeps else {}
        self.rows = [old for old in self.rows if old not in older] + [row | kept]
        self.rows.sort(key=lambda row: [(value is None, str(value).zfill(8)) for value in _key(row)])
        self._write()

    def add_profile(self, profile: dict[str, Any]) -> None:
        """Stores the profile of a decode step or a prefill in place of an older one of the same case."""
        self.profiles = [*(old for old in self.profiles if _key(old) != _key(profile)), profile]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        lines = {
            name: ",\n".join("  " + json.dumps(row) for row in getattr(self, name)) for name in ("rows", "profiles")
        }
        body = json.dumps(self.header, indent=1)[:-2]
        partial.write_text(f'{body},\n "rows": [\n{lines["rows"]}\n ],\n "profiles": [\n{lines["profiles"]}\n ]\n}}\n')
        partial.replace(self.path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row; those stored before there were other allocations are uniform."""
    return tuple(({"allocation": "uniform"} | row).get(name) for name in KEY)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table for people."""
    columns = {
        "scheme": "scheme",
        "batch": "batch",
        "context": "context",
        "kv_bits": "kv bits",
        "lm_head_bits": "head bits",
        "embedding_bits": "embedding bits",
        "decode_tokens_per_s": "decode tok/s",
        "roofline_share": "roofline",
        "time_to_first_token_ms": "first token ms",
        "peak_memory_gb": "peak GB",
    }
    if any(row.get("allocation", "uniform") != "uniform" for row in rows):
        columns["allocation"] = "allocation"
    if any("error" in row for row in rows):
        columns["error"] = "error"

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return (
            f"{value:.2f}"
            if isinstance(value, float) and value < 100
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    table = [list(columns.values()), *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in table)
