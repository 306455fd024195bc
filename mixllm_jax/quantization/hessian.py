"""The Hessian of a linear layer's output error, accumulated over calibration inputs, and its factor for GPTQ.

For a layer ``y = W x`` with inputs ``X [tokens, in_features]`` the error ``||(W - Q) X^T||^2`` has, for every output
channel, the same Hessian ``H = 2/n X^T X`` (Frantar et al., GPTQ, arXiv 2210.17323). Sums and factorisation run in
float64: H is badly conditioned (a few input channels are hundreds of times larger than others).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal before factorising."""


@partial(jax.jit, donate_argnums=0)
def _add(hessian: jax.Array, inputs: jax.Array) -> jax.Array:
    # The product of one batch is exact to float32 (HIGHEST: no TF32 on a GPU); sums over batches are in float64.
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    product = jax.lax.dot(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return hessian + 2.0 * product.astype(hessian.dtype)


class HessianSum:
    """Running sum of ``2 X^T X`` over batches of inputs, float64, on the device."""

    def __init__(self, in_features: int) -> None:
        with jax.enable_x64(True):
            self._sum = jnp.zeros((in_features, in_features), jnp.float64)
        self._tokens = 0

    def add(self, inputs: jax.Array) -> None:
        """Adds inputs ``[..., in_features]`` of the layer."""
        with jax.enable_x64(True):
            self._sum = _add(self._sum, inputs)
        self._tokens += inputs.size // inputs.shape[-1]

    def mean(self) -> jax.Array:
        """``2/n X^T X``, float64 [in_features, in_features].

        Raises:
            FloatingPointError: the inputs held a NaN or an infinity.
        """
        with jax.enable_x64(True):
            hessian = self._sum / max(self._tokens, 1)
            if not bool(jnp.isfinite(hessian).all()):
                raise FloatingPointError("the calibration inputs of a layer hold values that are not finite")
        return hessian


class FactoredHessian(NamedTuple):
    """What GPTQ needs of a Hessian whose input channels were put into processing order.

    Attributes:
        factor: float32 [in_features, in_features], upper triangular R with ``R^T R = H^-1``.
        order: int32 [in_features], position in processing order -> input channel; groups stay together.
        dead: bool [in_features], in processing order: inputs that are always zero.
        group_size: input channels of a group.
    """

    factor: jax.Array
    order: np.ndarray
    dead: jax.Array
    group_size: int


def processing_order(diagonal: np.ndarray, group_size: int, *, reorder: bool = True) -> np.ndarray:
    """Order in which GPTQ processes the input channels, int32 [in_features].

    Whole groups go by the falling sum of their diagonal (paper, "group reorder"), and the inputs of a group by their
    falling diagonal: what has the largest inputs goes first, while the most other weights can still make up for its
    errors. The stored weight keeps its natural order, so nothing changes at run time. ``reorder=False`` is the natural
    order.
    """
    channels = np.arange(diagonal.shape[0], dtype=np.int32).reshape(-1, group_size)
    if reorder:
        grouped = diagonal.reshape(-1, group_size)
        channels = np.take_along_axis(channels, np.argsort(-grouped, axis=1, kind="stable"), axis=1)
        channels = channels[np.argsort(-grouped.sum(axis=1), kind="stable")]
    return channels.reshape(-1)


@jax.jit
def _factor(hessian: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    hessian = hessian[order][:, order]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    living_mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    damped = hessian + jnp.diag(jnp.where(dead, 1.0, DAMPING * living_mean))
    # H = U U^T with U upper triangular (a Cholesky factorisation from the other end), so R = U^-1 has R^T R = H^-1:
    # one factorisation and one triangular inverse instead of inverting H and factorising again.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(damped.shape[0], dtype=damped.dtype)
    inverse = jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
    return inverse.astype(jnp.float32), dead


def factor_hessian(hessian: jax.Array, group_size: int, *, reorder: bool = True) -> FactoredHessian:
    """Orders, damps and factors a Hessian.

    Args:
        hessian: float64 [in_features, in_features], symmetric, positive semidefinite.
        group_size: input channels of a group.
        reorder: process the important inputs first (:func:`processing_order`).

    Raises:
        FloatingPointError: the damped Hessian is not positive definite, so the input was not a Hessian.
    """
    order = processing_order(np.diagonal(np.asarray(hessian)), group_size, reorder=reorder)
    with jax.enable_x64(True):
        factor, dead = _factor(hessian, order)
        if not bool(jnp.isfinite(factor).all()):
            raise FloatingPointError("the damped Hessian of a layer is not positive definite")
    return FactoredHessian(factor, order, dead, group_size)
