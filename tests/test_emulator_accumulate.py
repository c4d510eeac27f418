"""emulator/accumulate: the fused sum against a scalar oracle in rationals, by hand at the edges, and in kernels."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import ptx_kernels
import pytest
import test_emulator_matrix as matrix
import test_emulator_mma as mma
import wgmma_programs as wgmma
from wgmma_scores import lost

from generator.emulator import Gpu
from generator.emulator.accumulate import Model, fused_dot, mma_model, wgmma_model
from generator.emulator.errors import LaunchError

LOWEST = {"bf16": -126, "f16": -14, "tf32": -126, "f32": -126, "e4m3": -6, "e5m2": -14}
DTYPE = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
         "e5m2": ml_dtypes.float8_e5m2}  # fmt: skip
F32 = Model(25, "f32")


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def exponent_of(x: float, form: str) -> int:
    return -126 if x == 0 else max(floor_log2(abs(Fraction(float(x)))), LOWEST[form])


def cut(x: Fraction, quantum: Fraction) -> Fraction:
    return math.trunc(x / quantum) * quantum


def oracle(a, b, c: float, form: str, fraction_bits: int, result: str) -> float:
    """One element, term by term (MMA-Sim's model, arXiv 2511.10909), in rationals."""
    exponents = [exponent_of(x, form) + exponent_of(y, form) for x, y in zip(a, b, strict=True)]
    common = max([*exponents, exponent_of(c, "f16" if result == "f16" else "f32")])
    quantum = Fraction(2) ** (common - fraction_bits)
    terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)] + [Fraction(float(c))]
    total = sum(cut(term, quantum) for term in terms)
    if result == "f16":
        if total == 0:
            return 0.0
        step = Fraction(2) ** (max(floor_log2(abs(total)), -14) - 10)
        return float(np.float16(float(round(total / step) * step)))
    bits = 23 if result == "f32" else 13
    step = Fraction(2) ** (max(floor_log2(abs(total)) if total else -126, -126) - bits)
    return float(cut(total, step))


def draw(rng, shape, form: str, spread: int) -> np.ndarray:
    values = rng.normal(size=shape) * np.exp2(rng.integers(-spread, spread + 1, shape))
    values = values.astype(np.float32).astype(DTYPE[form]).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if form == "tf32" else values


CASES = [(f, "f32", 25) for f in ("bf16", "f16", "tf32", "e4m3")] + [("f16", "f16", 25)]
CASES += [(f, r, 13) for f in ("e4m3", "e5m2") for r in ("e8m13", "f16")]


@pytest.mark.parametrize("spread", [0, 3, 6])
@pytest.mark.parametrize("form, result, fraction_bits", CASES)
def test_against_the_scalar_oracle(form, result, fraction_bits, spread):
    rng = np.random.default_rng(spread)
    k = {"tf32": 8, "e4m3": 32, "e5m2": 32}.get(form, 16)
    a, b = draw(rng, (5, k), form, spread), draw(rng, (6, k), form, spread)
    c = rng.normal(size=(5, 6)) * np.exp2(rng.integers(-2 * spread - 1, 2 * spread + 2, (5, 6)))
    c = c.astype(np.float16 if result == "f16" else np.float32).astype(np.float32)
    found = fused_dot(a, b, c, (form, form), Model(fraction_bits, result))
    for i, j in np.ndindex(5, 6):
        assert found[i, j] == np.float32(oracle(a[i], b[j], c[i, j], form, fraction_bits, result)), (i, j)


def dot(products, c=0.0, form="bf16", model=F32) -> float:
    """The sum of pairs (a, b) and c."""
    a, b = (np.array([[pair[side] for pair in products]], np.float32) for side in (0, 1))
    return fused_dot(a, b, np.array([[c]], np.float32), (form, form), model)[0, 0]


def test_terms_are_cut_25_bits_below_the_largest():
    assert dot([(1, 1), (2**-12, 2**-13)]) == 1  # bit 25 is kept, and lost in float32
    assert dot([(1, 1), (-1, 1), (2**-12, 2**-13)]) == 2**-25
    assert dot([(1, 1), (-1, 1), (2**-13, 2**-13)]) == 0  # bit 26 is cut
    assert dot([(1, 1), (-1, 1), (1.5 * 2**-12, 2**-13)]) == 2**-25
    assert dot([(1, 1), (-1, 1), (-1.5 * 2**-12, 2**-13)]) == -(2**-25)  # toward zero
    assert dot([(1.5, 1.5), (-1.5, 1.5), (2**-12, 2**-13)]) == 2**-25  # 2.25 counts as exponent 0: not normalized


def test_c_is_one_of_the_terms():
    assert dot([(2**-12, 2**-13)], 1.0) == 1
    assert dot([(2**-12, 2**-12), (-1, 1)], 1.0) == 2**-24
    assert dot([(1, 1), (-1, 1)], 2.0**-26) == 0
    assert dot([(2.0**10, 1), (-(2.0**10), 1)], 1 + 2.0**-23) == 1  # cut at 2^-15


