"""How a tensor core adds up products: the model of "exact" accumulation, for one instruction at a time.

PTX leaves order, rounding and subnormals of an accumulation open (ISA 9.1 §9.7.15.5.2). The model is the one that
MMA-Sim publishes (arXiv 2511.10909), which claims equality of bits with silicon. One instruction is one fused sum of
its K products and of C:

    1. every product is exact, and so is its exponent: the sum of the operands' exponents, its significand not
       normalized, so below 4; a subnormal has the exponent of the smallest normal of its format, a zero -126
    2. the largest exponent of the K products and of C is the common one
    3. every term is cut, toward zero, to `fraction_bits` bits below the common exponent
    4. the terms are added without error; a zero result is +0
    5. the sum is cut toward zero to float32 (fp8 on Hopper: to 13 bits of fraction), or rounded to nearest even to
       float16

A NaN, or infinities of both signs, make the NaN 0x7FFFFFFF (float16: 0x7FFF). A block of products that shares scale
factors is one term of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ZERO_EXPONENT = -126
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
# Exponent of the smallest normal. tf32 has the exponents of float32, to which it is cut from a register.
LOWEST = {"f32": -126, "tf32": -126, "bf16": -126, "f16": -14, "e5m2": -14, "e4m3": -6, "e3m2": -2, "e2m3": 0}
LOWEST |= {"e2m1": 0, "ue8m0": -127}
_TINY = 2.0**-126
MODES = ("fast", "exact")


class Model(NamedTuple):
    """`fraction_bits` that a term keeps below the common exponent; `result`: "f32", "f16", or "e8m13", a float32
    with 13 bits of fraction.
    """

    fraction_bits: int
    result: str


def wgmma_model(a: str, d: str) -> Model:
    """Hopper's wgmma: operands of type `a`, accumulator of type `d`."""
    if a in ("e4m3", "e5m2"):
        return Model(13, "f16" if d == "f16" else "e8m13")
    return Model(25, d)


def mma_model(d: str) -> Model:
    """mma.sync on Hopper and Blackwell, and tcgen05.mma without scale factors a block of 16 or 32 of K = 64."""
    return Model(25, d)


BLOCK_SCALED_F4 = Model(35, "f32")  # tcgen05.mma kind::mxf4 and mxf4nvf4


def exponents_of(x: np.ndarray, form: str) -> np.ndarray:
    """Finite float32 or float64 values of a format → their exponents, int16."""
    _, exponent = np.frexp(x)
    exponent = np.maximum(exponent - 1, LOWEST[form])
    return np.where(x == 0, ZERO_EXPONENT, exponent).astype(np.int16)


def fused_dot(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, forms: tuple[str, str], model: Model) -> np.ndarray:
    """One instruction's A·Bᵀ + C.

    a: float32 [..., M, K] in format forms[0]; b: float32 [..., N, K] in forms[1]; c: float32 [..., M, N] in the
    format of the result, None for zero. Returns float32 [..., M, N], whose values are float16 where the result is.
    """
    finite_a, finite_b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    exponents = exponents_of(finite_a, forms[0]), exponents_of(finite_b, forms[1])
    return fused_blocks(a[..., None], b[..., None], *exponents, c, model)


def split_fp8_dot(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """mma.sync of fp8 as an H200 does it, which has no such instruction: every operand becomes float16, the lower two
    and the upper two elements of each register go through a float16 instruction of their own, from zero, and C is added
    last, rounded to nearest. Shapes as in `fused_dot`; `kind`: "f32" or "f16".
    """
    lower = np.arange(a.shape[-1]) % 4 < 2
    total, model, forms = None, mma_model(kind), ("f16", "f16")
    for part in (lower, ~lower):
        total = fused_dot(a[..., part], b[..., part], total, forms, model)
    if kind == "f16":
        return (total.astype(np.float64) + c).astype(np.float16).astype(np.float32)
    return total + c.astype(np.float32)


def fused_blocks(a, b, a_exponents, b_exponents, c, model: Model) -> np.ndarray:
    """As `fused_dot`, for blocks of k that are one term each.

    a: float [..., M, blocks, k], its values scaled; b: float [..., N, blocks, k]; a_exponents: int16 [..., M, blocks];
    b_exponents: int16 [..., N, blocks].
    """
    m, n = a.shape[-3], b.shape[-3]
    lead = a.shape[:-3]
    out = np.empty((*lead, m, n), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # both are IEEE's answers here
        for at in np.ndindex(*lead):
            exponents = a_exponents[at], b_exponents[at]
            out[at] = _tile(a[at], b[at], *exponents, None if c is None else c[at], model)
    return out


def _tile(a, b, a_exponents, b_exponents, c, model: Model) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    c = np.zeros((len(a), len(b))) if c is None else c.astype(np.float64)
    every = np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(c).all()
    special = None if every else _ieee_sum(a, b, c)
    if special is not None:
        a, b, c = (np.where(np.isfinite(x), x, 0.0) for x in (a, b, c))
    result = rounded(_cut_sum(a, b, a_exponents, b_exponents, c, model), model.result)
    if special is not None:
        result = np.where(np.isnan(special), NAN, np.where(np.isinf(special), special.astype(np.float32), result))
    return result


def _cut_sum(a, b, a_exponents, b_exponents, c, model: Model) -> np.ndarray:
    """Steps 1 to 4: float64 [M, N], exact, as a sum has fewer than 53 bits."""
    blocks = a.shape[1]
    common = exponents_of(c, "f16" if model.result == "f16" else "f32")
    exponent = np.empty_like(common)
    for k in range(blocks):
        np.add(a_exponents[:, k, None], b_exponents[None, :, k], out=exponent)
        np.maximum(common, exponent, out=common)
    shift = model.fraction_bits - common.astype(np.int32)
    scale = np.ldexp(1.0, shift)
    total = np.trunc(c * scale)
    term = np.empty_like(total)
    for k in range(blocks):
        np.matmul(a[:, k], b[:, k].T, out=term) if a.shape[2] > 1 else np.multiply(a[:, k], b[:, k].T, out=term)
        term *= scale
        np.trunc(term, out=term)
        total += term
    return total * np.ldexp(1.0, -shift)


def _ieee_sum(a, b, c) -> np.ndarray:
    """The sum in float64, for what NaN and infinities make of it."""
    total = c.copy()
    for k in range(a.shape[1]):
        for i in range(a.shape[2]):
            total += a[:, k, i, None] * b[None, :, k, i]
    return total


def rounded(x: np.ndarray, result: str) -> np.ndarray:
    """Step 5: float64 → float32."""
    if result == "f16":
        return (x + 0.0).astype(np.float16).astype(np.float32) + np.float32(0)  # what rounds to zero is +0
    bits = 13 if result == "e8m13" else 23
    kept = np.uint64((1 << 64) - (1 << (52 - bits)))
    cut = (x.view(np.uint64) & kept).view(np.float64)
    small = np.abs(x) < _TINY
    if small.any():
        quantum = 2.0 ** (-126 - bits)
        cut = np.where(small, np.trunc(x / quantum) * quantum, cut)
    return (cut + 0.0).astype(np.float32)
