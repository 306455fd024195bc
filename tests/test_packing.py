"""The packed weight: layout, round trips, fusing, validation."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import make_case

from pallas_kernels import packing


def test_layout_of_a_group():
    codes = np.arange(8, dtype=np.uint8)[None, :]
    packed = packing.pack(
        codes,
        np.ones((1, 1)),
        np.zeros((1, 1), np.uint8),
        np.zeros((0, 8), np.int8),
        np.zeros((0, 1)),
        np.arange(1),
        group_size=8,
    )
    # Byte j: code j in the low nibble, code j + 4 in the high one.
    np.testing.assert_array_equal(packed.codes4[0, 0], [0x40, 0x51, 0x62, 0x73])


@hypothesis.given(
    n4=st.integers(0, 5),
    n8=st.integers(0, 5),
    groups=st.integers(1, 3),
    half=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_pack_and_unpack_are_inverses(n4: int, n8: int, groups: int, half: int, seed: int):
    rng = np.random.default_rng(seed)
    group_size = 2 * half
    k = groups * group_size
    unpacked = packing.UnpackedWeight(
        rng.integers(0, 16, (n4, k)).astype(np.uint8),
        rng.uniform(0, 1, (n4, groups)).astype(np.float16),
        rng.integers(0, 16, (n4, groups)).astype(np.uint8),
        rng.integers(-128, 128, (n8, k)).astype(np.int8),
        rng.uniform(0, 1, (n8, groups)).astype(np.float16),
        rng.permutation(n4 + n8).astype(np.int32),
    )
    for arrays in (unpacked, packing.UnpackedWeight(*map(jnp.asarray, unpacked))):
        packed = packing.pack(*arrays, group_size=group_size)
        packing.validate(packed, values=True)
        for name, expected, actual in zip(unpacked._fields, unpacked, packing.unpack(packed), strict=True):
            np.testing.assert_array_equal(actual, expected, err_msg=name)
            assert actual.dtype == expected.dtype


def test_numpy_stays_numpy_and_jax_stays_jax():
    weight = make_case(1, 6, 64, 32, 0.5).weight
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weight))
    assert isinstance(packing.dequantize(weight), np.ndarray)
    on_device = jax.tree.map(jnp.asarray, weight)
    assert isinstance(packing.dequantize(on_device), jax.Array)
    np.testing.assert_array_equal(packing.dequantize(on_device), packing.dequantize(weight))


def test_dequantize_puts_rows_in_channel_order():
    case = make_case(3, 7, 64, 32, 0.3, order="shuffled")
    x = np.repeat(case.activations.scales.T.astype(np.float64), 32, axis=1) * case.activations.codes
    np.testing.assert_allclose(x @ packing.dequantize(case.weight).T.astype(np.float64), case.expected, rtol=1e-6)


def test_concatenate_fuses_channels():
    weights = [make_case(1, n, 128, 64, share, seed=n).weight for n, share in ((5, 0.4), (3, 0.0), (4, 1.0))]
    fused = packing.concatenate(weights)
    packing.validate(fused, values=True)
    expected = np.concatenate([packing.dequantize(weight) for weight in weights])
    np.testing.assert_array_equal(packing.dequantize(fused), expected)
    assert (fused.n4, fused.n8, fused.shape) == (6, 6, (12, 128))


def random_weight(n4: int, n8: int, groups: int, group_size: int, seed: int) -> packing.PackedWeight:
    """A weight of the format: channels ascending within each bit width."""
    share = n8 / (n4 + n8)
    return make_case(1, n4 + n8, groups * group_size, group_size, share, seed=seed).weight


SIZES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 3), st.integers(0, 99)).filter(
    lambda sizes: sizes[0] + sizes[1] > 0
)


@hypothesis.given(sizes=SIZES, moved=st.integers(0, 40))
@hypothesis.settings(max_examples=25, deadline=None)
def test_channels_stored_with_8_bits_are_the_same_weight(sizes: tuple[int, int, int, int], moved: int):
    n4, n8, groups, seed = sizes
    weight = random_weight(n4, n8, groups, 32, seed)
    aligned = packing.with_aligned_rows(weight)
    packing.validate(aligned, values=True)
    assert packing.has_aligned_rows(aligned) == (weight.out_features % packing.ALIGNED_ROWS == 0)
    assert aligned.n8 - weight.n8 < packing.ALIGNED_ROWS
    np.testing.assert_array_equal(packing.dequantize(aligned), packing.dequantize(weight))
    if moved > n4:
        with pytest.raises(ValueError, match=f"there are {n4} 4-bit channels, not {moved}"):
            packing.with_8bit_channels(weight, moved)
        return
    changed = packing.with_8bit_channels(weight, moved)
    packing.validate(changed, values=True)
    assert (changed.n4, changed.n8) == (n4 - moved, n8 + moved)
    np.testing.assert_array_equal(packing.dequantize(changed), packing.dequantize(weight))


@hypothesis.given(parts=st.lists(SIZES, min_size=1, max_size=4), groups=st.integers(1, 3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_fused_layers_are_their_channels_one_after_another(parts: list[tuple[int, int, int, int]], groups: int):
    weights = [packing.with_code_sums(random_weight(n4, n8, groups, 32, seed)) for n4, n8, _, seed in parts]
    fused = packing.concatenate(weights)
    packing.validate(fused, values=True)
    expected = np.concatenate([packing.dequantize(weight) for weight in weights])
    np.testing.assert_array_equal(packing.dequantize(fused), expected)
    again = packing.with_code_sums(fused)
    np.testing.assert_array_equal(fused.code_sums4, again.code_sums4)
    np.testing.assert_array_equal(fused.code_sums8, again.code_sums8)


def test_concatenate_refuses_different_inputs():
    with pytest.raises(ValueError, match="weight 1 has 128 and 32"):
        packing.concatenate([make_case(1, 4, 64, 32, 0).weight, make_case(1, 4, 128, 32, 0).weight])
    with pytest.raises(ValueError, match="at least one"):
        packing.concatenate([])


def test_nbytes_counts_the_format():
    weight = make_case(1, 10, 128, 64, 0.2).weight
    assert weight.nbytes == 8 * 128 // 2 + 8 * 2 * 3 + 2 * 128 + 2 * 2 * 2 + 10 * 4
    assert packing.with_code_sums(weight).nbytes == weight.nbytes


@pytest.mark.parametrize("extreme", [None, 0, 255])
def test_code_sums_are_those_of_the_unsigned_codes(extreme: int | None):
    weight = make_case(1, 9, 256, 128, 0.4).weight
    if extreme is not None:  # all nibbles 0 or 15, all bytes -128 or 127
        codes4 = np.full_like(weight.codes4, extreme)
        weight = dataclasses.replace(weight, codes4=codes4, codes8=np.full_like(weight.codes8, extreme - 128))
    unpacked = packing.unpack(weight)
    expected4 = unpacked.codes4.reshape(-1, 2, 128).sum(axis=-1, dtype=np.int64).T
    expected8 = (unpacked.codes8.reshape(-1, 2, 128).astype(np.int64) + 128).sum(axis=-1).T
    for given in (weight, jax.tree.map(jnp.asarray, weight)):
        summed = packing.with_code_sums(given)
        packing.validate(summed)
        np.testing.assert_array_equal(summed.code_sums4, expected4)
        np.testing.assert_array_equal(summed.code_sums8, expected8)
        assert type(summed.code_sums4) is type(summed.code_sums8) is type(given.codes4)
        assert summed.codes4 is given.codes4


def test_code_sums_are_traced():
    weight = make_case(1, 4, 128, 128, 0.5).weight
    summed = jax.jit(packing.with_code_sums)(weight)
    np.testing.assert_array_equal(summed.code_sums8, packing.with_code_sums(weight).code_sums8)


@pytest.mark.parametrize(
    ("n", "share", "aligned"), [(96, 0.2, (64, 32)), (96, 0.0, (96, 0)), (32, 0.9, (0, 32)), (50, 0.2, (40, 10))]
)
def test_aligned_rows_hold_the_same_weight(n: int, share: float, aligned: tuple[int, int]):
    weight = make_case(1, n, 256, 128, share).weight
    for given in (weight, jax.tree.map(jnp.asarray, weight)):
        result = packing.with_aligned_rows(given)
        assert (result.n4, result.n8) == aligned
        assert packing.has_aligned_rows(result) == (n % 16 == 0)
        packing.validate(result, values=True)
        np.testing.assert_array_equal(packing.dequantize(result), packing.dequantize(weight))
        for order in np.split(np.asarray(result.channel_order), [result.n4]):
            assert np.all(np.diff(order) > 0)
        assert type(result.codes8) is type(given.codes8)


def test_concatenate_keeps_code_sums_that_all_have():
    first, second = (make_case(1, n, 128, 64, 0.5, seed=n).weight for n in (4, 6))
    fused = packing.concatenate([packing.with_code_sums(first), packing.with_code_sums(second)])
    expected = packing.with_code_sums(packing.concatenate([first, second]))
    jax.tree.map(np.testing.assert_array_equal, fused, expected)
    assert packing.concatenate([packing.with_code_sums(first), second]).code_sums4 is None


def test_code_sums_must_fit_16_bits():
    with pytest.raises(ValueError, match="up to 257, not 512"):
        packing.with_code_sums(make_case(1, 2, 512, 512, 0.5).weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("code_sums4", np.zeros((2, 4), np.uint16), "code_sums8 is missing"),
        ("scales4", np.zeros((2, 3), np.float16), "scales4 must be float16"),
        ("scales4", np.zeros((2, 4), np.float32), "scales4 must be float16"),
        ("codes8", np.zeros((1, 4, 32), np.int8), "codes8 must be int8"),
        ("codes8", np.zeros((4, 32), np.int8), "3 axes"),
        ("channel_order", np.zeros(8, np.int32), "permutation"),
        ("zero_points4", np.full((2, 4), 16, np.uint8), "0..15"),
        ("scales8", np.full((2, 4), np.nan, np.float16), "finite"),
        ("group_size", 7, "even"),
    ],
)
def test_validate_names_the_field(field: str, value: object, message: str):
    weight = make_case(1, 8, 64, 32, 0.5).weight
    with pytest.raises(ValueError, match=message):
        packing.validate(dataclasses.replace(weight, **{field: value}), values=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codes4", np.full((1, 32), 16), r"codes4 must lie in 0\.\.15, found 16\.\.16"),
        ("codes4", np.full((1, 32), -1), r"codes4 must lie in 0\.\.15"),
        ("codes4", np.full((1, 32), 0.5), "codes4 must be integers, found fractions in float64"),
        ("codes4", np.full((1, 32), np.nan), "codes4 must be integers"),
        ("zero_points4", np.full((1, 1), 256 + 7), r"zero_points4 must lie in 0\.\.15, found 263"),  # 7 as a byte
        ("codes8", np.full((1, 32), 128), r"codes8 must lie in -128\.\.127, found 128"),
        ("codes8", np.zeros((1, 64), int), "codes8 must be int8"),
        ("scales4", np.ones((1, 2)), "scales4 must be float16"),
        ("channel_order", np.zeros(2, int), "permutation"),
        ("group_size", 24, "multiple of group_size 24"),
        ("group_size", 0, "positive even number, found 0"),
    ],
)
def test_pack_refuses_what_does_not_fit(field: str, value: object, message: str):
    arrays = {
        "codes4": np.zeros((1, 32), int),
        "scales4": np.ones((1, 1)),
        "zero_points4": np.zeros((1, 1), int),
        "codes8": np.zeros((1, 32), int),
        "scales8": np.ones((1, 1)),
        "channel_order": np.arange(2),
        "group_size": 32,
    }
    packing.pack(**arrays)
    with pytest.raises(ValueError, match=message):
        packing.pack(**{**arrays, field: value})
