"""Conversions, lane by lane (PTX ISA 9.1 §9.7.9.21, §9.7.9.22).

Values go through float64, which holds every other type exactly but 64-bit integers: those are rounded to odd there, so
that the one rounding of the instruction is right.
"""

from __future__ import annotations

import numpy as np

from ..formats import (
    bf16_bits,
    bf16_to_f32,
    decode,
    encode,
    f16_bits,
    f16_to_f32,
    flush,
    flush_to,
    pack16,
    relu,
    round_float,
    saturate,
    sum_exact,
    sum_odd,
)
from ..table import alu

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S32, S64, F32, F64 = np.int32, np.int64, np.float32, np.float64
ISA = "9.7.9.21"


@alu("cvt.rn.bf16x2.f32", "u=f,f", ISA)
def cvt_bf16x2(high, low):
    return pack16(bf16_bits(high), bf16_bits(low))


@alu("cvt.rn.f16x2.f32", "u=f,f", ISA)
def cvt_f16x2(high, low):
    return pack16(f16_bits(high), f16_bits(low))


# -- between floating-point types --------------------------------------------------------------------------------------
FLOAT_KINDS = {"f16": "h", "bf16": "h", "f32": "f", "f64": "d"}
FAST = {
    "cvt.rn.bf16.f32": bf16_bits,
    "cvt.rn.f16.f32": f16_bits,
    "cvt.f32.bf16": bf16_to_f32,
    "cvt.f32.f16": f16_to_f32,
}
MODES = ("rn", "rz", "rm", "rp")
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _read(kind: str, x):
    return x.astype(F64) if kind in ("f32", "f64") else decode(kind, x)


def _write(kind: str, x, mode: str = "rn", finite: bool = False):
    if kind == "f64":
        return x
    if kind == "f32":
        return round_float("f32", x, mode, finite).astype(F32)
    return encode(kind, x, mode, finite)


def _float_to_float(to, source, mode="rn", ftz=False, sat=False, clamp=False, finite=False, whole=None):
    def run(x):
        value = _read(source, x)
        if ftz and source == "f32" and to != "f16":  # an H200 flushes no input on the way to float16
            value = flush_to("f32", value)
        if whole is not None:
            value = whole(value)
        if sat:
            value = saturate(value)
        result = _write(to, relu(value) if clamp else value, mode, finite)
        if source == "f64" and to in ("f16", "bf16") and not sat:  # its NaN keeps sign and payload
            quiet, shift = (0x7E00, 42) if to == "f16" else (0x7FC0, 45)
            bits = x.view(U64)
            kept = bits >> U64(shift) & U64(quiet ^ 0x7FFF) | bits >> U64(48) & U64(0x8000) | U64(quiet)
            result = np.where(np.isnan(x), kept.astype(U16), result)
        return flush(result) if ftz and to == "f32" else result

    return run


def _register(name: str, signature: str, f) -> None:
    """Nothing saturates to or from bf16, and no 8-bit integer converts to or from it. Where silicon hands on the bits
    of a NaN, the result is bits: arithmetic's would become 0x7FFFFFFF.
    """
    *modifiers, to, source = name.split(".")
    if "bf16" in (to, source) and ("sat" in modifiers or {to, source} & {"u8", "s8"}):
        return
    f = FAST.get(name, f)
    if name == "cvt.f32.f32":
        alu(name, "u=u", ISA)(lambda x: x)
    elif name == "cvt.f32.bf16" or name.endswith(".f32.f64"):
        alu(name, signature.replace("f=", "u="), ISA)(lambda x: f(x).view(U32))
    else:
        alu(name, signature, ISA)(f)


_RANK = {"f16": 0, "bf16": 0, "f32": 1, "f64": 2}
for _to, _tk in FLOAT_KINDS.items():
    for _from, _fk in FLOAT_KINDS.items():
        for _ftz in ("", ".ftz") if "f32" in (_to, _from) else ("",):
            for _sat in ("", ".sat"):
                _flags = {"ftz": bool(_ftz), "sat": bool(_sat)}
                _end = f"{_ftz}{_sat}.{_to}.{_from}"
                if _RANK[_to] > _RANK[_from] or _to == _from:
                    _register(f"cvt{_end}", f"{_tk}={_fk}", _float_to_float(_to, _from, **_flags))
                else:
                    for _mode in MODES:
                        _register(f"cvt.{_mode}{_end}", f"{_tk}={_fk}", _float_to_float(_to, _from, _mode, **_flags))
                if _to == _from:
                    for _mode, _whole in WHOLE.items():
                        _f = _float_to_float(_to, _from, whole=_whole, **_flags)
                        _register(f"cvt.{_mode}{_end}", f"{_tk}={_fk}", _f)

