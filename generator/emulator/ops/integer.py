"""Integer arithmetic, logic, shifts and bit fields, lane by lane (PTX ISA 9.1 §9.7.1, §9.7.2, §9.7.8, §9.7.9.7)."""

from __future__ import annotations

import numpy as np

from ..table import alu, effect

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S16, S32, S64, F64 = np.int16, np.int32, np.int64, np.float64


# -- integers, §9.7.1 -------------------------------------------------------------------------------------------------
for _types, _kind in (("u16,s16", "h"), ("u32,s32", "u"), ("u64,s64", "U")):
    alu(f"add.{{{_types}}}", f"{_kind}={_kind},{_kind}", "9.7.1.1")(np.add)
    alu(f"sub.{{{_types}}}", f"{_kind}={_kind},{_kind}", "9.7.1.2")(np.subtract)
    alu(f"mul.lo.{{{_types}}}", f"{_kind}={_kind},{_kind}", "9.7.1.3")(np.multiply)


@alu("mad.lo.{u32,s32}", "u=u,u,u", "9.7.1.4")
@alu("mad.lo.{u64,s64}", "U=U,U,U", "9.7.1.4")
@alu("mad.lo.{u16,s16}", "h=h,h,h", "9.7.1.4")
def mad_lo(a, b, c):
    return a * b + c


@alu("mul.hi.u32", "u=u,u", "9.7.1.3")
def mul_hi_u32(a, b):
    return (np.multiply(a, b, dtype=U64) >> U64(32)).astype(U32)


@alu("mul.hi.s32", "s=s,s", "9.7.1.3")
def mul_hi_s32(a, b):
    return (np.multiply(a, b, dtype=S64) >> S64(32)).astype(S32)


@alu("mul.hi.u16", "h=h,h", "9.7.1.3")
def mul_hi_u16(a, b):
    return (np.multiply(a, b, dtype=U32) >> U32(16)).astype(U16)


@alu("mul.hi.s16", "i=i,i", "9.7.1.3")
def mul_hi_s16(a, b):
    return (np.multiply(a, b, dtype=S32) >> S32(16)).astype(np.int16)


@alu("mul.hi.u64", "U=U,U", "9.7.1.3")
def mul_hi_u64(a, b):
    low = U64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> U64(32), b & low, b >> U64(32)
    middle = a1 * b0 + (a0 * b0 >> U64(32))
    return a1 * b1 + (middle >> U64(32)) + ((middle & low) + a0 * b1 >> U64(32))


@alu("mul.hi.s64", "S=S,S", "9.7.1.3")
def mul_hi_s64(a, b):
    unsigned = mul_hi_u64(a.view(U64), b.view(U64)).view(S64)
    return unsigned - np.where(a < 0, b, S64(0)) - np.where(b < 0, a, S64(0))


@alu("mul.wide.u16", "u=h,h", "9.7.1.3")
def mul_wide_u16(a, b):
    return np.multiply(a, b, dtype=U32)


@alu("mul.wide.s16", "s=i,i", "9.7.1.3")
def mul_wide_s16(a, b):
    return np.multiply(a, b, dtype=S32)


@alu("mul.wide.u32", "U=u,u", "9.7.1.3")
def mul_wide_u32(a, b):
    return np.multiply(a, b, dtype=U64)


@alu("mul.wide.s32", "S=s,s", "9.7.1.3")
def mul_wide_s32(a, b):
    return np.multiply(a, b, dtype=S64)


@alu("mad.wide.u32", "U=u,u,U", "9.7.1.4")
def mad_wide_u32(a, b, c):
    return np.multiply(a, b, dtype=U64) + c


@alu("mad.wide.s32", "S=s,s,S", "9.7.1.4")
def mad_wide_s32(a, b, c):
    return np.multiply(a, b, dtype=S64) + c


def _quotient(a, b):
    """C's division: toward zero; a zero divisor gives all ones, as the hardware does."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, b.dtype.type(-1 if b.dtype.kind == "i" else np.iinfo(b.dtype).max), q.astype(a.dtype))


def _remainder(a, b):
    """C's remainder; a zero divisor gives all ones, as the hardware does."""
    quotient = _quotient(a, b)
    return np.where(b == 0, quotient, a - quotient * b)


