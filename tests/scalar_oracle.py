"""What each elementwise PTX instruction gives, in exact Python integers and fractions, apart from the emulator.

`oracle(opcode)` returns a function from operand bits (ints) to `Exact(bits)`, `Float(bits)` (any NaN will do where the
result is NaN) or `Near(value, ulps, absolute)`; `widths(opcode)` the bits of the destination and of each source.
"""

import math
import struct
from fractions import Fraction
from typing import NamedTuple


class Exact(NamedTuple):
    bits: int


class Float(NamedTuple):
    bits: int  # of a float32


class Near(NamedTuple):
    value: float  # the exact result
    ulps: float  # of the float32 nearest to it
    absolute: float = 0.0


def to_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(value: float) -> int:
    """Bits of a float32 that holds `value` exactly (or is inf or NaN)."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def round_to(value: Fraction, mode: str = "rn", mantissa: int = 23, exponent: int = 8) -> int:
    """Exact non-zero value → bits of the binary format with these field widths; mode rn, rz, rm or rp."""
    negative, magnitude = value < 0, abs(value)
    bias = (1 << exponent - 1) - 1
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** e:
        e -= 1
    e = max(e, 1 - bias)
    scaled = magnitude / Fraction(2) ** (e - mantissa)
    n = scaled.numerator // scaled.denominator
    rest = scaled - n
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n & 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    n += bool(up)
    if n >> mantissa + 1:
        n, e = n >> 1, e + 1
    if e > bias:
        to_infinity = mode == "rn" or (mode == "rm" and negative) or (mode == "rp" and not negative)
        bits = ((1 << exponent) - 1) << mantissa if to_infinity else (((1 << exponent) - 1) << mantissa) - 1
    elif n >> mantissa:
        bits = (e + bias << mantissa) + n - (1 << mantissa)
    else:
        bits = n
    return bits | negative << mantissa + exponent


def sign(bits: int) -> int:
    return bits >> 31


def is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


def is_inf(bits: int) -> bool:
    return bits & 0x7FFFFFFF == 0x7F800000


def flush(bits: int) -> int:
    return bits & 0x80000000 if bits & 0x7F800000 == 0 else bits


NAN = 0x7FC00000


def fused(a: int, b: int, c: int, mode: str) -> int:
    """a·b + c, rounded once."""
    if is_nan(a) or is_nan(b) or is_nan(c):
        return NAN
    product_sign = sign(a) ^ sign(b)
    if is_inf(a) or is_inf(b):
        if a & 0x7FFFFFFF == 0 or b & 0x7FFFFFFF == 0 or (is_inf(c) and sign(c) != product_sign):
            return NAN
        return 0x7F800000 | product_sign << 31
    if is_inf(c):
        return c
    exact = Fraction(to_float(a)) * Fraction(to_float(b)) + Fraction(to_float(c))
    if exact:
        return round_to(exact, mode)
    product_is_zero = a & 0x7FFFFFFF == 0 or b & 0x7FFFFFFF == 0
    if product_is_zero and product_sign == sign(c):
        return product_sign << 31
    return 0x80000000 if mode == "rm" else 0


def add(a: int, b: int, mode: str) -> int:
    return fused(a, 0x3F800000, b, mode)


def sub(a: int, b: int, mode: str) -> int:
    return fused(a, 0x3F800000, b ^ 0x80000000 if not is_nan(b) else b, mode)


def mul(a: int, b: int, mode: str) -> int:
    """The product; adding a zero of its own sign keeps the sign of zero."""
    return fused(a, b, ((a ^ b) & 0x80000000), mode)


def divide(a: int, b: int) -> int:
    if is_nan(a) or is_nan(b) or (is_inf(a) and is_inf(b)) or not (a | b) & 0x7FFFFFFF:
        return NAN
    negative = (sign(a) ^ sign(b)) << 31
    if is_inf(a) or not b & 0x7FFFFFFF:
        return 0x7F800000 | negative
    if is_inf(b) or not a & 0x7FFFFFFF:
        return negative
    return round_to(Fraction(to_float(a)) / Fraction(to_float(b)))


def square_root(a: int) -> int:
    if not a & 0x7FFFFFFF:
        return a
    if is_nan(a) or sign(a):
        return NAN
    if is_inf(a):
        return a
    exact = Fraction(to_float(a))
    scale = 200  # enough bits that the floor of the root, made odd where inexact, rounds as the root itself
    scaled = exact * Fraction(4) ** scale
    root = math.isqrt(scaled.numerator // scaled.denominator)
    inexact = root * root != scaled
    return round_to((Fraction(root) + Fraction(1, 2) * inexact) / Fraction(2) ** scale)


def extreme(values, largest: bool, propagate: bool) -> int:
    """min or max of float32: -0 < +0; NaN is dropped or, with .NaN, wins."""
    numbers = [v for v in values if not is_nan(v)]
    if not numbers or (propagate and len(numbers) < len(values)):
        return NAN
    return (max if largest else min)(numbers, key=lambda v: (to_float(v), -sign(v)))


def signed(x: int, width: int) -> int:
    return x - (1 << width) if x >> width - 1 else x


def integer_value(x: int, kind: str) -> int:
    width = int(kind[1:])
    x &= (1 << width) - 1
    return signed(x, width) if kind[0] == "s" else x


def truncated(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


ORDER = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b}
ORDER |= {"le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}
LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}
ROUND_INTEGER = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def compare_floats(name: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name.endswith("u"):
        return unordered or ORDER[name[:-1]](a, b)
    return not unordered and ORDER[name](a, b)


def width_of(kind: str) -> int:
    return {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "f32x2": 64}.get(kind) or int(kind[1:])


def widths(opcode: str, operands: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Bits of the destination, bits of every source (PTX ISA 9.1 §9.7)."""
    parts = opcode.split(".")
    name, w = parts[0], width_of(parts[-1])
    if name == "cvt":
        source, dest = w, width_of(parts[-2])
        return max(dest, 16), (max(source, 16),) * (2 if parts[-2].endswith("x2") else 1)
    if name == "setp":
        return 1, (w, w, 1) if LOGIC.keys() & set(parts) else (w, w)
    if name in ("neg", "abs", "not", "clz", "popc", "brev", "sqrt", "ex2", "lg2", "rcp", "rsqrt", "tanh", "cvta"):
        return w, (w,)
    if name in ("shl", "shr"):
        return w, (w, 32)
    if name == "selp":
        return w, (w, w, 1)
    if "wide" in parts:
        return 2 * w, (w, w) if name == "mul" else (w, w, 2 * w)
    if name in ("fma", "mad", "prmt", "bfe", "shf"):
        return w, (w, w, w)
    if name == "lop3":
        return w, (w, w, w, 8)
    return w, (w, w)


