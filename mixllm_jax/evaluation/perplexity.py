"""Perplexity, and how far a model's predictions are from a reference model's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixllm_jax.errors import OptionError
from mixllm_jax.evaluation.cached import ThroughInt8Cache
from mixllm_jax.generation.memory import reporting_shortage
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.progress_bar import progress_bar

LanguageModel = Decoder | ThroughInt8Cache
"""What can be measured: it takes tokens `[1, length]`, and gives logits first."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model got on a text.

    Attributes:
        name: of the model.
        perplexity: exp of the mean negative log-likelihood of the next token.
        kl: mean over tokens of KL(reference || model), in nats; None for the reference.
        top1_agreement: share of tokens where both find the same token most likely; None for the reference.
    """

    name: str
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None


def cut_sequences(tokens: Sequence[int], samples: int | None, sequence_length: int, source: str) -> np.ndarray:
    """The first `samples` (None: all) non-overlapping sequences of a text: int32 `[samples, sequence_length]`.

    Raises:
        OptionError: the text is too short, or a size makes no sense.
    """
    if sequence_length < 2:
        raise OptionError(f"sequence-length must be at least 2, found {sequence_length}")
    if samples is not None and samples < 1:
        raise OptionError(f"samples must be at least 1, found {samples}")
    available = len(tokens) // sequence_length
    if available < (samples or 1):
        raise OptionError(
            f"{source} has {len(tokens)} tokens, but {samples or 1} x {sequence_length} are needed: give a longer "
            "text, or fewer --samples, or a shorter --sequence-length."
        )
    samples = samples or available
    return np.asarray(tokens[: samples * sequence_length], np.int32).reshape(samples, sequence_length)


def evaluate(
    models: Mapping[str, LanguageModel], sequences: np.ndarray, *, show_progress: bool = True
) -> list[Evaluation]:
    """Measures models side by side; the first is the reference of the others.

    All models are held at once, and logits of the reference for one sequence only. The first token of each sequence is
    context and is not predicted.

    Args:
        models: by name; they share a vocabulary.
        sequences: int32 `[samples, length]`.
        show_progress: draw a bar on stderr.

    Raises:
        OptionError: vocabularies differ, or a sequence is longer than a model's context.
        OutOfDeviceMemoryError: a pass over one sequence does not fit beside the models.
    """
    _check(models, sequences.shape[1])
    names = list(models)
    sums = {name: _Sums() for name in names}
    steps: Iterable[tuple[int, str]] = [(row, name) for row in range(len(sequences)) for name in names]
    reference: Array | None = None
    for row, name in progress_bar(steps, desc="perplexity", disable=not show_progress):
        tokens = jnp.asarray(sequences[row : row + 1])
        with _explained_shortage(len(models), sequences.shape[1]):
            if name == names[0]:
                reference = None  # frees the logits of the sequence before
                reference, loss = _reference(models[name], tokens)
                sums[name].add(loss)
            else:
                assert reference is not None
                sums[name].add(*_compare(models[name], tokens, reference))
    predictions = len(sequences) * (sequences.shape[1] - 1)
    return [sums[name].result(name, predictions, is_reference=name == names[0]) for name in names]


def _explained_shortage(models: int, length: int) -> contextlib.AbstractContextManager[None]:
    return reporting_shortage(
        lambda: (
            f"the device ran out of memory in a pass over {length} tokens with {models} models on it: choose a shorter "
            "--sequence-length, or fewer models at once"
        )
    )


@dataclasses.dataclass
class _Sums:
    """Sums over tokens, kept in float64 on the host."""

    loss: float = 0.0
    kl: float = 0.0
    agreeing: int = 0

    def add(self, loss: Any, kl: Any = 0.0, agreeing: Any = 0) -> None:
        self.loss += float(loss)
        self.kl += float(kl)
        self.agreeing += int(agreeing)

    def result(self, name: str, predictions: int, *, is_reference: bool) -> Evaluation:
        perplexity = math.exp(min(self.loss / predictions, 700.0))  # exp(710) overflows
        if is_reference:
            return Evaluation(name, perplexity)
        return Evaluation(name, perplexity, self.kl / predictions, self.agreeing / predictions)


@jax.jit
def _reference(model: LanguageModel, tokens: Int[Array, "1 length"]) -> tuple[Float[Array, "predictions vocab"], Array]:
    """Log-probabilities of the reference, and its summed loss."""
    log_probabilities = _log_probabilities(model, tokens)
    return log_probabilities, _loss(log_probabilities, tokens)


@jax.jit
def _compare(
    model: LanguageModel, tokens: Int[Array, "1 length"], reference: Float[Array, "predictions vocab"]
) -> tuple[Array, Array, Array]:
    """Summed loss, summed KL(reference || model), and how often both favour the same token."""
    log_probabilities = _log_probabilities(model, tokens)
    kl = jnp.sum(jnp.exp(reference) * (reference - log_probabilities), axis=-1)
    agreeing = jnp.argmax(reference, axis=-1) == jnp.argmax(log_probabilities, axis=-1)
    return _loss(log_probabilities, tokens), kl.sum(), agreeing.sum()


def _log_probabilities(model: LanguageModel, tokens: Int[Array, "1 length"]) -> Float[Array, "predictions vocab"]:
    logits, _ = model(tokens)
    return jax.nn.log_softmax(logits[0, :-1].astype(jnp.float32), axis=-1)


def _loss(log_probabilities: Float[Array, "predictions vocab"], tokens: Int[Array, "1 length"]) -> Array:
    return -jnp.take_along_axis(log_probabilities, tokens[0, 1:, None], axis=-1).sum()


def _check(models: Mapping[str, LanguageModel], length: int) -> None:
    vocabularies = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(vocabularies.values())) > 1:
        raise OptionError(f"these models cannot be compared, their vocabularies differ: {vocabularies}")
    for name, model in models.items():
        if length > model.config.max_position_embeddings:
            raise OptionError(
                f"a sequence length of {length} exceeds the context of {name}, "
                f"{model.config.max_position_embeddings} tokens: choose a shorter --sequence-length."
            )


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for the terminal of rows with a `name` and what else there is of the columns below.

    A column in which no row has a value is left out; a value that is None prints as `-`.
    """
    possible = (
        ("perplexity", "perplexity", "{:.3f}"),
        ("kl", "KL divergence", "{:.4f}"),
        ("top1_agreement", "top-1 agreement", "{:.2%}"),
        ("bits_per_weight", "bits per weight", "{:.3f}"),
        ("lm_head_bits", "head bits", "{}"),
        ("embedding_bits", "embedding bits", "{}"),
    )
    columns = tuple(column for column in possible if any(row.get(column[0]) is not None for row in rows))
    cells = [["model", *(title for _, title, _ in columns)]]
    for row in rows:
        values = ((row.get(key), form) for key, _, form in columns)
        cells.append([str(row["name"]), *("-" if value is None else form.format(value) for value, form in values)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
