"""The decoder: embedding, blocks, final norm and output head."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mixllm_jax.models.block import Block
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import ModelConfig, layer_part_name
from mixllm_jax.models.eight_bit_table import HEAD_ACTIVATION_TERMS, choose_bits, eight_bit_table, look_up
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.norm import RMSNorm
from mixllm_jax.models.parameters import Execution, Parameters, check_parameters
from mixllm_jax.models.rope import rotary_embedding
from pallas_kernels import prepare_weight
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.packing import PackedWeight


class Embedding(nnx.Module):
    """Token embedding, `[vocab, hidden]` in the compute dtype, or packed in 8 bits."""

    def __init__(self, weight: Float[Array, "vocab hidden"] | PackedWeight, execution: Execution) -> None:
        packed = isinstance(weight, PackedWeight)
        self.weight = nnx.Param(jax.tree.map(jnp.asarray, weight) if packed else jnp.asarray(weight, execution.dtype))
        self.dtype = jnp.dtype(execution.dtype)
        self.execution = execution

    @classmethod
    def from_parameters(
        cls, config: ModelConfig, parameters: Parameters, execution: Execution | None = None
    ) -> "Embedding":
        """Builds it from the checkpoint part `embedding`; `CheckpointError` where that does not fit."""
        check_parameters(config, "embedding", parameters)
        execution = execution or Execution()
        weight = parameters["embed.weight"]
        if execution.embedding_bits == 8 and not isinstance(weight, PackedWeight):
            weight = eight_bit_table(weight)
        if isinstance(weight, PackedWeight) and config.tie_word_embeddings and execution.activation_bits == 8:
            weight = prepare_weight(weight, execution.implementation)
        return cls(weight, execution)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """Looks up the rows of int32 `tokens`."""
        weight = self.weight.get_value()
        if isinstance(weight, PackedWeight):
            return look_up(weight, tokens, self.dtype)
        return jnp.take(weight, tokens, axis=0, mode="clip")

    def projection(self) -> Linear:
        """The output projection that a tied embedding is as well."""
        return _output_projection(self.weight.get_value(), self.execution)


class Head(nnx.Module):
    """Final norm and output projection; with tied embeddings the projection is the embedding's weight."""

    def __init__(self, norm: RMSNorm, lm_head: Linear | None) -> None:
        self.norm = norm
        self.lm_head = lm_head

    @classmethod
    def from_parameters(cls, config: ModelConfig, parameters: Parameters, execution: Execution | None = None) -> "Head":
        """Builds it from the checkpoint part `final`; `CheckpointError` where that does not fit."""
        check_parameters(config, "final", parameters)
        execution = execution or Execution()
        weight = parameters.get("lm_head.weight")
        lm_head = None if weight is None else _output_projection(weight, execution)
        return cls(RMSNorm(parameters["norm.weight"], config.norm_epsilon), lm_head)

    def __call__(self, x: Float[Array, "*batch hidden"], embedding: Embedding) -> Float[Array, "*batch vocab"]:
        """Logits, float32; `embedding` is used where there is no projection of its own."""
        lm_head = embedding.projection() if self.lm_head is None else self.lm_head
        return lm_head(self.norm(x), out_dtype=jnp.float32)


def _output_projection(weight: Float[Array, "vocab hidden"] | PackedWeight, execution: Execution) -> Linear:
    return Linear(
        weight,
        dtype=execution.dtype,
        activation_bits=execution.activation_bits,
        activation_terms=HEAD_ACTIVATION_TERMS,
        implementation=execution.implementation,
    )