def oracle(opcode: str):
    """A function from operand bits to the result, or KeyError where this module does not know the opcode."""
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    if name == "cvt":
        return conversion(parts)
    if name == "setp":
        return comparison(parts)
    if kind in ("f32", "f32x2") and name not in ("selp",):
        return float_operation(name, parts, "ftz" in parts)
    return integer_operation(name, parts, kind)


def float_operation(name: str, parts: list[str], ftz: bool):
    mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp")), "rn")
    rules = {"add": add, "sub": sub, "mul": mul, "fma": fused}
    if name in rules:
        function = lambda *x: rules[name](*x, mode)  # noqa: E731
    elif name in ("min", "max"):
        function = lambda *x: extreme(x, name == "max", "NaN" in parts)  # noqa: E731
    elif name in ("neg", "abs", "copysign"):
        function = {
            "neg": lambda a: a ^ 0x80000000,
            "abs": lambda a: a & 0x7FFFFFFF,
            "copysign": lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF,
        }[name]
        return lambda *x: Float(function(*x))
    elif name == "sqrt":
        function = square_root
    elif name == "rcp" and "rn" in parts:
        function = lambda a: divide(0x3F800000, a)  # noqa: E731
    elif name == "div" and "rn" in parts:
        function = divide
    else:
        return approximation(name, ftz, parts)
    if not ftz:
        return lambda *x: Float(function(*x))
    return lambda *x: Float(flush(function(*map(flush, x))))


def approximation(name: str, ftz: bool, parts: list[str]):
    """ISA 9.1 §9.7.3: ex2 2 ulp, lg2 2^-22 (absolute near 1), rcp 1 ulp, rsqrt 2^-22.9, div 2 ulp, tanh 2^-11."""
    ulps = {"ex2": 2, "lg2": 2, "rcp": 1, "rsqrt": 2, "div": 2, "tanh": 2**13}[name]

    def exact(x: float, y: float) -> float:
        if name == "div":  # a divisor beyond 2^126 has no normal reciprocal: its quotient is +0 on an H200
            beyond = math.isfinite(x) and 2.0**126 < abs(y) < math.inf and "full" not in parts
            return 0.0 if beyond else to_float(divide(bits_of(x), bits_of(y)))
        if name == "rcp":
            return to_float(divide(0x3F800000, bits_of(x)))
        if name == "ex2":
            return math.exp2(x) if hasattr(math, "exp2") and x < 1000 else math.inf if x > 0 else math.nan
        if name == "tanh":
            return math.tanh(x)
        if math.isnan(x) or x < 0:
            return math.nan
        if name == "lg2":
            return -math.inf if x == 0 else math.inf if x == math.inf else math.log2(x)
        return math.copysign(math.inf, x) if x == 0 else 0.0 if x == math.inf else 1 / math.sqrt(x)

    def run(a: int, b: int = 0):
        a, b = (flush(a), flush(b)) if ftz else (a, b)
        value = exact(to_float(a), to_float(b))
        if ftz and abs(value) < 2.0**-126:
            return Near(math.copysign(0.0, value), 0, 0)
        return Near(value, ulps, 2.0**-22 if name == "lg2" else 2.0**-149)

    return run


