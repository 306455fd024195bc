"""The Hopper kernel: its settings and its lowering anywhere, its results (beyond tests/test_kernels.py) on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assemble, make_case, relative_error, require_hopper

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.mixed_matmul import configs, pallas_mosaic_gpu
from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MAX_HALVED_WAVES, MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem
from pallas_kernels.mixed_matmul.tuned_table import H100
from pallas_kernels.packing import PackedWeight, has_aligned_rows, with_aligned_rows, with_code_sums

CONFIGS = [
    MosaicGpuConfig(),
    MosaicGpuConfig(stages=4, unroll=4, band=4),
    MosaicGpuConfig(stages=5, unroll=1),
    MosaicGpuConfig(64, 2, 8, 4, parts=2),
    MosaicGpuConfig(64, 1, 12, 4, parts=1),
    MosaicGpuConfig(16, 1, 16, 4, parts=1),
    MosaicGpuConfig(8, 2, 8, 2, parts=1),
    MosaicGpuConfig(64, 1, 4, 8, parts=1, unsigned=True),
    MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True),
]


def with_sums(weight: PackedWeight) -> PackedWeight:
    """As prepared for unsigned operands, where the group size is one for which they are used."""
    return with_code_sums(with_aligned_rows(weight)) if weight.group_size == 128 else weight


def limit(config: MosaicGpuConfig) -> float:
    """Of the relative error: the zero points of unsigned operands are taken off with 16 bits."""
    return 2e-4 if config.unsigned else 1e-6


def test_settings_that_the_kernel_cannot_take_are_refused():
    with pytest.raises(ValueError, match="tile_tokens must be parts times one of"):
        MosaicGpuConfig(tile_tokens=40, parts=1)
    with pytest.raises(ValueError, match="compute_warpgroups must be 1 or 2"):
        MosaicGpuConfig(compute_warpgroups=3)
    with pytest.raises(ValueError, match="with unsigned operands parts must be 1"):
        MosaicGpuConfig(unsigned=True)
    with pytest.raises(ValueError, match="tile_tokens a multiple of 16"):
        MosaicGpuConfig(24, parts=1, unsigned=True)


@pytest.mark.parametrize(("tile_tokens", "halves"), [(128, True), (96, True), (80, False), (48, False), (16, False)])
def test_half_tiles_are_dots_of_whole_sixteens(tile_tokens: int, halves: bool):
    assert mosaic_gpu_config.can_halve(tile_tokens) == halves
    assert (mosaic_gpu_config.halved_tiles(15, tile_tokens, 12) > 0) == halves


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize(("tokens", "n", "k", "fits"), [(4096, 57344, 8192, True), (40000, 57344, 8192, False)])
def test_arrays_of_too_many_elements_are_refused(
    tokens: int, n: int, k: int, fits: bool, monkeypatch: pytest.MonkeyPatch
):
    """The limit is on each array that there is, such as those of gate and up of a 70B model."""
    monkeypatch.setattr(pallas_mosaic_gpu.registry, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(pallas_mosaic_gpu.registry, "default_platform", lambda: "gpu")
    groups = k // 128

    def zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    weight = PackedWeight(
        codes4=zeros((groups, n, 64), np.uint8),
        scales4=zeros((groups, n), np.float16),
        zero_points4=zeros((groups, n), np.uint8),
        codes8=zeros((groups, 0, 128), np.int8),
        scales8=zeros((groups, 0), np.float16),
        channel_order=np.arange(n, dtype=np.int32),
        group_size=128,
    )
    activations = QuantizedActivations(zeros((tokens, k), np.int8), zeros((groups, tokens), np.float32), 128)
    reason = pallas_mosaic_gpu.refuses(activations, weight, None, out_dtype=jnp.bfloat16)
    assert reason is None if fits else "fewer than 2147483648 elements" in str(reason)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_without_sums_of_codes_have_the_same_tiles(config: MosaicGpuConfig):
    signed = config.signed
    assert not signed.unsigned
    assert (signed.tile_tokens, signed.compute_warpgroups) == (config.tile_tokens, config.compute_warpgroups)
    assert config.unsigned or signed == config


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("groups", [1, 2, 28, 32, 33, 43, 86, 112, 149])
@pytest.mark.parametrize(("stages", "unroll"), [(4, 4), (4, 8), (8, 4), (3, 2)])
def test_blocks_of_unsigned_operands_cover_the_groups_in_order(groups: int, stages: int, unroll: int):
    """With as many groups in 32 as the activation sums of one correction, and slots that follow each other."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel

    config = MosaicGpuConfig(stages=stages, unroll=unroll, parts=1, unsigned=True)
    kernel = UnsignedKernel(256, 128, 128, groups, 128, 2, config)
    with jax.ensure_compile_time_eval():
        spans = [tuple(map(int, kernel.blocks_of(number))) for number in range(kernel.corrections)]
        slots = [int(slot) for block in range(2 * kernel.num_blocks) for slot in kernel.slots(block)]
    assert [end * kernel.unroll for _, end in spans] == [min(32 * (i + 1), groups) for i in range(len(spans))]
    assert [first for first, _ in spans] == [0] + [end for _, end in spans[:-1]]
    assert slots == [group % kernel.stages for group in range(2 * groups)]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize(("n", "unsigned"), [(304, True), (302, False)])
