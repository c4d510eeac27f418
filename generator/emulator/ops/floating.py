"""float32 arithmetic and its approximations, lane by lane (PTX ISA 9.1 §9.7.3)."""

from __future__ import annotations

import numpy as np

from ..formats import F32_TINY, flush, round_toward, saturate, sum_exact
from ..symbolic import traced_as
from ..table import alu

U32, U64 = np.uint32, np.uint64
S64, F32, F64 = np.int64, np.float32, np.float64
LOWEST = np.iinfo(S64).min


@traced_as("fma", F32)
def fma(a, b, c):
    """float32 fused multiply-add, rounded once.

    The product is exact in float64. Rounding the sum to float64 first goes wrong only where that lands on a midpoint of
    float32, or where the result is subnormal: there the sum is rounded to odd, which float32 then rounds rightly.
    """
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    result = total.astype(F32)
    midpoint = (total.view(S64) << S64(35)).min() == LOWEST
    if midpoint or ((result.view(U32) << U32(1)) - U32(1)).min() < 0x00FFFFFF:
        total, error = sum_exact(product, c)
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
            total, error = sum_exact(a, b if name == "add" else -b)
        elif name == "mul":
            total, error = a * b, F64(0)
        else:
            total, error = sum_exact(a * b, c.astype(F64))
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


MODES = ("rn", "rm", "rp", "rz")
_NEAREST = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma}


def rounded(name, mode):
    """The float32 operation in one rounding mode."""
    return _NEAREST[name] if mode == "rn" else _directed(name, mode)


def saturated(f):
    """.sat: the result in [0, 1]."""
    return lambda *args: saturate(f(*args))


for _name, _f, _n, _isa in (
    ("add", np.add, 2, "9.7.3.3"),
    ("sub", np.subtract, 2, "9.7.3.4"),
    ("mul", np.multiply, 2, "9.7.3.5"),
    ("fma", fma, 3, "9.7.3.6"),
):
    for _suffix, _kind in (("f32", "f"), ("f32x2", "2")):
        _sig = f"{_kind}={','.join(_kind * _n)}"
        _rn = ".rn" if _name == "fma" else "{,.rn}"
        alu(f"{_name}{_rn}.{_suffix}", _sig, _isa)(_f)
        alu(f"{_name}{_rn}.ftz.{_suffix}", _sig, _isa)(_flushed(_f))
        for _mode in MODES[1:]:
            alu(f"{_name}.{_mode}.{_suffix}", _sig, _isa)(_directed(_name, _mode))
            alu(f"{_name}.{_mode}.ftz.{_suffix}", _sig, _isa)(_flushed(_directed(_name, _mode)))
    for _mode in MODES:
        _rnd = "{,.rn}" if _mode == "rn" and _name != "fma" else f".{_mode}"
        for _head in (_name, "mad") if _name == "fma" else (_name,):
            _sig, _f = f"f={','.join('f' * _n)}", rounded(_name, _mode)
            alu(f"{_head}{_rnd}.sat.f32", _sig, _isa)(saturated(_f))
            alu(f"{_head}{_rnd}.ftz.sat.f32", _sig, _isa)(saturated(_flushed(_f)))
            if _head == "mad":
                alu(f"mad{_rnd}.f32", _sig, "9.7.3.7")(_f)
                alu(f"mad{_rnd}.ftz.f32", _sig, "9.7.3.7")(_flushed(_f))

alu("neg.f32", "f=f", "9.7.3.10")(np.negative)
alu("abs.f32", "f=f", "9.7.3.9")(_abs)
alu("neg.ftz.f32", "f=f", "9.7.3.10")(_flushed(np.negative))
alu("abs.ftz.f32", "f=f", "9.7.3.9")(_flushed(_abs))


def _quotient(f, mode):
    """A quotient or root in float64, rounded to float32 in `mode`: the exact value is never so close to a float32 that
    the float64 hides on which side it lies (the operands have 24 bits, the residual is a multiple of 2^-48)."""
    if mode == "rn":
        return f
    return lambda *args: round_toward(f(*(np.asarray(a).astype(F64) for a in args)), mode)


def _reciprocal(x):
    return x.dtype.type(1) / x


