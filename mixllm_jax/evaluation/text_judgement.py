"""Judges greedy text of another device: is each token what this device's model would choose, or nearly so?

Greedy texts of two devices cannot be compared token by token: behind the first near-tie that falls the other way they
are texts about different things. So the reference goes along the text of the device under test, and says at every place
whether it would have chosen the same token there, and otherwise by how many logits it likes its own choice better: the
gap. All tokens are judged, and not only those up to the first difference.

Int8 activations make a model chaotic: a float that differs in its last bit is rounded to another code here and there,
that changes other floats, and after a few layers the difference is that of quantising anew, however small it began. One
run of the reference is no better than one of the device, then. So the reference is the mean of `RUNS` runs in which the
weights of all RMSNorms are changed by about a millionth of themselves, at random; how far the lead of its choice over
the runner-up is from the mean in one run is the noise that any order of summation has. A token is different where its
gap exceeds `NEAR_TIE` times the noise. The same is asked of the choices of each run and the mean of the others: so many
tokens, and gaps so large, differ in the reference itself.

The criterion can fail: where the lead is larger than the limit, any wrong token is seen for itself, and a device that
computes a layer wrongly comes to choose such tokens. In SmolLM2-135M W4.4A8, with a noise of 0.13 logits, one of 30
layers without the 8-bit channels of its query, key and value projection makes some 60 of 1280 tokens different, the
worst by 6.5 logits. A fault too small for that makes more tokens differ than do in the reference itself; both numbers
are reported. A model with float activations has the noise of rounding floats alone: judge its text in the dtype of the
device under test.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mixllm_jax.errors import MixLLMError, OptionError
from mixllm_jax.loaded_model import LoadedModel
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.decoder import Decoder
from mixllm_jax.models.norm import RMSNorm

Logits = np.ndarray[Any, np.dtype[np.float32]]

NEAR_TIE = 6.0
"""A gap of so many standard deviations of the noise is still a near-tie. A few places are several times as noisy as
most: runs of SmolLM2-135M W4.4A8, judged by each other, reach 5.1 in 10,240 tokens."""
PERTURBATION = 1e-6
"""Relative change of RMSNorm weights: a few units in the last place of a float32."""
RUNS = 8
"""How often they are changed."""


class DifferentTextError(MixLLMError):
    """A token is not the reference's choice, by more than a near-tie."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Greedy text of one prompt.

    Attributes:
        prompt: the text continued.
        tokens: token ids.
    """

    prompt: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A token that the reference would not have chosen.

    Attributes:
        place: number of tokens before it in its text.
        token: what stands there.
        choice: the reference's token.
        gap: the reference's logit of `choice` less that of `token`.
    """

    place: int
    token: int
    choice: int
    gap: float


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the reference says of texts.

    Attributes:
        texts: that were judged.
        differences: of each text, in order of place.
        leads: of all tokens, the reference's logit of its choice less that of its runner-up.
        noise: standard deviation of a lead in one run of the reference.
        own_differences: tokens at which each run differs from the mean of the others.
        own_largest_gap: of those tokens.
    """

    texts: list[Text]
    differences: list[list[Difference]]
    leads: np.ndarray[Any, Any]
    noise: float
    own_differences: list[int]
    own_largest_gap: float

    @property
    def limit(self) -> float:
        """The largest gap of a near-tie."""
        return NEAR_TIE * self.noise

    def different(self) -> list[tuple[str, Difference]]:
        """Differences that are more than a near-tie, with their prompts, the largest gap first."""
        found = [
            (text.prompt, difference)
            for text, differences in zip(self.texts, self.differences, strict=True)
            for difference in differences
            if not difference.gap <= self.limit  # NaN is different as well
        ]
        return sorted(found, key=lambda pair: -pair[1].gap)

    def summary(self) -> dict[str, Any]:
        """Counts, and gaps in logits."""
        gaps = [difference.gap for differences in self.differences for difference in differences]
        return {
            "texts": len(self.texts),
            "texts_the_same_throughout": sum(not differences for differences in self.differences),
            "tokens": len(self.leads),
            "tokens_that_differ": len(gaps),
            "largest_gap": round(max(gaps, default=0.0), 5),
            "noise": round(self.noise, 5),
            "limit": round(self.limit, 5),
            "different": len(self.different()),
            "tokens_with_a_lead_beyond_the_limit": int((self.leads > self.limit).sum()),
            "runs_of_the_reference": {
                "tokens_that_differ": self.own_differences,
                "largest_gap": round(self.own_largest_gap, 5),
            },
        }

    def check(self) -> None:
        """Raises a `DifferentTextError` that names the worst token, if there is any that is more than a near-tie."""
        different = self.different()
        if different:
            prompt, worst = different[0]
            raise DifferentTextError(
                f"{len(different)} of {len(self.leads)} tokens differ from the reference's choice by more than a "
                f"near-tie. The worst: behind the prompt {prompt!r}, place {worst.place}, the text has token "
                f"{worst.token} and the reference chooses {worst.choice}, whose logit is {worst.gap:.3f} larger; a "
                f"near-tie is up to {self.limit:.3f}, {NEAR_TIE:g} times the noise of {self.noise:.3f}."
            )


def judge(loaded: LoadedModel, texts: list[Text]) -> Judgement:
    """Goes along `texts` with the runs of this device's model.

    Raises:
        OptionError: the texts do not suit the model (see `encode_prompts`).
    """
    prompts = encode_prompts(loaded, texts)
    longest = max(len(prompt) + len(text.tokens) for prompt, text in zip(prompts, texts, strict=True))
    cache = KVCache.zeros(loaded.config, 1, 16 * math.ceil(longest / 16), loaded.engine.cache_dtype)  # one program
    models = [perturb(loaded.model, seed) for seed in range(RUNS)]
    differences, leads, deviations, own_gaps = [], [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        runs = np.stack([logits_of_text(model, cache, prompt, text.tokens) for model in models])
        mean = runs.mean(0)
        choice, gaps = choices_and_gaps(mean, np.asarray(text.tokens))
        differing = np.flatnonzero(choice != text.tokens)
        differences.append([Difference(int(i), text.tokens[i], int(choice[i]), float(gaps[i])) for i in differing])
        runner_up = np.argpartition(mean, -2)[:, -2]
        places = np.arange(len(text.tokens))
        lead = runs[:, places, choice] - runs[:, places, runner_up]
        leads.append(lead.mean(0))
        deviations.append(lead - leads[-1])
        own_gaps.append(np.stack([own_gaps_of_run(run, (RUNS * mean - run) / (RUNS - 1)) for run in runs]))
    noise = math.sqrt(float(np.mean(np.concatenate(deviations, axis=1) ** 2)) * RUNS / (RUNS - 1))
    own = np.concatenate(own_gaps, axis=1)  # [runs, tokens]
    own_differences = np.count_nonzero(~np.isnan(own), axis=1).tolist()
    return Judgement(
        texts, differences, np.concatenate(leads), noise, own_differences, float(np.nanmax(own, initial=0))
    )


def choices_and_gaps(logits: Logits, tokens: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Logits]:
    """The likeliest token of each row of `logits` `[tokens, vocab]`, and by how much it leads that of `tokens`."""
    places, choice = np.arange(len(tokens)), logits.argmax(-1)
    return choice, logits[places, choice] - logits[places, tokens]


def own_gaps_of_run(run: Logits, others: Logits) -> Logits:
    """Gaps of the choices of one run for the mean of the others, NaN where they agree; both `[tokens, vocab]`."""
    choice, gaps = choices_and_gaps(others, run.argmax(-1))
    return np.where(choice == run.argmax(-1), np.nan, gaps)


def encode_prompts(loaded: LoadedModel, texts: list[Text]) -> list[list[int]]:
    """Token ids of the prompts of `texts`.

    Raises:
        OptionError: there are no texts, one has no tokens or tokens that the model does not know, or is too long.
    """
    if not texts or not all(text.tokens for text in texts):
        raise OptionError("there are no texts, or there is one without tokens")
    vocabulary, longest = loaded.config.vocab_size, loaded.config.max_position_embeddings
    prompts = [loaded.encode(text.prompt) for text in texts]
    for prompt, text in zip(prompts, texts, strict=True):
        if not 0 <= min(text.tokens) <= max(text.tokens) < vocabulary:
            raise OptionError(
                f"the text of {text.prompt!r} has token ids beyond 0 to {vocabulary - 1}: another model's?"
            )
        if len(prompt) + len(text.tokens) > longest:
            raise OptionError(f"the text of {text.prompt!r} is longer than the model's {longest} positions")
    return prompts


def perturb(model: Decoder, seed: int) -> Decoder:
    """The model with the weights of its RMSNorms changed by about `PERTURBATION` of themselves."""
    generator = np.random.default_rng(seed)

    def changed(node: Any) -> Any:
        if not isinstance(node, RMSNorm):
            return node
        weight = node.weight.get_value()
        factor = 1 + PERTURBATION * generator.standard_normal(weight.shape, dtype=np.float32)
        return RMSNorm(weight * factor, node.epsilon)

    return jax.tree.map(changed, model, is_leaf=lambda node: isinstance(node, RMSNorm))


def logits_of_text(model: Decoder, cache: KVCache, prompt: list[int], tokens: list[int]) -> Logits:
    """float32 `[len(tokens), vocab]`: the logits from which each token is chosen, from one pass over the text.

    `cache` is empty; one of int8 lets the pass see keys and values as generating with it does.
    """
    padded = np.zeros((1, cache.max_length), np.int32)
    padded[0, : len(prompt) + len(tokens) - 1] = [*prompt, *tokens[:-1]]
    return np.asarray(_all_logits(model, padded, cache))[len(prompt) - 1 :][: len(tokens)]


@jax.jit
def _all_logits(model: Decoder, tokens: jax.Array, cache: KVCache) -> jax.Array:
    return model(tokens, cache, history=0)[0][0]