for _type, _kind in (("u32", "u"), ("s32", "s"), ("u64", "U"), ("s64", "S"), ("u16", "h"), ("s16", "i")):
    _sig = f"{_kind}={_kind},{_kind}"
    alu(f"div.{_type}", _sig, "9.7.1.8")(_quotient)
    alu(f"rem.{_type}", _sig, "9.7.1.9")(_remainder)
    alu(f"min.{_type}", _sig, "9.7.1.12")(np.minimum)
    alu(f"max.{_type}", _sig, "9.7.1.13")(np.maximum)
    if _type[0] == "s":
        alu(f"neg.{_type}", f"{_kind}={_kind}", "9.7.1.11")(np.negative)
        alu(f"abs.{_type}", f"{_kind}={_kind}", "9.7.1.10")(np.abs)


# -- saturating, 24-bit and packed forms -------------------------------------------------------------------------------
def _clamped(f):
    """A signed 32-bit operation, computed in 64 bits, that stops at the ends of its range (.sat)."""
    return lambda *args: np.clip(f(*(x.astype(S64) for x in args)), -(2**31), 2**31 - 1).astype(S32)


alu("add.sat.s32", "s=s,s", "9.7.1.1")(_clamped(np.add))
alu("sub.sat.s32", "s=s,s", "9.7.1.2")(_clamped(np.subtract))
alu("mad.hi.sat.s32", "s=s,s,s", "9.7.1.4")(_clamped(lambda a, b, c: (a * b >> S64(32)) + c))

for _type, _kind, _f in (
    ("u16", "h", mul_hi_u16),
    ("s16", "i", mul_hi_s16),
    ("u32", "u", mul_hi_u32),
    ("s32", "s", mul_hi_s32),
    ("u64", "U", mul_hi_u64),
    ("s64", "S", mul_hi_s64),
):
    alu(f"mad.hi.{_type}", f"{_kind}={_kind},{_kind},{_kind}", "9.7.1.4")(lambda a, b, c, f=_f: f(a, b) + c)
    alu(f"sad.{_type}", f"{_kind}={_kind},{_kind},{_kind}", "9.7.1.7")(
        lambda a, b, c: np.where(a < b, b - a, a - b) + c
    )


@alu("mad.wide.u16", "u=h,h,u", "9.7.1.4")
def mad_wide_u16(a, b, c):
    return np.multiply(a, b, dtype=U32) + c


@alu("mad.wide.s16", "s=i,i,s", "9.7.1.4")
def mad_wide_s16(a, b, c):
    return np.multiply(a, b, dtype=S32) + c


def _product24(a, b, part: str):
    """The 48-bit product of the low 24 bits; `lo` its low 32 bits, `hi` the bits 16 to 47."""
    if a.dtype.kind == "i":
        a, b = ((x.astype(S64) << S64(40)) >> S64(40) for x in (a, b))
    else:
        a, b = (x.astype(U64) & U64(0xFFFFFF) for x in (a, b))
    product = a * b
    return product if part == "lo" else product >> product.dtype.type(16)


for _type, _kind, _dtype in (("u32", "u", U32), ("s32", "s", S32)):
    for _part in ("lo", "hi"):
        alu(f"mul24.{_part}.{_type}", f"{_kind}={_kind},{_kind}", "9.7.1.5")(
            lambda a, b, part=_part, dtype=_dtype: _product24(a, b, part).astype(dtype)
        )
        alu(f"mad24.{_part}.{_type}", f"{_kind}={_kind},{_kind},{_kind}", "9.7.1.6")(
            lambda a, b, c, part=_part, dtype=_dtype: _product24(a, b, part).astype(dtype) + c
        )
alu("mad24.hi.sat.s32", "s=s,s,s", "9.7.1.6")(_clamped(lambda a, b, c: _product24(a, b, "hi") + c))