for _name, _f, _sig, _isa in (
    ("div", np.divide, "f=f,f", "9.7.3.8"),
    ("rcp", _reciprocal, "f=f", "9.7.3.13"),
    ("sqrt", np.sqrt, "f=f", "9.7.3.15"),
):
    for _mode in MODES:
        alu(f"{_name}.{_mode}.f32", _sig, _isa)(_quotient(_f, _mode))
        alu(f"{_name}.{_mode}.ftz.f32", _sig, _isa)(_flushed(_quotient(_f, _mode)))

alu("rcp.approx.f32", "f=f", "9.7.3.13")(_reciprocal)
alu("rcp.approx.ftz.f32", "f=f", "9.7.3.13")(_flushed(_reciprocal))
alu("sqrt.approx.f32", "f=f", "9.7.3.15")(np.sqrt)
alu("sqrt.approx.ftz.f32", "f=f", "9.7.3.15")(_flushed(np.sqrt))


def _divide_approx(a, b):
    """A divisor above 2^126 has no normal reciprocal: the quotient of a finite number is +0, as on an H200."""
    return np.where((np.abs(b) > F32(2.0**126)) & np.isfinite(b) & np.isfinite(a), F32(0), a / b)


alu("div.full.f32", "f=f,f", "9.7.3.8")(np.divide)
alu("div.full.ftz.f32", "f=f,f", "9.7.3.8")(_flushed(np.divide))
alu("div.approx.f32", "f=f,f", "9.7.3.8")(_divide_approx)
alu("div.approx.ftz.f32", "f=f,f", "9.7.3.8")(_flushed(_divide_approx))


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


def _sign_product(f):
    """.xorsign.abs: `f` of the magnitudes, negative where the signs of the operands differ."""

    def run(a, b):
        sign = (a.view(U32) ^ b.view(U32)) & U32(0x80000000)
        return (f(np.abs(a), np.abs(b)).view(U32) | sign).view(F32)

    return run


for _name, _f, _isa in (
    ("max", max_f32, "9.7.3.12"),
    ("min", min_f32, "9.7.3.11"),
    ("max.NaN", max_nan_f32, "9.7.3.12"),
    ("min.NaN", min_nan_f32, "9.7.3.11"),
):
    _op, _, _nan = _name.partition(".")
    _nan = _nan and f".{_nan}"
    alu(f"{_op}.ftz{_nan}.f32", "f=f,f,?f", _isa)(_flushed(_f))
    alu(f"{_op}{_nan}.xorsign.abs.f32", "f=f,f", _isa)(_sign_product(_f))
    alu(f"{_op}.ftz{_nan}.xorsign.abs.f32", "f=f,f", _isa)(_flushed(_sign_product(_f)))


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


@alu("rsqrt.approx.f32", "f=f", "9.7.3.16")
def rsqrt(x):
    return (1.0 / np.sqrt(x.astype(F64))).astype(F32)


alu("lg2.approx.ftz.f32", "f=f", "9.7.3.20")(_flushed(lg2))
alu("rsqrt.approx.ftz.f32", "f=f", "9.7.3.16")(_flushed(rsqrt))


@alu("tanh.approx.f32", "f=f", "9.7.3.22")
def tanh(x):
    return np.tanh(x)


def _trigonometric(f):
    """The argument in turns is a float32, so the error grows with it, as on an H200: a large one is a whole turn."""

    def run(x):
        turns = round_toward(x.astype(F64) * F64(F32(0.5 / np.pi)), "rz").astype(F64)
        return f((turns - np.floor(turns)) * (2 * np.pi)).astype(F32)

    return run


for _name, _f, _isa in (("sin", np.sin, "9.7.3.18"), ("cos", np.cos, "9.7.3.19")):
    alu(f"{_name}.approx.f32", "f=f", _isa)(_trigonometric(_f))
    alu(f"{_name}.approx.ftz.f32", "f=f", _isa)(_flushed(_trigonometric(_f)))


@alu("copysign.f32", "u=u,u", "9.7.3.2")
def copysign(a, b):
    return a & U32(0x80000000) | b & U32(0x7FFFFFFF)