def comparison(parts: list[str]):
    kind, compare = parts[-1], parts[1]
    combine = next((LOGIC[p] for p in parts[2:-1] if p in LOGIC), None)

    def value(x: int):
        if kind == "f32":
            return to_float(flush(x) if "ftz" in parts else x)
        if kind == "f64":
            return struct.unpack("<d", struct.pack("<Q", x))[0]
        return integer_value(x, kind)

    def run(a: int, b: int, c: int = 0):
        test = compare_floats if kind[0] == "f" else lambda name, x, y: ORDER[name](x, y)
        result = int(test(compare, value(a), value(b)))
        return Exact(result if combine is None else combine(result, c))

    return run


def conversion(parts: list[str]):
    dest, source = parts[-2:]
    formats = {"bf16": (7, 8), "f16": (10, 5)}
    if dest in ("bf16x2", "f16x2", "bf16", "f16"):
        mantissa, exponent = formats[dest.removesuffix("x2")]

        def one(a: int) -> int:
            if is_nan(a):
                return 0x7FFF
            infinity = ((1 << exponent) - 1) << mantissa
            x = to_float(a)
            if x == 0 or math.isinf(x):
                return (infinity if x else 0) | sign(a) << 15
            return round_to(Fraction(x), "rn", mantissa, exponent)

        return (lambda a, b: Exact(one(a) << 16 | one(b))) if dest.endswith("x2") else (lambda a: Exact(one(a)))
    if dest == "f32" and source in formats:
        return lambda a: Float(bits_of(struct.unpack("<e", struct.pack("<H", a))[0]) if source == "f16" else a << 16)
    if dest == "f32":
        return lambda a: Float(round_to(Fraction(v)) if (v := integer_value(a, source)) else 0)
    width = int(dest[1:])
    register = (1 << max(width, 16)) - 1
    if source != "f32":  # a sign is extended to the whole register
        return lambda a: Exact(integer_value(integer_value(a, source) & ((1 << width) - 1), dest) & register)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if dest[0] == "s" else (0, (1 << width) - 1)
    whole = ROUND_INTEGER[next(p for p in parts if p in ROUND_INTEGER)]

    def run(a: int):
        a = flush(a) if "ftz" in parts else a
        if is_nan(a):
            return Exact(0) if width < 64 else None  # not compared: ISA versions differ
        if is_inf(a):
            return Exact((low if sign(a) else high) & register)
        return Exact(min(max(whole(Fraction(to_float(a))), low), high) & register)

    return run


def permute(a: int, b: int, selector: int) -> int:
    data, result = b << 32 | a, 0
    for i in range(4):
        code = selector >> 4 * i & 15
        byte = data >> 8 * (code & 7) & 255
        result |= ((255 if byte & 128 else 0) if code & 8 else byte) << 8 * i
    return result


def integer_operation(name: str, parts: list[str], kind: str):
    w = width_of(kind)
    mask = (1 << w) - 1
    value = (lambda x: integer_value(x, kind)) if kind[0] == "s" else (lambda x: x)
    relu = "relu" in parts
    wide = 2 * w if "wide" in parts else w
    shift = w if "hi" in parts else 0

    def clamp(x: int) -> int:
        return max(x, 0) if relu else x

    rules = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: value(a) * value(b) >> shift,
        "mad": lambda a, b, c: value(a) * value(b) + c,
        "div": lambda a, b: -1 if b == 0 else truncated(value(a), value(b)),
        "rem": lambda a, b: -1 if b == 0 else value(a) - truncated(value(a), value(b)) * value(b),
        "min": lambda a, b: clamp(min(value(a), value(b))),
        "max": lambda a, b: clamp(max(value(a), value(b))),
        "neg": lambda a: -a,
        "abs": lambda a: abs(value(a)),
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a,
        "shl": lambda a, n: a << min(n, w),
        "shr": lambda a, n: value(a) >> min(n, w),
        "shf": lambda a, b, n: (b << 32 | a) << (n & 31) >> 32 if "l" in parts else (b << 32 | a) >> (n & 31),
        "lop3": lambda a, b, c, t: sum(
            (t >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
        ),
        "prmt": permute,
        "bfe": lambda a, p, n: a >> (p & 255) & ((1 << (n & 255)) - 1),
        "clz": lambda a: 32 - a.bit_length(),
        "popc": lambda a: a.bit_count(),
        "brev": lambda a: int(f"{a:032b}"[::-1], 2),
        "selp": lambda a, b, p: a if p else b,
        "cvta": lambda a: a,
    }
    rule = rules[name]
    return lambda *x: Exact(rule(*x) & ((1 << wide) - 1) if wide != w else rule(*x) & mask)
