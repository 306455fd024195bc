"""Rounding, packing and salience of one linear layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixllm_jax.errors import OptionError
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.quantization.packed import pack_for_calibration, pack_weight
from mixllm_jax.quantization.rounding import dequantize, round_to_nearest
from mixllm_jax.quantization.salience import rounding_error, sequence_salience
from mixllm_jax.quantization.scheme import QuantizationScheme, choose_group_size, share_of_bits
from pallas_kernels import mixed_matmul, packing, quantize_activations

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=1,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=64,
)


def random_weight(seed: int, shape: tuple[int, int] = (12, 64), size: float = 0.05) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, shape) * size).astype(np.float32)


@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-9, 1e-4, 0.05, 30.0]))
@settings(max_examples=50, deadline=None)
def test_rounding_error_is_at_most_half_a_step(seed: int, size: float) -> None:
    weight = random_weight(seed, size=size)
    eight_bit = np.arange(12) % 2 == 0
    result = round_to_nearest(jnp.asarray(weight), jnp.asarray(eight_bit), 32)
    step = np.repeat(np.asarray(result.scales, np.float32), 32, axis=1)
    error = np.abs(np.asarray(dequantize(result)) - weight)
    # The scale is rounded to float16 (relative 2^-11, or half a step of subnormals), so the end of the range may lie
    # outside by 15 or 127 times that; the zero point of 4-bit channels is an integer and moves the range by half a
    # step.
    span = np.where(eight_bit, 127, 15)[:, None]
    slack = span * np.maximum(step * 2.0**-11, 2.0**-25)
    allowed = np.where(eight_bit, 0.5, 1.0)[:, None] * step + slack
    assert (error <= allowed * 1.001).all()
    assert np.asarray(result.scales > 0).all()
    assert result.zero_points.max() <= 15
    assert (np.asarray(result.zero_points)[eight_bit] == 0).all()


def test_formats_of_a_known_group() -> None:
    weight = np.zeros((4, 32), np.float32)
    weight[0, :2] = [-0.5, 1.0]  # 4-bit: scale 0.1, zero point 5
    weight[1, :2] = [-0.5, 1.27]  # 8-bit: scale 0.01
    weight[2, :] = 3.0  # 4-bit, all positive: the range is widened to contain zero
    result = round_to_nearest(jnp.asarray(weight), jnp.array([False, True, False, False]), 32)
    assert np.allclose(result.scales[:, 0], [0.1, 0.01, 0.2, 1e-5 / 15], rtol=0.06)
    assert result.zero_points[:, 0].tolist() == [5, 0, 0, 0]
    assert result.codes[0, :3].tolist() == [-5, 10, 0]
    assert result.codes[1, :3].tolist() == [-50, 127, 0]
    assert (dequantize(result)[2] == 3.0).all() or np.allclose(dequantize(result)[2], 3.0, rtol=1e-3)
    assert (dequantize(result)[3] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_packing_keeps_the_weight(share: float) -> None:
    weight = random_weight(1)
    eight_bit = np.random.default_rng(2).permutation(12) < share * 12
    result = round_to_nearest(jnp.asarray(weight), jnp.asarray(eight_bit), 32)
    packed = pack_weight(result)
    assert np.array_equal(packed.channel_order, np.concatenate([np.flatnonzero(~eight_bit), np.flatnonzero(eight_bit)]))
    assert np.array_equal(packing.dequantize(packed), dequantize(result))


def test_calibration_form_computes_the_same_bits() -> None:
    """The claim that lets one compilation serve all blocks: both forms give the same output, not just a close one."""
    weight = random_weight(3, (40, 128))
    result = round_to_nearest(jnp.asarray(weight), jnp.arange(40) % 3 == 0, 64)
    activations = quantize_activations(jnp.asarray(random_weight(4, (7, 128), 1.0)), 64)
    outputs = [
        mixed_matmul(activations, jax.tree.map(jnp.asarray, form), out_dtype=jnp.float32)
        for form in (pack_weight(result), pack_for_calibration(result))
    ]
    assert np.array_equal(*outputs)


def test_salience_matches_explicit_weight_gradients() -> None:
    """Eq. 4 with gradients of the weight formed by torch in float64, one sequence at a time."""
    torch = pytest.importorskip("torch", reason="torch forms the reference gradients in float64")
    sequences, tokens, in_features, out_features = 3, 5, 64, 12
    rng = np.random.default_rng(5)
    weight = random_weight(6)
    inputs = rng.normal(size=(sequences, tokens, in_features))
    target = rng.normal(size=(sequences, tokens, out_features))
    delta = np.asarray(rounding_error(jnp.asarray(weight), 32), np.float64)
    expected, output_gradients = [], []
    for x, t in zip(inputs, target, strict=True):
        w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
        y = torch.tensor(x) @ w.T
        y.retain_grad()
        (30 * torch.nn.functional.mse_loss(torch.tanh(y), torch.tensor(t))).backward()
        first = (w.grad.numpy() * delta).sum(axis=1)
        expected.append(np.abs(first + first**2 / 2))
        output_gradients.append(y.grad.numpy())
    found = sequence_salience(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(np.stack(output_gradients), jnp.float32),
        jnp.asarray(delta, jnp.float32),
    )
    assert np.allclose(found, np.stack(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eight_bit_share": 1.2}, "between 0 and 1"),
        ({"group_size": 48}, "32, 64, 128"),
        ({"activation_bits": 4}, "8, 16"),
        ({"method": "magic"}, "gptq, rtn"),
        ({"allocation": "best"}, "global, per-layer, random"),
        ({"samples": 0}, "at least 1"),
        ({"sequence_length": 1}, "at least 2"),
    ],
)
def test_scheme_refuses(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizationScheme(**values)


def test_bits_are_an_average_over_channels() -> None:
    assert share_of_bits(4.4) == 0.1
    assert QuantizationScheme(eight_bit_share=share_of_bits(4.4)).name == "W4.4A8"
    assert QuantizationScheme.from_dict(QuantizationScheme(seed=3).to_dict()) == QuantizationScheme(seed=3)
    for bits in (3.9, 8.5, float("nan")):
        with pytest.raises(OptionError, match="between 4 and 8"):
            share_of_bits(bits)


def test_group_size_is_chosen_to_fit() -> None:
    assert choose_group_size(CONFIG, None) == 64  # 576 is not a multiple of 128
    assert choose_group_size(CONFIG, 32) == 32
    with pytest.raises(OptionError, match="use 64 or 32"):
        choose_group_size(CONFIG, 128)
    with pytest.raises(OptionError, match="one of 32, 64, 128"):
        choose_group_size(CONFIG, 100)
