"""What a user would run instead: `transformers` in bf16 with a static cache and `torch.compile`, on random weights.

`python -m mixllm_jax.benchmark.transformers_baseline '{"model": "llama-3.1-8b", "batches": [1, 16, 64]}'` prints rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.errors import MixLLMError, OptionError
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.presets import preset
from pallas_kernels.kv_cache import bytes_per_position

PROMPT = 512
"""Tokens of the prompts; decoding is timed from there on."""
_NEW_TOKENS = 64
_REPEATS = 2
TIME_LIMIT = 220
"""Seconds for all batches: each is a compilation of its own, and one that hangs must not cost the rows before it."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds to the first token of each row, and seconds of a decode step."""

    first_token: float
    step: float


class TokenTimes:
    """A streamer of `generate`: notes when each step's tokens are on the host (its first call brings the prompt)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        """Called with the prompt, then with the tokens of each step, copied to the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last step."""

    def timing(self) -> Timing:
        """The prompt's time to the first token, and the average of the second half of the steps after it."""
        prompt, first, *steps = self.times
        late = steps[(len(steps) - 1) // 2 :]  # where a CUDA graph has to be recorded anew, it is in the first steps
        return Timing(first - prompt, (late[-1] - late[0]) / (len(late) - 1))


def transformers_config(config: ModelConfig) -> Any:
    """The `transformers` configuration with the shapes of ours.

    Raises:
        OptionError: `transformers` has no such architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(
            config.architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=min(config.max_position_embeddings, 8192),
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    except ValueError as error:
        raise OptionError(f"transformers has no model of architecture {config.architecture!r}: {error}") from error


def build(config: ModelConfig, device: str) -> Any:
    """A model of these shapes with random bf16 weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(transformers_config(config), dtype=torch.bfloat16).eval()
    # Random weights may well choose a token that ends a text, so there is none.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def measure(model: Any, batch: int, *, prompt: int = PROMPT, new_tokens: int = _NEW_TOKENS) -> Timing:
    """Times greedy `generate` with a static cache, which compiles its decode step on a GPU; medians after a warm-up."""
    import torch
    from transformers import CompileConfig, StaticCache

    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    # One cache for all calls: the compiled step and its CUDA graph know its arrays.
    cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens)
    compiled = model.device.type == "cuda"

    def once() -> Timing:
        streamer = TokenTimes()
        cache.reset()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            past_key_values=cache,
            # Fixed shapes: with the default, another batch size would compile a slower program for any batch size.
            **({"compile_config": CompileConfig(dynamic=False)} if compiled else {}),
            streamer=streamer,
        )
        return streamer.timing()

    once()  # compiles
    once()  # what is left to record
    timings = [once() for _ in range(_REPEATS)]
    return Timing(*(statistics.median(values) for values in zip(*map(dataclasses.astuple, timings), strict=True)))


def row(
    plan: Plan, config: ModelConfig, batch: int, timing: Timing, memory: int, bandwidth: float | None
) -> dict[str, Any]:
    """The row of a measurement, with the roofline of the benchmark: bytes a step must read at the bandwidth."""
    layers = sum(math.prod(config.linear_shape(name)) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    weights = 2 * (config.num_layers * layers + config.vocab_size * config.hidden_size)
    position = config.num_layers * bytes_per_position(config.num_kv_heads, config.head_dim, "float16")
    step_bytes = weights + batch * (PROMPT + _NEW_TOKENS // 2) * position
    return plan.row(
        batch,
        PROMPT,
        decode_tokens_per_s=round(batch / timing.step, 1),
        time_to_first_token_ms=round(1e3 * timing.first_token, 2) if batch == 1 else None,
        peak_memory_gb=round(memory / 1e9, 3),
        roofline_share=round(step_bytes / bandwidth / timing.step, 4) if bandwidth else None,
    )


def _measure_batches(model_name: str, batches: Sequence[int], bandwidth: float | None) -> None:
    import torch

    config, began = preset(model_name), time.monotonic()

    def note(text: str) -> None:
        print(f"  {time.monotonic() - began:.0f} s: {text}", file=sys.stderr, flush=True)

    plan = Plan(model_name, "transformers bf16", (), (), ())
    model = build(config, "cuda")
    note("weights there")
    for batch in batches:
        torch.cuda.reset_peak_memory_stats()
        try:
            timing = measure(model, batch)
        except torch.cuda.OutOfMemoryError as error:  # one case must not cost the others their figures
            note(f"batch {batch} failed: {str(error)[:300]}")
            continue
        measured = row(plan, config, batch, timing, torch.cuda.max_memory_allocated(), bandwidth)
        print(json.dumps({"row": measured}), flush=True)
        note(f"batch {batch} done")
        torch.compiler.reset()  # gives back the memory of its CUDA graphs
        torch.cuda.empty_cache()


def require_torch() -> None:
    """Checks that there is a PyTorch which sees a GPU.

    Raises:
        OptionError: There is not.
    """
    try:
        import torch
    except ImportError as error:
        raise OptionError("the comparison with transformers needs PyTorch: pip install torch") from error
    if not torch.cuda.is_available():
        raise OptionError(f"the comparison with transformers needs a GPU that PyTorch {torch.__version__} sees")


def main() -> None:
    """Measures the batches given in the argument, within `TIME_LIMIT`."""
    settings = json.loads(sys.argv[1])

    def give_up(*_: object) -> None:
        # Compilation holds threads and processes of its own, which a raised exception would wait for.
        print(f"transformers took more than {TIME_LIMIT} s: the remaining batches are left out", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; the parent says so, once
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TIME_LIMIT)
    try:
        require_torch()
        _measure_batches(settings["model"], settings["batches"], settings.get("read_bandwidth"))
    except MixLLMError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