class Decoder(nnx.Module):
    """A Llama-family language model (see `from_parameters`).

    Batches are right-padded. A padded token computes garbage that nobody reads: it lies behind every real token of its
    row, where the causal mask hides it, and the row's next real token overwrites its place in the cache.
    """

    def __init__(self, config: ModelConfig, embedding: Embedding, layers: list[Block], final: Head) -> None:
        if len(layers) != config.num_layers:
            raise ValueError(f"{config.num_layers} layers expected, {len(layers)} given")
        self.config = config
        self.embedding = embedding
        self.layers = nnx.List(layers)
        self.final = final

    @classmethod
    def from_parameters(
        cls,
        config: ModelConfig,
        parts: Mapping[str, Parameters] | Callable[[str], Parameters],
        execution: Execution | None = None,
    ) -> "Decoder":
        """Builds a model from the parts of a checkpoint, one after the other; no weight is initialised before.

        Args:
            config: Model configuration.
            parts: The parts by name (`config.part_names()`), or a function that reads one.
            execution: Compute dtype, activation bits and implementation; float32 by default.

        Raises:
            CheckpointError: A part does not fit the configuration.
            OptionError: 8 bits for an embedding that is the float output head as well.
        """
        execution = execution or Execution()
        tied = config.tie_word_embeddings
        choose_bits(execution.lm_head_bits, execution.embedding_bits, quantized=True, tied=tied)  # checks
        read = parts if callable(parts) else parts.__getitem__
        embedding = Embedding.from_parameters(config, read("embedding"), execution)
        layers = [
            Block.from_parameters(config, layer, read(layer_part_name(layer)), execution)
            for layer in range(config.num_layers)
        ]
        final = dict(read("final"))
        if execution.lm_head_bits == 8 and not (tied and execution.embedding_bits == 8):
            head = final.get("lm_head.weight", embedding.weight.get_value())
            final["lm_head.weight"] = head if isinstance(head, PackedWeight) else eight_bit_table(head)
        return cls(config, embedding, layers, Head.from_parameters(config, final, execution))

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length hidden"]:
        """The residual stream before the first block."""
        return self.embedding(tokens)

    def head(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits from the residual stream after the last block."""
        return self.final(x, self.embedding)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
        history: int | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Runs the model on new tokens.

        Args:
            tokens: int32, right-padded.
            cache: The tokens before; returned anew with these added. None: there are none, and no cache is returned.
            lengths: int32, valid tokens of each row of `tokens`; all of them by default.
            last_only: Compute logits of the last valid token of each row alone.
            history: Most tokens that any row of the cache holds, where the caller knows a bound (static), 0 for an
                empty cache: makes the attention of a longer input cheaper.

        Returns:
            Float32 logits `[batch, length, vocab]`, or `[batch, vocab]` with `last_only`; and the cache. The caller
            keeps `cache.lengths + lengths` within `cache.max_length`.

        Raises:
            ValueError: `tokens` is longer than the whole cache.
        """
        batch, length = tokens.shape
        if cache is not None and length > cache.max_length:
            raise ValueError(f"{length} tokens do not fit a cache of {cache.max_length} positions")
        if lengths is None:
            lengths = jnp.full((batch,), length, jnp.int32)
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.lengths
        rotary = rotary_embedding(self.config, start[:, None] + jnp.arange(length, dtype=jnp.int32))

        last = jnp.maximum(lengths - 1, 0) if last_only and length > 1 else None
        x = self.embed(tokens)
        update: Array | None = None
        layer_caches: list[LayerCache] = []
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            only = last if index == self.config.num_layers - 1 else None
            x, update, layer_cache = block.step(x, update, rotary, layer_cache, history=history, only=only)
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        if update is not None:
            x = x + update
        if last_only:
            x = x[:, 0]
        new_cache = None if cache is None else KVCache(tuple(layer_caches), cache.lengths + lengths)
        return self.head(x), new_cache


def random_parameters(config: ModelConfig, part: str, seed: int, scale: float = 0.02) -> dict[str, Any]:
    """Float32 NumPy parameters of one part for tests and benchmarks: norms near 1, the rest normal with `scale`."""
    generator = np.random.default_rng([seed, config.part_names().index(part)])
    return {
        path: (1.0 if path.endswith("norm.weight") else 0.0)
        + scale * generator.standard_normal(shape, dtype=np.float32)
        for path, shape in config.part_shapes(part).items()
    }