def test_results_are_cut_toward_zero():
    assert dot([(1, 1), (2**-12, 2**-12)]) == 1
    assert dot([(1, 1), (2**-12, 1.5 * 2**-11)]) == np.float32(1 + 2**-23)
    assert dot([(-1, 1), (-(2**-12), 1.5 * 2**-12)]) == -1
    assert dot([(1, 1), (1.5 * 2**-12, 2**-12)], model=wgmma_model("e4m3", "f32"), form="e4m3") == 1
    assert dot([(1, 1), (2**-6, 2**-7)], model=wgmma_model("e4m3", "f32"), form="e4m3") == 1 + 2**-13
    assert dot([(2, 1), (2**-6, 2**-7)], model=wgmma_model("e4m3", "f32"), form="e4m3") == 2  # 14 bits below
    assert dot([(1, 1), (2**-6, 2**-5)], form="f16", model=wgmma_model("f16", "f16")) == 1  # tie to even
    assert dot([(1, 1), (2**-6, 3 * 2**-5)], form="f16", model=mma_model("f16")) == 1 + 2**-9


def test_subnormals_zeros_and_overflow():
    tiny = float(2.0**-133)  # the smallest subnormal of bfloat16
    assert dot([(tiny, 1), (tiny, 2)]) == 3 * 2.0**-133
    assert dot([(2.0**-100, 2.0**-49)]) == 2.0**-149 and dot([(2.0**-100, 2.0**-50)]) == 0
    for zero in (dot([(-0.0, 1)], -0.0), dot([(1, 1), (-1, 1)]), dot([(-(2.0**-100), 2.0**-50)])):
        assert zero == 0 and not np.signbit(zero)
    assert dot([(2.0**100, 2.0**28)]) == np.inf and dot([(-(2.0**100), 2.0**28)]) == -np.inf
    largest = np.finfo(np.float32).max
    assert dot([(2.0**100, 1)], largest) == largest  # cut, not rounded up
    assert dot([(240.0, 256.0), (64.0, 64.0)], form="f16", model=mma_model("f16")) == np.inf
    assert dot([(2.0**-14, 2.0**-10), (2.0**-24, 2.0**-1)], form="f16", model=mma_model("f16")) == 2.0**-23


def test_a_subnormal_has_the_exponent_of_the_smallest_normal():
    """2^-24 · 2^10 in float16 counts as exponent -4, so what is below 2^-29 is cut."""
    pair = [(2.0**-24, 2.0**10), (-(2.0**-24), 2.0**10)]
    assert dot([*pair, (2.0**-14, 2.0**-15)], form="f16") == 2.0**-29
    assert dot([*pair, (2.0**-14, 2.0**-16)], form="f16") == 0


def test_not_a_number_and_infinities():
    inf, nan = math.inf, math.nan
    for products, c in (
        ([(nan, 0)], 1),
        ([(1, 1)], nan),
        ([(inf, 0)], 0),
        ([(inf, 1), (-inf, 1)], 0),
        ([(inf, 1)], -inf),
    ):
        assert np.float32(dot(products, c)).view(np.uint32) == 0x7FFFFFFF
        half = np.float16(dot(products, c, "f16", mma_model("f16")))
        assert half.view(np.uint16) == 0x7FFF
    assert dot([(inf, -2), (5, 5)], 3) == -inf and dot([(5, 5)], inf) == inf


def test_one_bad_element_leaves_the_others_alone():
    a, b = np.ones((3, 16), np.float32), np.ones((4, 16), np.float32)
    a[1, 5] = np.nan
    found = fused_dot(a, b, None, ("f16", "f16"), F32)
    assert np.isnan(found[1]).all() and (found[[0, 2]] == 16).all()


