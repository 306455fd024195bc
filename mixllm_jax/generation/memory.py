"""Device memory of generation: an estimate before anything is loaded, and errors that say what would fit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from mixllm_jax.errors import MixLLMError
from mixllm_jax.models.config import ModelConfig
from pallas_kernels.kv_cache import bytes_per_position

GB = 1e9


class OutOfDeviceMemoryError(MixLLMError):
    """The batch or context asked for does not fit into the device's memory."""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of device memory while generating.

    Attributes:
        weights: The model.
        cache: Keys and values of every position of every row.
        activations: Of the largest step, prefill or decode.
        int8_cache: Whether the cache holds codes.
    """

    weights: int
    cache: int
    activations: int
    int8_cache: bool = False

    @property
    def peak(self) -> int:
        """All together."""
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        """One line for messages."""
        return (
            f"{self.peak / GB:.2f} GB ({self.weights / GB:.2f} weights, {self.cache / GB:.2f} cache, "
            f"{self.activations / GB:.2f} activations)"
        )


def estimate_memory(
    config: ModelConfig,
    weight_bytes: int,
    *,
    batch: int,
    context: int,
    cache_dtype: DTypeLike,
    compute_dtype: DTypeLike,
    prefill_tokens: int,
) -> MemoryEstimate:
    """Memory for `batch` rows of `context` positions.

    Args:
        config: The model.
        weight_bytes: Size of the weights on the device (`weight_bytes`).
        batch: Rows.
        context: Positions of each row in the cache.
        cache_dtype: Of keys and values; int8 counts its scales too.
        compute_dtype: Of activations.
        prefill_tokens: Tokens of the whole batch in one prefill step.
    """
    itemsize = np.dtype(compute_dtype).itemsize
    cache = batch * context * config.num_layers * bytes_per_position(config.num_kv_heads, config.head_dim, cache_dtype)
    tokens = max(batch, min(prefill_tokens, batch * context))
    # Chunks after the first run with a mask over the whole context, a byte and a bias in the compute dtype an entry.
    mask = tokens * context * (1 + itemsize) if batch * context > prefill_tokens else 0
    # At its widest, a block holds the residual stream twice, the gate and up projections, and their product.
    width = 2 * config.hidden_size + config.query_size + 2 * config.kv_size + 3 * config.intermediate_size
    # Of this step (as two products, where the head has two terms), of the step before, and what sampling makes of them.
    logits = 4 * batch * config.vocab_size * 4
    activations = tokens * width * itemsize + mask + logits
    return MemoryEstimate(weight_bytes, cache, activations, int8_cache=np.dtype(cache_dtype) == np.int8)


def weight_bytes(model: Any) -> int:
    """Bytes of all arrays of a model, real or abstract (`jax.eval_shape`)."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(model))


def device_memory() -> int | None:
    """Bytes that JAX may use on the default device, None where the device does not say (a CPU)."""
    statistics = jax.devices()[0].memory_stats()
    return None if statistics is None else statistics.get("bytes_limit")


def largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest number from 0 to `upper` that fits, where everything below a number that fits does so too."""
    low = 0
    while low < upper:
        middle = (low + upper + 1) // 2
        low, upper = (middle, upper) if fits(middle) else (low, middle - 1)
    return low


def require_memory(
    estimate: Callable[[int, int], MemoryEstimate], batch: int, context: int, available: int | None
) -> None:
    """Checks that a batch fits before its cache is made.

    Args:
        estimate: The memory of a batch (first argument) with a context (second).
        batch: Rows asked for.
        context: Positions of each row asked for.
        available: Bytes of the device; None skips the check.

    Raises:
        OutOfDeviceMemoryError: It does not fit; the message says what would.
    """
    if available is None or estimate(batch, context).peak <= available:
        return
    raise OutOfDeviceMemoryError(
        f"{batch} rows of {context} positions need {estimate(batch, context)}, but the device has "
        f"{available / GB:.2f} GB: {_what_fits(estimate, batch, context, available)}"
    )


def explain_shortage(
    estimate: Callable[[int, int], MemoryEstimate], batch: int, context: int
) -> contextlib.AbstractContextManager[None]:
    """Where the device runs out of memory within, although the batch should have fitted, says what would fit.

    Raises:
        OutOfDeviceMemoryError: In place of JAX's error.
    """

    def message() -> str:
        # The estimate was too low, the memory is cut up, or others use it: leave a margin in what is said to fit.
        need = estimate(batch, context)
        has = device_memory()
        fits = _what_fits(estimate, batch, context, int(0.9 * need.peak if has is None else min(0.9 * need.peak, has)))
        of = "" if has is None else f" of the device's {has / GB:.2f} GB"
        return (
            f"the device ran out of memory: {batch} rows of {context} positions should need {need}{of}, but other "
            f"arrays or programs may use some of it: {fits}"
        )

    return reporting_shortage(message)


def explain_shortage_of_weights(model: str) -> contextlib.AbstractContextManager[None]:
    """Where the device runs out of memory while the weights of `model` are brought to it, says so.

    Raises:
        OutOfDeviceMemoryError: In place of JAX's error.
    """

    def message() -> str:
        has = device_memory()
        of = "" if has is None else f" of {has / GB:.2f} GB"
        return (
            f"the weights of {model} do not fit into the device's memory{of}: quantize the model to fewer bits, or "
            "free memory that other programs use (mixllm inspect --memory says what a model needs)"
        )

    return reporting_shortage(message)


@contextlib.contextmanager
def reporting_shortage(message: Callable[[], str]) -> Iterator[None]:
    """Has a message where the device runs out of memory within; other errors pass.

    Args:
        message: Made when it is needed.

    Raises:
        OutOfDeviceMemoryError: In place of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfDeviceMemoryError(message()) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says so: its own allocator, or CUDA where it loads programs or makes graphs."""
    text = str(error)
    if "hared memory" in text:  # a kernel that asks for more of it than a multiprocessor has is no lack of memory
        return False
    return any(sign in text for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "ALLOC_FAILED"))


def _what_fits(estimate: Callable[[int, int], MemoryEstimate], batch: int, context: int, available: int) -> str:
    rows = largest(lambda rows: estimate(rows, context).peak <= available, batch)
    positions = largest(lambda positions: estimate(batch, positions).peak <= available, context)
    options = [f"{rows} rows of {context} positions"] if rows else []
    options += [f"{batch} rows of {positions} positions"] if positions else []
    if not options:
        return "not even one row would fit: use a model with fewer bits per weight"
    fits = f"{' or '.join(options)} would fit"
    return fits if estimate(batch, context).int8_cache else f"{fits}; an int8 cache (--kv-bits 8) halves the cache"