def test_unsigned_operands_are_for_aligned_rows(n: int, unsigned: bool):
    weight = with_sums(make_case(1, n, 256, 128, 0.3).weight)
    assert has_aligned_rows(weight) == unsigned
    assert pallas_mosaic_gpu.config_for(130, weight, CONFIGS[-1]).unsigned == unsigned


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("channels", [384, 1152, 2816])
@pytest.mark.parametrize("tokens", [100, 600, 1409])
def test_every_token_of_every_channel_is_in_one_tile(channels: int, tokens: int):
    """Whether the last wave is halved, the 8-bit tiles of the only wave, or none."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel

    kernel = UnsignedKernel(tokens, channels // 2, channels // 2, 4, 128, 2, CONFIGS[-1])
    multiprocessors = kernel.blocks(12)
    visits = np.zeros((-(-tokens // 128) * 128, 2, kernel.tiles4 * 128), int)
    longest = np.zeros(multiprocessors)
    with jax.disable_jit(), jax.ensure_compile_time_eval():
        for multiprocessor in range(multiprocessors):

            def visit(tile, multiprocessor=multiprocessor):
                rows = slice(int(tile.first_row), int(tile.first_row) + 128)
                visits[int(tile.first_token) : int(tile.first_token) + tile.tokens, int(tile.is8), rows] += 1
                longest[multiprocessor] += tile.tokens / 128

            kernel.for_each_tile(jnp.int32(multiprocessor), multiprocessors, visit)
    assert (visits == 1).all()
    whole, rest = divmod(kernel.num_tiles, multiprocessors)
    is_halved = 0 < whole < MAX_HALVED_WAVES and 0 < 2 * rest <= multiprocessors
    assert longest.max() == whole + (0.5 if is_halved else rest > 0)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@given(
    row=st.integers(1, 600),
    tile=st.sampled_from([8, 16, 48, 64, 96, 112, 128]),
    itemsize=st.sampled_from([1, 2, 4]),
    group=st.integers(0, 200),
    number=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_copies_of_scales_start_at_16_bytes_and_bring_the_tile(
    row: int, tile: int, itemsize: int, group: int, number: int
):
    """Whatever the length of the rows; tiles of channels are whole 64, those of tokens (of 4 bytes) whole 8."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.operands import Slice

    tile = tile if itemsize == 4 else -(-tile // 64) * 64
    scales = Slice(row, tile, itemsize)
    first = number * tile
    start, lead = int(scales.start(group, first)), int(scales.lead(group))
    assert start + lead == group * row + first
    assert start * itemsize % 16 == 0
    assert scales.copied * itemsize % 128 == 0
    assert lead + tile <= scales.copied


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_part_of_a_tile_has_a_token(config: MosaicGpuConfig):
    for tokens in range(1, 2 * config.tile_tokens):
        fitted = config.fitted(tokens)
        assert fitted.tile_tokens // fitted.parts in mosaic_gpu_config.DOT_TOKENS
        assert fitted.tile_tokens * (fitted.parts - 1) // fitted.parts < tokens
        assert -(-tokens // fitted.tile_tokens) == -(-tokens // config.tile_tokens)


def test_rule_and_candidates_are_settings_that_fit_the_kernel():
    for tokens in (1, 8, 9, 33, 64, 65, 300, 4096):
        for n in (64, 4096, 28672):
            config = mosaic_gpu_config.default(Problem(tokens, 4096, 128, n // 2, n - n // 2))
            assert config.tile_tokens >= min(tokens, 64)
        assert mosaic_gpu_config.candidates(tokens)


def test_the_faster_implementation_of_the_nearest_case_comes_first(monkeypatch: pytest.MonkeyPatch):
    triton = FewTokensConfig(16, 16, 8, 1, splits=1, prefetch="none")
    entries = (
        configs.Entry(16, 4096, 4096, 128, 0.1, triton, 7.0),
        configs.Entry(16, 4096, 4096, 128, 0.1, MosaicGpuConfig(16, parts=1), 8.0),
        configs.Entry(64, 4096, 4096, 128, 0.1, triton, 20.0),
        configs.Entry(64, 4096, 4096, 128, 0.1, MosaicGpuConfig(64, parts=1), 11.0),
    )
    monkeypatch.setattr(configs, "read_table", lambda device_kind: entries)
    few, many = (Problem(tokens, 4096, 128, 3686, 410) for tokens in (15, 60))
    assert configs.by_speed(few, H100) == ("triton", "mosaic_gpu")
    assert configs.by_speed(many, H100) == ("mosaic_gpu", "triton")
    assert configs.choose(few, H100, "triton") is triton
    assert configs.choose(many, H100, "mosaic_gpu") == MosaicGpuConfig(64, parts=1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11 or later, and says so")
@pytest.mark.parametrize("config", CONFIGS[:1] + CONFIGS[-3:], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(130, 208, 256, 128, 0.3), (33, 70, 192, 64, 0.0), (1, 70, 96, 32, 1.0), (65, 80, 4224, 128, 0.5)],
    ids=str,
)
def test_lowers_without_a_gpu(config: MosaicGpuConfig, sizes: tuple[int, int, int, int, float]):
    """The whole lowering is Python and runs anywhere; what it gives is a call of the Mosaic GPU compiler."""
    case = make_case(*sizes, bias=True)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.activations, with_sums(case.weight), case.bias)
    )
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype=jnp.bfloat16, config=config))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (11, 70, 640, 128, 0.2),
        (300, 333, 1024, 64, 0.2),
        (65, 130, 2048, 128, 0.0),
        (33, 70, 576, 64, 0.5),
        (257, 301, 4480, 128, 0.3),
        (257, 304, 4480, 128, 0.3),
        (65, 96, 2048, 128, 0.0),
        (11, 80, 640, 128, 0.2),
        (144, 80, 256, 128, 1.0),
    ],
    ids=str,
)
def test_configurations(config: MosaicGpuConfig, sizes: tuple[int, int, int, int, float]):
    require_hopper()
    case = make_case(*sizes, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, with_sums(case.weight), case.bias))
    out = pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=config)
    assert relative_error(out, case.expected) < limit(config)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=str)