# -- in kernels --------------------------------------------------------------------------------------------------------
def multiply(operands, arch_model, monkeypatch, registers: bool, start=None):
    """What the kernel computes under exact accumulation, and the oracle model applied instruction by instruction."""
    monkeypatch.setattr(wgmma, "Gpu", lambda arch: Gpu(arch, accumulation="exact"))
    rng = np.random.default_rng(3)
    for array in (operands.a, operands.b):
        array[:] = rng.normal(size=array.shape).astype(array.dtype)
    images = [wgmma.operand_image(wgmma.halves(v), False, 3) for v in (operands.a, operands.b)]
    operands.x[: sum(map(len, images))] = np.concatenate(images)
    body = None if start is None else start + operands.mmas("%one", registers=registers) + wgmma.COMMIT + wgmma.wait()
    found = operands.multiply(body, registers=registers)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    if operands.dtype is wgmma.TF32:
        a, b = ((v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (a, b))
    name, k = wgmma.NAMES[operands.dtype], operands.k // operands.steps
    d = np.full(found.shape, 0 if start is None else 10, np.float32)
    for step in range(operands.steps):
        span = slice(step * k, step * k + k)
        for at in np.ndindex(d.shape):
            if at[0] % 16 == at[1] % 16:  # every row and column, not every pair
                d[at] = oracle(a[at[0], span] * operands.negate[0], b[at[1], span], d[at], name, *arch_model)
    rows, columns = np.indices(d.shape)
    chosen = rows % 16 == columns % 16
    assert (found[chosen] == d[chosen]).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(
    "dtype, d, model",
    [(wgmma.BF16, "f32", (25, "f32")), (wgmma.F16, "f32", (25, "f32")), (wgmma.F16, "f16", (25, "f16")),
     (wgmma.TF32, "f32", (25, "f32")), (wgmma.E4M3, "f32", (13, "e8m13")), (wgmma.E5M2, "f16", (13, "f16"))],
)  # fmt: skip
def test_wgmma(dtype, d, model, registers, monkeypatch):
    multiply(wgmma.Operands(16, 2, dtype, d=d), model, monkeypatch, registers)


def test_wgmma_adds_to_registers_and_negates(monkeypatch):
    start = "".join(f"mov.b32 %acc{i}, 0f41200000;" for i in range(8))
    multiply(wgmma.Operands(16, 2, negate=(-1, 1)), (25, "f32"), monkeypatch, False, start)


def instruction(a, b, c, form: str, d: str) -> float:
    """mma.sync: one fused sum; fp8 as an H200 does it, in two float16 instructions, C added last."""
    if form[0] != "e":
        return oracle(a, b, c, form, 25, d)
    lower, total = np.arange(len(a)) % 4 < 2, 0.0
    for part in (lower, ~lower):
        total = oracle(a[part], b[part], total, "f16", 25, d)
    return np.float16(total) + np.float16(c) if d == "f16" else np.float32(total) + np.float32(c)


@pytest.mark.parametrize(
    "form, k, d",
    [("bf16", 16, "f32"), ("tf32", 8, "f32"), ("e4m3", 32, "f32"), ("e5m2", 16, "f16"), ("f16", 16, "f16")],
)
def test_mma_sync(form, k, d, monkeypatch):
    monkeypatch.setattr(ptx_kernels, "Gpu", lambda: Gpu(accumulation="exact"))
    rng = np.random.default_rng(1)
    a, b = draw(rng, (16, k), form, 2), draw(rng, (8, k), form, 2)
    c = rng.normal(size=(16, 8)).astype(np.float16 if d == "f16" else np.float32)
    words = [matrix.spread(v.astype(matrix.TYPES[form]), len(v)) for v in (a, b)]
    found = matrix.execute(f"mma.sync.aligned.m16n8k{k}.row.col.{d}.{form}.{form}.{d}", *words, c)
    expected = [[instruction(a[i], b[j], c[i, j], form, d) for j in range(8)] for i in range(16)]
    assert (found == matrix.fragments_of(np.array(expected, c.dtype))).all()


@pytest.mark.parametrize("dtype, name", [(mma.BF16, "bf16"), (mma.F16, "f16")])
def test_tcgen05(dtype, name, monkeypatch):
    monkeypatch.setattr(ptx_kernels, "Gpu", lambda: Gpu(accumulation="exact"))
    operands = mma.Operands(16, 64, dtype)
    rng = np.random.default_rng(6)
    for array in (operands.a, operands.b):
        array[:] = rng.normal(size=array.shape).astype(dtype)
    images = np.concatenate([mma.operand_image(v, False, 3) for v in (operands.a, operands.b)])
    operands.x[: len(images)] = images
    found = mma.multiply(operands)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    for i, j in zip(range(128), np.arange(128) % 16, strict=True):
        d = 0.0
        for k in range(0, 64, 16):
            d = oracle(a[i, k : k + 16], b[j, k : k + 16], d, name, 25, "f32")
        assert found[i, j] == d


def test_fast_and_exact_agree_where_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(wgmma, "Gpu", lambda arch: Gpu(arch, accumulation="exact"))
    operands = wgmma.Operands(24, 2, groups=2)
    assert (operands.multiply() == operands.product()).all()


def test_an_unknown_mode():
    with pytest.raises(LaunchError, match="accumulation is 'best': one of fast, exact"):
        Gpu(accumulation="best")


@pytest.mark.parametrize("head_dim, least, most", [(128, 2e-5, 4e-5), (512, 8e-5, 1.3e-4), (576, 9e-5, 1.5e-4)])
def test_large_scores_lose_what_the_bit_model_says(head_dim, least, most):
    """Scores of up to 146, thirty times random ones: the more columns, the more cuts."""
    rng = np.random.default_rng(7)
    q, k = (rng.standard_normal((rows, head_dim)).astype(np.float32) for rows in (300, 700))
    found = lost((30 * q).astype(ml_dtypes.bfloat16), k.astype(ml_dtypes.bfloat16), head_dim**-0.5)
    assert least < found < most
