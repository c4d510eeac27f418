"""Per-lane arithmetic, comparison, logic and conversion (PTX ISA 9.1 §9.7.1 to §9.7.9)."""

from __future__ import annotations

import numpy as np

from ..formats import F32_TINY, bf16_bits, bf16_to_f32, f16_bits, f16_to_f32, flush, pack16, round_toward
from ..table import BITS, alu

U16, U32, U64 = np.uint16, np.uint32, np.uint64
S32, S64, F32, F64 = np.int32, np.int64, np.float32, np.float64


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
    return np.where(b == 0, a, a - _quotient(a, b) * b)


for _type, _kind in (("u32", "u"), ("s32", "s"), ("u64", "U"), ("s64", "S"), ("u16", "h"), ("s16", "i")):
    _sig = f"{_kind}={_kind},{_kind}"
    alu(f"div.{_type}", _sig, "9.7.1.8")(_quotient)
    alu(f"rem.{_type}", _sig, "9.7.1.9")(_remainder)
    alu(f"min.{_type}", _sig, "9.7.1.12")(np.minimum)
    alu(f"max.{_type}", _sig, "9.7.1.13")(np.maximum)
    if _type[0] == "s":
        alu(f"neg.{_type}", f"{_kind}={_kind}", "9.7.1.11")(np.negative)
        alu(f"abs.{_type}", f"{_kind}={_kind}", "9.7.1.10")(np.abs)


# -- logic and shifts, §9.7.8 -----------------------------------------------------------------------------------------
for _bits, _kind in (("b16", "h"), ("b32", "u"), ("b64", "U"), ("pred", "p")):
    alu(f"and.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.1")(np.bitwise_and)
    alu(f"or.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.2")(np.bitwise_or)
    alu(f"xor.{_bits}", f"{_kind}={_kind},{_kind}", "9.7.8.3")(np.bitwise_xor)
    alu(f"not.{_bits}", f"{_kind}={_kind}", "9.7.8.4")(np.logical_not if _kind == "p" else np.invert)


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


@alu("shf.l.wrap.b32", "u=u,u,u", "9.7.8.7")
def shf_l_wrap(a, b, c):
    both = (b.astype(U64) << U64(32)) | a
    return ((both << (c & U32(31)).astype(U64)) >> U64(32)).astype(U32)


@alu("shf.r.wrap.b32", "u=u,u,u", "9.7.8.7")
def shf_r_wrap(a, b, c):
    both = (b.astype(U64) << U64(32)) | a
    return (both >> (c & U32(31)).astype(U64)).astype(U32)


@alu("lop3.b32", "u=u,u,u,k", "9.7.8.6")
def lop3(a, b, c, table):
    result = U32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


