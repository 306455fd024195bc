"""Phase 1: the salience of every output channel, streamed block by block.

Forward through the float blocks, storing the input of each; then from the last block back to the first, each run again
under ``vjp``. The device holds one block and the activations of one batch, whatever the size of the model. Every step
leaves its result in the work folder before the next begins, so a killed run goes on where it was.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.checkpoint.storage import write_file_atomically
from mixllm_jax.errors import MixLLMError
from mixllm_jax.models.config import LINEAR_NAMES
from mixllm_jax.quantization import block_passes
from mixllm_jax.quantization.activation_store import ActivationStore
from mixllm_jax.quantization.pieces import Score
from mixllm_jax.quantization.progress import Progress
from mixllm_jax.quantization.runtime import StreamedModel
from mixllm_jax.quantization.salience import sequence_salience

FORWARD_COST, BACKWARD_COST = 1.0, 4.0
"""Work per block in units of :class:`~mixllm_jax.quantization.progress.Progress`."""


def scoring_cost(num_layers: int) -> float:
    """Work of the whole phase."""
    return num_layers * (FORWARD_COST + BACKWARD_COST)


def score_channels(
    model: StreamedModel, group_size: int, folder: Path, progress: Progress, score: Score = sequence_salience
) -> np.ndarray:
    """The mean score over the sequences of all output channels of the quantised linears.

    Args:
        model: the float model and the calibration sequences.
        group_size: of the 4-bit rounding whose effect is estimated.
        folder: work folder, with what an earlier run left.
        progress: counts the work.
        score: of the channels of a linear, for each sequence; by default Eq. 4.

    Returns:
        float32 [channels], ordered by layer, linear, channel.

    Raises:
        MixLLMError: the model's loss on the calibration sequences is not finite.
    """
    num_layers = model.config.num_layers
    store = ActivationStore(folder, jnp.dtype(model.runtime.dtype))
    todo = [layer for layer in range(num_layers) if not _score_file(folder, layer).exists()]
    if todo:
        if _gradient(todo[-1] + 1) not in store:
            _run_forward(model, store, progress)
        else:
            progress.skip(num_layers * FORWARD_COST)
        progress.skip((num_layers - len(todo)) * BACKWARD_COST)
        for layer in reversed(todo):
            progress.describe(f"salience of block {layer + 1}/{num_layers}")
            _run_backward(model, group_size, layer, store, folder, score)
            progress.advance(BACKWARD_COST)
    else:
        progress.skip(scoring_cost(num_layers))
    scores = []
    for layer in range(num_layers):
        with np.load(_score_file(folder, layer)) as arrays:
            scores += [arrays[name] for name in LINEAR_NAMES]
    return np.concatenate(scores)


def _input(layer: int) -> str:
    return f"float_input_{layer:04d}"


def _gradient(layer: int) -> str:
    """Name of the gradient with respect to the input of a layer."""
    return f"gradient_{layer:04d}"


def _score_file(folder: Path, layer: int) -> Path:
    return folder / f"salience_{layer:04d}.npz"


def _run_forward(model: StreamedModel, store: ActivationStore, progress: Progress) -> None:
    """Stores the input of every block and the gradient of the loss with respect to the output of the last."""
    batch, shape, num_layers = model.runtime.batch, model.hidden_shape(), model.config.num_layers
    embedding = model.embedding()
    if _input(0) not in store:
        store.write(_input(0), shape, (np.asarray(block_passes.embed(embedding, t)) for t in model.token_batches()))
    rotary = model.rotary()
    for layer in range(num_layers):
        progress.describe(f"forward through block {layer + 1}/{num_layers}")
        if _input(layer + 1) in store:
            progress.skip(FORWARD_COST)
            continue
        block = model.block(layer, model.read_layer(layer))
        outputs = (np.asarray(block_passes.forward(block, x, rotary)) for x in store.read(_input(layer), batch))
        store.write(_input(layer + 1), shape, outputs)
        progress.advance(FORWARD_COST)
    progress.describe("loss")
    head = model.head()

    def gradients() -> Iterator[np.ndarray]:
        for x, tokens in zip(store.read(_input(num_layers), batch), model.token_batches(), strict=True):
            losses, gradient = block_passes.loss_gradient(head, embedding, x, tokens)
            if not np.isfinite(losses).all():
                raise MixLLMError(
                    f"{model.reader.path}: the loss of this model on the calibration text is not finite: its weights "
                    "are damaged, or it does not work in the dtype it is computed in"
                )
            yield np.asarray(gradient)

    store.write(_gradient(num_layers), shape, gradients())
    store.delete(_input(num_layers))


def _run_backward(
    model: StreamedModel, group_size: int, layer: int, store: ActivationStore, folder: Path, score: Score
) -> None:
    batch = model.runtime.batch
    block = model.block(layer, model.read_layer(layer))
    deltas = block_passes.rounding_errors(block, group_size)
    rotary = model.rotary()
    scores: dict[str, list[jax.Array]] = {name: [] for name in LINEAR_NAMES}

    def gradients() -> Iterator[np.ndarray]:
        for x, gradient in zip(store.read(_input(layer), batch), store.read(_gradient(layer + 1), batch), strict=True):
            x_gradient, batch_scores = block_passes.backward(block, deltas, x, rotary, gradient, score)
            for name in LINEAR_NAMES:
                scores[name].append(batch_scores[name])
            yield np.asarray(x_gradient)

    store.write(_gradient(layer), model.hidden_shape(), gradients())
    means = {name: np.concatenate(parts).mean(axis=0, dtype=np.float64) for name, parts in scores.items()}
    # This file marks the block as done, so it comes after the gradient and before its inputs are deleted.
    content = io.BytesIO()
    np.savez(content, **{name: mean.astype(np.float32) for name, mean in means.items()})
    write_file_atomically(_score_file(folder, layer), content.getvalue())
    store.delete(_gradient(layer + 1))
    store.delete(_input(layer))
