"""Does one device generate the same text as another? `python -m mixllm_jax.evaluation.same_text`.

    python -m mixllm_jax.evaluation.same_text write MODEL_DIR REFERENCE.json      # on the CPU: JAX_PLATFORMS=cpu
    python -m mixllm_jax.evaluation.same_text compare MODEL_DIR REFERENCE.json    # on the GPU

Greedy text may differ where two tokens are nearly equally likely and the devices round differently. So the reference
notes, for every token, by how much its logit leads the runner-up's in one pass over the text, and the other device's
leads are compared with these: how far they differ over all tokens is the noise of rounding, and where the texts part,
the lead must be within it. A difference in the last bit changes int8 activations here and there, so that the noise is
that of quantising them: a device does not even agree with itself where one pass and token by token round differently.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.benchmark.runner import versions
from mixllm_jax.loaded_model import LoadedModel
from mixllm_jax.loading import load
from mixllm_jax.models.cache import KVCache

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first human",
    "A list of planets in the solar system:",
    "def fibonacci(n):",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "My favourite recipe begins with",
    "The theory of relativity says that",
    "Dear Sir or Madam,",
    "To install the package, run",
    "The largest ocean on Earth is",
    "Shakespeare wrote many plays, such as",
    "If it rains tomorrow, we will",
    "The difference between a virus and a bacterium is",
    "One plus one equals",
    "The heart pumps blood through",
    "At the end of the day, the most important thing is",
)
NEAR_TIE = 4.0
"""A lead of so many standard deviations of the noise is still a near-tie: there are some thousand tokens to fail at."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Greedy text of one prompt.

    Attributes:
        prompt: the text continued.
        tokens: token ids.
        runners_up: at each place, the second likeliest token.
        leads: at each place, the logit of the token less that of the runner-up.
    """

    prompt: str
    tokens: list[int]
    runners_up: list[int]
    leads: list[float]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far this device's text of a prompt is the reference's.

    Attributes:
        prompt: the text continued.
        same_tokens: tokens before the first difference; all of them where there is none.
        expected: the reference's token at the first difference.
        found: this device's token there.
        reference_lead: by how much the reference's logit of `expected` leads its runner-up's there.
        lead: by how much this device's logit of `expected` leads that of `found`: negative, unless generating rounds
            otherwise than the one pass over the text that finds this out.
    """

    prompt: str
    same_tokens: int
    expected: int | None = None
    found: int | None = None
    reference_lead: float | None = None
    lead: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All prompts.

    Attributes:
        agreements: one a prompt.
        noise: root mean square difference of the devices' leads over all tokens of the reference.
        unsure: tokens of the reference whose own lead is within the noise or negative: where texts may part.
    """

    agreements: list[Agreement]
    noise: float
    unsure: int

    def different(self) -> list[Agreement]:
        """Where the texts part at more than a near-tie."""
        limit = NEAR_TIE * self.noise
        return [a for a in self.agreements if a.reference_lead is not None and a.reference_lead > limit]


def greedy_tokens(loaded: LoadedModel, length: int) -> list[list[int]]:
    """`length` greedy tokens for each of `PROMPTS`, without stopping."""
    prompts = [loaded.encode(prompt) for prompt in PROMPTS]
    results = loaded.engine.generate(prompts, max_tokens=length)
    print(f"generated {len(prompts)} texts", file=sys.stderr)
    return [result.tokens for result in results]


def write(loaded: LoadedModel, length: int) -> list[Text]:
    """This device's texts, as a reference."""
    texts = []
    for prompt, tokens in zip(PROMPTS, greedy_tokens(loaded, length), strict=True):
        logits = logits_of_text(loaded, prompt, tokens)
        places = np.arange(len(tokens))
        others = logits.copy()
        others[places, tokens] = -np.inf
        runners_up = others.argmax(-1)
        leads = logits[places, tokens] - logits[places, runners_up]
        texts.append(Text(prompt, tokens, runners_up.tolist(), [round(float(lead), 5) for lead in leads]))
    return texts


