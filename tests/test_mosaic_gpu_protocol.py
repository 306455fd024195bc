"""The barriers of the Hopper kernels on a CPU: their own loops, run as Python, give the events of each warp.

The loops are traced code, but Python all the same: with loops, conditions and arithmetic of plain integers, and
recorders instead of copies, barriers and dots, a warp's part of a kernel runs as it stands. `barrier_simulator` then
lets the warps go on in random orders, and each must find the groups of its tile where it reads them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from barrier_simulator import Event, Place, Recorder, simulate

from pallas_kernels.mixed_matmul.mosaic_gpu.config import CHANNELS_PER_WARPGROUP, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 or later, and say so")

MULTIPROCESSORS = 4
SEEDS = range(2)
OPERANDS = (
    *("codes", "codes4", "codes8", "token_scales", "scales4", "scales8", "zero_points4", "code_sums4", "code_sums8"),
    *("scale_rows4", "scale_rows8", "zero_point_rows4", "order", "bias"),
)
UNSIGNED: dict[str, Any] = {"parts": 1, "unsigned": True}
SIZES = [(300, 200, 100), (70, 130, 0), (129, 0, 300), (1, 60, 4)]
"""Tokens, 4-bit and 8-bit channels."""


class Ref:
    """A reference that remembers its name and its first index, the slot."""

    dtype = jnp.dtype("bfloat16")

    def __init__(self, name: str, slot: int | None = None) -> None:
        self.name, self.slot = name, slot

    @property
    def at(self) -> Ref:
        return self

    def __getitem__(self, index: Any) -> Ref:
        first = index[0] if isinstance(index, tuple) else index
        slot = int(first) if isinstance(first, int | jax.Array) else 0
        return Ref(self.name, slot if self.slot is None else self.slot)

    @property
    def place(self) -> Place:
        return (self.name, self.slot or 0)


@dataclasses.dataclass
class Trace:
    """The warp that is being recorded, and where it is.

    Attributes:
        axes: Its indices: warpgroup, warp and so on.
        recorder: Of its events.
        tile: Of the loop.
        content: What the copies bring that it starts.
        groups: What is left for it to compute of the tile.
        tiles: All that it visited.
        expected_groups: Of a tile.
    """

    expected_groups: Callable[[Trace], Iterator[int]]
    axes: dict[str, int] = dataclasses.field(default_factory=dict)
    recorder: Recorder = dataclasses.field(default_factory=Recorder)
    tile: Any = None
    content: tuple[Any, ...] = ()
    groups: Iterator[int] | None = None
    tiles: list[Any] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple[int, ...]:
        return int(self.tile.is8), int(self.tile.first_row), int(self.tile.first_token)


class Arithmetic:
    """Stands for the dots of a tile: what they read has to belong to the next group that is the warpgroup's.

    A dot has its codes in registers, but reads its activations until it is awaited.
    """

    def __init__(self, trace: Trace, tokens: int) -> None:
        self.trace, self.tokens, self.corrections = trace, tokens, 0
        trace.groups = trace.expected_groups(trace)

    def read(self, group: int, *refs: Any) -> None:
        for ref in refs:
            if isinstance(ref, Ref) and ref.slot is not None:
                self.trace.recorder.read(ref.place, (*self.trace.key, group))

    def nothing(self, *_: Any) -> None: ...

    zero_total = magic_accumulator = unscaled = nothing

    def load_codes(self, *refs: Any) -> int:
        assert self.trace.groups is not None
        group = next(self.trace.groups)
        self.read(group, *refs)
        return group

    load_codes4 = load_codes8 = load_codes

    def start_dot(self, accumulator: None, codes: int, activations: Ref) -> Ref:
        self.read(codes, activations)
        return activations

    def finish_dot(self, in_flight: int, dot: Ref, codes: int, total: None, *scales: Any) -> None:
        self.read(codes, dot, *scales)

    def start(self, codes: int, activations: Ref) -> Ref:
        return self.start_dot(None, codes, activations)

    def finish(self, dot: Ref, codes: int, total: None, scales: list[Ref], *places: Any) -> None:
        self.finish_dot(0, dot, codes, total, *scales)

    def subtract_zero_points(self, total: None, sums: Ref, channels: list[Ref], first: Any) -> None:
        for ref in (sums, *channels):
            self.trace.recorder.read(ref.place, (*self.trace.key, "correction", self.corrections))
        self.corrections += 1


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Loops, conditions and integers of Python, and recorders of Pallas' copies and barriers."""
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    trace = Trace(lambda _: iter(()))
    original_snake = plgpu.planar_snake

    def loop(lower: Any, upper: Any, body: Callable[[int, Any], Any], carry: Any) -> Any:
        for index in range(int(lower), int(upper)):
            carry = body(index, carry)
        return carry

    def when(condition: Any) -> Callable[[Callable[[], None]], None]:
        return lambda body: body() if condition else None

    @functools.cache  # which takes much longer than all the rest
    def snake(place: int, shape: tuple[int, int], axis: int, width: int) -> tuple[int, ...]:
        with jax.disable_jit():
            return tuple(int(index) for index in original_snake(jnp.int32(place), shape, axis, width))

    def copy(source: Ref, destination: Ref, barrier: Ref) -> None:
        trace.recorder.copy((destination.place,), (*trace.key, *trace.content), barrier.place)

    monkeypatch.setattr(lax, "fori_loop", loop)
    monkeypatch.setattr(lax, "rem", lambda a, b: int(a) % int(b))
    monkeypatch.setattr(lax, "div", lambda a, b: int(a) // int(b))
    monkeypatch.setattr(lax, "axis_index", lambda name: trace.axes[name])
    monkeypatch.setattr(lax, "axis_size", lambda name: trace.axes["num_" + name])
    monkeypatch.setattr(pl, "when", when)
    monkeypatch.setattr(plgpu, "planar_snake", snake)
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *_, **__: None)
    monkeypatch.setattr(plgpu, "warp_map", lambda body: body(trace.axes["warp"]))
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda ref: trace.recorder.wait(ref.place))
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda ref: trace.recorder.arrive(ref.place))
    return trace


