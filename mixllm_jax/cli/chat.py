"""`mixllm chat DIR`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from mixllm_jax.cli.options import add_execution_options, add_sampling_options, load_model, sampling_options
from mixllm_jax.errors import MixLLMError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from mixllm_jax.generation.completion import GenerationOptions
    from mixllm_jax.loaded_model import LoadedModel, Message

_HELP = (
    "/reset begins anew, /system TEXT begins anew with a system message, /exit or Ctrl-D ends; Ctrl-C stops an answer"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="model folder, float or quantized")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_options(parser, temperature=0.7, top_p=0.95)
    add_execution_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads, answers, and remembers, until the user has enough."""
    options = sampling_options(arguments)
    model = load_model(arguments.folder, arguments)
    if not model.tokenizer.chat_template:
        raise OptionError(f"{arguments.folder} has no chat template: it is no chat model; use mixllm generate.")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{arguments.folder.resolve().name}[/bold]", markup=True)
    console.print(_HELP, style="dim")
    Conversation(model, options, arguments.system, console).run()


class Conversation:
    """The turns so far, and the key/value cache that goes with them."""

    def __init__(self, model: LoadedModel, options: GenerationOptions, system: str | None, console: Console) -> None:
        self._model = model
        self._options = options
        self._console = console
        self._begin(system)

    def run(self) -> None:
        """One turn after another."""
        while True:
            try:
                line = self._console.input("[bold green]>[/bold green] ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self._begin(self._system)
            elif line.startswith("/system"):
                self._begin(line.removeprefix("/system").strip() or None)
            elif line.startswith("/"):
                self._console.print(_HELP, style="dim")
            elif line:
                self._turn(line)

    def _begin(self, system: str | None) -> None:
        from mixllm_jax.generation import PromptCache

        self._system = system
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._prompt_cache = PromptCache()

    def _turn(self, question: str) -> None:
        """Answers; a turn that failed is forgotten, one that was stopped keeps what there is."""
        messages: list[Message] = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        try:
            pieces = self._model.stream(messages, prompt_cache=self._prompt_cache, **self._options)
            with contextlib.closing(pieces):  # now, so that the prompt cache has what was read so far
                for piece in pieces:
                    answer += piece
                    self._console.print(piece, end="", markup=False, soft_wrap=True)
        except MixLLMError as error:  # no room in the context, or in the device's memory
            self._console.print(f"error: {error} (/reset begins anew)", style="red", markup=False)
            return
        except KeyboardInterrupt:
            self._console.print(" (stopped)", end="", style="dim")
        self._console.print("\n")
        self._messages = [*messages, {"role": "assistant", "content": answer}]
