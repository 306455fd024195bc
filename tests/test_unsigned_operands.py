"""The operands of the unsigned kernel: its algebra in exact integers, and what its float32 steps cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Case, assemble, make_case, relative_error

from pallas_kernels import QuantizedActivations, mixed_matmul, packing, prepare_weight, registry
from pallas_kernels.unsigned_operands import GROUP_SIZE, corrections_of


def extreme_case(code4: int, code8: int, activation: int, tokens: int = 3, groups: int = 2) -> Case:
    """All codes alike, zero points and scales at random."""
    rng = np.random.default_rng(0)
    k = groups * GROUP_SIZE
    return assemble(
        activation_codes=np.full((tokens, k), activation),
        activation_scales=rng.uniform(0.001, 0.02, (groups, tokens)).astype(np.float32),
        codes4=np.full((4, k), code4),
        zero_points4=rng.integers(0, 16, (4, groups)),
        codes8=np.full((2, k), code8),
        scales=rng.uniform(0.0005, 0.02, (6, groups)).astype(np.float16),
        order=np.arange(6),
        bias=None,
        group_size=GROUP_SIZE,
    )


CASES = {
    "one group": make_case(2, 5, 128, GROUP_SIZE, 0.4),
    "one correction": make_case(5, 12, 32 * 128, GROUP_SIZE, 0.25),
    "just over one correction": make_case(4, 10, 33 * 128, GROUP_SIZE, 0.5),
    "only 4 bits": make_case(3, 6, 256, GROUP_SIZE, 0.0),
    "only 8 bits": make_case(3, 6, 256, GROUP_SIZE, 1.0),
    "largest sums": extreme_case(15, 127, 127),
    "smallest sums": extreme_case(0, -128, -127),
    "opposite signs": extreme_case(15, -128, -127),
    "no activation": extreme_case(7, 1, 0),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def unsigned_weight(weight: packing.PackedWeight) -> tuple[np.ndarray, ...]:
    """Unsigned codes `[groups, n, 128]`, their sums, zero points and scales `[groups, n]`, 4-bit rows first."""
    summed = packing.with_code_sums(weight)
    assert summed.code_sums4 is not None
    assert summed.code_sums8 is not None
    codes = np.concatenate([packing.unpack_nibbles(weight.codes4), weight.codes8.view(np.uint8) ^ 0x80], axis=1)
    zero_points8 = np.full(weight.scales8.shape, 128)
    return (
        codes.astype(np.int64),
        np.concatenate([summed.code_sums4, summed.code_sums8], axis=1).astype(np.int64),
        np.concatenate([weight.zero_points4, zero_points8], axis=1).astype(np.int64),
        np.concatenate([weight.scales4, weight.scales8], axis=1),
    )


def split_operand(activations: QuantizedActivations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[tokens, k]`, hi and mid `[tokens, 32 * corrections]` in the unsigned layout."""
    operand = np.asarray(jax.tree.map(jnp.asarray, activations).in_layout("unsigned").codes)
    k = activations.in_features
    corrections = corrections_of(k // GROUP_SIZE)
    assert operand.dtype == np.uint8
    assert operand.shape == (activations.tokens, k + 128 * corrections)
    behind = np.ascontiguousarray(operand[:, k:]).view(jnp.bfloat16).reshape(-1, corrections, 2, 32)
    return operand[:, :k], behind[:, :, 0].reshape(-1, 32 * corrections), behind[:, :, 1].reshape(-1, 32 * corrections)


def group_dots(unsigned_activation_codes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64 `[groups, n, tokens]`."""
    grouped = unsigned_activation_codes.reshape(len(unsigned_activation_codes), -1, GROUP_SIZE).astype(np.int64)
    return np.einsum("gnk,mgk->gnm", codes, grouped)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 multiply-add with one rounding, but for the rare double rounding: a product of float32 fits float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def test_unsigned_dots_and_sums_give_the_signed_dots(case: Case):
    activation_codes = case.activations.codes.astype(np.int64).reshape(case.activations.tokens, -1, GROUP_SIZE)
    codes, sums, zero_points, _ = unsigned_weight(case.weight)
    dots = group_dots(split_operand(case.activations)[0], codes)
    assert dots.min() >= 0
    assert dots.max() < 2**23
    signed = np.einsum("gnk,mgk->gnm", codes - zero_points[..., None], activation_codes)
    token_sums = activation_codes.sum(axis=-1).T[:, None, :]
    np.testing.assert_array_equal(dots - 128 * sums[..., None] - zero_points[..., None] * token_sums, signed)


def test_sums_behind_the_codes_have_16_bits_and_the_rest_is_zero(case: Case):
    codes, high, mid = split_operand(case.activations)
    np.testing.assert_array_equal(codes, case.activations.codes.astype(np.int16) + 128)
    groups = case.weight.num_groups
    sums = case.activations.codes.reshape(len(codes), groups, GROUP_SIZE).sum(axis=-1, dtype=np.int64)
    r = sums.astype(np.float32) * case.activations.scales.T
    np.testing.assert_array_equal(high[:, :groups], r.astype(jnp.bfloat16))
    rest = r - high[:, :groups].astype(np.float32)
    np.testing.assert_array_equal(mid[:, :groups], rest.astype(jnp.bfloat16))
    assert np.all(np.abs(rest - mid[:, :groups].astype(np.float32)) <= 2.0**-17 * np.abs(r))
    assert not high[:, groups:].any()
    assert not mid[:, groups:].any()


def through_denormals(case: Case) -> np.ndarray:
    """The output in the float32 steps of the kernel: bits of the dots as denormals, two multiply-adds a group."""
    weight, groups = case.weight, case.weight.num_groups
    codes, sums, zero_points, scales = unsigned_weight(weight)
    unsigned, high, mid = split_operand(case.activations)
    bits = group_dots(unsigned, codes).astype(np.int32).view(np.float32)
    scales = scales.astype(np.float32)

    products = zero_points.astype(np.float32) * scales
    products_high = products.astype(jnp.bfloat16).astype(np.float32)
    products_low = (products - products_high).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(products_high + products_low, products)
    high, mid = (half[:, :groups].astype(np.float32) for half in (high, mid))
    total = -(products_high.T @ high.T + products_high.T @ mid.T + products_low.T @ high.T)
    for group in range(groups):
        start = np.float32(-128 * 2.0**-38) * sums[group].astype(np.float32) * scales[group]
        scaled = fma(bits[group], np.float32(2.0**111) * scales[group][:, None], start[:, None])
        total = fma(scaled, np.float32(2.0**38) * case.activations.scales[group], total)
    out = np.empty_like(total)
    out[weight.channel_order] = total
    return out.T


@pytest.mark.parametrize(
    "name", ["one group", "one correction", "just over one correction", "only 4 bits", "only 8 bits"]
)
def test_float32_through_denormals_is_close_to_exact(name: str):
    case = CASES[name]
    assert relative_error(through_denormals(case), case.expected) < 1e-4


@pytest.mark.parametrize("name", ["largest sums", "smallest sums", "opposite signs"])
def test_all_activations_of_one_sign_lose_no_more_than_the_split_leaves_out(name: str):
    """Here the term of the zero points is far larger than what is left of it, and so are 2**-16 of it."""
    case = CASES[name]
    weight = packing.unpack(case.weight)
    zero_points = np.concatenate([weight.zero_points4, np.full(weight.scales8.shape, 128)])
    products = zero_points * np.concatenate([weight.scales4, weight.scales8]).astype(np.float64)
    sums = case.activations.codes.reshape(case.activations.tokens, -1, GROUP_SIZE).sum(axis=-1, dtype=np.int64)
    term = np.abs(sums * case.activations.scales.T.astype(np.float64)) @ products.T
    assert np.all(np.abs(through_denormals(case) - case.expected) <= 2.0**-15 * term + 1e-6 * np.abs(case.expected))


def test_no_activation_gives_zero():
    assert not through_denormals(CASES["no activation"]).any()


def test_only_groups_of_128():
    with pytest.raises(ValueError, match="groups of 128, not 64"):
        jax.tree.map(jnp.asarray, make_case(1, 2, 128, 64, 0.5).activations).in_layout("unsigned")


def test_prepare_weight_adds_sums_on_a_hopper_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    weight, small_groups = make_case(1, 4, 128, 128, 0.5).weight, make_case(1, 4, 128, 64, 0.5).weight
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(registry, "default_platform", lambda: "gpu")
        monkeypatch.setattr(registry, "compute_capability", lambda capability=capability: capability)
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
        assert (prepare_weight(weight).code_sums4 is not None) == (capability == (9, 0))
        assert prepare_weight(small_groups) is small_groups
        assert prepare_weight(weight, "xla") is weight
    monkeypatch.setattr(registry, "default_platform", lambda: "cpu")
    assert prepare_weight(weight) is weight


def test_operations_take_weights_with_sums():
    case = CASES["one group"]
    activations, weight = jax.tree.map(jnp.asarray, (case.activations, packing.with_code_sums(case.weight)))
    y = mixed_matmul(activations, weight, out_dtype=jnp.float32, implementation="xla")
    assert relative_error(np.asarray(y), case.expected) < 1e-6