def follow(trace: Trace, kernel_type: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels tell which tile they are at, and what they are about to copy."""
    for_each_tile = kernel_type.for_each_tile

    def visit_all(self: Any, first: int, step: int, visit: Callable[[Any], None]) -> None:
        def visit_one(tile: Any) -> None:
            trace.tile, trace.groups = tile, None
            trace.tiles.append(tile)
            visit(tile)
            assert next(trace.groups or iter(()), None) is None, "a group is missing"

        for_each_tile(self, first, step, visit_one)

    def noting(name: str, note: Callable[[Any], tuple[Any, ...]]) -> None:
        method = getattr(kernel_type, name)

        def noted(self: Any, inputs: Any, scratch: Any, tile: Any, index: Any, *slot: Any) -> None:
            trace.content = note(index)
            method(self, inputs, scratch, tile, index, *slot)

        monkeypatch.setattr(kernel_type, name, noted)

    monkeypatch.setattr(kernel_type, "for_each_tile", visit_all)
    noting("load_group", lambda group: (int(group),))
    if hasattr(kernel_type, "load_correction"):
        noting("load_correction", lambda correction: ("correction", int(correction)))


def scratch_of(kernel: Any, prefix: str = "") -> dict[str, Any]:
    """References to the kernel's shared memory. Codes of both widths share theirs."""
    refs: dict[str, Any] = {name: Ref(prefix + name) for name in kernel.scratch()}
    if kernel.n4 and kernel.n8:
        refs["code_rings"] = (refs["code_rings"],) * 2
    return refs


def events_of(trace: Trace, kernel: Any, prefix: str = "", **axes: int) -> list[Event]:
    """The events of a warp, or of a computing warpgroup, that runs the whole kernel."""
    trace.axes, trace.recorder, trace.tiles = axes, Recorder(), []
    kernel.body(OPERANDS, *map(Ref, OPERANDS), Ref("out"), **scratch_of(kernel, prefix))
    return trace.recorder.events


def check_cover(kernel: Any, tiles: list[Any], tile_channels: int) -> None:
    """Every token of every channel is in one tile."""
    for is8, rows in ((False, kernel.n4), (True, kernel.n8)):
        visits = np.zeros((kernel.tokens, rows), int)
        for tile in tiles:
            if tile.is8 == is8:
                tokens = getattr(tile, "tokens", kernel.tile_tokens)
                first_token, first_row = int(tile.first_token), int(tile.first_row)
                visits[first_token : first_token + tokens, first_row : first_row + tile_channels] += 1
        assert (visits == 1).all()


def run_persistent(kernel: Any, trace: Trace) -> None:
    """Record and simulate all multiprocessors of a kernel whose barriers are Pallas'."""
    arrivals = {
        (name, slot): memory.num_arrivals
        for name, memory in kernel.scratch().items()
        if hasattr(memory, "num_arrivals")
        for slot in range(int(np.prod(memory.num_barriers)))
    }
    warpgroups = kernel.config.compute_warpgroups
    trace.expected_groups = lambda _: iter(range(kernel.num_groups))
    tiles = []
    blocks = kernel.blocks(MULTIPROCESSORS)
    for multiprocessor in range(blocks):
        axes = {"multiprocessor": multiprocessor, "num_multiprocessor": blocks}
        warps = {
            f"warpgroup {number}": events_of(trace, kernel, **axes, warpgroup=number) for number in range(warpgroups)
        }
        tiles += trace.tiles
        for warp in range(4):
            warps[f"warp {warp}"] = events_of(trace, kernel, **axes, warpgroup=warpgroups, warp=warp)
        for seed in SEEDS:
            simulate(warps, arrivals, seed)
    check_cover(kernel, tiles, kernel.tile_channels)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (MosaicGpuConfig(), 6),
        (MosaicGpuConfig(stages=4, unroll=4), 8),
        (MosaicGpuConfig(stages=5, unroll=1), 7),
        (MosaicGpuConfig(64, 1, 12, 4, parts=1), 4),
        (MosaicGpuConfig(16, 2, 2, 4, parts=1), 3),
    ],
    ids=str,
)
def test_signed_kernel(
    config: MosaicGpuConfig, groups: int, sizes: tuple[int, int, int], trace: Trace, monkeypatch: pytest.MonkeyPatch
):
    from pallas_kernels.mixed_matmul.mosaic_gpu.signed import kernel as signed

    tokens, n4, n8 = sizes
    kernel = signed.SignedKernel(tokens, n4, n8, groups, 128, 2, config.fitted(tokens))
    follow(trace, signed.SignedKernel, monkeypatch)
    monkeypatch.setattr(signed, "fetch_columns", lambda *_: None)
    monkeypatch.setattr(signed, "_store", lambda *_: None)
    monkeypatch.setattr(signed, "GroupArithmetic", lambda size, tokens, **_: Arithmetic(trace, tokens))
    run_persistent(kernel, trace)


