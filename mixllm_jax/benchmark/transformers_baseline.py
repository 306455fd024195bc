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

CONTEXT = 512
"""Positions of the cache, and tokens of the prompt whose first token is timed, as in our own rows of this context."""
TIMED_STEPS = 128
"""The last steps before the cache is full are timed, as in ours."""
_FIRST_STEPS = 16
"""Steps before these: where a CUDA graph has to be recorded anew, it is in them."""
_REPEATS = 2
TIME_LIMIT = 220
"""Seconds for all batches: each is a compilation of its own, and one that hangs must not cost the rows before it."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds to the first token of a prompt, where there is one row, and seconds of a decode step."""

    first_token: float | None
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

    def first_token(self) -> float:
        """Seconds from the prompt to its first token."""
        return self.times[1] - self.times[0]

    def step(self, timed: int) -> float:
        """Seconds of a step, the average of the last `timed` ones."""
        return (self.times[-1] - self.times[-1 - timed]) / timed


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


def measure(model: Any, batch: int, *, context: int = CONTEXT, timed: int = TIMED_STEPS) -> Timing:
    """Times greedy `generate` with a static cache, which compiles its decode step on a GPU; medians after a warm-up.

    Args:
        model: From `build`.
        batch: Rows.
        context: Positions of the cache. The prompt is so long that generating fills it; that of the first token, which
            is timed alone and for one row only, has as many tokens.
        timed: Steps whose average counts.
    """
    from transformers import StaticCache

    new_tokens = timed + _FIRST_STEPS
    # One cache for all calls: the compiled step and its CUDA graph know its arrays.
    cache = StaticCache(config=model.config, max_cache_len=context)
    runs = [_generate(model, batch, context - new_tokens, new_tokens, cache) for _ in range(2 + _REPEATS)]
    step = statistics.median(run.step(timed) for run in runs[2:])  # the first compiles, the second records what is left
    if batch > 1:
        return Timing(None, step)
    del cache, runs
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    prompts = [_generate(model, batch, context, 1, cache).first_token() for _ in range(1 + _REPEATS)]
    return Timing(statistics.median(prompts[1:]), step)


def _generate(model: Any, batch: int, prompt: int, new_tokens: int, cache: Any) -> TokenTimes:
    """One call of `generate` with random prompts."""
    import torch
    from transformers import CompileConfig

    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    times = TokenTimes()
    cache.reset()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        past_key_values=cache,
        # Fixed shapes: with the default, another batch size would compile a slower program for any batch size.
        **({"compile_config": CompileConfig(dynamic=False)} if model.device.type == "cuda" else {}),
        streamer=times,
    )
    return times


def row(
    plan: Plan, config: ModelConfig, batch: int, timing: Timing, memory: int, bandwidth: float | None
) -> dict[str, Any]:
    """The row of a measurement, with the roofline of the benchmark: bytes a step must read at the bandwidth."""
    layers = sum(math.prod(config.linear_shape(name)) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    weights = 2 * (config.num_layers * layers + config.vocab_size * config.hidden_size)
    position = config.num_layers * bytes_per_position(config.num_kv_heads, config.head_dim, "float16")
    step_bytes = weights + batch * (CONTEXT - TIMED_STEPS // 2) * position
    return plan.row(
        batch,
        CONTEXT,
        decode_tokens_per_s=round(batch / timing.step, 1),
        time_to_first_token_ms=None if timing.first_token is None else round(1e3 * timing.first_token, 2),
        peak_memory_gb=round(memory / 1e9, 3),
        roofline_share=round(step_bytes / bandwidth / timing.step, 4) if bandwidth else None,
    )


def _measure_batches(model_name: str, batches: Sequence[int], bandwidth: float | None) -> int:
    """Prints a row for each batch, also where its memory did not suffice; returns how many of them failed."""
    import torch

    config, began = preset(model_name), time.monotonic()

    def note(text: str) -> None:
        print(f"  {time.monotonic() - began:.0f} s: {text}", file=sys.stderr, flush=True)

    plan = Plan(model_name, "transformers bf16", (), (), ())
    model = build(config, "cuda")
    note("weights there")
    failed = 0
    for batch in batches:
        torch.cuda.reset_peak_memory_stats()
        try:
            timing = measure(model, batch)
        except torch.cuda.OutOfMemoryError as error:  # one case must not cost the others their figures
            note(f"batch {batch} failed: {str(error)[:300]}")
            print(json.dumps({"row": plan.row(batch, CONTEXT, error="out of device memory")}), flush=True)
            failed += 1
            continue
        measured = row(plan, config, batch, timing, torch.cuda.max_memory_allocated(), bandwidth)
        print(json.dumps({"row": measured}), flush=True)
        note(f"batch {batch} done")
        torch.compiler.reset()  # gives back the memory of its CUDA graphs
        torch.cuda.empty_cache()
    return failed


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
        failed = _measure_batches(settings["model"], settings["batches"], settings.get("read_bandwidth"))
    except MixLLMError as error:
        raise SystemExit(str(error)) from error
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
