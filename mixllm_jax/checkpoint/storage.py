"""Arrays and small files on disk: Orbax, written so that equal content gives equal bytes."""

from __future__ import annotations

import functools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_ORBAX_NOISE = (
    "Skipping merge of OCDBT",  # this and the next are about the storage that we turn off
    "TensorStore data files not found",
    "_SignalingThread.run() raised an exception",  # with its traceback; `save` raises the same exception later
)


def prepare_saving() -> None:
    """Imports Orbax and starts the thread that saves, now rather than with the first array."""
    from orbax.checkpoint import v1  # noqa: F401

    _saving_thread()


@functools.cache
def _saving_thread() -> ThreadPoolExecutor:
    """A pool of one thread that runs already: one that Ctrl-C finds at its start would not be waited for."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="save-arrays")
    pool.submit(int).result()
    return pool


def _orbax_context() -> Any:
    from orbax.checkpoint import v1 as ocp

    if not any(isinstance(f, _DropOrbaxNoise) for f in logging.getLogger("absl").filters):
        logging.getLogger("absl").addFilter(_DropOrbaxNoise())
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False  # one file per array: equal arrays give equal files, a damaged file has a name
    saving.use_zarr3 = True
    saving.use_compression = False  # codes and bf16 mantissas hardly compress
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    return context


class _DropOrbaxNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in _ORBAX_NOISE)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays (none of them empty) as one Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    def save() -> None:
        with _orbax_context():
            ocp.save(path, arrays)

    # Ctrl-C must not leave Orbax's own threads writing into a folder that is being removed: it reaches this thread
    # alone, which waits for the end of what it asked for before the interrupt goes on.
    thread = _saving_thread()
    try:
        thread.submit(save).result()
    except BaseException:
        thread.submit(int).result()  # has its turn when the save is over
        raise
    # Orbax notes the time and the absolute path of the commit; without them, equal models are equal files.
    commit_file, metadata_file = path / "commit_success.txt", path / "_CHECKPOINT_METADATA"
    commit_file.unlink(missing_ok=True)
    metadata = json.loads(metadata_file.read_bytes())
    metadata_file.write_bytes(to_json(metadata | {"init_timestamp_nsecs": None, "commit_timestamp_nsecs": None}))


def load_arrays(path: Path, abstract: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads the arrays whose shapes and dtypes `abstract` has; raises what Orbax raises."""
    from orbax.checkpoint import v1 as ocp

    with _orbax_context():
        return dict(ocp.load(path, abstract))


def to_json(value: Any) -> bytes:
    """JSON; keys in their order."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_file_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash it is either absent or complete."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_directory(path: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
