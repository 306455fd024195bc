"""What a user would run instead: `transformers` in bf16 with a static cache and `torch.compile`, on random weights.

`python -m mixllm_jax.benchmark.transformers_baseline '{"model": "llama-3.1-8b", "batches": [1, 16, 64]}'` prints rows.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.presets import preset

_PROMPT = 512
_NEW_TOKENS = 64


def llama_config(config: ModelConfig) -> Any:
    """The `transformers` configuration of a Llama-shaped preset."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.qkv_bias,
    )


def main() -> None:
    """Measures the batches given in the argument."""
    import torch
    from transformers import LlamaForCausalLM

    settings = json.loads(sys.argv[1])
    plan = Plan(settings["model"], "transformers bf16", (), (), ())
    if not torch.cuda.is_available():
        raise SystemExit("the comparison needs torch with CUDA")
    config = preset(settings["model"])
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(llama_config(config)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def seconds(batch: int, new_tokens: int) -> float:
        prompt = torch.randint(0, config.vocab_size, (batch, _PROMPT), device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for batch in settings["batches"]:
        with torch.inference_mode():
            # The static cache is made for the longest generation, so warm that one up, then the single token.
            for _ in range(3):
                seconds(batch, _NEW_TOKENS)
            long = min(seconds(batch, _NEW_TOKENS) for _ in range(2))
            seconds(batch, 1)
            first = min(seconds(batch, 1) for _ in range(2))
        row = plan.row(
            batch,
            _PROMPT,
            decode_tokens_per_s=round(batch * (_NEW_TOKENS - 1) / (long - first), 1),
            time_to_first_token_ms=round(1e3 * first, 2) if batch == 1 else None,
            peak_memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 3),
        )
        print(json.dumps({"row": row}), flush=True)


if __name__ == "__main__":
    main()
