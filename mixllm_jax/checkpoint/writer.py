"""Writes a model folder aside, part by part, and renames it into place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mixllm_jax.checkpoint.layout import FORMAT_VERSION, KINDS, METADATA_FILE, describe, flatten
from mixllm_jax.checkpoint.storage import prepare_saving, save_arrays, sync_directory, to_json, write_file_atomically
from mixllm_jax.errors import OptionError, OutputExistsError, StorageError
from mixllm_jax.models.config import ModelConfig

_PART_NAME = re.compile(r"[a-z0-9_]+")
_LOCK_FILE = ".lock"
_DISK_REMEDY = "Free some space or choose an --out on another disk, then repeat the command."
_WRITE_REMEDY = "Choose an --out that can be written, then repeat the command."
_TOOLS = ("mixllm-jax", "jax", "orbax-checkpoint", "numpy")


class CheckpointWriter:
    """Writes a model folder part by part, and renames it into place at the end.

    Use it as a context manager: leaving it with an exception before `finish` removes what was written, unless `resume`.

    Args:
        out_dir: the model folder to create.
        metadata: JSON values for `mixllm.json`; `kind` ("float" or "quantized") and `config` (the model configuration
            as a dict) are required, `quantization` (the settings) belongs to a quantised model.
        overwrite: replace an existing model folder; it stays as it is until `finish`.
        resume: keep the unfinished folder when interrupted, and go on with the one that an earlier run left, if its
            metadata are the same (otherwise an error; `overwrite` starts afresh).

    Raises:
        OutputExistsError: `out_dir` exists (and `overwrite` is off), or is something else than a model folder.
        OptionError: an unfinished run with other settings is there.
        StorageError: another process is writing it, or it cannot be written.
    """

    def __init__(
        self, out_dir: str | Path, metadata: Mapping[str, Any], overwrite: bool = False, *, resume: bool = False
    ) -> None:
        self.out_dir = _folder_path(out_dir)
        self.partial_dir = self.out_dir.with_name(f".{self.out_dir.name}.partial")
        self._retired_dir = _retired(self.out_dir)
        self._resume = resume
        self._finished = False
        if metadata.get("kind") not in KINDS or not isinstance(metadata.get("config"), Mapping):
            raise ValueError(f"metadata need 'kind', one of {KINDS}, and 'config', a dict; got {dict(metadata)!r}")
        self._metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **json.loads(json.dumps(metadata)),
            "tool_versions": {name: _version(name) for name in _TOOLS} | {"python": platform.python_version()},
        }
        check_target(out_dir, overwrite=overwrite)
        prepare_saving()  # seconds, in which Ctrl-C ends the process at once: before there is anything to clean up
        with _readable_os_errors(self.out_dir):
            self.partial_dir.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._start_or_resume(overwrite)
            except BaseException:
                self._lock.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished and not self._resume:
            shutil.rmtree(self.partial_dir, ignore_errors=True)
        self._lock.close()

    def has_part(self, name: str) -> bool:
        """Whether this part has been written completely, now or by the run that is being resumed."""
        return self._manifest_path(name).exists()

    def write_part(self, name: str, part: Mapping[str, Any]) -> None:
        """Writes one part: a flat dict of float arrays (NumPy or JAX) and `PackedWeight`s.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        if not _PART_NAME.fullmatch(name):
            raise ValueError(f"part name {name!r} must match {_PART_NAME.pattern}")
        arrays, packed = flatten(part)
        entry = {
            "arrays": {key: describe(value) for key, value in arrays.items()},
            "packed": packed,
        }
        part_dir = self.partial_dir / "parts" / name
        _check_free_space(self.out_dir, part_dir.parent, sum(value.nbytes for value in arrays.values()))
        with _readable_os_errors(self.out_dir):
            self._manifest_path(name).unlink(missing_ok=True)
            shutil.rmtree(part_dir, ignore_errors=True)
            # Orbax cannot store arrays without elements; their shape in the JSON is all there is to know.
            save_arrays(part_dir, {key: value for key, value in arrays.items() if value.size})
            write_file_atomically(self._manifest_path(name), to_json(entry))

    def copy_file(self, path: str | Path, name: str | None = None) -> None:
        """Copies a file that goes along unchanged (tokenizer, chat template) into the folder."""
        with _readable_os_errors(self.out_dir):
            shutil.copyfile(path, self.partial_dir / (name or Path(path).name))

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file of its own into the folder."""
        with _readable_os_errors(self.out_dir):
            write_file_atomically(self.partial_dir / name, content)

    def finish(self, extra_metadata: Mapping[str, Any] | None = None) -> None:
        """Writes `mixllm.json` (with `extra_metadata` merged in) and renames the folder into place.

        Raises:
            ValueError: a part of the model was not written.
        """
        names = ModelConfig.from_dict(self._metadata["config"]).part_names()
        if missing := [name for name in names if not self.has_part(name)]:
            raise ValueError(f"finish() before these parts were written: {', '.join(missing)}")
        with _readable_os_errors(self.out_dir):
            parts = {name: json.loads(self._manifest_path(name).read_bytes()) for name in names}
            metadata = {**self._metadata, **(extra_metadata or {}), "parts": parts}
            write_file_atomically(self.partial_dir / METADATA_FILE, to_json(metadata))
            shutil.rmtree(self._state_dir)
            (self.partial_dir / _LOCK_FILE).unlink()
            if self.out_dir.exists():
                shutil.rmtree(self._retired_dir, ignore_errors=True)
                self.out_dir.rename(self._retired_dir)
            self.partial_dir.rename(self.out_dir)
            sync_directory(self.out_dir.parent)
            shutil.rmtree(self._retired_dir, ignore_errors=True)
        self._finished = True

    @property
    def work_dir(self) -> Path:
        """A folder for the writer's user to keep resumable state in; `finish` removes it."""
        path = self._state_dir / "work"
        path.mkdir(exist_ok=True)
        return path

    @property
    def _state_dir(self) -> Path:
        return self.partial_dir / "state"

    def _manifest_path(self, name: str) -> Path:
        return self._state_dir / f"part_{name}.json"

    def _take_lock(self) -> Any:
        lock = open(self.partial_dir / _LOCK_FILE, "w")  # noqa: SIM115  (held until the writer is done)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StorageError(
                f"{self.out_dir} is being written by another process right now. Wait for it, or choose another --out."
            ) from None
        return lock

    def _start_or_resume(self, overwrite: bool) -> None:
        run_file = self._state_dir / "run.json"
        if self._resume and run_file.exists():
            changed = _changed_keys(json.loads(run_file.read_bytes()), self._metadata)
            if not changed:
                return
            if not overwrite:
                raise OptionError(
                    f"{self.partial_dir} holds an unfinished run with other settings ({', '.join(changed)} differ). "
                    "Repeat that run's command to finish it, or pass --overwrite (or delete that folder) "
                    "to start afresh."
                )
        for child in self.partial_dir.iterdir():
            if child.name != _LOCK_FILE:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self._state_dir.mkdir()
        (self.partial_dir / "parts").mkdir()
        write_file_atomically(run_file, to_json(self._metadata))


