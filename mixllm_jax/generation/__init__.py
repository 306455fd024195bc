"""Text generation: prefill, decoding with a cache, sampling, streaming."""

from mixllm_jax.generation.engine import Engine
from mixllm_jax.generation.prompt_cache import PromptCache
from mixllm_jax.generation.requests import Generation
from mixllm_jax.generation.sampling import SamplingSettings
from mixllm_jax.generation.streaming import IncrementalDetokenizer

__all__ = ["Engine", "Generation", "IncrementalDetokenizer", "PromptCache", "SamplingSettings"]
