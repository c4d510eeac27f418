"""What the wider families of elementwise PTX instructions give, in exact Python integers and fractions.

`lookup(opcode)` returns (bits of the destination, bits of each source, function from operand bits to the result), or
None where `scalar_oracle` knows the opcode. A result is an int (exact bits), `Exact`, `Near` or `AnyNan(bits)`.
"""

import math
import struct
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np
from integer_oracle import halves, integer_rule, limits
from scalar_oracle import LOGIC, ROUND_INTEGER, Near, compare_floats, integer_value, round_to, signed


class AnyNan(NamedTuple):
    """Any NaN of a format of so many bits."""

    bits: int


class Form(NamedTuple):
    """A floating-point format: stored mantissa bits, exponent bits."""

    mantissa: int
    exponent: int

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def top(self) -> int:
        return 1 << self.mantissa + self.exponent

    def nan(self, x: int) -> bool:
        return x & (self.top - 1) > self.infinity

    def inf(self, x: int) -> bool:
        return x & (self.top - 1) == self.infinity

    def sign(self, x: int) -> int:
        return int(x & self.top != 0)

    def zero(self, x: int) -> bool:
        return x & (self.top - 1) == 0

    def value(self, x: int) -> Fraction:
        field, fraction = x >> self.mantissa & (1 << self.exponent) - 1, x & (1 << self.mantissa) - 1
        bias = (1 << self.exponent - 1) - 1
        magnitude = Fraction(fraction + (bool(field) << self.mantissa)) * Fraction(2) ** (
            max(field, 1) - bias - self.mantissa
        )
        return -magnitude if self.sign(x) else magnitude

    def real(self, x: int) -> float:
        if self.nan(x) or self.inf(x):
            return math.nan if self.nan(x) else -math.inf if self.sign(x) else math.inf
        return math.copysign(float(self.value(x)), -1 if self.sign(x) else 1)

    def flush(self, x: int) -> int:
        return x & self.top if not x >> self.mantissa & (1 << self.exponent) - 1 else x

    def round(self, value: Fraction, mode: str, negative_zero: bool = False) -> int:
        if not value:
            return self.top if negative_zero else 0
        return round_to(value, mode, self.mantissa, self.exponent)


FORMS = {"f16": Form(10, 5), "bf16": Form(7, 8), "f32": Form(23, 8), "f64": Form(52, 11)}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
MODES = ("rn", "rz", "rm", "rp")


def result_nan(form: str):
    """The NaN of arithmetic on an H200; float64 hands on the bits of an operand."""
    return {16: 0x7FFF, 32: 0x7FFFFFFF, 64: AnyNan(64)}[WIDTH[form]]


def fused(f: Form, a: int, b: int, c: int, mode: str) -> int | None:
    """a·b + c rounded once; None for NaN."""
    if f.nan(a) or f.nan(b) or f.nan(c):
        return None
    product_sign = f.sign(a) ^ f.sign(b)
    if f.inf(a) or f.inf(b):
        if f.zero(a) or f.zero(b) or (f.inf(c) and f.sign(c) != product_sign):
            return None
        return f.infinity | product_sign * f.top
    if f.inf(c):
        return c
    exact = f.value(a) * f.value(b) + f.value(c)
    if not exact and (f.zero(a) or f.zero(b)) and product_sign == f.sign(c):
        return product_sign * f.top
    return f.round(exact, mode, mode == "rm")


def operate(name: str, f: Form, mode: str, x: tuple) -> int | None:
    one = f.round(Fraction(1), "rn")
    if name == "add":
        return fused(f, x[0], one, x[1], mode)
    if name == "sub":
        return fused(f, x[0], one, x[1] if f.nan(x[1]) else x[1] ^ f.top, mode)
    if name == "mul":
        return fused(f, *x, (x[0] ^ x[1]) & f.top, mode)
    if name in ("fma", "mad"):
        return fused(f, *x, mode)
    if name == "sqrt":
        return root(f, x[0], mode)
    a, b = x if name == "div" else (one, x[0])
    if f.nan(a) or f.nan(b) or (f.inf(a) and f.inf(b)) or (f.zero(a) and f.zero(b)):
        return None
    negative = (a ^ b) & f.top
    if f.inf(a) or f.zero(b):
        return f.infinity | negative
    return negative if f.inf(b) or f.zero(a) else f.round(f.value(a) / f.value(b), mode)


