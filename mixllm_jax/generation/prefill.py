"""Runs one chunk of the prompts through the model, a few layers a program.

Before its first kernel starts, a program needs the host for some microseconds an argument and a kernel: 4 ms for all
layers of an 8B model at 4.4 bits, in which the device idles. Cut up, it starts after those of the first few layers, and
the host prepares the next ones while it works. That hides as well what it costs to write new addresses into XLA's CUDA
graphs, which every prompt needs, since its cache lies elsewhere, and every segment of layers. Layers of one shape also
share one program, which is compiled in a fraction of the time. Layers that differ, as those of a quantised model do in
their numbers of 8-bit channels, would each bring kernels of their own to every program: such a model is cut only once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixllm_jax.generation.flat import Flat
from mixllm_jax.models.block import Block
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder, Embedding, Head
from mixllm_jax.models.rope import RotaryEmbedding, rotary_embedding
from pallas_kernels.kv_cache import LayerCache

LAYERS_OF_A_PROGRAM = 4
"""Their kernels keep the device busy for longer than the host takes to launch the next ones."""

Item = TypeVar("Item")
LayerCaches = tuple[LayerCache, ...]
Hidden = Float[Array, "batch length hidden"]


@functools.partial(jax.jit, static_argnames=("config",))
def begin(
    embedding: Flat[Embedding], config: ModelConfig, tokens: Int[Array, "batch length"], held: Int[Array, " batch"]
) -> tuple[Hidden, Hidden, RotaryEmbedding]:
    """The residual stream and an update of zeros to it, and the rotation of the tokens, of which `held` came before."""
    x = embedding.tree()(tokens)
    return x, jnp.zeros_like(x), rotary_embedding(config, held[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("history",), donate_argnames=("caches", "x", "update"))
def run_layers(
    blocks: Flat[tuple[Block, ...]],
    caches: LayerCaches,
    x: Hidden,
    update: Hidden,
    rotary: RotaryEmbedding,
    history: int | None,
) -> tuple[LayerCaches, Hidden, Hidden]:
    """Some blocks, on the residual stream `x + update`; see `Block.step`."""
    new_caches = []
    for block, cache in zip(blocks.tree(), caches, strict=True):
        x, update, new_cache = block.step(x, update, rotary, cache, history=history)
        assert new_cache is not None
        new_caches.append(new_cache)
    return tuple(new_caches), x, update


@functools.partial(jax.jit, static_argnames=("history",), donate_argnames=("caches", "held"))
def finish(
    rest: Flat[tuple[tuple[Block, ...], Embedding, Head]],
    caches: LayerCaches,
    x: Hidden,
    update: Hidden,
    rotary: RotaryEmbedding,
    lengths: Int[Array, " batch"],
    held: Int[Array, " batch"],
    history: int | None,
) -> tuple[LayerCaches, Int[Array, " batch"], Float[Array, "batch vocab"]]:
    """The last blocks and the head, behind the last attention for the last valid token of each row alone.

    Returns:
        The caches, how many tokens they hold, and the float32 logits.
    """
    blocks, embedding, head = rest.tree()
    last = jnp.maximum(lengths - 1, 0)
    new_caches = []
    for block, cache in zip(blocks, caches, strict=True):
        only = last if block is blocks[-1] else None
        x, update, new_cache = block.step(x, update, rotary, cache, history=history, only=only)
        assert new_cache is not None
        new_caches.append(new_cache)
    return tuple(new_caches), held + lengths, head((x + update)[:, 0], embedding)


class PrefillModel:
    """A decoder cut into the programs of a prefill.

    Attributes:
        config: of the decoder.
        embedding: for `begin`.
        segments: for `run_layers`, one after the other.
        rest: for `finish`.
    """

    def __init__(self, model: Decoder) -> None:
        blocks = tuple(model.layers)
        alike = len({_shapes(Flat.of(block)) for block in blocks}) == 1
        programs = math.ceil(len(blocks) / LAYERS_OF_A_PROGRAM)
        self._starts = [index * LAYERS_OF_A_PROGRAM for index in range(programs if alike else min(programs, 2))]
        *segments, rest = self._cut(blocks)
        self.config = model.config
        self.embedding = Flat.of(model.embedding)
        self.segments = _with_shared_structures([Flat.of(segment) for segment in segments])
        self.rest = Flat.of((rest, model.embedding, model.final))

    def step(
        self,
        cache: KVCache,
        tokens: Int[np.ndarray[Any, Any], "batch length"],
        lengths: Int[np.ndarray[Any, Any], " batch"],
        history: int | None,
    ) -> tuple[KVCache, Float[Array, "batch vocab"]]:
        """Runs right-padded tokens through the model.

        Args:
            cache: What came before; given up.
            tokens: int32, on the host: they go to the device with the call, which is faster than before it.
            lengths: int32, valid tokens of each row.
            history: A bound of the tokens that any row of the cache holds; see `Decoder`.

        Returns:
            The cache, and the float32 logits of each row's last valid token; those of a row without any mean nothing.
        """
        x, update, rotary = begin(self.embedding, self.config, tokens, cache.lengths)
        layers: LayerCaches = ()
        *caches, rest = self._cut(cache.layers)
        for segment, segment_caches in zip(self.segments, caches, strict=True):
            done, x, update = run_layers(segment, segment_caches, x, update, rotary, history)
            layers += done
        done, held, logits = finish(self.rest, rest, x, update, rotary, lengths, cache.lengths, history)
        return KVCache(layers + done, held), logits

    def lower(
        self, cache: KVCache, tokens: jax.ShapeDtypeStruct, lengths: jax.ShapeDtypeStruct, history: int | None
    ) -> Iterator[jax.stages.Lowered]:
        """The programs of a `step` of these shapes, each once, to compile ahead."""
        yield begin.lower(self.embedding, self.config, tokens, cache.lengths)
        x, update, rotary = begin.eval_shape(self.embedding, self.config, tokens, cache.lengths)
        *caches, rest = self._cut(cache.layers)
        seen = set()
        for segment, segment_caches in zip(self.segments, caches, strict=True):
            if _shapes(segment) not in seen:
                yield run_layers.lower(segment, segment_caches, x, update, rotary, history)
            seen.add(_shapes(segment))
        yield finish.lower(self.rest, rest, x, update, rotary, lengths, cache.lengths, history)

    def _cut(self, layers: tuple[Item, ...]) -> list[tuple[Item, ...]]:
        """The layers of each program; the last ones go to `finish`."""
        return [layers[start:end] for start, end in zip(self._starts, [*self._starts[1:], None], strict=True)]


def _shapes(flat: Flat[Any]) -> tuple[Any, ...]:
    """What a program is compiled for."""
    return flat.structure, *((array.shape, array.dtype) for array in flat.arrays)


def _with_shared_structures(segments: list[Flat[Any]]) -> list[Flat[Any]]:
    """The same, where equal structures are one object: comparing them would walk through the modules at every call."""
    shared: list[Any] = []
    for segment in segments:
        shared.append(next((known for known in shared if known == segment.structure), segment.structure))
    return [Flat(segment.arrays, structure) for segment, structure in zip(segments, shared, strict=True)]
