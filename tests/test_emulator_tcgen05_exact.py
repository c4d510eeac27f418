"""tcgen05.mma under exact accumulation, random operands against the scalar oracle in rationals; and without checks."""

from fractions import Fraction

import numpy as np
import pytest
from tcgen05_oracle import DTYPE, execute, scaled_instruction
from test_emulator_accumulate import LOWEST, cut, exponent_of, floor_log2, oracle
from test_emulator_tcgen05_kinds import FACTORS_AT, FORMS, Case, with_factors

LOWEST |= {"e2m3": 0, "e3m2": -2, "e2m1": 0, "ue8m0": -127}


def numbers(shape, form: str, seed: int) -> np.ndarray:
    """Random numbers of a format, as float32, over a few powers of two."""
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(size=shape) * np.exp2(rng.integers(-2, 3, shape)), -6, 6).astype(np.float32)
    values = values.astype(DTYPE.get(form, np.float32)).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if form == "tf32" else values


def diagonal(m: int, n: int) -> list[tuple[int, int]]:
    """Elements of D that reach every row and column, not every pair."""
    return [(i, i % n) for i in range(m)]


def compare(case: Case, found: np.ndarray, element) -> None:
    """`element(i, j)` is what D[i, j] has to be; found as tensor memory."""
    d = case.c.astype(np.float64)
    chosen = np.zeros(d.shape, bool)
    for i, j in diagonal(case.m, case.n):
        d[i, j], chosen[i, j] = element(i, j), True
    expected = case.expected(d)
    for rank, lane, at, row, column in case.cells():
        keep = chosen[row, column]
        assert (found[rank, lane[keep], at[keep]] == expected[rank, lane[keep], at[keep]]).all()


@pytest.mark.parametrize("m, n, group, layout", [(64, 16, 1, "F"), (128, 32, 2, "B")])
@pytest.mark.parametrize("kind, a, b, d", [form for form in FORMS if form[0] != "i8"])
def test_random_numbers(kind, a, b, d, m, n, group, layout):
    case = Case(kind, m, n, a, b, d, group=group, layout=layout, columns=32, draw=numbers)
    found = execute(case.text(), case.x, case.t, group, "exact")

    compare(case, found, lambda i, j: mixed_oracle(case.a[i], case.b[j], case.c[i, j], a, b, d))


def mixed_oracle(left, right, c, a: str, b: str, d: str) -> float:
    """`oracle` for operands of two formats: 25 bits below the common exponent."""
    if a == b:
        return oracle(left, right, c, a, 25, d)
    exponents = [exponent_of(x, a) + exponent_of(y, b) for x, y in zip(left, right, strict=True)]
    terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left, right, strict=True)]
    return summed(terms, exponents, c, 25, d)


def summed(terms, exponents, c, bits: int, d: str) -> float:
    common = max([*exponents, exponent_of(c, "f16" if d == "f16" else "f32")])
    quantum = Fraction(2) ** (common - bits)
    total = sum(cut(term, quantum) for term in [*terms, Fraction(float(c))])
    if d == "f16":
        step = Fraction(2) ** (max(floor_log2(abs(total)), -14) - 10) if total else Fraction(1)
        return float(round(total / step) * step)
    return float(cut(total, Fraction(2) ** (max(floor_log2(abs(total)) if total else -126, -126) - 23)))


@pytest.mark.parametrize("kind, suffix, blocks, scale, a, b", [
    ("mxf8f6f4", "", 1, "ue8m0", "e4m3", "e5m2"), ("mxf4", ".block32", 2, "ue8m0", "e2m1", "e2m1"),
    ("mxf4nvf4", ".scale_vec::4X", 4, "ue4m3", "e2m1", "e2m1")])  # fmt: skip
def test_block_scaling(kind, suffix, blocks, scale, a, b):
    case = Case(kind, 128, 16, a, b, columns=288, draw=numbers)
    case.idesc = scaled_instruction(128, 16, a, b, scale, packed=kind != "mxf8f6f4")
    factors = with_factors(case, blocks, 0, 0, scale, 9)
    address = f"add.u32 %r145, %r150, {FACTORS_AT}; add.u32 %r144, %r150, {FACTORS_AT + 8};"
    text = address + case.text(f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale{suffix}", "[%r145], [%r144], 1")
    found = execute(text, case.x, case.t, 1, "exact")
    each, form = case.a.shape[1] // blocks, "e4m3" if scale == "ue4m3" else "ue8m0"

    def element(i, j):
        powers = [
            exponent_of(x, form) + exponent_of(y, form) for x, y in zip(factors[0][i], factors[1][j], strict=True)
        ]
        pairs = list(zip(case.a[i], case.b[j], strict=True))
        scaled = [Fraction(float(x)) * Fraction(float(y)) * Fraction(factors[0][i][k // each]) *
                  Fraction(factors[1][j][k // each]) for k, (x, y) in enumerate(pairs)]  # fmt: skip
        if kind == "mxf8f6f4":
            exponents = [exponent_of(x, a) + exponent_of(y, b) + powers[0] for x, y in pairs]
            return summed(scaled, exponents, case.c[i, j], 25, "f32")
        blocks_of_16 = [sum(scaled[k : k + 16]) for k in range(0, 64, 16)]
        return summed(blocks_of_16, [powers[k // each] for k in range(0, 64, 16)], case.c[i, j], 35, "f32")

    compare(case, found, element)


@pytest.mark.parametrize("kind, a, b, d", FORMS)
def test_without_checks_the_same_bits(kind, a, b, d):
    case = Case(kind, 64, 24, a, b, d, layout="F", half=1, columns=32)
    assert (execute(case.text(), case.x, case.t, strict=False) == execute(case.text(), case.x, case.t)).all()
