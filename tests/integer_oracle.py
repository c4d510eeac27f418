"""What the integer and bit instructions do, in Python integers; shares nothing with the emulator."""

from scalar_oracle import integer_value, permute, signed


def halves(rule, count: int):
    """A rule of 16-bit operands → the same on both halves."""

    def run(*x):
        parts = [rule(*(v >> shift & 0xFFFF for v in x[:count]), *x[count:]) for shift in (0, 16)]
        return parts[0] | parts[1] << 16

    return run


def limits(kind: str) -> tuple[int, int]:
    w = int(kind[1:])
    return (-(1 << w - 1), (1 << w - 1) - 1) if kind[0] == "s" else (0, (1 << w) - 1)


def field(a: int, position: int, length: int, width: int, sign: bool) -> int:
    position, length = position & 255, length & 255
    fill = a >> min(position + length - 1, width - 1) & 1 if sign and length else 0
    return sum((a >> position + i & 1 if i < length and position + i < width else fill) << i for i in range(width))


def insert(a: int, b: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    for i in range(min(length, width)):
        if position + i < width:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def nth_set(mask: int, base: int, offset: int) -> int:
    offset = signed(offset, 32)
    # a base beyond 31 is undefined; the test keeps to the others
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    where = [i for i in range(32) if mask >> i & 1]
    side = [i for i in where if i >= base] if offset > 0 else [i for i in where if i <= base][::-1]
    return side[abs(offset) - 1] if abs(offset) <= len(side) else 0xFFFFFFFF


def find(a: int, w: int, sign: bool, shift: bool) -> int:
    if sign and a >> w - 1:
        a ^= (1 << w) - 1
    return 0xFFFFFFFF if not a else w - a.bit_length() if shift else a.bit_length() - 1


def dot(x: int, y: int, tx: str, ty: str, bits: int, first: int) -> int:
    count = 4 if bits == 8 else 2
    part = lambda v, w, i, kind: integer_value(v >> w * i & (1 << w) - 1, f"{kind[0]}{w}")  # noqa: E731
    return sum(part(x, bits, i, tx) * part(y, 8, first + i, ty) for i in range(count))


PRMT = {
    "f4e": lambda i, s: s + i,
    "b4e": lambda i, s: (s - i) % 8,
    "rc8": lambda i, s: s,
    "ecl": lambda i, s: max(i, s),
    "ecr": lambda i, s: min(i, s),
    "rc16": lambda i, s: 2 * (s & 1) + (i & 1),
}


def integer_rule(parts: list[str]):
    """(destination bits, source bits, rule) of the integer families, or None."""
    name, kind = parts[0], parts[-1]
    if name == "prmt" and len(parts) == 3:
        choose = PRMT[parts[2]]
        code = lambda s: sum(choose(i, s & 3) << 4 * i for i in range(4))  # noqa: E731
        return 32, (32, 32, 32), lambda a, b, s: permute(a, b, code(s))
    if kind in ("s16x2", "u16x2"):
        one = f"{kind[0]}16"
        value = lambda x: integer_value(x, one)  # noqa: E731
        rule = {
            "add": lambda a, b: a + b,
            "min": lambda a, b: min(value(a), value(b)),
            "max": lambda a, b: max(value(a), value(b)),
        }[name]
        relu = "relu" in parts
        return 32, (32, 32), halves(lambda a, b: (max(rule(a, b), 0) if relu else rule(a, b)) & 0xFFFF, 2)
    if name in ("dp4a", "dp2a"):
        first = 2 if "hi" in parts else 0
        ta, tb = parts[-2:]
        bits = 8 if name == "dp4a" else 16
        return 32, (32, 32, 32), lambda a, b, c: dot(a, b, ta, tb, bits, first) + c & 0xFFFFFFFF
    if not kind[1:].isdigit():
        return None
    w = int(kind[1:])
    mask = (1 << w) - 1
    value = lambda x: integer_value(x, kind)  # noqa: E731
    low24 = lambda x: integer_value(x & 0xFFFFFF, "s24" if kind[0] == "s" else "u24")  # noqa: E731
    low, high = limits(kind)
    clamp = (lambda x: min(max(x, low), high)) if "sat" in parts else lambda x: x
    wrap24 = lambda x: signed(x & mask, w) if kind[0] == "s" else x & mask  # noqa: E731
    shift24 = 16 if "hi" in parts else 0
    count = (lambda c: c & 31) if "wrap" in parts else lambda c: min(c, 32)
    rules = {
        "add": (w, (w, w), lambda a, b: clamp(value(a) + value(b))),
        "sub": (w, (w, w), lambda a, b: clamp(value(a) - value(b))),
        "sad": (w, (w, w, w), lambda a, b, c: abs(value(a) - value(b)) + c),
        "mul24": (w, (w, w), lambda a, b: low24(a) * low24(b) >> shift24),
        "mad24": (w, (w, w, w), lambda a, b, c: clamp(wrap24(low24(a) * low24(b) >> shift24) + value(c))),
        "cnot": (w, (w,), lambda a: int(a == 0)),
        "popc": (32, (w,), int.bit_count),
        "clz": (32, (w,), lambda a: w - a.bit_length()),
        "brev": (w, (w,), lambda a: int(f"{a:0{w}b}"[::-1], 2)),
        "bfe": (w, (w, 32, 32), lambda a, p, n: field(a, p, n, w, kind[0] == "s")),
        "bfi": (w, (w, w, 32, 32), lambda a, b, p, n: insert(a, b, p, n, w)),
        "bmsk": (32, (32, 32), lambda a, b: (1 << count(b)) - 1 << count(a)),
        "bfind": (32, (w,), lambda a: find(a, w, kind[0] == "s", "shiftamt" in parts)),
        "fns": (32, (32, 32, 32), nth_set),
        "szext": (32, (32, 32), lambda a, b: field(a, 0, count(b), 32, kind[0] == "s")),
        "shf": (
            32,
            (32, 32, 32),
            lambda a, b, n: (b << 32 | a) << count(n) >> 32 if "l" in parts else (b << 32 | a) >> count(n),
        ),
    }
    if name == "mad" and "wide" in parts:
        return 2 * w, (w, w, 2 * w), lambda a, b, c: value(a) * value(b) + c & (1 << 2 * w) - 1
    if name == "mad" and "hi" in parts:
        return w, (w, w, w), lambda a, b, c: clamp((value(a) * value(b) >> w) + value(c)) & mask
    if name not in rules or (name in ("add", "sub") and "sat" not in parts):
        return None
    dest, sources, rule = rules[name]
    return dest, sources, lambda *x: rule(*x) & (1 << dest) - 1
