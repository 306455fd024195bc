"""What threads of the Hopper kernels do with dots and finished tiles, on a CPU.

A dot is added with the scales of its channels and tokens; every element is stored once, where it belongs. The code that
the kernels emit for the threads is interpreted (`mlir_interpreter`); fragments are filled, and outputs expected, by the
formulas of the PTX ISA and of the packed format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from mlir_interpreter import Interpreter, Memory

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 or later, and say so")

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16"), "float32": np.dtype("float32")}
ORDERS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "in order": lambda n, rng: np.arange(n),
    "from an odd column on": lambda n, rng: np.roll(np.arange(n), 3),
    "from an aligned column on": lambda n, rng: np.roll(np.arange(n), 16),
    "at random": lambda n, rng: rng.permutation(n),
    "with one gap": lambda n, rng: np.delete(np.arange(n + 1), 70) % n,
}


@dataclasses.dataclass
class Part:
    """A finished part of a tile, and what there is around it.

    Attributes:
        values: float32 `[64 * warpgroups, tokens]`.
        order: int32 `[out_features]`.
        bias: float32 `[out_features]`, or None.
        first_row: Row of its first channel among those of its bit width.
        first_token: Its first token.
        rows: Rows of this bit width.
        order_start: Where they start in `order`.
        num_tokens: Of the output.
        dtype: Of the output.
    """

    values: np.ndarray
    order: np.ndarray
    bias: np.ndarray | None
    first_row: int
    first_token: int
    rows: int
    order_start: int
    num_tokens: int
    dtype: np.dtype

    @property
    def tokens(self) -> int:
        return self.values.shape[1]

    def registers(self) -> list[np.ndarray]:
        """Of all threads: the fragments of `wgmma`, by block of 8 tokens, channel half and token of a pair."""
        thread = np.arange(len(self.values) * 2)
        warp, lane = thread // 32, thread % 32
        channel, token = 16 * warp + lane // 4, 2 * (lane % 4)
        return [
            self.values[channel + 8 * half, token + 8 * block + pair]
            for block in range(self.tokens // 8)
            for half in range(2)
            for pair in range(2)
        ]

    def check(self, out: np.ndarray, stores: np.ndarray) -> None:
        """The elements of the part were stored once, with the right values, and nothing else was."""
        channels = slice(0, min(len(self.values), self.rows - self.first_row))
        columns = self.order[self.order_start + self.first_row :][channels]
        last_token = min(self.first_token + self.tokens, self.num_tokens)
        values = self.values[channels, : last_token - self.first_token].T
        expected, expected_stores = np.zeros(out.shape, self.dtype), np.zeros(out.shape, int)
        added = 0 if self.bias is None else self.bias[columns]
        expected[self.first_token : last_token, columns] = (values + added).astype(self.dtype)
        expected_stores[self.first_token : last_token, columns] = 1
        np.testing.assert_array_equal(stores, expected_stores)
        np.testing.assert_array_equal(out.astype(np.float64), expected.astype(np.float64))


def make_part(
    tokens: int,
    dtype: str,
    order: str,
    *,
    n: int = 200,
    warpgroups: int = 1,
    bias: bool = False,
    first_row: int = 0,
    order_start: int = 0,
    first_token: int = 0,
    num_tokens: int = 300,
) -> Part:
    """A part of random values."""
    rng = np.random.default_rng([tokens, n, first_row])
    return Part(
        values=rng.standard_normal((64 * warpgroups, tokens)).astype(np.float32),
        order=ORDERS[order](n, rng).astype(np.int32),
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
        first_row=first_row,
        first_token=first_token,
        rows=n - order_start,
        order_start=order_start,
        num_tokens=num_tokens,
        dtype=DTYPES[dtype],
    )


class Emitter:
    """Builds a function of MLIR from what the kernels emit, and runs it.

    Args:
        threads: Of the block.
        arrays: Memory by name.
    """

    def __init__(self, threads: int, arrays: dict[str, np.ndarray]) -> None:
        self.threads, self.memory = threads, Memory()
        self.addresses = {name: self.memory.put(name, array) for name, array in arrays.items()}
        self.arrays = arrays

    def run(
        self,
        emit: Callable[..., None],
        scalars: dict[str, Any],
        registers: list[np.ndarray],
        mask: np.ndarray | None = None,
    ) -> None:
        """Run `emit(refs and scalars by name, values)` for the threads of the mask; other threads have left."""
        from jax._src.interpreters import mlir
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import func

        with mlir.make_ir_context(), ir.Location.unknown():
            module = ir.Module.create()
            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            for name, number in (("arch_major", 9), ("arch_minor", 0)):
                module.operation.attributes[f"mosaic_gpu.{name}"] = ir.IntegerAttr.get(i32, number)
            refs = [
                ir.MemRefType.get(array.shape, mlir.dtype_to_ir_type(array.dtype)) for array in self.arrays.values()
            ]
            with ir.InsertionPoint(module.body):
                function = func.FuncOp("part", (refs + [i32] * len(scalars) + [f32] * len(registers), []))
            block = function.add_entry_block()
            with ir.InsertionPoint(block):
                names = [*self.arrays, *scalars]
                emit(dict(zip(names, block.arguments, strict=False)), list(block.arguments)[len(names) :])
                func.ReturnOp([])
            mask = np.ones(self.threads, bool) if mask is None else mask
            numbers = [np.asarray(number, np.int32) for number in scalars.values()]
            Interpreter(self.memory, self.threads).run(block, [*self.addresses.values(), *numbers, *registers], mask)


class Scalar:
    """A traced index, as the body of a call gets it."""

    def __init__(self, value: Any) -> None:
        self.registers = np.array(value, dtype=object)


@dataclasses.dataclass
class Shaped:
    """A reference of Pallas, and what it is in MLIR."""

    value: Any
    shape: tuple[int, ...]


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plgpu.inline_mgpu` calls its body where it stands."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mixed_matmul.mosaic_gpu.mlir import i32_constant

    def lowered(argument: Any) -> Any:
        if isinstance(argument, jax.Array):
            return Scalar(i32_constant(int(argument)))
        return argument.value if isinstance(argument, Shaped) else argument

    def inline(**_: Any) -> Callable[..., Callable[..., Any]]:
        return lambda body: lambda *arguments: body(None, *map(lowered, arguments))

    monkeypatch.setattr(plgpu, "inline_mgpu", inline)


def arrays_of(part: Part, **memory: int) -> dict[str, np.ndarray]:
    """The output, what it is stored with, and shared memory of some words."""
    arrays = {"out": np.zeros((part.num_tokens, len(part.order)), part.dtype), "order": part.order}
    if part.bias is not None:
        arrays["bias"] = part.bias
    return arrays | {name: np.zeros(words, np.int32) for name, words in memory.items()}


CASES = [
    (16, "bfloat16", "in order", {}),
    (64, "bfloat16", "from an aligned column on", {"bias": True, "num_tokens": 70, "first_token": 64}),
    (128, "float16", "from an odd column on", {"num_tokens": 128}),
    (96, "float32", "in order", {"n": 208, "order_start": 80, "bias": True}),
    (128, "float32", "at random", {"first_row": 128, "bias": True}),
    (8, "bfloat16", "with one gap", {"first_row": 64, "first_token": 296}),
    (48, "float32", "with one gap", {"num_tokens": 40}),
    (80, "bfloat16", "in order", {"n": 201, "order_start": 64}),
    (24, "float16", "at random", {"n": 67, "order_start": 60}),
    (48, "bfloat16", "in order", {}),
    (8, "bfloat16", "from an aligned column on", {"bias": True}),
]
"""Tokens, dtype, order, other arguments of `make_part`."""


@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize(("tokens", "dtype", "order", "others"), CASES, ids=str)
def test_signed_kernel(
    tokens: int, dtype: str, order: str, others: dict[str, Any], warpgroups: int, direct_calls: None
):
    """By the warpgroups that computed the part, from the columns that they fetched."""
    from pallas_kernels.mixed_matmul.mosaic_gpu import columns, fragments, staging
    from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Destination
    from pallas_kernels.mixed_matmul.mosaic_gpu.signed import store

    part = make_part(tokens, dtype, order, warpgroups=warpgroups, **others)
    words = warpgroups * staging.Staging(tokens, part.dtype.itemsize).words
    emitter = Emitter(128 * warpgroups, arrays_of(part, columns=256 * warpgroups, shared=words))

    def emit(refs: dict[str, Any], values: list[Any]) -> None:
        total = fragments.fragment(values, tokens)
        columns.fetch_columns(refs["order"], refs["columns"], Scalar(refs["first_row"]), part.rows, part.order_start)
        to = Destination(refs["out"], refs["first_row"], refs["first_token"], part.rows, tokens)
        store.store_tile(total, to, refs["columns"], refs.get("bias"), refs["shared"])

    first_row = part.first_row + np.arange(128 * warpgroups) // 128 * 64
    emitter.run(emit, {"first_row": first_row, "first_token": part.first_token}, part.registers())
    part.check(*emitter.memory.get("out"))


@pytest.mark.parametrize(("tokens", "dtype", "order", "others"), CASES, ids=str)
def test_unsigned_kernel(tokens: int, dtype: str, order: str, others: dict[str, Any], direct_calls: None):
    """Piece by piece: staged by the warpgroup that computed the part, stored by three warps of another."""
    from pallas_kernels.mixed_matmul.mosaic_gpu import columns, fragments, staging
    from pallas_kernels.mixed_matmul.mosaic_gpu.destination import Destination
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import hand_over, store

    part = make_part(tokens, dtype, order, **others)
    how = staging.Staging(tokens, part.dtype.itemsize)
    emitter = Emitter(128, arrays_of(part, columns=256, shared=how.words))
    scalars = {"first_row": part.first_row, "first_token": part.first_token}
    for piece in range(how.pieces):

        def stage(refs: dict[str, Any], values: list[Any], piece: int = piece) -> None:
            total = fragments.fragment(values, tokens)
            bias = [refs["columns"], refs["bias"]] if part.bias is not None else []
            if bias:
                first_row = Scalar(refs["first_row"])
                columns.fetch_columns(refs["order"], refs["columns"], first_row, part.rows, part.order_start)
            hand_over._stage(total, piece, refs["shared"], part.dtype, bias)

        def bring(refs: dict[str, Any], values: list[Any], piece: int = piece) -> None:
            to = Destination(refs["out"], refs["first_row"], refs["first_token"], part.rows, tokens)
            store.store_piece(to, refs["order"], part.order_start, piece, refs["shared"])

        emitter.run(stage, scalars, part.registers())
        emitter.run(bring, scalars, [], mask=np.arange(128) >= 32)
    part.check(*emitter.memory.get("out"))


@pytest.mark.parametrize("tokens", [16, 48, 128])
def test_dots_of_unsigned_operands_are_scaled_by_the_channels_and_tokens_they_belong_to(tokens: int):
    """Scales of tokens in the layout that the quantisers write."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    from pallas_kernels.mixed_matmul.mosaic_gpu import fragments, mlir
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned import arithmetic
    from pallas_kernels.unsigned_operands import placed_scales

    rng = np.random.default_rng(tokens)
    dots = rng.integers(0, 2**23, (64, tokens), dtype=np.int32)
    totals = rng.standard_normal((64, tokens)).astype(np.float32)
    of_channels = rng.uniform(0.001, 0.01, 80).astype(np.float16)
    code_sums = rng.integers(0, 2**15, 80, dtype=np.uint16)
    of_tokens = rng.uniform(0.001, 0.1, tokens).astype(np.float32)
    parts = [make_part(tokens, "float32", "in order") for _ in range(2)]
    parts[0].values, parts[1].values = totals, dots.view(np.float32)
    shared = {
        "scales": of_channels,
        "code_sums": code_sums,
        "token_scales": np.asarray(placed_scales(jax.numpy.asarray(of_tokens[None])))[0],
        "found": np.zeros(64 * tokens, np.float32),
    }
    emitter = Emitter(128, shared)

    def emit(refs: dict[str, Any], values: list[Any]) -> None:
        i32 = ir.IntegerType.get_signless(32)
        half = len(values) // 2
        total = fragments.fragment(values[:half], tokens)
        dot = fragments.fragment((arith.bitcast(i32, value) for value in values[half:]), tokens, is_signed=True)
        channels = arithmetic.load_channel_scales(refs["scales"], refs["code_sums"], mlir.i32_constant(16))
        total = arithmetic.unscaled(arithmetic.add_scaled(total, dot, channels, refs["token_scales"]))
        for number, value in enumerate(fragments.elements(total)):
            place = arith.addi(utils.thread_idx(), mlir.i32_constant(128 * number))
            llvm.store(value, mlir.at(utils.memref_ptr(refs["found"]), place, value.type))

    registers = [register * arithmetic.TOTAL_SCALE for register in parts[0].registers()] + parts[1].registers()
    emitter.run(emit, {}, registers)
    scale = of_channels[16:].astype(np.float64)[:, None] * of_tokens
    parts[0].values = totals + (dots - 128.0 * code_sums[16:][:, None]) * scale
    found = emitter.memory.get("found")[0].reshape(len(registers) // 2, 128)
    np.testing.assert_allclose(found, np.stack(parts[0].registers()), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "dtype", "order", "others"), CASES, ids=str)
