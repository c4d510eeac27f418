"""Comparison and selection, lane by lane (PTX ISA 9.1 §9.7.6)."""

from __future__ import annotations

import numpy as np

from ..formats import flush
from ..table import BITS, alu


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

assert set(KINDS.values()) <= set(BITS)
