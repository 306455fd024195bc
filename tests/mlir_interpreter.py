"""Runs what a thread block does with its registers, as the kernels emit it in MLIR, with NumPy on a CPU.

All threads go in lockstep, a value is an array over them. So what is seen is what each thread computes, loads and
stores, not whether it waits for the others. Only what the kernels use is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from jaxlib.mlir import ir

DTYPES = {
    "i1": np.dtype(bool),
    "i16": np.dtype(np.uint16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "index": np.dtype(np.int64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
}


def dtype_of(kind: Any) -> np.dtype:
    """Of the elements of an MLIR type; a pointer is an address."""
    text = str(kind)
    text = re.sub(r"vector<\d+x(\w+)>", r"\1", text)
    return np.dtype(np.int64) if text.startswith("!llvm.ptr") else DTYPES[text]


class Memory:
    """Arrays at addresses of one memory, and how often each byte was stored."""

    def __init__(self) -> None:
        self.bytes, self.stores, self.places = np.zeros(0, np.uint8), np.zeros(0, int), {}

    def put(self, name: str, array: np.ndarray) -> int:
        """Add an array at a multiple of 1024 bytes, behind a gap that belongs to none; returns its address."""
        address = (len(self.bytes) // 1024 + 2) * 1024
        grown = np.zeros(address + array.nbytes, np.uint8)
        grown[: len(self.bytes)] = self.bytes
        grown[address:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.bytes, self.stores = grown, np.zeros(len(grown), int)
        self.places[name] = address, array.shape, array.dtype
        return address

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """An array, and how often each element was stored."""
        address, shape, dtype = self.places[name]
        span = slice(address, address + int(np.prod(shape)) * dtype.itemsize)
        stores = self.stores[span].reshape(-1, dtype.itemsize)
        assert (stores == stores[:, :1]).all()
        return self.bytes[span].view(dtype).reshape(shape), stores[:, 0].reshape(shape)

    def _places(self, address: np.ndarray, nbytes: int) -> np.ndarray:
        places = address[:, None] + np.arange(nbytes)
        assert (address % nbytes == 0).all(), "an access that is not aligned"
        inside = np.zeros(places.shape, bool)
        for start, shape, dtype in self.places.values():
            inside |= (places >= start) & (places < start + int(np.prod(shape)) * dtype.itemsize)
        assert inside.all(), "an access outside of all arrays"
        return places

    def load(self, address: np.ndarray, mask: np.ndarray, dtype: np.dtype, lanes: int = 1) -> np.ndarray:
        """Loads by the threads of the mask: `[threads]`, or `[threads, lanes]`."""
        out = np.zeros((len(mask), lanes * dtype.itemsize), np.uint8)
        out[mask] = self.bytes[self._places(address[mask], out.shape[1])]
        values = out.view(dtype)
        return values[:, 0] if lanes == 1 else values

    def store(self, address: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        """Stores by the threads of the mask."""
        raw = np.ascontiguousarray(values.reshape(len(mask), -1)).view(np.uint8)
        places = self._places(address[mask], raw.shape[1])
        self.bytes[places] = raw[mask]
        np.add.at(self.stores, places, 1)


class Interpreter:
    """Runs the body of a function.

    Args:
        memory: Global and shared memory in one.
        threads: Of the block.
    """

    def __init__(self, memory: Memory, threads: int) -> None:
        self.memory, self.threads, self.values = memory, threads, {}

    def run(self, block: ir.Block, arguments: list[Any], mask: np.ndarray) -> None:
        """Run a block with arguments (arrays over the threads, or numbers), for the threads of the mask."""
        for value, argument in zip(block.arguments, arguments, strict=True):
            self.values[value] = np.broadcast_to(argument, (self.threads,))
        for operation in block.operations:
            op = operation.operation
            operands = [self.values[operand] for operand in op.operands]
            result = self.execute(op, operands, mask)
            if len(op.results) == 1 and result is not None:
                self.values[op.results[0]] = result

    def execute(self, op: Any, operands: list[Any], mask: np.ndarray) -> Any:
        """The result of one operation."""
        name = op.name
        kind = op.results[0].type if len(op.results) else None
        if name in SIMPLE:
            result = SIMPLE[name](*operands)
            is_wide = isinstance(result, np.ndarray) and result.dtype != bool
            return result.astype(dtype_of(kind)) if is_wide else result
        if name == "arith.constant":
            return np.full(self.threads, op.attributes["value"].value, dtype_of(kind))
        if name == "arith.cmpi":
            compare = {0: np.equal, 2: np.less, 6: lambda a, b: a.astype(np.uint32) < b.astype(np.uint32)}
            return compare[op.attributes["predicate"].value](*operands)
        if name == "arith.cmpf":
            return {2: np.greater, 4: np.less}[op.attributes["predicate"].value](*operands)
        if name in ("arith.bitcast", "llvm.bitcast", "vector.bitcast"):
            values = operands[0] if operands[0].ndim == 2 else operands[0][:, None]
            cast = np.ascontiguousarray(values).view(dtype_of(kind))
            return cast if name == "vector.bitcast" else cast[:, 0]
        if name == "vector.extract":
            vector = operands[0] if operands[0].ndim == 2 else operands[0][:, None]
            return vector[:, op.attributes["static_position"][0]]
        if name == "vector.from_elements":
            return np.stack(operands, axis=1)
        if name == "vector.broadcast":
            return operands[0][:, None]
        if name == "builtin.unrealized_conversion_cast":  # a reference: base, aligned base, offset
            return (operands[0], operands[0], np.zeros(self.threads, np.int64))
        if name == "llvm.extractvalue":
            return operands[0][op.attributes["position"][0]]
        if name == "llvm.getelementptr":
            [index] = op.attributes["rawConstantIndices"]
            offset = operands[1].astype(np.int64) if index == -(2**31) else index
            return operands[0] + offset * dtype_of(op.attributes["elem_type"].value).itemsize
        if name == "llvm.load":
            lanes = kind.shape[0] if isinstance(kind, ir.VectorType) else 1
            return self.memory.load(operands[0], mask, dtype_of(kind), lanes)
        if name == "llvm.store":
            return self.memory.store(operands[1], operands[0], mask)
        if name in ("gpu.thread_id", "gpu.block_dim"):
            is_x = "x" in str(op.attributes["dimension"])
            if name == "gpu.block_dim":
                return np.full(self.threads, self.threads if is_x else 1)
            return np.arange(self.threads) if is_x else np.zeros(self.threads, np.int64)
        if name == "nvvm.shfl.sync":
            warp = np.arange(self.threads) // 32 * 32
            lane = np.arange(self.threads) % 32
            return operands[1][warp + (lane ^ operands[2] if "bfly" in str(op) else operands[2] % 32)]
        if name == "nvvm.vote.sync":
            return np.repeat(operands[1].reshape(-1, 32).all(axis=1), 32)
        if name == "scf.if":
            for region, condition in zip(op.regions, (operands[0], ~operands[0]), strict=True):
                for block in region:
                    self.run(block, [], mask & condition)
            return None
        if name == "scf.for":
            lower, upper, step = (int(np.unique(operand).item()) for operand in operands)
            for index in range(lower, upper, step):
                self.run(op.regions[0].blocks[0], [np.int32(index)], mask)
            return None
        if name == "llvm.inline_asm":
            return self.assembly(op.attributes["asm_string"].value, operands, mask)
        if name in ("scf.yield", "func.return"):
            return None
        raise NotImplementedError(str(op))

    def assembly(self, text: str, operands: list[Any], mask: np.ndarray) -> Any:
        """The PTX that the output paths have."""
        text = re.sub(r"\s*(\.reg \.b32 a;|mapa\.shared::cluster\.u32 a, \$0, 0;)\s*", "", text).strip("{ }")
        text = text.replace("[a]", "[$0]").replace("::cluster", "")
        if match := re.fullmatch(r"@\$(\d+) st\.global\.(?:v\d\.)?b\d+ \[\$0(?:\+(\d+))?\], (.*);", text):
            values = np.stack(operands[1 : int(match[1])], axis=1)
            return self.memory.store(operands[0] + int(match[2] or 0), values, mask & operands[int(match[1])])
        if re.fullmatch(r"st\.shared\.v4\.\w+ \[\$0\], .*;", text):
            return self.memory.store(operands[0], np.stack(operands[1:], axis=1), mask)
        if re.fullmatch(r"ld\.shared\.v4\.f32 .*, \[\$4\];", text):
            return list(self.memory.load(operands[0], mask, np.dtype(np.float32), 4).T)
        if text == "ld.shared.b32 $0, [$1];":
            return self.memory.load(operands[0], mask, np.dtype(np.int32))
        if match := re.fullmatch(r"cp\.async\.ca\.shared\.global \[\$0(?:\+(\d+))?\], \[\$1\], 4;", text):
            values = self.memory.load(operands[1], mask, np.dtype(np.int32))
            return self.memory.store(operands[0] + int(match[1] or 0), values, mask)
        if text == "prmt.b32 $0, $1, $2, $3;":
            both = np.stack(operands[:2], axis=1).view(np.uint8)
            nibbles = operands[2][:, None] >> np.arange(0, 16, 4) & 7
            return np.ascontiguousarray(np.take_along_axis(both, nibbles, axis=1)).view(np.int32)[:, 0]
        if match := re.fullmatch(r"@\$2 st\.shared\.f32 \[\$0\], \$1;", text):
            return self.memory.store(operands[0], operands[1], mask & operands[2])
        if text == "div.rn.f32 $0, $1, 0f42FE0000;":
            return operands[0] / np.float32(127)
        if text == "rcp.rn.f32 $0, $1;":
            return np.float32(1) / operands[0]
        if "prmt.b32 $0, a, b, 0x5410;" in text:  # the low bytes of four words
            return np.ascontiguousarray(np.stack(operands, axis=1).astype(np.uint8)).view(np.int32)[:, 0]
        if text == "mov.u32 $0, %tid.x;":
            return np.arange(self.threads, dtype=np.int32)
        if text.startswith(("cp.async.wait_all", "bar.sync", "fence.proxy")):
            return None
        raise NotImplementedError(text)


SIMPLE: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add,
    "llvm.add": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "llvm.mul": np.multiply,
    "arith.andi": np.bitwise_and,
    "arith.xori": np.bitwise_xor,
    "arith.shrui": lambda a, b: (a.astype(np.uint32) >> b.astype(np.uint32)).astype(np.int32),
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.minsi": np.minimum,
    "arith.minui": np.minimum,
    "arith.addf": np.add,
    "arith.mulf": np.multiply,
    "arith.negf": np.negative,
    "arith.maximumf": np.maximum,
    "math.absf": np.abs,
    # A product of two floats is exact in 53 bits, their sum rounded twice at worst.
    "math.fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "arith.shli": lambda a, b: (a.astype(np.uint32) << b.astype(np.uint32)).astype(np.int32),
    "arith.select": np.where,
    **dict.fromkeys(("arith.extsi", "arith.extui", "arith.index_cast", "arith.truncf", "arith.extf"), lambda a: a),
    **dict.fromkeys(("llvm.ptrtoint", "llvm.inttoptr", "llvm.addrspacecast"), lambda a: a),
    "arith.trunci": lambda a: a & 0xFFFF,
    "nvvm.barrier": lambda *_: None,
    "gpu.barrier": lambda *_: None,
}
"""Operations on each thread's values."""
