"""What `mixllm inspect --memory` says: device memory for a batch and context, from the folder's description alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixllm_jax.checkpoint import CheckpointReader
    from mixllm_jax.models.decoder import Decoder
    from mixllm_jax.models.eight_bit_table import TableBits


def abstract_model(reader: CheckpointReader, dtype: str, tables: TableBits) -> Decoder:
    """The model with shapes and dtypes in place of arrays, as it would be on a GPU; reads no weights."""
    import jax
    import ml_dtypes  # noqa: F401  (registers the name "bfloat16" with NumPy)
    import numpy as np

    from mixllm_jax.checkpoint.layout import unflatten
    from mixllm_jax.models.common_shapes import shape_on_gpu
    from mixllm_jax.models.decoder import Decoder
    from mixllm_jax.models.parameters import Execution
    from pallas_kernels.packing import PackedWeight

    parts: dict[str, Any] = {}
    for name in reader.config.part_names():
        entry = reader.metadata["parts"][name]
        arrays: Any = {
            path: jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
            for path, array in entry["arrays"].items()
        }
        part = unflatten(arrays, entry["packed"])
        parts[name] = {
            path: shape_on_gpu(value) if isinstance(value, PackedWeight) else value for path, value in part.items()
        }
    execution = Execution(dtype=np.dtype(dtype), lm_head_bits=tables.lm_head, embedding_bits=tables.embedding)
    return jax.eval_shape(lambda values: Decoder.from_parameters(reader.config, values, execution), parts)


def memory_facts(
    reader: CheckpointReader,
    *,
    batch: int,
    context: int | None,
    dtype: str,
    kv_bits: int,
    lm_head_bits: int | None,
    embedding_bits: int | None,
) -> dict[str, Any]:
    """The estimate in bytes, with what it is for: a GPU, one of the Hopper generation, whatever there is here.

    Raises:
        OptionError: The context is longer than the model's, or bits that are not possible.
    """
    from mixllm_jax.errors import OptionError
    from mixllm_jax.generation.engine import Engine
    from mixllm_jax.loading import table_bits
    from mixllm_jax.models.attention import flash_attention_takes

    longest = reader.config.max_position_embeddings
    context = min(4096, longest) if context is None else context
    if not 1 <= context <= longest:
        raise OptionError(f"--context must be from 1 to {longest}, the longest that this model takes, found {context}")
    if batch < 1:
        raise OptionError(f"--batch must be at least 1, found {batch}")
    tables = table_bits(reader, lm_head_bits, embedding_bits)
    model = abstract_model(reader, dtype, tables)
    flash_attention = flash_attention_takes(model.embedding.dtype, reader.config.head_dim)
    engine = Engine(model, kv_bits=kv_bits, flash_attention=flash_attention)
    positions = engine.sizes.cache_length(context)
    estimate = engine.estimate_memory(batch, positions)
    return {
        "batch": batch,
        "context": context,
        "cache_positions": positions,
        "dtype": dtype,
        "kv_bits": kv_bits,
        "lm_head_bits": tables.lm_head,
        "embedding_bits": tables.embedding,
        "weights": estimate.weights,
        "cache": estimate.cache,
        "activations": estimate.activations,
        "peak": estimate.peak,
    }


def format_memory(facts: dict[str, Any]) -> str:
    """`memory_facts` for people."""
    title = (
        f"device memory for {facts['batch']} x {facts['context']} tokens in {facts['dtype']}, "
        f"cache of {facts['kv_bits']} bits, output head of {facts['lm_head_bits']} bits, "
        f"embedding of {facts['embedding_bits']} bits"
    )
    lines = [f"{name:<20} {facts[name] / 1e9:.3f} GB" for name in ("weights", "cache", "activations", "peak")]
    return "\n".join([title, *lines])