def halves(f, dtype):
    """A function of 16-bit values → the same on both halves of 32-bit registers."""

    def run(*words):
        low = f(*(np.asarray(w).astype(U16).view(dtype) for w in words)).view(U16)
        high = f(*((np.asarray(w) >> U32(16)).astype(U16).view(dtype) for w in words)).view(U16)
        return (high.astype(U32) << U32(16)) | low

    return run


def _not_negative(f):
    """.relu"""
    return lambda a, b: np.maximum(f(a, b), a.dtype.type(0))


for _type, _dtype in (("u16x2", U16), ("s16x2", S16)):
    alu(f"add.{_type}", "u=u,u", "9.7.1.1")(halves(np.add, _dtype))
    for _name, _f, _isa in (("min", np.minimum, "9.7.1.12"), ("max", np.maximum, "9.7.1.13")):
        alu(f"{_name}.{_type}", "u=u,u", _isa)(halves(_f, _dtype))
        if _type == "s16x2":
            alu(f"{_name}.relu.s16x2", "u=u,u", _isa)(halves(_not_negative(_f), S16))


@alu("min.relu.s32", "s=s,s", "9.7.1.12")
def min_relu_s32(a, b):
    return np.maximum(np.minimum(a, b), S32(0))


@alu("max.relu.s32", "s=s,s", "9.7.1.13")
def max_relu_s32(a, b):
    return np.maximum(np.maximum(a, b), S32(0))


# -- logic and shifts, §9.7.8 -----------------------------------------------------------------------------------------
for _bits, _kind in (("b16", "h"), ("b32", "u"), ("b64", "U"), ("pred", "p")):
    alu(f"and.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.1")(np.bitwise_and)
    alu(f"or.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.2")(np.bitwise_or)
    alu(f"xor.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.3")(np.bitwise_xor)
    alu(f"not.{_bits}", f"{_kind}={_kind}", "9.7.8.4")(np.logical_not if _kind == "p" else np.invert)
    if _kind != "p":
        alu(f"cnot.{_bits}", f"{_kind}={_kind}", "9.7.8.5")(lambda a: (a == 0).astype(a.dtype))


def _shift(operation, clamp):
    """A shift whose count is clamped to the width (§9.7.8.8, §9.7.8.9): `clamp(x)` is the value at any larger count."""

    def shift(a, count):
        width = a.dtype.itemsize * 8
        over = count >= width
        if not np.any(over):
            return operation(a, count.astype(a.dtype))
        inside = operation(a, np.where(over, 0, count).astype(a.dtype))
        return np.where(over, clamp(a), inside)

    return shift


_zero = np.zeros_like
for _bits, _kind in (("b16", "h"), ("b32", "u"), ("b64", "U")):
    alu(f"shl.{_bits}", f"{_kind}={_kind},u", "9.7.8.8")(_shift(np.left_shift, _zero))
for _types, _kind in (("{u16,b16}", "h"), ("{u32,b32}", "u"), ("{u64,b64}", "U")):
    alu(f"shr.{_types}", f"{_kind}={_kind},u", "9.7.8.9")(_shift(np.right_shift, _zero))
for _type, _kind in (("s16", "i"), ("s32", "s"), ("s64", "S")):
    alu(f"shr.{_type}", f"{_kind}={_kind},u", "9.7.8.9")(
        _shift(np.right_shift, lambda a: np.where(a < 0, a.dtype.type(-1), a.dtype.type(0)))
    )


@alu("lop3.b32", "u=u,u,u,k", "9.7.8.6")
def lop3(a, b, c, table):
    result = U32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _lop3_test(combine):
    """lop3.and, lop3.or: also p = (d != 0) combined with q."""

    def run(m, ws, active, instr, a, b, c, table, q):
        result = lop3(a, b, c, table)
        return result, combine(result != 0, q)

    return run


effect("lop3.and.b32", "u,p=u,u,u,k,p", "9.7.8.6")(_lop3_test(np.logical_and))
effect("lop3.or.b32", "u,p=u,u,u,k,p", "9.7.8.6")(_lop3_test(np.logical_or))
