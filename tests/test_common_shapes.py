"""Packed weights in common shapes are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.loading import _next_part
from mixllm_jax.models.common_shapes import common_number, shape_on_gpu, with_common_shape
from pallas_kernels import mixed_matmul, packing, quantize_activations


def random_weight(n8: int, size: int = 32) -> packing.PackedWeight:
    generator = np.random.default_rng(n8)
    n4, groups = 200 - n8, 3
    return packing.pack(
        generator.integers(0, 16, (n4, groups * size)),
        generator.uniform(0.01, 1, (n4, groups)).astype(np.float16),
        generator.integers(0, 16, (n4, groups)),
        generator.integers(-128, 128, (n8, groups * size)),
        generator.uniform(0.01, 1, (n8, groups)).astype(np.float16),
        np.concatenate([np.sort(part) for part in np.split(generator.permutation(200), [n4])]),
        group_size=size,
    )


@pytest.mark.parametrize(("n8", "expected"), [(0, 0), (1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (195, 200)])
def test_the_weight_and_its_products_stay_the_same_to_the_bit(n8, expected):
    weight = random_weight(n8)
    common = with_common_shape(weight)
    packing.validate(common, values=True)
    assert (common.n8, common.out_features) == (expected, 200)
    np.testing.assert_array_equal(packing.dequantize(common), packing.dequantize(weight))
    for order in np.split(common.channel_order, [common.n4]):
        assert np.all(np.diff(order) > 0)
    activations = quantize_activations(jnp.asarray(np.random.default_rng(1).standard_normal((5, 96)), jnp.float32), 32)
    products = [mixed_matmul(activations, packed, out_dtype=jnp.float32) for packed in (weight, common)]
    np.testing.assert_array_equal(*products)


def test_loading_for_a_gpu_rounds_packed_weights_and_nothing_else(monkeypatch):
    part = {"packed": random_weight(65), "norm": np.ones(3)}
    assert all(value is part[path] for path, value in _next_part(iter([("a", part)]), "a").items())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    loaded = _next_part(iter([("a", part)]), "a")
    assert loaded["packed"].n8 == 96
    assert loaded["norm"] is part["norm"]


@pytest.mark.parametrize("size", [64, 128])
def test_the_shapes_on_a_gpu_are_known_without_the_weight(size):
    weight = random_weight(65, size)
    loaded = with_common_shape(weight)
    loaded = packing.with_code_sums(loaded) if size == 128 else loaded  # what `prepare_weight` does on a Hopper GPU

    def shapes(packed: packing.PackedWeight) -> list[tuple[tuple[int, ...], np.dtype]]:
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(packed)]

    assert shapes(shape_on_gpu(weight)) == shapes(loaded)


def test_few_numbers_are_left():
    assert len({common_number(n8, 6144) for n8 in range(6145)}) == 15