def test_tiles_of_both_kinds_follow_each_other(config: MosaicGpuConfig):
    """More tiles than multiprocessors, so that slots of the ring pass from 4-bit to 8-bit channels and back."""
    require_hopper()
    case = make_case(1500, 3008, 512, 128, 0.3, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, with_sums(case.weight), case.bias))
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=config))
    first = run(*arguments)
    assert relative_error(first, case.expected) < limit(config)
    for _ in range(5):
        assert (run(*arguments) == first).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "config", "order"),
    [
        ((528, 1376, 384), MosaicGpuConfig(64, 1, 4, 4, parts=1, unsigned=True), (False, True, False)),
        ((1040, 4096, 256), MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True), (False, True, True)),
        ((1100, 3840, 256), MosaicGpuConfig(64, 1, 4, 8, parts=1, unsigned=True), (False, True, False)),
        ((256, 6144, 1024), MosaicGpuConfig(128, 2, 4, 8, parts=1, unsigned=True), (True, False, False)),
    ],
    ids=str,
)
def test_orders_of_tiles(sizes: tuple[int, int, int], config: MosaicGpuConfig, order: tuple[bool, bool, bool]):
    """A single wave with halved 8-bit tiles; waves that turn, with halves in the last one or too many for that."""
    require_hopper()
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel

    tokens, n, k = sizes
    case = make_case(tokens, n, k, 128, 0.1, bias=True)
    weight = with_sums(case.weight)
    kernel = UnsignedKernel(tokens, weight.n4, weight.n8, weight.num_groups, 128, 4, config)
    blocks = kernel.blocks(mosaic_gpu_config.MULTIPROCESSORS)
    assert (kernel.splits8(blocks), kernel.turn(blocks) > 0, kernel.halved(blocks) > 0) == order
    arguments = jax.tree.map(jnp.asarray, (case.activations, weight, case.bias))
    run = jax.jit(lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=config))
    first = run(*arguments)
    assert relative_error(first, case.expected) < limit(config)
    assert (run(*arguments) == first).all()


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [257, 300])
def test_a_last_wave_of_few_tiles_is_halved(share: float, tokens: int):
    """138 tiles; of the last halves of the tokens, some have none."""
    require_hopper()
    case = make_case(tokens, 5760 + 128 * (share == 0.1), 384, 128, share, bias=True)
    arguments = jax.tree.map(jnp.asarray, (case.activations, with_sums(case.weight), case.bias))
    run = jax.jit(
        lambda *arguments: pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=CONFIGS[-1])
    )
    first = run(*arguments)
    assert relative_error(first, case.expected) < limit(CONFIGS[-1])
    assert (run(*arguments) == first).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "code4", "zero_point", "code8"), [(127, 15, 0, 127), (-127, 0, 15, -128)])
def test_unsigned_dots_at_their_limits(activation: int, code4: int, zero_point: int, code8: int):
    """255 x 255 x 128 is the largest integer whose bits have to be a denormal float."""
    require_hopper()
    m, n4, n8, groups = 130, 80, 48, 3
    case = assemble(
        activation_codes=np.full((m, 128 * groups), activation),
        activation_scales=np.full((groups, m), 0.02, np.float32),
        codes4=np.full((n4, 128 * groups), code4),
        zero_points4=np.full((n4, groups), zero_point),
        codes8=np.full((n8, 128 * groups), code8),
        scales=np.full((n4 + n8, groups), 0.02, np.float16),
        order=np.arange(n4 + n8),
        bias=None,
        group_size=128,
    )
    arguments = jax.tree.map(jnp.asarray, (case.activations, with_sums(case.weight), None))
    out = pallas_mosaic_gpu.mixed_matmul(*arguments, out_dtype="float32", config=CONFIGS[-1])
    assert relative_error(out, case.expected) < limit(CONFIGS[-1])
