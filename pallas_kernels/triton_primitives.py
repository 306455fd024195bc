"""What the Triton kernels need below the level of Pallas: a batched int8 dot and a few instructions of PTX.

What is private to JAX's Triton backend is used in this module alone. Each primitive is lowered to Triton on the GPU and
to `jax.numpy` elsewhere, so that the kernels run in interpret mode on a CPU, where inline assembly does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax._src.lib import triton as _triton
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import gpu as _gpu
from jax._src.pallas.triton import lowering as _lowering
from jax.interpreters import mlir

MAGIC = 12582912.0
"""1.5 * 2**23. Its bits as an integer are `MAGIC_BITS`, and adding an integer below 2**22 in magnitude to the bits adds
it to the float: an int32 accumulator that starts at `MAGIC_BITS` is converted by reading its bits as a float32."""
MAGIC_BITS = 0x4B400000


def _primitive(name: str, reference: Callable[..., jax.Array], triton: Callable[..., Any]) -> Any:
    """A primitive that is `reference` in JAX, and `triton(context, *values)` inside a Triton kernel."""
    primitive = jax.extend.core.Primitive(f"mixllm_{name}")
    primitive.def_impl(reference)

    @primitive.def_abstract_eval
    def _abstract(*avals: Any) -> Any:
        out = jax.eval_shape(reference, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals))
        return jax.core.ShapedArray(out.shape, out.dtype)

    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=False))
    _lowering.register_lowering(primitive)(triton)
    return primitive


def _out_type(ctx: Any) -> ir.Type:
    [aval] = ctx.avals_out
    return ir.RankedTensorType.get(aval.shape, _lowering._dtype_to_ir_type(aval.dtype))


def _inline_asm(asm: str, constraints: str, pack: int) -> Callable[..., Any]:
    """Lowering to elementwise PTX; each instance takes `pack` neighbouring elements of every argument."""

    def lower(ctx: Any, *args: ir.Value) -> Any:
        return _triton.dialect.elementwise_inline_asm(
            [_out_type(ctx)], asm, constraints=constraints, pure=True, packed_element=pack, args=list(args)
        )

    return lower


def _int8_dot_reference(a: jax.Array, b: jax.Array) -> jax.Array:
    batch = ((0,), (0,)) if a.ndim == 3 else ((), ())
    return jax.lax.dot_general(a, b, (((a.ndim - 1,), (b.ndim - 2,)), batch), preferred_element_type=jnp.int32)


def _int8_dot_triton(ctx: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return _triton.dialect.dot(a, b, _lowering._zeros(_out_type(ctx)))


_int8_dot = _primitive("int8_dot", _int8_dot_reference, _int8_dot_triton)


def int8_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """int8 `[(batch,) rows, k]` x int8 `[(batch,) k, columns]` -> int32 `[(batch,) rows, columns]`.

    Pallas' own dot refuses a batch axis, and fewer than 16 columns. Triton gives each warp its own entries of the batch
    axis, so that the warps of a program can split K among them.
    """
    return _int8_dot.bind(a, b)


def _loads_before_triton(ctx: Any, value: ir.Value) -> ir.Value:
    _gpu.barrier()
    return value


_loads_before = _primitive("loads_before", lambda value: value, _loads_before_triton)


def loads_before(value: jax.Array) -> jax.Array:
    """`value`, behind a barrier that keeps the loads written before it from being put off.

    The PTX assembler moves loads down to their uses to save registers, which leaves few of them in flight.
    """
    return _loads_before.bind(value)


# Both nibble operations work on four codes in a 32-bit register. Setting the top bit of every byte first keeps the
# subtraction of the zero point (0..15) from borrowing across bytes; the final xor clears it as two's complement.
_SUBTRACT = "sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }"
_SELECT = "lop3.b32 t, t, 0x0f0f0f0f, 0x80808080, 0xEA; "  # (t & 0x0f0f0f0f) | 0x80808080

_low_codes = _primitive(
    "low_codes", lambda codes: (codes & 15).astype(jnp.int8), _inline_asm("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", 4)
)
_high_codes = _primitive(
    "high_codes",
    lambda codes: (codes >> 4).astype(jnp.int8),
    _inline_asm("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }", "=r,r", 4),
)


def unpack_codes(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs of 4-bit codes, uint8: the low and the high ones as int8, 0..15."""
    return _low_codes.bind(codes), _high_codes.bind(codes)