@alu("prmt.b32", "u=u,u,u", "9.7.9.7")
def prmt(a, b, selector):
    both = (b.astype(U64) << U64(32)) | a
    result = U32(0)
    for i in range(4):
        code = (selector >> U32(4 * i)) & U32(15)
        byte = ((both >> ((code & U32(7)) * U32(8)).astype(U64)) & U64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        result = result | (np.where(code & U32(8), sign, byte) << U32(8 * i))
    return result


# -- float32, §9.7.3 --------------------------------------------------------------------------------------------------
def _sum(a, b):
    """Two float64 arrays → their rounded sum and its exact error (Knuth's two-sum)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def fma(a, b, c):
    """float32 fused multiply-add, rounded once.

    The product is exact in float64. Rounding the sum to float64 first goes wrong only where that lands on a midpoint of
    float32, or where the result is subnormal: there the sum is rounded to odd, which float32 then rounds rightly.
    """
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    result = total.astype(F32)
    midpoint = (total.view(S64) << S64(35)).min() == np.iinfo(S64).min
    if midpoint or ((result.view(U32) << U32(1)) - U32(1)).min() < 0x00FFFFFF:
        total, error = _sum(product, c)
        odd = (error != 0) & (total.view(U64) & U64(1) == 0)
        result = np.where(odd, np.nextafter(total, np.copysign(np.inf, error)), total).astype(F32)
    return result


def _flushed(f):
    def run(*args):
        return flush(f(*(flush(a) for a in args)))

    return run


def _directed(name, mode):
    """A float32 operation rounded toward -inf (rm), +inf (rp) or zero (rz): from float64 and its exact error."""

    def run(a, b, c=None):
        a, b = a.astype(F64), b.astype(F64)
        if name == "add" or name == "sub":
            total, error = _sum(a, b if name == "add" else -b)
        elif name == "mul":
            total, error = a * b, F64(0)
        else:
            total, error = _sum(a * b, c.astype(F64))
        result = round_toward(total, mode, error)
        if (
            mode == "rm" and name != "mul"
        ):  # rounding down, a sum that is exactly zero is -0 unless both operands are +0
            first, second = (a * b, c) if name == "fma" else (a, b if name == "add" else -b)
            result = np.where((total == 0) & (np.signbit(first) | np.signbit(second)), F32(-0.0), result)
        return result

    return run


def _abs(x):
    return np.abs(x)


for _name, _f, _n, _isa in (
    ("add", np.add, 2, "9.7.3.3"),
    ("sub", np.subtract, 2, "9.7.3.4"),
    ("mul", np.multiply, 2, "9.7.3.5"),
    ("fma", fma, 3, "9.7.3.6"),
):
    for _suffix, _kind in (("f32", "f"), ("f32x2", "2")):
        _sig = f"{_kind}={','.join(_kind * _n)}"
        _rn = "{,.rn}" if _name != "fma" and _kind == "f" else ".rn"
        alu(f"{_name}{_rn}.{_suffix}", _sig, _isa)(_f)
        alu(f"{_name}{_rn}.ftz.{_suffix}", _sig, _isa)(_flushed(_f))
        for _mode in ("rm", "rp", "rz"):
            alu(f"{_name}.{_mode}.{_suffix}", _sig, _isa)(_directed(_name, _mode))

alu("neg.f32", "f=f", "9.7.3.10")(np.negative)
alu("abs.f32", "f=f", "9.7.3.9")(_abs)
alu("div.rn.f32", "f=f,f", "9.7.3.8")(np.divide)
alu("sqrt.rn.f32", "f=f", "9.7.3.15")(np.sqrt)


alu("div.{full,approx}.f32", "f=f,f", "9.7.3.8")(np.divide)
alu("div.{full,approx}.ftz.f32", "f=f,f", "9.7.3.8")(_flushed(np.divide))


def _ordered_zeros(pick):
    """NumPy takes either zero of two unlike ones; PTX orders -0 below +0: `pick` combines the bits of two zeros."""

    def run(f, a, b):
        r = f(a, b)
        zero = (r == 0) & (a == b)
        return np.where(zero, pick(a.view(U32), b.view(U32)).view(F32), r) if np.any(zero) else r

    return run


_max, _min = _ordered_zeros(np.bitwise_and), _ordered_zeros(np.bitwise_or)


@alu("max.f32", "f=f,f,?f", "9.7.3.12")
def max_f32(a, b, c=None):
    r = _max(np.fmax, a, b)
    return r if c is None else _max(np.fmax, r, c)


@alu("min.f32", "f=f,f,?f", "9.7.3.11")
def min_f32(a, b, c=None):
    r = _min(np.fmin, a, b)
    return r if c is None else _min(np.fmin, r, c)


@alu("max.NaN.f32", "f=f,f,?f", "9.7.3.12")
def max_nan_f32(a, b, c=None):
    r = _max(np.maximum, a, b)
    return r if c is None else _max(np.maximum, r, c)


@alu("min.NaN.f32", "f=f,f,?f", "9.7.3.11")
def min_nan_f32(a, b, c=None):
    r = _min(np.minimum, a, b)
    return r if c is None else _min(np.minimum, r, c)


@alu("ex2.approx.ftz.f32", "f=f", "9.7.3.21")
def ex2_ftz(x):
    result = np.exp2(x)  # a subnormal input gives 1 either way
    small = result < F32_TINY
    return np.where(small, F32(0), result) if small.any() else result


@alu("ex2.approx.f32", "f=f", "9.7.3.21")
def ex2(x):
    return np.exp2(x)


@alu("lg2.approx.f32", "f=f", "9.7.3.20")
def lg2(x):
    return np.log2(x.astype(F64)).astype(F32)


@alu("rcp.rn.f32", "f=f", "9.7.3.13")
def rcp(x):
    return F32(1) / x


@alu("rsqrt.approx.f32", "f=f", "9.7.3.16")
def rsqrt(x):
    return (1.0 / np.sqrt(x.astype(F64))).astype(F32)


alu("lg2.approx.ftz.f32", "f=f", "9.7.3.20")(_flushed(lg2))
alu("rcp.{rn,approx}.ftz.f32", "f=f", "9.7.3.13")(_flushed(rcp))
alu("rsqrt.approx.ftz.f32", "f=f", "9.7.3.16")(_flushed(rsqrt))


@alu("tanh.approx.f32", "f=f", "9.7.3.22")
def tanh(x):
    return np.tanh(x)


@alu("copysign.f32", "f=f,f", "9.7.3.2")
def copysign(a, b):
    return np.copysign(b, a)


# -- comparison and selection, §9.7.6 ---------------------------------------------------------------------------------
def _ordered_ne(a, b):
    return (a < b) | (a > b)


def _unordered(compare):
    def run(a, b):
        return compare(a, b) | np.isnan(a) | np.isnan(b)

    return run


INTEGER_COMPARES = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
FLOAT_COMPARES = {
    **INTEGER_COMPARES,
    "ne": _ordered_ne,
    "equ": _unordered(np.equal),
    "neu": np.not_equal,
    "ltu": _unordered(np.less),
    "leu": _unordered(np.less_equal),
    "gtu": _unordered(np.greater),
    "geu": _unordered(np.greater_equal),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMBINE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
KINDS = {
    "u16": "h",
    "b16": "h",
    "s16": "i",
    "u32": "u",
    "b32": "u",
    "s32": "s",
    "u64": "U",
    "b64": "U",
    "s64": "S",
    "f32": "f",
    "f64": "d",
}


def _on_flushed(compare):
    return lambda a, b: compare(flush(a), flush(b))


def _combined(compare, combine):
    def run(a, b, c):
        return combine(compare(a, b), c)

    run.complement = lambda a, b, c: combine(~compare(a, b), c)  # the second destination, p|q
    return run


for _type, _kind in KINDS.items():
    for _cmp, _f in (FLOAT_COMPARES if _kind in "fd" else INTEGER_COMPARES).items():
        if _type[0] == "b" and _cmp not in ("eq", "ne"):
            continue
        for _ftz, _test in (("", _f), (".ftz", _on_flushed(_f))) if _type == "f32" else (("", _f),):
            alu(f"setp.{_cmp}{_ftz}.{_type}", f"p={_kind},{_kind}", "9.7.6.2")(_test)
            for _bool, _g in COMBINE.items():
                alu(f"setp.{_cmp}.{_bool}{_ftz}.{_type}", f"p={_kind},{_kind},p", "9.7.6.2")(_combined(_test, _g))
    if _type[0] != "s" or _kind in "sSi":
        alu(f"selp.{_type}", f"{_kind}={_kind},{_kind},p", "9.7.6.3")(lambda a, b, p: np.where(p, a, b))


# -- conversion, §9.7.9.21 --------------------------------------------------------------------------------------------
@alu("cvt.rn.bf16x2.f32", "u=f,f", "9.7.9.21")
def cvt_bf16x2(high, low):
    return pack16(bf16_bits(high), bf16_bits(low))


@alu("cvt.rn.f16x2.f32", "u=f,f", "9.7.9.21")
def cvt_f16x2(high, low):
    return pack16(f16_bits(high), f16_bits(low))


alu("cvt.rn.bf16.f32", "h=f", "9.7.9.21")(bf16_bits)
alu("cvt.rn.f16.f32", "h=f", "9.7.9.21")(f16_bits)
alu("cvt.f32.bf16", "f=h", "9.7.9.21")(bf16_to_f32)
alu("cvt.f32.f16", "f=h", "9.7.9.21")(f16_to_f32)

DTYPES = {"h": np.uint16, "i": np.int16, "u": U32, "s": S32, "U": U64, "S": S64, "f": F32, "d": F64}


def _float_to_int(dtype, rounding, ftz):
    """Saturates; NaN becomes 0."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def run(x):
        whole = rounding((flush(x) if ftz else x).astype(F64))
        over, under = (
            whole >= float(high),
            whole <= float(low),
        )  # high of 64 bits is 2^64 in float64: equal is too large
        result = np.where(over | under | np.isnan(whole), 0.0, whole).astype(dtype)
        return np.where(over, dtype(high), np.where(under, dtype(low), result))

    return run


_INTEGERS = {"u8": "h", "s8": "i", "u16": "h", "s16": "i", "u32": "u", "s32": "s", "u64": "U", "s64": "S"}


def _converter(*steps):
    def run(x):
        for dtype in steps:
            x = x.astype(dtype)
        return x

    return run


def _steps(kind):
    """dtypes that take a register to a value of an integer type: an 8-bit one lies in the low byte of 16 bits."""
    return (np.int8 if kind[0] == "s" else np.uint8,) if kind[1:] == "8" else ()


for _to, _tk in _INTEGERS.items():
    for _from, _fk in _INTEGERS.items():
        _all = (*_steps(_from), *_steps(_to), DTYPES[_tk])
        alu(f"cvt.{_to}.{_from}", f"{_tk}={_fk}", "9.7.9.21")(_converter(*_all))
    alu(f"cvt.rn.f32.{_to}", f"f={_tk}", "9.7.9.21")(_converter(*_steps(_to), F32))
    if _to[1:] != "8":
        for _mode, _rounding in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
            for _ftz in ("", ".ftz"):
                _convert = _float_to_int(DTYPES[_tk], _rounding, bool(_ftz))
                alu(f"cvt.{_mode}{_ftz}.{_to}.f32", f"{_tk}=f", "9.7.9.21")(_convert)


# -- bit fields, §9.7.1.16 to §9.7.1.19 --------------------------------------------------------------------------------
@alu("bfe.u32", "u=u,u,u", "9.7.1.19")
def bfe_u32(a, position, length):
    position, length = position & U32(255), length & U32(255)
    shifted = np.where(position > 31, U32(0), a >> np.minimum(position, U32(31)))
    return np.where(length > 31, shifted, shifted & ((U32(1) << np.minimum(length, U32(31))) - U32(1)))


@alu("clz.b32", "u=u", "9.7.1.17")
def clz(a):
    return np.where(a == 0, U32(32), U32(31) - np.log2(np.maximum(a, 1).astype(F64)).astype(U32))


@alu("popc.b32", "u=u", "9.7.1.16")
def popc(a):
    return np.bitwise_count(a).astype(U32)


@alu("brev.b32", "u=u", "9.7.1.18")
def brev(a):
    a = ((a >> U32(1)) & U32(0x55555555)) | ((a & U32(0x55555555)) << U32(1))
    a = ((a >> U32(2)) & U32(0x33333333)) | ((a & U32(0x33333333)) << U32(2))
    a = ((a >> U32(4)) & U32(0x0F0F0F0F)) | ((a & U32(0x0F0F0F0F)) << U32(4))
    return a.byteswap()


assert set(KINDS.values()) <= set(BITS)


@alu("min.relu.s32", "s=s,s", "9.7.1.12")
def min_relu_s32(a, b):
    return np.maximum(np.minimum(a, b), S32(0))


@alu("max.relu.s32", "s=s,s", "9.7.1.13")
def max_relu_s32(a, b):
    return np.maximum(np.maximum(a, b), S32(0))
