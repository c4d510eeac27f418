"""Conversions, lane by lane (PTX ISA 9.1 §9.7.9.21)."""

from __future__ import annotations

import numpy as np

from ..formats import bf16_bits, bf16_to_f32, f16_bits, f16_to_f32, flush, pack16
from ..table import alu

U32, U64 = np.uint32, np.uint64
S32, S64, F32, F64 = np.int32, np.int64, np.float32, np.float64


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