def test_splitting_kernel(tokens: int, dtype: str, order: str, others: dict[str, Any], splits: int, direct_calls: None):
    """Sums of the other warpgroups through shared memory, then straight from the registers."""
    from pallas_kernels.mixed_matmul.mosaic_gpu import fragments
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import store, sums

    part = make_part(tokens, dtype, order, **others)
    size = 64 * tokens
    arrays = arrays_of(part, columns=256) | {"sums": np.zeros(max(1, splits - 1) * size, np.float32)}
    emitter = Emitter(128, arrays)
    scalars = {"first_row": part.first_row, "first_token": part.first_token}
    shares = [np.float32(share) for share in (0.5, 0.25, 0.25)][:splits] if splits > 1 else [np.float32(1)]
    for number in range(splits - 1):

        def push(refs: dict[str, Any], values: list[Any]) -> None:
            total = fragments.fragment(values, tokens)
            sums.push_sums(total, refs["sums"], Scalar(refs["first"]), remote=number == 0)  # noqa: B023

        registers = [values * shares[number + 1] for values in part.registers()]
        emitter.run(push, {"first": number * size}, registers)

    def finish(refs: dict[str, Any], values: list[Any]) -> None:
        total = fragments.fragment(values, tokens)
        first_row, first_token = Scalar(refs["first_row"]), Scalar(refs["first_token"])
        store.fetch_columns(refs["order"], refs["columns"], first_row, part.rows, part.order_start)
        firsts = [Scalar(refs[f"first{number}"]) for number in range(splits - 1)]
        total = sums.add_sums(total, refs["sums"], firsts) if firsts else total
        store.store_tile(total, refs["columns"], first_row, first_token, part.rows, refs.get("bias"), refs["out"])

    firsts = {f"first{number}": number * size for number in range(splits - 1)}
    emitter.run(finish, scalars | firsts, [values * shares[0] for values in part.registers()])
    part.check(*emitter.memory.get("out"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "threads"),
    # In the second a thread takes pieces again and again, and the last time nothing is left for some lanes.
    [((1, 4, 0, 128), 128), ((7, 25, 3, 128), 256), ((8, 16, 16, 64), 384), ((5, 20, 0, 32), 128)],
    ids=str,
)
def test_quantising_within_the_matmul(sizes: tuple[int, int, int, int], threads: int, dtype: str, direct_calls: None):
    """Codes where the swizzle of `wgmma` wants them, and scales; rows of tokens that do not exist stay as they are."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.split import quantize

    tokens, groups, first_group, size = sizes
    tile_tokens = 8
    rng = np.random.default_rng(sizes)
    x = rng.standard_normal((tokens, (groups + first_group) * size)).astype(DTYPES[dtype])
    x[0, first_group * size :][:size] = 0
    arrays = {
        "x": x,
        "codes": np.zeros((groups, tile_tokens, size), np.int32).astype(np.int8),
        "scales": np.zeros(groups * tile_tokens, np.float32),
    }
    emitter = Emitter(threads, arrays)

    def emit(refs: dict[str, Any], values: list[Any]) -> None:
        shapes = {name: Shaped(refs[name], array.shape) for name, array in arrays.items()}
        quantize.quantize(*shapes.values(), first_group, threads=threads)

    emitter.run(emit, {}, [])
    # scale = absmax / 127, codes = round-half-even(x / scale), in float32.
    by_group = x.astype(np.float32).reshape(tokens, -1, size).transpose(1, 0, 2)[first_group:]
    expected_scales = np.abs(by_group).max(axis=2) / np.float32(127)
    expected_codes = np.rint(by_group / np.where(expected_scales > 0, expected_scales, 1)[..., None])
    codes, code_stores = emitter.memory.get("codes")
    scales, _ = emitter.memory.get("scales")
    np.testing.assert_array_equal(scales.reshape(groups, tile_tokens)[:, :tokens], expected_scales)
    # PTX ISA, "Swizzling modes": of a row at byte a, bits 7 and up of a turn the 16-byte pieces around.
    rows = np.arange(groups * tile_tokens)[:, None]
    piece = np.arange(size // 16)[None] ^ (rows * size // 128 % (size // 16))
    unswizzled = codes.reshape(-1, size // 16, 16)[rows, piece].reshape(groups, tile_tokens, size)
    np.testing.assert_array_equal(unswizzled[:, :tokens], expected_codes)
    assert (code_stores.reshape(groups, tile_tokens, size)[:, :tokens] > 0).all()
    assert (code_stores.reshape(groups, tile_tokens, size)[:, tokens:] == 0).all()
