"""float64 arithmetic, lane by lane (PTX ISA 9.1 §9.7.3)."""

from __future__ import annotations

import ctypes

import numpy as np

from ..table import alu

U64, F64 = np.uint64, np.float64
_libm_fma = ctypes.CDLL(None).fma  # NumPy has none; the C library's is rounded once
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma = np.frompyfunc(_libm_fma, 3, 1)


@alu("{fma,mad}.rn.f64", "d=d,d,d", "9.7.3.6")
def fma(a, b, c):
    return np.asarray(_fma(a, b, c)).astype(F64)


alu("add{,.rn}.f64", "d=d,d", "9.7.3.3")(np.add)
alu("sub{,.rn}.f64", "d=d,d", "9.7.3.4")(np.subtract)
alu("mul{,.rn}.f64", "d=d,d", "9.7.3.5")(np.multiply)
alu("div.rn.f64", "d=d,d", "9.7.3.8")(np.divide)
alu("sqrt.rn.f64", "d=d", "9.7.3.15")(np.sqrt)
alu("neg.f64", "d=d", "9.7.3.10")(np.negative)
alu("copysign.f64", "d=d,d", "9.7.3.2")(lambda a, b: np.copysign(b, a))


@alu("abs.f64", "d=d", "9.7.3.9")
def absolute(x):
    return np.abs(x)


@alu("rcp.rn.f64", "d=d", "9.7.3.13")
def reciprocal(x):
    return F64(1) / x


def _extreme(f, pick):
    """NumPy takes either zero of two unlike ones; PTX orders -0 below +0."""

    def run(a, b):
        zeros = pick(a.view(U64), b.view(U64)).view(F64)
        return np.where((a == 0) & (b == 0), zeros, f(a, b))

    return run


alu("max.f64", "d=d,d", "9.7.3.12")(_extreme(np.fmax, np.bitwise_and))
alu("min.f64", "d=d,d", "9.7.3.11")(_extreme(np.fmin, np.bitwise_or))
