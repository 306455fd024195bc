"""The layouts of quantised activations: what the quantisers write, what the matmuls take, who asks for which."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import make_case, relative_error, require_hopper

from mixllm_jax.models import linear as linear_module
from mixllm_jax.models.block import Block
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import LINEAR_PATHS, ModelConfig
from mixllm_jax.models.decoder import random_parameters
from mixllm_jax.models.rope import rotary_embedding
from pallas_kernels import (
    PackedWeight,
    QuantizedActivations,
    activation_layout,
    activations,
    mixed_matmul,
    packing,
    quantize_activations,
    quantized_linear,
    registry,
    rms_norm_quantize,
    swiglu_quantize,
)
from pallas_kernels.mixed_matmul import api as matmul_api
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.quantize_activations import pallas_triton as quantize_triton
from pallas_kernels.quantize_activations import triton_output
from pallas_kernels.quantize_activations.pallas_triton import Config
from pallas_kernels.swiglu_quantize import pallas_triton as swiglu_triton

gpu = pytest.mark.gpu
INTERPRETED = pytest.param(
    "triton_interpret",
    marks=pytest.mark.skipif(registry.default_platform() != "cpu", reason="interpret mode is for a CPU"),
)
SMALL_SIZES = [(1, 128), (3, 384), (2, 33 * 128), (32, 256), (23, 128)]
RUNS = [
    *(pytest.param("xla", sizes) for sizes in SMALL_SIZES),
    *(pytest.param("triton_interpret", sizes, marks=INTERPRETED.marks) for sizes in SMALL_SIZES),
    *(pytest.param("triton", sizes, marks=gpu) for sizes in (*SMALL_SIZES, (300, 14336), (513, 4096), (7, 65 * 128))),
]


def _quantize(x: jax.Array, **settings: object) -> QuantizedActivations:
    return quantize_activations(x, 128, **settings)


def _rms_norm(x: jax.Array, **settings: object) -> QuantizedActivations:
    return rms_norm_quantize(x, jnp.ones(x.shape[1], x.dtype), 1e-5, 128, residual=x[::-1], **settings)[0]


def _swiglu(x: jax.Array, **settings: object) -> QuantizedActivations:
    return swiglu_quantize(jnp.concatenate([x, x[::-1]], axis=1), 128, **settings)


SCALE_ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Tokens of a sixteen by the place of their scales, as the documentation of the layout has it."""