for _mode in ("rn", "rz"):
    for _relu, _finite in ((".relu", ""), ("", ".satfinite"), (".relu", ".satfinite")):
        for _to in ("f16", "bf16"):
            _f = _float_to_float(_to, "f32", _mode, clamp=bool(_relu), finite=bool(_finite))
            alu(f"cvt.{_mode}{_relu}{_finite}.{_to}.f32", "h=f", ISA)(_f)
            alu(f"cvt.{_mode}{_relu}{_finite}.{_to}x2.f32", "u=f,f", ISA)(lambda a, b, f=_f: pack16(f(a), f(b)))
for _to in ("f16", "bf16"):
    _f = _float_to_float(_to, "f32", "rz")
    alu(f"cvt.rz.{_to}x2.f32", "u=f,f", ISA)(lambda a, b, f=_f: pack16(f(a), f(b)))


def _to_tf32(mode, clamp, finite):
    return lambda x: encode("tf32", relu(x.astype(F64)) if clamp else x.astype(F64), mode, finite)


def _nearest_tf32(finite):
    """cvt.rna.tf32 rounds the bits of the magnitude; it cuts those of NaN and infinity, as an H200 does."""

    def run(x):
        bits = x.view(U32)
        magnitude = bits & U32(0x7FFFFFFF)
        beyond = magnitude >= U32(0x7F800000)
        magnitude = np.where(beyond, magnitude, magnitude + U32(0x1000)) & U32(0x7FFFE000)
        if finite:
            magnitude = np.where(magnitude >= U32(0x7F800000), magnitude - U32(0x2000), magnitude)
        return bits & U32(0x80000000) | magnitude

    return run


alu("cvt.rna.tf32.f32", "u=f", ISA)(_nearest_tf32(False))
alu("cvt.rna.satfinite.tf32.f32", "u=f", ISA)(_nearest_tf32(True))
for _mode in ("rn", "rz"):
    for _finite in ("", ".satfinite"):
        for _relu in ("", ".relu"):
            alu(f"cvt.{_mode}{_finite}{_relu}.tf32.f32", "u=f", ISA)(_to_tf32(_mode, bool(_relu), bool(_finite)))


def _pair_to_small(name, clamp):
    def one(x):
        return encode(name, relu(x) if clamp else x, "rn", True)

    return one


def _from_pair(f):
    return lambda a, b: (f(a.astype(F64)) << U16(8)) | f(b.astype(F64))


def _from_f16x2(f):
    return lambda x: (f(decode("f16", (x >> U32(16)).astype(U16))) << U16(8)) | f(decode("f16", x.astype(U16)))


def _small_to_f16x2(name, clamp):
    def half(bits):
        value = decode(name, bits)
        return encode("f16", relu(value) if clamp else value)

    return lambda x: pack16(half((x >> U16(8)).astype(U8)), half(x.astype(U8)))


for _small in ("e4m3", "e5m2", "e2m3", "e3m2"):
    for _relu in ("", ".relu"):
        _f = _pair_to_small(_small, bool(_relu))
        alu(f"cvt.rn.satfinite{_relu}.{_small}x2.f32", "h=f,f", ISA)(_from_pair(_f))
        if _small[:2] in ("e4", "e5"):
            alu(f"cvt.rn.satfinite{_relu}.{_small}x2.f16x2", "h=u", ISA)(_from_f16x2(_f))
        alu(f"cvt.rn{_relu}.f16x2.{_small}x2", "u=h", ISA)(_small_to_f16x2(_small, bool(_relu)))


# -- to and from integers ----------------------------------------------------------------------------------------------
DTYPES = {"h": np.uint16, "i": np.int16, "u": U32, "s": S32, "U": U64, "S": S64, "f": F32, "d": F64}
INTEGERS = {"u8": "h", "s8": "i", "u16": "h", "s16": "i", "u32": "u", "s32": "s", "u64": "U", "s64": "S"}


def _value_dtype(kind: str):
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}").type


def _float_to_int(to, source, rounding, ftz):
    """Saturates. NaN becomes 0, or where 64 bits are read or written the highest bit alone (measured on an H200)."""
    nan = _value_dtype(to)(0)
    if to[1:] == "64" or source == "f64":
        nan = np.array(1 << int(to[1:]) - 1, f"u{int(to[1:]) // 8}").view(_value_dtype(to))[()]
    dtype, register = _value_dtype(to), DTYPES[INTEGERS[to]]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def run(x):
        value = _read(source, x)
        whole = rounding(flush_to("f32", value) if ftz else value)
        over, under = (
            whole >= float(high),
            whole <= float(low),
        )  # high of 64 bits is 2^64 in float64: equal is too large
        result = np.where(over | under | np.isnan(whole), 0.0, whole).astype(dtype)
        result = np.where(over, dtype(high), np.where(under, dtype(low), result))
        return np.where(np.isnan(whole), nan, result).astype(register)

    return run


