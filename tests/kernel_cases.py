"""Random operands and the float64 oracle for the kernel tests, written from the formulas alone."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import PackedWeight, QuantizedActivations
from pallas_kernels.packing import pack


@dataclasses.dataclass
class Case:
    """One product: what goes in, and the exact result in float64."""

    activations: QuantizedActivations
    weight: PackedWeight
    bias: np.ndarray | None
    expected: np.ndarray


def channel_order(kind: str, n: int, n4: int, rng: np.random.Generator) -> np.ndarray:
    """Output channel of each packed row."""
    if kind == "reversed":
        return np.arange(n)[::-1].copy()
    if kind == "identity":
        return np.arange(n)
    if kind == "interleaved":  # 8-bit channels spread evenly
        eight = np.unique(np.linspace(0, n - 1, n - n4).round().astype(int)) if n > n4 else np.array([], int)
        four = np.setdiff1d(np.arange(n), eight)
        return np.concatenate([four[:n4], np.setdiff1d(np.arange(n), four[:n4])])
    permutation = rng.permutation(n)
    if kind == "ascending":  # as the format has it: ascending within each bit width
        return np.concatenate([np.sort(permutation[:n4]), np.sort(permutation[n4:])])
    assert kind == "shuffled"
    return permutation


def make_case(
    m: int,
    n: int,
    k: int,
    group_size: int,
    share: float,
    *,
    order: str = "ascending",
    bias: bool = False,
    seed: int = 0,
) -> Case:
    """Random codes over their whole ranges."""
    rng = np.random.default_rng([seed, m, n, k, group_size])
    n8 = round(n * share)
    n4, groups = n - n8, k // group_size
    return assemble(
        activation_codes=rng.integers(-127, 128, (m, k)),
        activation_scales=rng.uniform(0.001, 0.02, (groups, m)).astype(np.float32),
        codes4=rng.integers(0, 16, (n4, k)),
        zero_points4=rng.integers(0, 16, (n4, groups)),
        codes8=rng.integers(-128, 128, (n8, k)),
        scales=rng.uniform(0.0005, 0.02, (n, groups)).astype(np.float16),
        order=channel_order(order, n, n4, rng),
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
        group_size=group_size,
    )


def assemble(
    *,
    activation_codes: np.ndarray,
    activation_scales: np.ndarray,
    codes4: np.ndarray,
    zero_points4: np.ndarray,
    codes8: np.ndarray,
    scales: np.ndarray,
    order: np.ndarray,
    bias: np.ndarray | None,
    group_size: int,
) -> Case:
    """Pack the operands, and compute the product in float64 from the unpacked ones."""
    n4 = len(codes4)
    weight = pack(codes4, scales[:n4], zero_points4, codes8, scales[n4:], order, group_size=group_size)
    activations = QuantizedActivations(activation_codes.astype(np.int8), activation_scales, group_size)

    def spread(values: np.ndarray) -> np.ndarray:  # [rows, groups] -> [rows, k]
        return np.repeat(values.astype(np.float64), group_size, axis=1)

    rows4 = (codes4 - spread(zero_points4)) * spread(scales[:n4])
    rows8 = codes8 * spread(scales[n4:])
    expected = np.empty((len(activation_codes), len(order)))
    x = activation_codes * spread(activation_scales.T)
    expected[:, order] = x @ np.concatenate([rows4, rows8]).T
    return Case(activations, weight, bias, expected if bias is None else expected + bias.astype(np.float64))


def require_hopper() -> None:
    """Skip where the Hopper kernels cannot run, for a test that is marked `gpu`."""
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("the kernel is for Hopper GPUs")
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernel needs JAX 0.11 or later, and says so")


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of the expected; NaN is an infinite error."""
    difference = np.asarray(actual, np.float64) - expected
    error = np.linalg.norm(difference) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")