def compare(loaded: LoadedModel, reference: list[Text]) -> Comparison:
    """This device's texts against the reference's."""
    found = greedy_tokens(loaded, max(len(text.tokens) for text in reference))
    same = [_same_tokens(text.tokens, tokens) for text, tokens in zip(reference, found, strict=True)]
    print(f"tokens before the first difference: {same}", file=sys.stderr)  # said before the leads, which take longer
    agreements, squares = [], []
    for text, tokens, place in zip(reference, found, same, strict=True):
        logits = logits_of_text(loaded, text.prompt, text.tokens)
        places = np.arange(len(text.tokens))
        leads = logits[places, text.tokens] - logits[places, text.runners_up]
        squares.append(np.mean((leads - np.asarray(text.leads)) ** 2))
        if place == len(text.tokens):
            agreements.append(Agreement(text.prompt, len(text.tokens)))
            continue
        lead = float(logits[place, text.tokens[place]] - logits[place, tokens[place]])
        agreements.append(
            Agreement(text.prompt, place, text.tokens[place], tokens[place], text.leads[place], round(lead, 5))
        )
    noise = math.sqrt(float(np.mean(squares)))
    return Comparison(agreements, noise, sum(lead <= noise for text in reference for lead in text.leads))


def _same_tokens(expected: list[int], found: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))


def logits_of_text(loaded: LoadedModel, prompt: str, tokens: list[int]) -> np.ndarray[Any, Any]:
    """float32 `[len(tokens), vocab]`: the logits from which each token was chosen, from one pass over the text.

    With an int8 cache, keys and values are seen as it stores them.
    """
    start = loaded.encode(prompt)
    sequence = [*start, *tokens[:-1]]
    padded = np.zeros((1, 128 * math.ceil(len(sequence) / 128)), np.int32)  # one program for all texts
    padded[0, : len(sequence)] = sequence
    cache = KVCache.zeros(loaded.config, 1, padded.shape[1], loaded.engine.cache_dtype)
    logits = _all_logits(loaded.model, jnp.asarray(padded), cache)
    return np.array(logits[len(start) - 1 : len(sequence)])


@jax.jit
def _all_logits(model: Any, tokens: jax.Array, cache: KVCache) -> jax.Array:
    return model(tokens, cache, history=0)[0][0]


def main() -> None:
    """Writes a reference, or compares with one; ends with an error where a difference is more than a near-tie."""
    parser = argparse.ArgumentParser(description="Compare greedy text between devices.")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("reference", type=Path, metavar="FILE")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens a prompt (default: 64)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-bits", type=int, default=16)
    parser.add_argument("--lm-head-bits", type=int, default=16)
    parser.add_argument("--embedding-bits", type=int, default=16)
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the comparison to this file")
    arguments = parser.parse_args()
    bits: Any = {name: getattr(arguments, name) for name in ("kv_bits", "lm_head_bits", "embedding_bits")}
    loaded = load(arguments.folder, dtype=arguments.dtype, **bits)
    settings = {
        "model": loaded.path.name,
        "device": jax.devices()[0].device_kind,
        "dtype": str(loaded.model.embedding.dtype),
        **bits,
        "versions": versions(),
        "command": shlex.join(["python", "-m", "mixllm_jax.evaluation.same_text", *sys.argv[1:]]),
    }
    if arguments.action == "write":
        texts = [dataclasses.asdict(text) for text in write(loaded, arguments.length)]
        arguments.reference.write_text(json.dumps({**settings, "texts": texts}) + "\n")
        return
    stored = json.loads(arguments.reference.read_text())
    comparison = compare(loaded, [Text(**text) for text in stored.pop("texts")])
    agreements = comparison.agreements
    parting = [a for a in agreements if a.found is not None]
    for agreement in parting:
        print(f"{'DIFFERENT' if agreement in comparison.different() else 'near-tie'}: {agreement}")
    summary = {
        "same_texts": len(agreements) - len(parting),
        "texts": len(agreements),
        "tokens": arguments.length,
        "parted_at_a_near_tie": len(parting) - len(comparison.different()),
        "different": len(comparison.different()),
        "noise_of_leads": round(comparison.noise, 5),
        "reference_tokens_within_noise": comparison.unsure,
    }
    print(json.dumps({**settings, **summary}))
    if arguments.out is not None:
        runs = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
        rows = [dataclasses.asdict(agreement) for agreement in agreements]
        runs.append({**settings, "reference": stored, **summary, "prompts": rows})
        arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    raise SystemExit(1 if comparison.different() else 0)


if __name__ == "__main__":
    main()
