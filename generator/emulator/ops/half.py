"""f16 and bf16 arithmetic, single and packed, and the forms that mix them with float32 (PTX ISA 9.1 §9.7.4, §9.7.5).

Values are computed in float64, where products are exact and sums are rounded to odd, and then rounded once.
"""

from __future__ import annotations

import numpy as np

from ..formats import decode, encode, flush_to, pack16, relu, saturate, sum_odd
from ..table import alu
from .floating import MODES, rounded, saturated

U16, U32, F32 = np.uint16, np.uint32, np.float32


def packed(f):
    """A function of u16 bits → the same on both halves of u32."""

    def run(*words):
        low = f(*(np.asarray(w).astype(U16) for w in words))
        return pack16(f(*((np.asarray(w) >> U32(16)).astype(U16) for w in words)), low)

    return run


def _arithmetic(name, form, ftz=False, sat=False, clamp=False):
    def run(*operands):
        values = [decode(form, x) for x in operands]
        if ftz:
            values = [flush_to(form, v) for v in values]
        if name == "fma":
            result = sum_odd(values[0] * values[1], values[2])
        elif name == "mul":
            result = values[0] * values[1]
        else:
            result = sum_odd(values[0], values[1] if name == "add" else -values[1])
        if ftz:  # what rounds up to a normal number is not flushed
            result = flush_to(form, decode(form, encode(form, result)))
        if sat:
            result = saturate(result)
        return encode(form, relu(result) if clamp else result)

    return run


def _extreme(name, form, ftz=False, nan=False, xorsign=False):
    """-0 is below +0; NaN is dropped or, with .NaN, wins; .xorsign.abs: magnitudes, signed by the operands' signs."""
    infinity = U16(0x7C00 if form == "f16" else 0x7F80)
    smallest = U16(0x0400 if form == "f16" else 0x0080)

    def run(a, b):
        if ftz:
            a, b = (np.where(x & U16(0x7FFF) < smallest, x & U16(0x8000), x) for x in (a, b))
        sign = (a ^ b) & U16(0x8000)
        a_nan, b_nan = (x & U16(0x7FFF) > infinity for x in (a, b))
        if xorsign:
            a, b = a & U16(0x7FFF), b & U16(0x7FFF)
        rank_a, rank_b = (np.where(x & U16(0x8000), ~x, x | U16(0x8000)) for x in (a, b))
        first = rank_a > rank_b if name == "max" else rank_a < rank_b
        result = np.where(first & ~a_nan | b_nan, a, b)
        if xorsign:
            result = result | sign
        bad = a_nan | b_nan if nan else a_nan & b_nan
        return np.where(bad, U16(0x7FFF), result)

    return run


def _sign(name, form, ftz=False):
    """A NaN becomes the hardware's, also here."""
    smallest, infinity = U16(0x0400), U16(0x7C00 if form == "f16" else 0x7F80)

    def run(a):
        nan = a & U16(0x7FFF) > infinity
        if ftz:
            a = np.where(a & U16(0x7FFF) < smallest, a & U16(0x8000), a)
        return np.where(nan, U16(0x7FFF), a ^ U16(0x8000) if name == "neg" else a & U16(0x7FFF))

    return run


def _approximate(f, form, ftz=False):
    def run(a):
        x = decode(form, a)
        result = f(flush_to(form, x) if ftz else x)
        if ftz:
            result = flush_to(form, decode(form, encode(form, result)))
        return encode(form, result)

    return run


def _both(pattern: str, form: str, sources: int, isa: str, f) -> None:
    alu(f"{pattern}.{form}", f"h={','.join('h' * sources)}", isa)(f)
    alu(f"{pattern}.{form}x2", f"u={','.join('u' * sources)}", isa)(packed(f))


for _name, _isa in (("add", "9.7.4.1"), ("sub", "9.7.4.2"), ("mul", "9.7.4.3")):
    for _ftz in ("", ".ftz"):
        for _sat in ("", ".sat"):
            _both(f"{_name}{{,.rn}}{_ftz}{_sat}", "f16", 2, _isa, _arithmetic(_name, "f16", bool(_ftz), bool(_sat)))
    _both(f"{_name}{{,.rn}}", "bf16", 2, _isa, _arithmetic(_name, "bf16"))
for _ftz in ("", ".ftz"):
    for _end in ("", ".sat", ".relu"):
        _fma = _arithmetic("fma", "f16", bool(_ftz), _end == ".sat", _end == ".relu")
        _both(f"fma.rn{_ftz}{_end}", "f16", 3, "9.7.4.4", _fma)
for _end in ("", ".relu"):
    _both(f"fma.rn{_end}", "bf16", 3, "9.7.4.4", _arithmetic("fma", "bf16", clamp=bool(_end)))

for _form in ("f16", "bf16"):
    for _ftz in ("", ".ftz") if _form == "f16" else ("",):
        _both(f"neg{_ftz}", _form, 1, "9.7.4.5", _sign("neg", _form, bool(_ftz)))
        _both(f"abs{_ftz}", _form, 1, "9.7.4.6", _sign("abs", _form, bool(_ftz)))
        for _name, _isa in (("min", "9.7.4.7"), ("max", "9.7.4.8")):
            for _nan in ("", ".NaN"):
                for _xor in ("", ".xorsign.abs"):
                    _f = _extreme(_name, _form, bool(_ftz), bool(_nan), bool(_xor))
                    _both(f"{_name}{_ftz}{_nan}{_xor}", _form, 2, _isa, _f)
    _both("tanh.approx", _form, 1, "9.7.4.9", _approximate(np.tanh, _form))
_both("ex2.approx", "f16", 1, "9.7.4.10", _approximate(np.exp2, "f16"))
_both("ex2.approx.ftz", "bf16", 1, "9.7.4.10", _approximate(np.exp2, "bf16", True))


# -- mixed precision, §9.7.5 -------------------------------------------------------------------------------------------
def _widened(f, form, narrow):
    def run(*operands):
        wide = [decode(form, x).astype(F32) if i < narrow else x for i, x in enumerate(operands)]
        return f(*wide)

    return run


for _form in ("f16", "bf16"):
    for _name, _narrow, _sig, _isa in (
        ("add", 1, "f=h,f", "9.7.5.1"),
        ("sub", 1, "f=h,f", "9.7.5.2"),
        ("fma", 2, "f=h,h,f", "9.7.5.3"),
    ):
        for _mode in MODES:
            _f = _widened(rounded(_name, _mode), _form, _narrow)
            _rnd = "{,.rn}" if _mode == "rn" and _name != "fma" else f".{_mode}"
            alu(f"{_name}{_rnd}.f32.{_form}", _sig, _isa)(_f)
            alu(f"{_name}{_rnd}.sat.f32.{_form}", _sig, _isa)(saturated(_f))
