"""Does one device generate the same text as another? `python -m mixllm_jax.evaluation.same_text`.

    python -m mixllm_jax.evaluation.same_text write MODEL_DIR REFERENCE.json      # on the CPU: JAX_PLATFORMS=cpu
    python -m mixllm_jax.evaluation.same_text compare MODEL_DIR REFERENCE.json    # on the GPU

Greedy text may differ where two tokens are nearly equally likely and the devices round differently. So at the first
difference the other device's own logits are looked at: the margin by which its token leads the reference's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.loading import LoadedModel, load

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
NEAR_TIE = 0.1
"""Logits closer than this are decided by rounding: about the noise of bfloat16 activations."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where the text of a prompt first differs.

    Attributes:
        prompt: the text continued.
        position: index of the token among the generated ones.
        expected: the reference's token.
        found: this device's token.
        margin: by how much this device's logit of `found` exceeds that of `expected`, after the common text before.
    """

    prompt: str
    position: int
    expected: int
    found: int
    margin: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin <= NEAR_TIE


def greedy_tokens(loaded: LoadedModel, length: int) -> list[list[int]]:
    """`length` greedy tokens for each of `PROMPTS`, without stopping."""
    prompts = [loaded.encode(prompt) for prompt in PROMPTS]
    return [result.tokens for result in loaded.engine.generate(prompts, max_tokens=length)]


def compare(loaded: LoadedModel, reference: list[list[int]]) -> list[Difference]:
    """The first difference of each prompt's text, if any."""
    found = greedy_tokens(loaded, max(map(len, reference)))
    differences = []
    for prompt, expected, tokens in zip(PROMPTS, reference, found, strict=True):
        position = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), None)
        if position is None:
            continue
        context = [*loaded.encode(prompt), *expected[:position]]
        padded = np.zeros((1, 256), np.int32)  # one program for all lengths
        padded[0, : len(context)] = context
        logits = _last_logits(loaded.model, jnp.asarray(padded), jnp.asarray([len(context)], jnp.int32))
        margin = float(logits[tokens[position]] - logits[expected[position]])
        differences.append(Difference(prompt, position, expected[position], tokens[position], margin))
    return differences


@jax.jit
def _last_logits(model: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return model(tokens, lengths=lengths, last_only=True)[0][0]


def main() -> None:
    """Writes a reference, or compares with one; ends with an error where a difference is more than a near-tie."""
    parser = argparse.ArgumentParser(description="Compare greedy text between devices.")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("reference", type=Path, metavar="FILE")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens a prompt (default: 64)")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    loaded = load(arguments.folder, dtype=arguments.dtype)
    if arguments.action == "write":
        arguments.reference.write_text(json.dumps(greedy_tokens(loaded, arguments.length)) + "\n")
        return
    reference = json.loads(arguments.reference.read_text())
    differences = compare(loaded, reference)
    for difference in differences:
        print(f"{'near-tie' if difference.near_tie else 'DIFFERENT'}: {difference}")
    wrong = sum(not difference.near_tie for difference in differences)
    same, near = len(reference) - len(differences), len(differences) - wrong
    print(
        f"{same} of {len(reference)} texts of {max(map(len, reference))} tokens are the same on "
        f"{jax.devices()[0].device_kind}; {near} differ first at a near-tie, {wrong} otherwise"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
