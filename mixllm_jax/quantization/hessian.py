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
        blocks: float32 [num_groups, group_size, group_size], diagonal blocks of the damped H.
        order: int32 [in_features], position in processing order -> input channel; groups stay together.
        dead: bool [in_features], in processing order: inputs that are always zero.
    """

    factor: jax.Array
    blocks: jax.Array
    order: np.ndarray
    dead: jax.Array


def group_order(diagonal: np.ndarray, group_size: int, *, reorder: bool = True) -> np.ndarray:
    """Processing order of input channels: whole groups by falling sum of their diagonal, int32 [in_features].

    The group with the largest inputs goes first, while all other weights can still make up for its errors (paper,
    "group reorder"); the stored weight keeps its natural order, so nothing changes at run time.
    """
    groups = np.arange(diagonal.shape[0] // group_size)
    if reorder:
        groups = np.argsort(-diagonal.reshape(-1, group_size).sum(axis=1), kind="stable")
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1).astype(np.int32)


@partial(jax.jit, static_argnames="group_size")
def _factor(hessian: jax.Array, order: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    num_groups = damped.shape[0] // group_size
    tiled = damped.reshape(num_groups, group_size, num_groups, group_size)
    blocks = tiled[jnp.arange(num_groups), :, jnp.arange(num_groups), :]
    return inverse.astype(jnp.float32), blocks.astype(jnp.float32), dead


def factor_hessian(hessian: jax.Array, group_size: int, *, reorder: bool = True) -> FactoredHessian:
    """Orders, damps and factors a Hessian.

    Args:
        hessian: float64 [in_features, in_features], symmetric, positive semidefinite.
        group_size: input channels of a group.
        reorder: process groups by falling importance (:func:`group_order`).

    Raises:
        FloatingPointError: the damped Hessian is not positive definite, so the input was not a Hessian.
    """
    order = group_order(np.diagonal(np.asarray(hessian)), group_size, reorder=reorder)
    with jax.enable_x64(True):
        factor, blocks, dead = _factor(hessian, order, group_size)
        if not bool(jnp.isfinite(factor).all()):
            raise FloatingPointError("the damped Hessian of a layer is not positive definite")
    return FactoredHessian(factor, blocks, order, dead)