def check_target(out_dir: str | Path, *, overwrite: bool = False) -> None:
    """Checks that a model folder may be written there: to be called before work that it would be a pity to lose.

    Raises:
        OptionError: not the path of a folder.
        OutputExistsError: as `CheckpointWriter`.
    """
    out_dir = _folder_path(out_dir)
    if _retired(out_dir).exists() and not out_dir.exists():
        _retired(out_dir).rename(out_dir)  # killed between the two renames of `finish`
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if out_dir.exists() and not (out_dir / METADATA_FILE).exists():
        raise OutputExistsError(
            f"{out_dir} exists and is not a model folder of this program; it is left as it is. Choose another --out."
        )
    if out_dir.exists() and not overwrite:
        raise OutputExistsError(
            f"{out_dir} exists already; it is left as it is. Choose another --out, or pass --overwrite to replace it."
        )


def _folder_path(out_dir: str | Path) -> Path:
    """The absolute path, which ends in a name: what is unfinished or replaced lies beside it under a name like it."""
    path = Path(out_dir).absolute()
    if path.name in ("", ".."):
        raise OptionError(f"--out {out_dir}: give the folder to create by its name.")
    return path


def _retired(out_dir: Path) -> Path:
    """Where the folder that is being replaced waits."""
    return out_dir.with_name(f".{out_dir.name}.old")


def _check_free_space(out_dir: Path, folder: Path, nbytes: int) -> None:
    free, needed = shutil.disk_usage(folder).free, nbytes + (1 << 20)
    if free < needed:
        raise StorageError(
            f"{out_dir}: the disk is full: {needed / 1e6:.1f} MB are needed for the next part, "
            f"{free / 1e6:.1f} MB are free. {_DISK_REMEDY}"
        )


@contextlib.contextmanager
def _readable_os_errors(out_dir: Path) -> Iterator[None]:
    """Turns a full disk and other failures to write into a StorageError (TensorStore raises ValueError for them)."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            text in str(error) for text in ("No space left on device", "Disk quota exceeded")
        )
        if not full and not isinstance(error, OSError) and "os_error_code" not in str(error):
            raise
        reason = "the disk is full" if full else f"cannot write: {_without_number(error)}"
        remedy = _DISK_REMEDY if full else _WRITE_REMEDY
        raise StorageError(f"{out_dir}: {reason}. {remedy}") from error


def _without_number(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # this package, run from a checkout
        return "not installed"


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two metadata differ."""
    changed: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += _changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return changed
