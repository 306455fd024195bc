"""From a command's exceptions to messages and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from mixllm_jax.errors import MixLLMError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
COMPILED_BYTES = 2 << 30
"""Most bytes of compiled programs on disk."""


def run_command(command: Callable[[], None]) -> int:
    """Runs a command; returns 0, or prints one message and returns an error code.

    Errors that the user can act on are `MixLLMError`s, `NotImplementedError`s of a kernel that cannot run here, and
    what the system says of a file by name (no permission, a read-only disk). Anything else is a bug of ours and keeps
    its traceback.
    """
    try:
        with _interruptible_imports():
            command()
            sys.stdout.flush()
    except (MixLLMError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (such as `head`) has had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR
    return 0


@contextlib.contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Lets Ctrl-C end the process at once where it comes during an import, of which JAX has seconds.

    Native modules that are being initialised make an ImportError or an abort of a KeyboardInterrupt, or lose it.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # such as ignored, by nohup
    ):
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\ninterrupted\n")
            os._exit(EXIT_INTERRUPTED)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def cache_dir() -> Path:
    """Where downloads and compiled programs are kept: `$XDG_CACHE_HOME/mixllm`, by default `~/.cache/mixllm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixllm"


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, so that the second start is fast; call it before JAX is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))