_low_nibbles = _primitive(
    "low_nibbles",
    lambda codes, zero_points: ((codes & 15) - zero_points).astype(jnp.int8),
    _inline_asm("{ .reg .b32 t; mov.b32 t, $1; " + _SELECT + _SUBTRACT, "=r,r,r", 4),
)
_high_nibbles = _primitive(
    "high_nibbles",
    lambda codes, zero_points: ((codes >> 4) - zero_points).astype(jnp.int8),
    _inline_asm("{ .reg .b32 t; shr.u32 t, $1, 4; " + _SELECT + _SUBTRACT, "=r,r,r", 4),
)


def subtract_zero_points(codes: jax.Array, zero_points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs of 4-bit codes, uint8, minus their zero points, uint8 of the same shape: the low and high ones as int8."""
    return _low_nibbles.bind(codes, zero_points), _high_nibbles.bind(codes, zero_points)


_fma = _primitive("fma", lambda a, b, c: a * b + c, _inline_asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1))
_divide = _primitive("divide", lambda a, b: a / b, _inline_asm("div.rn.f32 $0, $1, $2;", "=f,f,f", 1))


def scale_magic(accumulator: jax.Array, scale: jax.Array) -> jax.Array:
    """(accumulator - MAGIC_BITS) * scale in float32, in one instruction an element.

    Args:
        accumulator: int32, `MAGIC_BITS` + an integer below 2**22 in magnitude.
        scale: float32 with at most 11 significant bits (a float16), broadcast against `accumulator`: then MAGIC * scale
            is exact, and the fused multiply-add rounds once, just like the product of the integer and the scale.
    """
    shape = jnp.broadcast_shapes(accumulator.shape, scale.shape)
    value = jax.lax.bitcast_convert_type(accumulator, jnp.float32)
    return _scale_magic.bind(value, jnp.broadcast_to(scale, shape), jnp.broadcast_to(-MAGIC * scale, shape))


# Without a fused multiply-add, value * scale + offset would lose the low bits; subtracting first is exact.
_scale_magic = _primitive(
    "scale_magic",
    lambda value, scale, offset: (value - MAGIC) * scale,
    _inline_asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1),
)


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """A * b + c in float32, rounded once on the GPU; `b` and `c` are broadcast."""
    return _fma.bind(a, jnp.broadcast_to(b, a.shape), jnp.broadcast_to(c, a.shape))


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """A / b in float32, correctly rounded (Triton's own division is off by up to 2 ulp); `b` is broadcast."""
    return _divide.bind(a, jnp.broadcast_to(b, a.shape))


# x / (1 + exp(-x)); as Triton writes it, the special cases of the exponential and the division cost 20 instructions.
_silu = _primitive(
    "silu",
    lambda x: x / (1.0 + jnp.exp(-x)),
    _inline_asm(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }",
        "=f,f",
        1,
    ),
)


def silu(x: jax.Array) -> jax.Array:
    """X / (1 + exp(-x)) in float32, with a relative error of some 2**-22 and 2**-23 |x| on the GPU."""
    return _silu.bind(x)


def round_to_int(x: jax.Array, offset: int = 0) -> jax.Array:
    """float32 below 2**21 in magnitude, rounded half to even, plus an even `offset` below 2**21, as int32."""
    return jax.lax.bitcast_convert_type(x + (MAGIC + offset), jnp.int32) - MAGIC_BITS


def round_to_int8(x: jax.Array) -> jax.Array:
    """float32 within -127..127, rounded half to even."""
    return round_to_int(x).astype(jnp.int8)