def root(f: Form, a: int, mode: str) -> int | None:
    if f.zero(a) or f.nan(a) or f.sign(a) or f.inf(a):
        return a if f.zero(a) or (f.inf(a) and not f.sign(a)) else None
    scaled = f.value(a) * Fraction(4) ** 1200
    floor = math.isqrt(scaled.numerator // scaled.denominator)
    return f.round((Fraction(floor) + Fraction(1, 2) * (floor * floor != scaled)) / Fraction(2) ** 1200, mode)


def finish(form: str, bits: int | None, parts) -> int | AnyNan:
    """.sat and .relu on a rounded result, and the NaN of the format."""
    f = FORMS[form]
    if "sat" in parts:
        one = f.round(Fraction(1), "rn")
        return 0 if bits is None or f.sign(bits) else min(bits, one)
    if bits is None:
        return result_nan(form)
    return 0 if "relu" in parts and f.sign(bits) else bits


def extreme(form: str, parts, a: int, b: int):
    f = FORMS[form]
    sign = (a ^ b) & f.top
    missing = [x for x in (a, b) if f.nan(x)]
    if len(missing) == 2 or (missing and "NaN" in parts):
        return result_nan(form)
    if "xorsign" in parts:
        a, b = a & (f.top - 1), b & (f.top - 1)
    key = lambda x: (f.real(x), -f.sign(x))  # noqa: E731
    have = [x for x in (a, b) if not f.nan(x)]
    return (max if parts[0] == "max" else min)(have, key=key) | (sign if "xorsign" in parts else 0)


def float_rule(form: str, parts: list[str]):
    """A function of operand bits for arithmetic in one format."""
    f, name, ftz = FORMS[form], parts[0], "ftz" in parts
    flush = f.flush if ftz else lambda x: x
    mode = next((p for p in parts if p in MODES), "rn")

    def run(*x):
        x = [flush(v) for v in x]
        if name in ("neg", "abs", "copysign"):
            if name == "copysign":
                return x[0] & f.top | x[1] & (f.top - 1)
            result = x[0] ^ f.top if name == "neg" else x[0] & (f.top - 1)
            return result_nan(form) if f.nan(result) else result
        if name in ("min", "max"):
            return extreme(form, parts, *x)
        if "approx" in parts:
            return approximate(form, name, x, ftz)
        result = operate(name, f, mode, tuple(x))
        return finish(form, result if result is None else flush(result), parts)

    return run


FUNCTIONS = {
    "tanh": math.tanh,
    "ex2": lambda x: math.inf if x >= 128 else 2.0**x,
    "sin": lambda x: math.sin(turned(x)),
    "cos": lambda x: math.cos(turned(x)),
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rcp": lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x,
}


def turned(x: float) -> float:
    """The angle that an H200 takes the sine of: turns are a float32, rounded toward zero, whose fraction counts."""
    if not math.isfinite(x):
        return math.nan
    turns = FORMS["f32"].value(FORMS["f32"].round(Fraction(x) * Fraction(float(np.float32(0.5 / math.pi))), "rz"))
    return float(turns % 1) * 2 * math.pi


def approximate(form: str, name: str, x, ftz: bool):
    """f32: within the ISA's error (sin and cos 2^-20.5 in the main range). f16, bf16: within one unit of the format."""
    f = FORMS[form]
    value = FUNCTIONS[name](f.real(x[0]))
    if form == "f32":
        return Near(value, 2, 2.0**-20 if name in ("sin", "cos") else 2.0**-126 if ftz else 2.0**-149)
    if math.isnan(value):
        return 0x7FFF
    if math.isinf(value) or value == 0:
        return (f.infinity if value else 0) | (f.top if math.copysign(1, value) < 0 else 0)
    bits = f.round(Fraction(value), "rn", value < 0)
    return f.flush(bits) if ftz else bits


# -- conversions -------------------------------------------------------------------------------------------------------
SMALL = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}
GRID = {}
for _name, _dtype in SMALL.items():  # every finite value that is not negative, by its bits
    _all = np.arange(32 if _name[1] in "23" else 128, dtype=np.uint8).view(_dtype).astype(np.float64)
    GRID[_name] = [float(v) for v in _all if np.isfinite(v)]


def to_small(name: str, f: Form, x: int, clamp: bool) -> int:
    """Nearest value of an 8- or 6-bit format, ties to the even code, too large becomes the largest."""
    grid, top = GRID[name], 32 if name[1] in "23" else 128
    if f.nan(x):
        return 0x7F if top == 128 else 0x1F
    negative = f.sign(x)
    if clamp and negative:
        return 0
    if f.inf(x):
        return len(grid) - 1 | negative * top
    magnitude = abs(f.value(x))
    best = min(range(len(grid)), key=lambda i: (abs(Fraction(grid[i]) - magnitude), i & 1))
    return best | negative * top


