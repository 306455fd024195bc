"""Passes over one decoder block, jitted with the block as an argument: one compilation serves all blocks of a shape.

Activations are ``[sequences, tokens, hidden]``; all sequences are of one length, so there is no padding.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from mixllm_jax.models.block import Block
from mixllm_jax.models.config import LINEAR_NAMES
from mixllm_jax.models.decoder import Embedding, Head
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.rope import RotaryEmbedding
from mixllm_jax.quantization.pieces import Score
from mixllm_jax.quantization.salience import rounding_error, sequence_salience

_LOGITS_AT_ONCE = 1 << 25
"""Upper bound of the logits that exist at a time: 128 MB in float32."""


@jax.jit
def forward(block: Block, x: jax.Array, rotary: RotaryEmbedding) -> jax.Array:
    """The residual stream after the block; every linear gets its float input, as in :func:`linear_input`."""
    y, _ = block(x, rotary, linear_call=lambda name, linear, inputs: linear(inputs))
    return y


@partial(jax.jit, static_argnames="group_size")
def rounding_errors(block: Block, group_size: int) -> dict[str, jax.Array]:
    """``delta`` of Eq. 4 of each linear of a float block."""
    return {name: rounding_error(linear.weight.get_value(), group_size) for name, linear in block.linears().items()}


@partial(jax.jit, static_argnames="score")
def backward(
    block: Block,
    deltas: Mapping[str, jax.Array],
    x: jax.Array,
    rotary: RotaryEmbedding,
    gradient: jax.Array,
    score: Score = sequence_salience,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the block again and back, and scores its output channels.

    Args:
        block: a float block.
        deltas: rounding error of each linear, float32 [out_features, in_features].
        x: the block's input.
        rotary: positions of the tokens.
        gradient: of each sequence's loss with respect to the block's output.
        score: of the channels of a linear.

    Returns:
        The gradient with respect to ``x``, and for each linear the scores, float32 [sequences, out_features].
    """

    def run(x: jax.Array, taps: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs = {}

        def call(name: str, linear: Linear, value: jax.Array) -> jax.Array:
            inputs[name] = value
            return linear(value) + taps[name]  # adding zeros: their gradient is the one at the linear's output

        return block(x, rotary, linear_call=call)[0], inputs

    taps = {name: jnp.zeros((*x.shape[:-1], delta.shape[0]), x.dtype) for name, delta in deltas.items()}
    _, pullback, inputs = jax.vjp(run, x, taps, has_aux=True)
    x_gradient, tap_gradients = pullback(gradient)
    scores = {name: score(inputs[name], tap_gradients[name], deltas[name]) for name in deltas}
    return x_gradient, scores


@partial(jax.jit, static_argnames="wanted")
def linear_input(
    block: Block, x: jax.Array, rotary: RotaryEmbedding, wanted: str, attention_output: jax.Array | None = None
) -> jax.Array:
    """The input of one linear of the block.

    Args:
        block: the block, with the linears before ``wanted`` already quantised.
        x: the block's input.
        rotary: positions of the tokens.
        wanted: name of the linear.
        attention_output: output of ``o_proj`` where it is known, so that attention is not computed again.

    Returns:
        ``[sequences, tokens, in_features]``.
    """
    captured = {}

    def call(name: str, linear: Linear, value: jax.Array) -> jax.Array:
        if name == wanted:
            captured[name] = value
        if LINEAR_NAMES.index(name) >= LINEAR_NAMES.index(wanted):  # not returned, so XLA drops all that follows
            return jnp.zeros((*value.shape[:-1], linear.weight.get_value().shape[0]), value.dtype)
        if name == "o_proj" and attention_output is not None:
            return attention_output
        return linear(value)

    block(x, rotary, linear_call=call)
    return captured[wanted]


@jax.jit
def block_output(block: Block, x: jax.Array, rotary: RotaryEmbedding, attention_output: jax.Array) -> jax.Array:
    """The residual stream after the block, given the output of its ``o_proj``."""

    def call(name: str, linear: Linear, value: jax.Array) -> jax.Array:
        return attention_output if name == "o_proj" else linear(value)

    return block(x, rotary, linear_call=call)[0]


@jax.jit
def apply_linear(linear: Linear, x: jax.Array) -> jax.Array:
    """The linear on its float input."""
    return linear(x)


@jax.jit
def embed(embedding: Embedding, tokens: jax.Array) -> jax.Array:
    """The residual stream before the first block, of int32 tokens ``[sequences, tokens]``."""
    return embedding(tokens)


@jax.jit
def loss_gradient(head: Head, embedding: Embedding, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Causal language-modelling loss of each sequence and its gradient with respect to the last block's output.

    The head works on each token alone, so tokens go through it in chunks and the logits of a long sequence never exist
    at once.

    Args:
        head: final norm and output projection.
        embedding: the embedding, for tied models.
        x: residual stream after the last block.
        tokens: int32 [sequences, tokens].

    Returns:
        Losses float32 [sequences], each the mean over the predicted tokens, and the gradient, like ``x``.
    """
    sequences, length, hidden = x.shape
    vocabulary = embedding.weight.get_value().shape[0]
    chunk = max(1, min(sequences * length, _LOGITS_AT_ONCE // vocabulary))
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.broadcast_to(jnp.where(jnp.arange(length) < length - 1, 1 / (length - 1), 0.0), tokens.shape)
    padding = -(sequences * length) % chunk

    def chunked(array: jax.Array) -> jax.Array:
        flat = array.reshape(sequences * length, *array.shape[2:])
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, chunk, *flat.shape[1:])

    def weighted_loss(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head(x, embedding)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        losses = weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)
        return losses.sum(), losses

    def chunk_gradient(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        gradient, losses = jax.grad(weighted_loss, has_aux=True)(*chunk)
        return gradient, losses

    gradient, losses = jax.lax.map(chunk_gradient, (chunked(x), chunked(targets), chunked(weights)))
    tokens_in_all = sequences * length
    gradient = gradient.reshape(-1, hidden)[:tokens_in_all].reshape(x.shape)
    losses = losses.reshape(-1)[:tokens_in_all].reshape(tokens.shape).sum(axis=1)
    return losses, gradient
