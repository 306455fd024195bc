"""MixLLM in JAX: mixed 4/8-bit post-training quantisation with fused GPU kernels.

import mixllm_jax
model = mixllm_jax.load("smollm2-w4.4")
print(model.generate("What is the capital of France?", chat=True))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixllm_jax.cli.quantize import quantize
    from mixllm_jax.errors import MixLLMError
    from mixllm_jax.generation.completion import Completion
    from mixllm_jax.loaded_model import LoadedModel
    from mixllm_jax.loading import load

__all__ = ["Completion", "LoadedModel", "MixLLMError", "load", "quantize"]

_HOMES = {
    "Completion": "generation.completion",
    "LoadedModel": "loaded_model",
    "MixLLMError": "errors",
    "load": "loading",
    "quantize": "cli.quantize",
}


def __getattr__(name: str) -> Any:
    """Imports an export when it is first used: JAX and Flax take seconds, `mixllm --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