@pytest.mark.parametrize("sizes", [*SIZES, (129, 256, 320), (100, 250, 100)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (MosaicGpuConfig(128, 2, 4, 4, **UNSIGNED), 8),
        (MosaicGpuConfig(128, 2, 4, 8, **UNSIGNED), 16),
        (MosaicGpuConfig(64, 1, 4, 8, **UNSIGNED), 40),  # two corrections, blocks that go round the ring twice
        (MosaicGpuConfig(96, 1, 6, 2, **UNSIGNED), 2),  # 96 tokens of 32 bits are three pieces
        (MosaicGpuConfig(128, 2, 3, 1, **UNSIGNED), 33),
    ],
    ids=str,
)
def test_unsigned_kernel(
    config: MosaicGpuConfig,
    groups: int,
    itemsize: int,
    sizes: tuple[int, int, int],
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
):
    """With tiles that are handed over to the storing warps, halved ones in a last wave, 8-bit ones in a single one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import hand_over
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import kernel as unsigned

    tokens, n4, n8 = sizes
    kernel = unsigned.UnsignedKernel(tokens, n4, n8, groups, 128, itemsize, config)
    follow(trace, unsigned.UnsignedKernel, monkeypatch)

    def stage(total: None, piece: int, shared: Ref, *_: Any) -> None:
        trace.recorder.write(shared.place, (*trace.key, trace.axes["warpgroup"], piece))

    def storing(**_: Any) -> Callable[[Any], Callable[..., None]]:
        def read(first_row: int, first_token: int, order: Ref, shared: Ref, out: Ref) -> None:
            warpgroup = (first_row - trace.tile.first_row) // CHANNELS_PER_WARPGROUP
            piece = sum(
                event.kind == "read" and event.content[:4] == (*trace.key, warpgroup) for event in trace.recorder.events
            )
            trace.recorder.read(shared.place, (*trace.key, warpgroup, piece))

        return lambda body: read

    monkeypatch.setattr(plgpu, "inline_mgpu", storing)
    monkeypatch.setattr(hand_over, "_stage", stage)
    monkeypatch.setattr(unsigned, "fetch_columns", lambda *_: None)
    # Behind the last block a read is for nothing, and finds whatever is there.
    monkeypatch.setattr(
        unsigned._TileLoop, "read_ahead", lambda self, slot, exists: self.wait_and_load(slot) if exists else None
    )
    monkeypatch.setattr(unsigned, "UnsignedArithmetic", lambda size, tokens, **_: Arithmetic(trace, tokens))
    run_persistent(kernel, trace)


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("sizes", [(33, 200, 100), (5, 700, 0), (16, 0, 1100), (1, 60, 4)], ids=str)
@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (MosaicGpuSplitConfig(16, 1, 1, 4, 4), 8),
        (MosaicGpuSplitConfig(8, 4, 1, 16, 2), 28),
        (MosaicGpuSplitConfig(48, 3, 1, 6, 2), 10),
        (MosaicGpuSplitConfig(16, 2, 2, 8, 2), 12),
        (MosaicGpuSplitConfig(16, 3, 2, 6, 1), 14),
        (MosaicGpuSplitConfig(8, 4, 4, 8, 1), 4),  # fewer groups in a block than warpgroups
    ],
    ids=str,
)
def test_splitting_kernel(
    config: MosaicGpuSplitConfig,
    groups: int,
    sizes: tuple[int, int, int],
    quantizes: bool,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
):
    """All blocks of a cluster together: rings, and the sums that meet in the first block."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import kernel as split
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import ring
    from pallas_kernels.mixed_matmul.mosaic_gpu.split.barriers import Barriers

    tokens, n4, n8 = sizes
    problem = Problem(tokens, 128 * groups, 128, n4, n8)
    if quantizes and tokens > config.tile_tokens:
        pytest.skip("a tile has all tokens that are quantised")
    config = config.fitted(problem, quantizes=quantizes, multiprocessors=MULTIPROCESSORS)
    sets = config.sets_of_sums(problem, MULTIPROCESSORS)
    kernel = split.SplitKernel(tokens, n4, n8, groups, 128, config, sets, quantizes)
    runs = groups // (config.cluster * config.run)

    def groups_of_warpgroup(trace: Trace) -> Iterator[int]:
        for run in range(runs):  # of all tiles of the block, in turn
            if (trace.tile.index * runs + run) % config.warpgroups == trace.axes["warpgroup"]:
                first = (trace.axes["split"] * runs + run) * config.run
                yield from range(first, first + config.run)

    class Dots(Arithmetic):
        def read(self, group: int, *refs: Any) -> None:
            for ref in refs:
                if quantizes and isinstance(ref, Ref) and ref.name.endswith("activation_ring"):
                    trace.recorder.read(ref.place, group)
                else:
                    super().read(group, ref)

    def quantize(x: Ref, codes: Ref, scales: Ref, first_group: int, **_: Any) -> None:
        # The warpgroups share the groups, so that each has to wait for the others.
        for number in range(trace.axes["warpgroup"], groups // config.cluster, config.warpgroups):
            trace.recorder.write(codes.at[number].place, first_group + number)

    def start_copies(barriers: Ref, slot: int, copies: list[Any]) -> None:
        places = tuple(copy.destination.place for copy in copies)
        trace.recorder.copy(places, (*trace.key, *trace.content), (barriers.name, int(slot)))

    def announce(self: Barriers) -> None:
        for block in range(config.cluster):
            trace.recorder.arrive((f"{block} barriers", self.sums), 4)

    def push_sums(total: None, sums: Ref, first: int, **_: Any) -> None:
        trace.recorder.write(("sums", int(first)), trace.key)

    def add_sums(total: None, sums: Ref, firsts: list[int]) -> None:
        for first in firsts:
            trace.recorder.read(("sums", int(first)), trace.key)

    def wait(self: Barriers, barrier: int, uses: int) -> None:
        trace.recorder.wait((self.ref.name, int(barrier)), int(uses))

    follow(trace, split.SplitKernel, monkeypatch)
    trace.expected_groups = groups_of_warpgroup
    monkeypatch.setattr(Barriers, "start", lambda self: None)
    monkeypatch.setattr(Barriers, "wait_for_cluster", lambda self: None)
    monkeypatch.setattr(Barriers, "wait", wait)
    monkeypatch.setattr(Barriers, "wait_for_sums", lambda self, uses: wait(self, self.sums, uses))
    monkeypatch.setattr(Barriers, "arrive", lambda self, number: trace.recorder.arrive((self.ref.name, int(number)), 4))
    monkeypatch.setattr(Barriers, "announce_sums", announce)
    monkeypatch.setattr(ring, "start_copies", start_copies)
    monkeypatch.setattr(split.quantize, "quantize", quantize)
    monkeypatch.setattr(
        split.sums, "push_sums", lambda _, sums, first, **__: trace.recorder.write(("sums", int(first)), trace.key)
    )
    monkeypatch.setattr(split.sums, "add_sums", add_sums)
    monkeypatch.setattr(split.store, "fetch_columns", lambda *_: None)
    monkeypatch.setattr(split.store, "store_tile", lambda *_: None)
    monkeypatch.setattr(split, "GroupArithmetic", lambda size, tokens, **_: Dots(trace, tokens))

    clusters, tiles = min(MULTIPROCESSORS // config.cluster, kernel.num_tiles), []
    for cluster in range(clusters):
        warps, arrivals = {}, {}
        for block in range(config.cluster):
            axes = {"cluster": cluster, "num_cluster": clusters, "split": block}
            for number in range(config.warpgroups):
                events = events_of(trace, kernel, f"{block} ", **axes, warpgroup=number)
                warps[f"block {block}, warpgroup {number}"] = events
            for warp in range(4):
                events = events_of(trace, kernel, f"{block} ", **axes, warpgroup=config.warpgroups, warp=warp)
                warps[f"block {block}, warp {warp}"] = events
            kinds = [1] * config.stages + [4] * config.stages
            kinds += [4 * config.warpgroups * config.cluster, 4 * config.warpgroups]
            arrivals |= {(f"{block} barriers", number): kind for number, kind in enumerate(kinds)}
        events_of(trace, kernel, "0 ", cluster=cluster, num_cluster=clusters, split=0, warpgroup=0)
        tiles += trace.tiles
        for seed in SEEDS:
            simulate(warps, arrivals, seed)
    check_cover(kernel, tiles, CHANNELS_PER_WARPGROUP)
