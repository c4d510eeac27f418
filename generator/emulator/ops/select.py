"""Comparison and selection, lane by lane (PTX ISA 9.1 §9.7.6)."""

from __future__ import annotations

import numpy as np

from ..formats import bf16_to_f32, f16_to_f32, flush
from ..table import BITS, alu, effect


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
        _bits = "u" if _kind == "f" else _kind  # a NaN keeps its bits
        alu(f"selp.{_type}", f"{_bits}={_bits},{_bits},p", "9.7.6.3")(lambda a, b, p: np.where(p, a, b))


# -- f16 and bf16, §9.7.7 ----------------------------------------------------------------------------------------------
U16, U32, S32, F32 = np.uint16, np.uint32, np.int32, np.float32


def _flushed_f16(bits):
    return np.where(bits & U16(0x7C00) == 0, bits & U16(0x8000), bits)


def _half_test(compare, form, ftz):
    widen = f16_to_f32 if form == "f16" else bf16_to_f32
    if ftz:
        return lambda a, b: compare(widen(_flushed_f16(a)), widen(_flushed_f16(b)))
    return lambda a, b: compare(widen(a), widen(b))


def _packed_test(test, combine=None):
    """setp on packed pairs: p compares the low halves, q the high ones."""

    def run(m, ws, active, instr, a, b, c=None):
        low = test(np.asarray(a).astype(U16), np.asarray(b).astype(U16))
        high = test((np.asarray(a) >> U32(16)).astype(U16), (np.asarray(b) >> U32(16)).astype(U16))
        return (low, high) if combine is None else (combine(low, c), combine(high, c))

    return run


for _cmp, _f in FLOAT_COMPARES.items():
    for _form, _ftz in (("f16", ""), ("f16", ".ftz"), ("bf16", "")):
        _test = _half_test(_f, _form, bool(_ftz))
        alu(f"setp.{_cmp}{_ftz}.{_form}", "p=h,h", "9.7.7.2")(_test)
        effect(f"setp.{_cmp}{_ftz}.{_form}x2", "p,p=u,u", "9.7.7.2")(_packed_test(_test))
        for _bool, _g in COMBINE.items():
            alu(f"setp.{_cmp}.{_bool}{_ftz}.{_form}", "p=h,h,p", "9.7.7.2")(_combined(_test, _g))
            effect(f"setp.{_cmp}.{_bool}{_ftz}.{_form}x2", "p,p=u,u,p", "9.7.7.2")(_packed_test(_test, _g))


# -- set, slct, testp --------------------------------------------------------------------------------------------------
def _set(test, dtype):
    one = dtype(1) if dtype is F32 else ~dtype(0)
    return lambda *args: np.where(test(*args), one, dtype(0))


for _type, _kind in KINDS.items():
    for _cmp, _f in (FLOAT_COMPARES if _kind in "fd" else INTEGER_COMPARES).items():
        if _type[0] == "b" and _cmp not in ("eq", "ne"):
            continue
        for _ftz, _test in (("", _f), (".ftz", _on_flushed(_f))) if _type == "f32" else (("", _f),):
            for _to, _tk, _dtype in (("u32", "u", U32), ("s32", "s", S32), ("f32", "f", F32)):
                alu(f"set.{_cmp}{_ftz}.{_to}.{_type}", f"{_tk}={_kind},{_kind}", "9.7.6.1")(_set(_test, _dtype))
                for _bool, _g in COMBINE.items():
                    _sig = f"{_tk}={_kind},{_kind},p"
                    alu(f"set.{_cmp}.{_bool}{_ftz}.{_to}.{_type}", _sig, "9.7.6.1")(_set(_combined(_test, _g), _dtype))


def _choose_flushed(a, b, c):
    return np.where(flush(c) >= 0, a, b)


for _type, _kind in KINDS.items():
    _kind = "u" if _kind == "f" else _kind  # bits pass through
    alu(f"slct.{_type}.s32", f"{_kind}={_kind},{_kind},s", "9.7.6.4")(lambda a, b, c: np.where(c >= 0, a, b))
    alu(f"slct.{_type}.f32", f"{_kind}={_kind},{_kind},f", "9.7.6.4")(lambda a, b, c: np.where(c >= 0, a, b))
    alu(f"slct.ftz.{_type}.f32", f"{_kind}={_kind},{_kind},f", "9.7.6.4")(_choose_flushed)

for _type, _kind, _dtype in (("f32", "f", np.float32), ("f64", "d", np.float64)):
    _tiny = np.finfo(_dtype).tiny
    for _name, _f in {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x, tiny=_tiny: np.isfinite(x) & ((np.abs(x) >= tiny) | (x == 0)),  # a zero counts as normal
        "subnormal": lambda x, tiny=_tiny: (np.abs(x) < tiny) & (x != 0),
    }.items():
        alu(f"testp.{_name}.{_type}", f"p={_kind}", "9.7.3.1")(_f)

assert set(KINDS.values()) <= set(BITS)