def float_conversion(to: str, source: str, parts: list[str]):
    f, g = FORMS[source], FORMS[to]
    whole = next((ROUND_INTEGER[p] for p in parts if p in ROUND_INTEGER), None)
    mode = next((p for p in parts if p in MODES), "rn")

    def run(x: int):
        if "ftz" in parts and source == "f32" and to != "f16":  # on the way to float16 an H200 flushes nothing
            x = f.flush(x)
        if f.nan(x):
            if source == "f64" and WIDTH[to] == 16 and "sat" not in parts:  # sign and payload stay
                payload = (x & (1 << f.mantissa) - 1) >> f.mantissa - g.mantissa
                return f.sign(x) * g.top | g.infinity | 1 << g.mantissa - 1 | payload
            passed_on = to == "f32" and (source == "f64" or source != "f16" and "ftz" not in parts)
            return 0 if "sat" in parts else AnyNan(32) if passed_on else result_nan(to)
        if f.inf(x):
            bits = g.infinity | f.sign(x) * g.top
            if "satfinite" in parts:
                bits -= 1
        else:
            value = Fraction(whole(f.value(x))) if whole else f.value(x)
            bits = g.round(value, mode, bool(f.sign(x)))
            if "satfinite" in parts and g.inf(bits):
                bits -= 1
        if "ftz" in parts and to == "f32":
            bits = g.flush(bits)
        return finish(to, bits, parts)

    return run


def to_tf32(parts: list[str]):
    f, tf32 = FORMS["f32"], Form(10, 8)

    def run(x: int):
        magnitude = x & 0x7FFFFFFF
        if f.nan(x) and "rna" not in parts:
            return 0x7FFFE000
        if f.nan(x) or (f.inf(x) and "rna" in parts):  # rna works on the bits, whatever they mean
            magnitude = (magnitude & ~0x1FFF) - 0x2000 * ("satfinite" in parts)
            return magnitude | x & 0x80000000
        if "relu" in parts and f.sign(x):
            return 0
        if not f.inf(x):
            if "rna" in parts:
                magnitude = magnitude + 0x1000 & ~0x1FFF
            elif magnitude:
                magnitude = tf32.round(f.value(magnitude), "rn" if "rn" in parts else "rz") << 13
        if "satfinite" in parts:
            magnitude = min(magnitude, 0x7F7FE000)
        return magnitude | x & 0x80000000

    return run


def conversion(parts: list[str]):
    to, source = parts[-2:]
    clamp = "relu" in parts
    if parts[1] == "pack":
        size = int(parts[3][1:])
        low, high = limits(parts[3])
        fit = lambda x: min(max(signed(x, 32), low), high) & (1 << size) - 1  # noqa: E731
        under = lambda a, b, c=0: fit(a) << size | fit(b) | c << 2 * size & 0xFFFFFFFF  # noqa: E731
        return 32, (32,) * (3 if size == 8 else 2), under
    if to == "tf32":
        return 32, (32,), to_tf32(parts)
    if to[:4] in SMALL:
        f = FORMS["f32" if source == "f32" else "f16"]
        if source == "f32":
            return (
                16,
                (32, 32),
                lambda a, b: to_small(to[:4], f, a, clamp) << 8 | to_small(to[:4], f, b, clamp),
            )
        return (
            16,
            (32,),
            lambda a: to_small(to[:4], f, a >> 16, clamp) << 8 | to_small(to[:4], f, a & 0xFFFF, clamp),
        )
    if source[:4] in SMALL:
        mask, dtype = 63 if source[1] in "23" else 255, SMALL[source[:4]]

        def half(x: int) -> int:
            value = float(np.uint8(x & mask).view(dtype))
            if math.isnan(value):
                return 0x7FFF
            bits = struct.unpack("<H", struct.pack("<e", value))[0]
            return 0 if clamp and bits >> 15 else bits

        return 32, (16,), lambda a: half(a >> 8) << 16 | half(a & 255)
    if to.endswith("x2"):
        one = float_conversion(to[:-2], "f32", parts)
        return 32, (32, 32), lambda a, b: one(a) << 16 | one(b)
    if to in FORMS and source in FORMS:
        return WIDTH[to], (WIDTH[source],), float_conversion(to, source, parts)
    if to in FORMS:
        mode = next(p for p in parts if p in MODES)
        rule = lambda x: finish(to, FORMS[to].round(Fraction(integer_value(x, source)), mode), parts)  # noqa: E731
        return WIDTH[to], (max(int(source[1:]), 16),), rule
    low, high = limits(to)
    register = (1 << max(int(to[1:]), 16)) - 1
    if source in FORMS:
        return max(int(to[1:]), 16), (WIDTH[source],), float_to_integer(to, source, parts, register)
    return (
        max(int(to[1:]), 16),
        (max(int(source[1:]), 16),),
        lambda x: min(max(integer_value(x, source), low), high) & register,
    )