def _exact_parts(x):
    """A 64-bit integer as the sum of two float64."""
    low = (x & x.dtype.type(0xFFFFFFFF)).astype(F64)
    return (x >> x.dtype.type(32)).astype(F64) * 2.0**32, low


def _int_to_f64(x, mode):
    """64-bit integer → float64 in one of the directed modes."""
    total, error = sum_exact(*_exact_parts(x))
    down = {"rm": error < 0, "rp": np.False_, "rz": (error < 0) & (total > 0)}[mode]
    up = {"rp": error > 0, "rm": np.False_, "rz": (error > 0) & (total < 0)}[mode]
    return np.where(down, np.nextafter(total, -np.inf), np.where(up, np.nextafter(total, np.inf), total))


def _int_to_float(to, source, mode, sat):
    dtype = _value_dtype(source)

    def run(x):
        x = x.astype(dtype)
        wide = x.dtype.itemsize == 8
        if mode == "rn" and to in ("f32", "f64"):
            result = x.astype(DTYPES[FLOAT_KINDS[to]])
        elif to == "f64":
            result = _int_to_f64(x, mode) if wide else x.astype(F64)
        else:
            result = _write(to, sum_odd(*_exact_parts(x)) if wide else x.astype(F64), mode)
        if not sat:
            return result
        return saturate(result) if to in ("f32", "f64") else encode(to, saturate(decode(to, result)))

    return run


for _int, _ik in INTEGERS.items():
    for _float, _fk in FLOAT_KINDS.items():
        for _mode in MODES:
            for _sat in ("", ".sat"):
                _f = _int_to_float(_float, _int, _mode, bool(_sat))
                _register(f"cvt.{_mode}{_sat}.{_float}.{_int}", f"{_fk}={_ik}", _f)
        for _mode, _whole in WHOLE.items():
            for _ftz in ("", ".ftz") if _float == "f32" else ("",):
                _f = _float_to_int(_int, _float, _whole, bool(_ftz))
                for _sat in ("", ".sat"):
                    _register(f"cvt.{_mode}{_ftz}{_sat}.{_int}.{_float}", f"{_ik}={_fk}", _f)


# -- between integers --------------------------------------------------------------------------------------------------
def _converter(*steps):
    def run(x):
        for dtype in steps:
            x = x.astype(dtype)
        return x

    return run


def _steps(kind):
    """dtypes that take a register to a value of an integer type: an 8-bit one lies in the low byte of 16 bits."""
    return (_value_dtype(kind),) if kind[1:] == "8" else ()


def _clip(x, to):
    low = max(np.iinfo(to).min, np.iinfo(x.dtype).min)
    high = min(np.iinfo(to).max, np.iinfo(x.dtype).max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(to)


def _saturating(to, source):
    source, limit, register = _value_dtype(source), _value_dtype(to), DTYPES[INTEGERS[to]]
    return lambda x: _clip(x.astype(source), limit).astype(register)


for _to, _tk in INTEGERS.items():
    for _from, _fk in INTEGERS.items():
        _all = (*_steps(_from), *_steps(_to), DTYPES[_tk])
        alu(f"cvt.{_to}.{_from}", f"{_tk}={_fk}", ISA)(_converter(*_all))
        _limits, _values = np.iinfo(_value_dtype(_to)), np.iinfo(_value_dtype(_from))
        if _values.min < _limits.min or _values.max > _limits.max:  # otherwise there is nothing to saturate
            alu(f"cvt.sat.{_to}.{_from}", f"{_tk}={_fk}", ISA)(_saturating(_to, _from))


def _pack_two(to):
    return lambda a, b: pack16(_clip(a, to).view(U16), _clip(b, to).view(U16))


def _pack_two_under(to):
    return lambda a, b, c: c << U32(16) | _clip(a, to).view(U8).astype(U32) << U32(8) | _clip(b, to).view(U8)


alu("cvt.pack.sat.u16.s32", "u=s,s", "9.7.9.22")(_pack_two(U16))
alu("cvt.pack.sat.s16.s32", "u=s,s", "9.7.9.22")(_pack_two(np.int16))
alu("cvt.pack.sat.u8.s32.b32", "u=s,s,u", "9.7.9.22")(_pack_two_under(U8))
alu("cvt.pack.sat.s8.s32.b32", "u=s,s,u", "9.7.9.22")(_pack_two_under(np.int8))