def placed(scales: np.ndarray) -> np.ndarray:
    """Scales in the unsigned layout, place by place, from those in the order of the tokens."""
    groups, tokens = scales.shape
    found = np.zeros((groups, -(-tokens // 16) * 16), np.float32)
    for place in range(found.shape[1]):
        token = place // 16 * 16 + SCALE_ORDER[place % 16]
        if token < tokens:
            found[:, place] = scales[:, token]
    return found


def in_order_of_tokens(scales: jax.Array, tokens: int) -> np.ndarray:
    """The inverse of `placed`."""
    places = [token // 16 * 16 + SCALE_ORDER.index(token % 16) for token in range(tokens)]
    return np.asarray(scales)[:, places]


def operand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The unsigned layout, group by group, from what its documentation says."""
    tokens, features = codes.shape
    groups = features // 128
    rows = np.zeros((tokens, features + 128 * -(-groups // 32)), np.uint8)
    rows[:, :features] = codes.astype(np.int16) + 128
    for group in range(groups):
        r = codes[:, 128 * group : 128 * (group + 1)].sum(axis=1, dtype=np.int64).astype(np.float32) * scales[group]
        high = r.astype(jnp.bfloat16)
        mid = (r - high.astype(np.float32)).astype(jnp.bfloat16)
        for half, terms in enumerate((high, mid)):
            start = features + 128 * (group // 32) + 64 * half + 2 * (group % 32)
            rows[:, start : start + 2] = terms[:, None].view(np.uint8)
    return rows


def values(tokens: int, features: int) -> np.ndarray:
    """Normally distributed, a group of them 0, with mean values apart from 0 so that sums are large."""
    x = np.random.default_rng(tokens).standard_normal((tokens, features)) + np.arange(features) % 5 / 4
    x[-1, :128] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("operation", [_quantize, _rms_norm, _swiglu])
@pytest.mark.parametrize(("implementation", "sizes"), RUNS)
def test_quantizers_write_the_unsigned_layout(
    operation: Callable[..., QuantizedActivations], implementation: str, sizes: tuple[int, int]
):
    """Bit by bit what the documentation of the layout makes of its codes, which are those of the signed layout.

    That and the scales are so to within rounding: the norm may add its squares in another order.
    """
    x = jnp.asarray(values(*sizes), "bfloat16")
    signed, unsigned = (
        jax.jit(functools.partial(operation, layout=layout, implementation=implementation))(x)
        for layout in ("signed", "unsigned")
    )
    assert (signed.layout, unsigned.layout) == ("signed", "unsigned")
    assert unsigned.in_features == signed.in_features == sizes[1]
    activations.validate(unsigned)
    np.testing.assert_allclose(unsigned.scales, placed(np.asarray(signed.scales)), rtol=1e-6)
    codes = (np.asarray(unsigned.codes)[:, : sizes[1]].astype(np.int16) - 128).astype(np.int8)
    assert np.abs(codes.astype(int) - np.asarray(signed.codes)).max() <= (1 if operation is _rms_norm else 0)
    assert np.mean(codes != np.asarray(signed.codes)) < 1e-3
    np.testing.assert_array_equal(unsigned.codes, operand(codes, in_order_of_tokens(unsigned.scales, sizes[0])))


@pytest.mark.parametrize("interpret", [pytest.param(True, marks=INTERPRETED.marks), pytest.param(False, marks=gpu)])
@pytest.mark.parametrize(("group_size", "layout"), [(128, "signed"), (128, "unsigned"), (32, "signed")])
def test_settings_do_not_change_the_codes(interpret: bool, group_size: int, layout: activations.Layout):
    """Groups in one piece or in chunks, one program or several, some of them past the end."""
    x = jnp.asarray(values(3, 5 * 128), "bfloat16")
    settings = {"group_size": group_size, "layout": layout, "interpret": interpret}
    chunks = min(64, group_size)
    configs = Config(8, group_size, 4), Config(16, chunks, 4), Config(8, 32, 1)
    for quantize, values_ in (
        (quantize_triton.quantize_activations, x),
        (swiglu_triton.swiglu_quantize, jnp.concatenate([x, x[::-1]], axis=1)),
    ):
        first, *others = (
            jax.jit(functools.partial(quantize, config=config, **settings))(values_) for config in configs
        )
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, first, other)


def test_few_and_many_groups_have_settings_that_fit_the_group():
    for group_size in (32, 64, 128):
        few, many = (quantize_triton.choose_config(groups, group_size, swiglu_triton.MANY) for groups in (64, 10**5))
        assert few.columns == group_size
        assert many.columns == min(group_size, swiglu_triton.MANY.columns)
    assert triton_output.eviction_policy(16 * 4096) is None
    assert triton_output.eviction_policy(2048 * 14336) == "evict_first"


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED, pytest.param("triton", marks=gpu)])
def test_unsigned_codes_against_float64(implementation: str):
    x = values(5, 512)
    found = quantize_activations(jnp.asarray(x), 128, layout="unsigned", implementation=implementation)
    groups = x.astype(np.float64).reshape(5, 4, 128)
    scales = np.abs(groups).max(-1) / 127
    quotients = (groups / np.where(scales > 0, scales, 1)[..., None]).reshape(5, 512)
    np.testing.assert_allclose(found.scales, placed(scales.T), rtol=2e-7)
    assert np.abs(np.asarray(found.codes)[:, :512].astype(np.float64) - 128 - quotients).max() < 0.50003


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("tokens", [3, 16, 37])
def test_there_and_back(jit: bool, tokens: int):
    """Under `jit` too, where XLA may leave out conversions that only round."""
    before = jax.tree.map(jnp.asarray, make_case(tokens, 3, 33 * 128, 128, 0.5).activations)
    wrap = jax.jit if jit else lambda function: function
    between = wrap(lambda x: x.in_layout("unsigned"))(before)
    activations.validate(between)
    np.testing.assert_array_equal(between.codes, operand(np.asarray(before.codes), np.asarray(before.scales)))
    np.testing.assert_array_equal(between.scales, placed(np.asarray(before.scales)))
    after = wrap(lambda x: x.in_layout("signed"))(between)
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.scales, before.scales)
    assert after.layout == before.layout == "signed"
    assert before.in_layout("signed") is before
    assert between.in_layout("unsigned") is between


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED, pytest.param("triton", marks=gpu)])
def test_other_matmuls_take_unsigned_activations(implementation: str):
    case = make_case(19, 33, 384, 128, 0.3, bias=True)
    x, weight, bias = jax.tree.map(jnp.asarray, (case.activations, case.weight, case.bias))
    out = mixed_matmul(x.in_layout("unsigned"), weight, bias, out_dtype="float32", implementation=implementation)
    assert relative_error(out, case.expected) < 1e-6


@gpu
@pytest.mark.parametrize("config", [MosaicGpuConfig(), MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True)], ids=str)
@pytest.mark.parametrize("layout", ["signed", "unsigned"])
def test_the_hopper_kernel_takes_either(config: MosaicGpuConfig, layout: activations.Layout):
    require_hopper()
    case = make_case(257, 304, 4480, 128, 0.3, bias=True)
    weight = packing.with_code_sums(packing.with_aligned_rows(case.weight))
    x, weight, bias = jax.tree.map(jnp.asarray, (case.activations, weight, case.bias))
    out = pallas_mosaic_gpu.mixed_matmul(x.in_layout(layout), weight, bias, out_dtype="float32", config=config)
    assert relative_error(out, case.expected) < (2e-4 if config.unsigned else 1e-6)


def test_layouts_that_do_not_exist_are_refused():
    x = jnp.zeros((2, 128))
    for operation in (quantize_activations, swiglu_quantize):
        with pytest.raises(ValueError, match="layout must be one of signed, unsigned, found 'transposed'"):
            operation(x, 64, layout="transposed")
        with pytest.raises(ValueError, match="unsigned layout is for groups of 128, not 64"):
            operation(x, 64, layout="unsigned")
    with pytest.raises(ValueError, match="unsigned layout is for groups of 128, not 64"):
        rms_norm_quantize(x, jnp.ones(128), 1e-5, 64, layout="unsigned")
    case = make_case(2, 6, 256, 128, 0.5)
    x, weight = jax.tree.map(jnp.asarray, (case.activations, case.weight))
    for codes in (x.codes, x.in_layout("unsigned").codes[:, :-128]):
        wrong = QuantizedActivations(codes, x.scales, 128, layout="unsigned")
        with pytest.raises(ValueError, match=r"unsigned layout must be uint8 \[tokens, 384\]"):
            mixed_matmul(wrong, weight, out_dtype="float32")
    wrong = QuantizedActivations(x.in_layout("unsigned").codes, x.scales, 128, layout="unsigned")
    with pytest.raises(
        ValueError, match=r"scales in the unsigned layout must be float32 \[2, 16\] for 2 tokens, found"
    ):
        mixed_matmul(wrong, weight, out_dtype="float32")


def abstract_weight(n: int, k: int, *, group_size: int = 128, sums: bool = True) -> PackedWeight:
    """A weight of shapes alone, a tenth of its channels, in whole sixteens, with 8 bits."""
    n8, groups = n // 160 * 16, k // group_size
    n4 = n - n8

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return PackedWeight(
        codes4=array("uint8", groups, n4, group_size // 2),
        scales4=array("float16", groups, n4),
        zero_points4=array("uint8", groups, n4),
        codes8=array("int8", groups, n8, group_size),
        scales8=array("float16", groups, n8),
        channel_order=array("int32", n),
        group_size=group_size,
        code_sums4=array("uint16", groups, n4) if sums else None,
        code_sums8=array("uint16", groups, n8) if sums else None,
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """An H100, as far as the choice of kernels goes."""
    monkeypatch.setattr(registry, "default_platform", lambda: "gpu")
    monkeypatch.setattr(registry, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(registry, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 11, 0)))


@pytest.mark.usefixtures("hopper")
def test_only_many_tokens_and_weights_with_sums_want_the_unsigned_layout():
    weight = abstract_weight(28672, 4096)
    assert activation_layout(4096, weight) == activation_layout(4096, weight, "mosaic_gpu") == "unsigned"
    assert activation_layout(1, weight) == activation_layout(16, weight) == "signed"
    assert activation_layout(4096, weight, "triton") == activation_layout(4096, weight, "xla") == "signed"
    assert activation_layout(4096, abstract_weight(28672, 4096, sums=False)) == "signed"
    assert activation_layout(4096, abstract_weight(28672, 4096, group_size=64, sums=False)) == "signed"


def test_off_the_gpu_all_is_signed():
    if registry.default_platform() == "gpu":
        pytest.skip("this machine has a GPU")
    assert activation_layout(4096, abstract_weight(28672, 4096)) == "signed"


def outer_primitives(function: Callable[..., object], *arguments: object) -> set[str]:
    """Names of what XLA itself is to compute, outside of the kernels."""
    names: set[str] = set()

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            names.add(name)
            if name not in ("pallas_call", "custom_vmap_call", "core_map", "mpmd_map", "run_state"):
                for parameter in equation.params.values():
                    if hasattr(parameter, "jaxpr"):
                        visit(parameter.jaxpr)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return names


@pytest.mark.usefixtures("hopper")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("tokens", [16, 512, 4096])
def test_nothing_lies_between_the_quantizer_and_the_matmul(tokens: int):
    weight = abstract_weight(4096, 14336)
    x = jax.ShapeDtypeStruct((tokens, 14336), jnp.bfloat16)
    passes = {"xor", "pad", "concatenate", "reduce_sum", "slice"}
    linear = functools.partial(quantized_linear, out_dtype=jnp.bfloat16)
    assert not passes & outer_primitives(linear, x, weight)
    other: activations.Layout = "signed" if activation_layout(tokens, weight) == "unsigned" else "unsigned"

    def unfit(x: jax.Array, weight: PackedWeight) -> jax.Array:
        return mixed_matmul(quantize_activations(x, 128, layout=other), weight, out_dtype=jnp.bfloat16)

    assert passes & outer_primitives(unfit, x, weight)


CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=16,
    hidden_size=128,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=16,
)


def quantized_block() -> Block:
    parameters = random_parameters(CONFIG, "layer_0000", seed=1, scale=0.2)
    for seed, path in enumerate(LINEAR_PATHS.values()):
        out_features, in_features = parameters[f"{path}.weight"].shape
        parameters[f"{path}.weight"] = make_case(1, out_features, in_features, 128, 0.25, seed=seed).weight
    return Block.from_parameters(CONFIG, 0, parameters)


def test_a_block_asks_for_the_layouts_and_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    """Prefill with the last token alone behind the attention, then a decode step, whose attention may not quantise."""
    block = quantized_block()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, CONFIG.hidden_size)), jnp.float32)
    asked: list[int] = []
    layouts: set[str] = set()

    def run(layout: activations.Layout) -> list[jax.Array]:
        def choose(tokens: int, weight: PackedWeight, implementation: str = "auto") -> activations.Layout:
            asked.append(tokens)
            return layout

        def observed(found: QuantizedActivations, *arguments: object, **settings: object) -> jax.Array:
            layouts.add(found.layout)
            return mixed_matmul(found, *arguments, **settings)

        for module in (linear_module, matmul_api):
            monkeypatch.setattr(module, "activation_layout", choose)
            monkeypatch.setattr(module, "mixed_matmul", observed)
        asked.clear()
        layouts.clear()
        cache = KVCache.zeros(CONFIG, 2, 8, jnp.float32).layers[0]
        rotary = rotary_embedding(CONFIG, jnp.broadcast_to(jnp.arange(5), (2, 5)))
        *first, cache = block.step(x, x, rotary, cache, history=0, only=jnp.array([4, 3]))
        rotary = rotary_embedding(CONFIG, jnp.full((2, 1), 5))
        *second, _ = block.step(x[:, :1], None, rotary, cache)
        assert layouts == {layout}
        assert set(asked) == {10, 2}
        return [*first, *second]

    for signed, unsigned in zip(run("signed"), run("unsigned"), strict=True):
        assert np.isfinite(np.asarray(signed)).all()
        np.testing.assert_array_equal(signed, unsigned)