def float_to_integer(to: str, source: str, parts, register: int):
    f, (low, high) = FORMS[source], limits(to)
    whole = next(ROUND_INTEGER[p] for p in parts if p in ROUND_INTEGER)

    def run(x: int):
        x = f.flush(x) if "ftz" in parts else x
        if f.nan(x):  # the highest bit alone where 64 bits are read or written, as on an H200
            top = 1 << int(to[1:]) - 1
            return integer_value(top, to) & register if int(to[1:]) == 64 or source == "f64" else 0
        if f.inf(x):
            return (low if f.sign(x) else high) & register
        return min(max(whole(f.value(x)), low), high) & register

    return run


def property_rule(parts: list[str]):
    f = FORMS[parts[2]]
    rules = {
        "finite": lambda x: not (f.nan(x) or f.inf(x)),
        "infinite": f.inf,
        "number": lambda x: not f.nan(x),
        "notanumber": f.nan,
        "normal": lambda x: not (f.nan(x) or f.inf(x)) and (f.zero(x) or not f.zero(f.flush(x))),
        "subnormal": lambda x: not f.zero(x) and f.zero(f.flush(x)),
    }
    return 1, (WIDTH[parts[2]],), lambda x: int(rules[parts[1]](x))


def width_of(kind: str) -> int:
    return WIDTH.get(kind) or int(kind[1:])


def comparison(parts: list[str]):
    """setp of f16 and bf16, set of every type."""
    kind = parts[-1]
    combine = next((LOGIC[p] for p in parts[2:] if p in LOGIC), None)

    def value(x: int):
        if kind not in FORMS:
            return integer_value(x, kind)
        return FORMS[kind].real(FORMS[kind].flush(x) if "ftz" in parts else x)

    def run(a, b, c=0):
        compare = compare_floats if kind in FORMS else lambda n, x, y: compare_floats(n, x, y)
        result = int(compare(parts[1], value(a), value(b)) if kind in FORMS else compare_integers(parts[1], a, b, kind))
        result = result if combine is None else combine(result, c)
        if parts[0] == "setp":
            return result
        return 0 if not result else 0x3F800000 if parts[-2] == "f32" else 0xFFFFFFFF

    sources = (width_of(kind),) * 2
    return 1 if parts[0] == "setp" else 32, sources if combine is None else (*sources, 1), run


def compare_integers(name: str, a: int, b: int, kind: str) -> bool:
    a, b = integer_value(a, kind), integer_value(b, kind)
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name]


def lookup(opcode: str):
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    if name == "testp":
        return property_rule(parts)
    if name == "set" or (name == "setp" and kind in ("f16", "bf16")):
        return comparison(parts)
    if name == "slct":
        chooser, w = FORMS["f32"], width_of(parts[-2])
        if kind == "s32":
            return w, (w, w, 32), lambda a, b, c: a if c < 1 << 31 else b
        flush = chooser.flush if "ftz" in parts else lambda x: x
        return w, (w, w, 32), lambda a, b, c: a if chooser.real(flush(c)) >= 0 else b
    if name == "cvt" and (set(parts) & {"sat", "pack"} or parts[-1] in FORMS or parts[-2] in FORMS or "x2" in opcode):
        return conversion(parts)
    if opcode.endswith(".tf32.f32"):
        return conversion(parts)
    if name in ("setp", "selp"):
        return None
    if kind in ("f16", "bf16") and parts[-2] == "f32":  # mixed precision
        narrow = 2 if name == "fma" else 1
        rule, widen = float_rule("f32", parts), float_conversion("f32", kind, [])
        sources = (16,) * narrow + (32,)

        def mixed(*x):
            wide = [widen(v) if i < narrow else v for i, v in enumerate(x)]
            return rule(*(0x7FC00000 if isinstance(v, AnyNan) else v for v in wide))

        return 32, sources, mixed
    operands = {"fma": 3, "mad": 3, "neg": 1, "abs": 1, "tanh": 1, "ex2": 1, "sqrt": 1, "rcp": 1, "sin": 1, "cos": 1}
    if kind in ("f16x2", "bf16x2"):
        n = operands.get(name, 2)
        return 32, (32,) * n, halves(float_rule(kind[:-2], parts), n)
    if kind in ("f16", "bf16", "f64"):
        return WIDTH[kind], (WIDTH[kind],) * operands.get(name, 2), float_rule(kind, parts)
    if (
        kind == "f32"
        and (
            {"sat", "rz", "rm", "rp", "xorsign"} & set(parts)
            or name in ("sin", "cos", "mad", "sqrt", "rcp")
            or (name in ("min", "max", "neg", "abs", "div") and "ftz" in parts)
        )
        and "approx" not in (parts if name in ("rcp", "div", "rsqrt") else ())
    ):
        if name == "div" and "full" in parts:
            return None
        if name in ("min", "max") and "xorsign" not in parts:
            return None
        return 32, (32,) * operands.get(name, 2), float_rule("f32", parts)
    return integer_rule(parts)
