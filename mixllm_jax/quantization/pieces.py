"""The pieces of the method that can be replaced from outside the package: the score, the choice, the rounding.

docs/research.md shows each by an example.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mixllm_jax.quantization.allocation import Segment
from mixllm_jax.quantization.gptq import gptq
from mixllm_jax.quantization.hessian import factor_hessian
from mixllm_jax.quantization.rounding import QuantizedWeight
from mixllm_jax.quantization.salience import sequence_salience

Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``score(inputs, output_gradient, delta)``, see :func:`~mixllm_jax.quantization.salience.sequence_salience`."""

Choice = Callable[[np.ndarray, Sequence[Segment], int], np.ndarray]
"""``choose(scores, segments, count)`` -> bool [channels], true where a channel gets 8 bits.

``scores`` is float32 [channels] in the order of ``segments``, ``count`` what the budget asks for.
"""

Rounding = Callable[[jax.Array, jax.Array, np.ndarray, int], QuantizedWeight]
"""``quantize_weight(weight, hessian, eight_bit, group_size)``, see :func:`gptq_weight`."""


def gptq_weight(weight: jax.Array, hessian: jax.Array, eight_bit: np.ndarray, group_size: int) -> QuantizedWeight:
    """The method's rounding of one linear.

    Args:
        weight: float [out_features, in_features].
        hessian: float64 [in_features, in_features], ``2/n X^T X`` of the linear's inputs, which come through the
            linears quantised before it.
        eight_bit: bool [out_features], which channels get 8 bits; the others get 4.
        group_size: input channels that share a scale.

    Raises:
        FloatingPointError: not a Hessian.
    """
    return gptq(weight, factor_hessian(hessian, group_size), eight_bit).weight


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What scores, chooses and rounds.

    An unfinished run is resumed by the names of these functions, not by their code: after a change delete its folder,
    ``.NAME.partial`` beside the output folder.

    Attributes:
        score: salience of each channel for each sequence, traced by JAX: Eq. 4.
        choose: which channels get 8 bits; None for what ``QuantizationScheme.allocation`` says.
        quantize_weight: rounds the weight of a linear, by GPTQ; not asked by the method ``rtn``.
    """

    score: Score = sequence_salience
    choose: Choice | None = None
    quantize_weight: Rounding = gptq_weight

    def replaced(self) -> dict[str, str]:
        """Names of the functions that are not the method's own, by piece."""
        return {
            field.name: _name(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not field.default
        }


def _name(function: Callable[..., object]) -> str:
    """Module and name; of an object that is called, such as a module with parameters, those of its class."""
    if isinstance(function, functools.partial):
        given = [("", value) for value in function.args] + [
            (f"{key}=", value) for key, value in function.keywords.items()
        ]
        settings = (key + (_name(value) if callable(value) else repr(value)) for key, value in given)
        return f"{_name(function.func)}({', '.join(settings)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
