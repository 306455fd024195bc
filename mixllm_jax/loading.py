"""`mixllm_jax.load`: a model folder, float or quantised, ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.cli.runner import COMPILED_BYTES, cache_dir
from mixllm_jax.device import require_kernels
from mixllm_jax.errors import OptionError
from mixllm_jax.generation.memory import explain_shortage_of_weights
from mixllm_jax.loaded_model import LoadedModel
from mixllm_jax.models.common_shapes import for_default_device
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.eight_bit_table import TableBits, choose_bits
from mixllm_jax.models.parameters import Execution
from pallas_kernels.packing import GROUP_SIZES, PackedWeight

DTYPES = ("float32", "bfloat16", "float16")
"""Compute dtypes."""
IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic_gpu")


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | Literal["auto"] = "auto",
    implementation: str = "auto",
    kv_bits: int = 16,
    lm_head_bits: int | None = None,
    embedding_bits: int | None = None,
) -> LoadedModel:
    """Loads a converted or quantised model.

    From here on JAX keeps compiled programs in `~/.cache/mixllm/compiled`, so that the second start is fast, unless it
    was given another place (`JAX_COMPILATION_CACHE_DIR`) or is to keep none (`JAX_ENABLE_COMPILATION_CACHE=false`).

    Args:
        path: the model folder.
        dtype: compute dtype of activations and float weights; `auto` is bfloat16 on a GPU and float32 on a CPU.
        implementation: of the quantised operations: `auto`, `xla`, or a kernel's name (see `pallas_kernels`).
        kv_bits: 8 keeps keys and values of generation as int8, one scale a token and head; 16 in the compute dtype.
        lm_head_bits: 8 rounds the output head to 8 bits and runs it on int8 tensor cores, its input as a sum of two
            int8 terms; 16 leaves it as it is. None is 8 for a quantised model (with int8 activations), else 16.
        embedding_bits: 8 rounds the embedding to 8 bits; 16 leaves it as it is; None as for the head. A tied one needs
            `lm_head_bits` 8 too, and follows it by default.

    Raises:
        CheckpointError: not a model folder, or it is damaged or of a newer format.
        OptionError: a number of bits that is neither 8 nor 16, an 8-bit embedding tied to a 16-bit output head, a dtype
            that no model computes in, or an implementation that there is not.
        UnsupportedDeviceError: the GPU has no kernels for this quantised model, or for the 8-bit head asked for.
        OutOfDeviceMemoryError: the weights do not fit.
        NotImplementedError: the implementation asked for cannot run here.
    """
    if kv_bits not in (8, 16):
        raise OptionError(f"kv-bits must be 8 or 16, found {kv_bits!r}")
    if implementation not in IMPLEMENTATIONS:
        raise OptionError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, found {implementation!r}")
    dtype = compute_dtype(dtype)
    _keep_compiled_programs()
    reader = CheckpointReader(path)
    quantization = reader.metadata.get("quantization", {})
    tables = table_bits(reader, lm_head_bits, embedding_bits)
    bits = quantization.get("activation_bits", 8)
    if bits == 8 and "group_size" in quantization:
        require_kernels(quantization["group_size"], implementation)
    if bits == 8 and tables.lm_head == 8:  # whatever the linears are
        require_kernels(GROUP_SIZES[0], implementation)
    execution = Execution(
        dtype=dtype,
        activation_bits=cast(Any, bits),
        implementation=implementation,
        lm_head_bits=tables.lm_head,
        embedding_bits=tables.embedding,
    )
    parts = reader.read_parts()  # in the order in which the decoder asks for them
    with explain_shortage_of_weights(str(reader.path)):
        model = Decoder.from_parameters(reader.config, lambda name: _next_part(parts, name), execution)
        jax.block_until_ready(model)  # or the shortage would come to light at the first prompt
    return LoadedModel(model, reader.config, reader.metadata, reader.path, kv_bits, tables)


def _keep_compiled_programs() -> None:
    """Lets JAX keep programs on disk where the caller has not said where, as the command line does."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)


def table_bits(reader: CheckpointReader, lm_head_bits: int | None, embedding_bits: int | None) -> TableBits:
    """Bits with which the output head and the embedding of a folder are loaded, where these are asked for.

    Raises:
        OptionError: as `choose_bits`.
    """
    integer = reader.kind == "quantized" and reader.metadata.get("quantization", {}).get("activation_bits", 8) == 8
    tied = reader.config.tie_word_embeddings
    return choose_bits(lm_head_bits, embedding_bits, quantized=integer, tied=tied)


def compute_dtype(dtype: DTypeLike | Literal["auto"]) -> jnp.dtype[Any]:
    """The dtype meant; `auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        OptionError: another one than `DTYPES`, or float16 on a CPU, whose compiler has no attention of it.
    """
    if isinstance(dtype, str) and dtype == "auto":
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise OptionError(f"dtype must be auto or one of {', '.join(DTYPES)}, found {dtype!r}")
    if found.name == "float16" and jax.default_backend() == "cpu":
        raise OptionError("dtype float16 cannot be computed on a CPU: use float32 or bfloat16")
    return found


def _next_part(parts: Iterator[tuple[str, Any]], wanted: str) -> Any:
    name, part = next(parts)
    if name != wanted:
        raise AssertionError(f"the decoder asked for part {wanted!r} where {name!r} comes next")
    return {
        path: for_default_device(value) if isinstance(value, PackedWeight) else value for path, value in part.items()
    }
