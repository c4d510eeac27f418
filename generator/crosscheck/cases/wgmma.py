"""wgmma in every type and several N: layouts and descriptors, operands in registers, accumulation.

Shared memory is filled with random operands, whatever their place: both sides must find the same elements through the
descriptor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from ..case import Array, Case, Rule

BLOCK = 128
REGION = 40 * 1024  # bytes of each operand's region: 256 rows of 128 bytes, and a tail for odd strides
DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
STORAGE = {**DTYPES, "s8": np.int8, "u8": np.uint8}
# Swizzle mode -> descriptor bits 62-63, stride between groups of eight rows (K-major).
SWIZZLES = {"none": (0, 256), "128B": (1, 1024), "64B": (2, 512), "32B": (3, 256)}


@dataclass(frozen=True)
class Product:
    """One case: D[64, n] (+)= A B over `steps` instructions of 32 bytes of k."""

    d: str
    a: str
    b: str
    n: int
    swizzle: str = "none"
    a_mn: bool = False
    b_mn: bool = False
    registers: bool = False
    negate: tuple[int, int] = (1, 1)
    steps: int = 1
    accumulate: bool = True
    values: str = "normal"

    @property
    def k(self) -> int:
        return 32 // np.dtype(STORAGE[self.a]).itemsize

    @property
    def kind(self) -> str:
        """Shape and types as the opcode spells them."""
        end = ".satfinite" if self.d.endswith(".sat") else ""
        return f"m64n{self.n}k{self.k}.{self.d.removesuffix('.sat')}.{self.a}.{self.b}{end}"

    @property
    def name(self) -> str:
        parts = [self.kind, "A in registers" if self.registers else ""]
        parts += [f"swizzle {self.swizzle}", "A MN-major" * self.a_mn, "B MN-major" * self.b_mn]
        parts += [f"scaled {self.negate}" if self.negate != (1, 1) else "", f"{self.steps} steps"]
        parts += ["D += " if self.accumulate else "D =", f"{self.values} values"]
        return ", ".join(part.strip() for part in parts if part)


def cases(seed: int) -> Iterator[Case]:
    for i, product in enumerate(products()):
        yield build(product, np.random.default_rng([seed, 5, i]))


def products() -> Iterator[Product]:
    floats = [("f32", "bf16", "bf16"), ("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "tf32", "tf32")]
    fp8 = [(d, a, b) for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]
    for types in floats + fp8:
        for n in (8, 64, 256):
            yield Product(*types, n)
        base = Product(*types, 64)
        yield replace(base, accumulate=False)
        yield replace(base, steps=8)
        yield replace(base, registers=True, steps=2)
        for values in ("wide", "special", "cancelling", "subnormal"):
            yield replace(base, values=values)
        yield replace(base, values="wide", steps=4)
        for swizzle in ("128B", "64B", "32B"):
            yield replace(base, swizzle=swizzle, steps=1 if swizzle == "32B" else 2)
        for negate in ((-1, 1), (1, -1), (-1, -1)):
            yield replace(base, negate=negate)
    for types in floats[:3]:
        for swizzle in ("none", "128B", "64B", "32B"):
            base = Product(*types, 64, swizzle)
            yield replace(base, b_mn=True)
            yield replace(base, a_mn=True)
            yield replace(base, a_mn=True, b_mn=True)
            yield replace(base, registers=True, b_mn=True)
    for n in range(16, 256, 8):
        if n != 64:
            yield Product("f32", "bf16", "bf16", n)
    for types in itertools.product(("s32", "s32.sat"), ("s8", "u8"), ("s8", "u8")):
        for n in (8, 64, 256):
            yield Product(*types, n, values="integer")
        base = Product(*types, 64, values="integer")
        yield replace(base, accumulate=False)
        yield replace(base, steps=8)
        yield replace(base, registers=True, swizzle="64B", steps=2)


def build(product: Product, rng: np.random.Generator) -> Case:
    dtype = np.dtype(STORAGE[product.a])
    elements = 2 * REGION // dtype.itemsize
    low, high = (draw(product.values, kind, elements // 2, rng) for kind in (product.a, product.b))
    registers = product.n // 4 if product.d == "f16" else product.n // 2
    c = draw(product.values if product.values != "special" else "normal", product.d, 64 * product.n, rng)
    a_regs = draw(product.values, product.a, BLOCK * 16 * product.steps // dtype.itemsize, rng)
    shared = np.concatenate([low.view(np.uint8), high.view(np.uint8)])
    arguments = [
        Array("x", shared),
        Array("c", c.view(np.uint32)),
        Array("a", a_regs.view(np.uint32)),
        Array("y", np.full(BLOCK * registers, 0xA5A5A5A5, np.uint32), True),
    ]
    exact = Rule("f32" if product.d == "f32" else "bits")
    fast = None if product.values == "integer" else _bound(product, low, high, c)
    body = _body(product, registers)
    return Case("wgmma", product.name, body, arguments, exact, 1, BLOCK, 1, 2 * REGION, fast)


def draw(values: str, kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random elements of a type: `wide` over many magnitudes, `special` with infinities and NaN, `cancelling` of equal
    size, `subnormal` below the smallest normal.
    """
    if values == "integer":
        width = np.dtype(STORAGE.get(kind, np.int32))
        return rng.integers(np.iinfo(width).min, np.iinfo(width).max, count, width, endpoint=True)
    dtype = np.dtype(DTYPES.get(kind, np.float32))
    x = rng.standard_normal(count)
    if values == "wide":
        reach = {"bf16": 20, "f16": 7, "tf32": 20, "e4m3": 4, "e5m2": 7, "f32": 20}[kind]
        x *= np.exp2(rng.integers(-reach, reach + 1, count))
    elif values == "cancelling":
        x = rng.choice([-1.0, 1.0], count) * (1 + rng.integers(0, 4, count) / 8)
    elif values == "subnormal":
        x *= float(ml_dtypes.finfo(dtype).smallest_normal) * (1 if kind != "f32" else 1e-7)
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    if values == "special":
        at = rng.integers(0, count, count // 400)
        x[at] = rng.choice(np.array([np.inf, -np.inf, np.nan, 0.0, -0.0]).astype(dtype), len(at))
    return x


def _bound(product: Product, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Rule:
    """What truncation can lose: a term is cut at 2^-25 of the largest (fp8: 2^-13), the sum at its last place."""
    finite = (x.astype(np.float64) for x in (a, b, c))
    largest = [float(np.abs(x[np.isfinite(x)]).max()) for x in finite]
    total = product.k * product.steps * largest[0] * largest[1] + largest[2]
    bits = 12 if product.a[0] == "e" else 22
    if product.d == "f16":
        return Rule("f16", 2.0**-10, total * 2.0**-9, "float16 sums in another order", True)
    return Rule("f32", 0, total * product.steps * 2.0**-bits, "float32 sums in another order", True)


def _body(product: Product, registers: int) -> str:
    d = [f"%r{64 + i}" for i in range(registers)]
    lines = [
        f"mov.u32 %r0, %thread; LOAD: setp.ge.u32 %p0, %r0, {2 * REGION // 16}; @%p0 bra FILLED;",
        "mad.wide.u32 %d0, %r0, 16, %x; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];",
        "mad.lo.u32 %r5, %r0, 16, %s; st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};",
        f"add.u32 %r0, %r0, {BLOCK}; bra LOAD;",
        "FILLED: fence.proxy.async.shared::cta; bar.sync 0;",
        "mad.wide.u32 %d10, %thread, 4, %c; mad.wide.u32 %d11, %thread, 4, %y; mad.wide.u32 %d12, %thread, 4, %a;",
    ]
    lines += [f"ld.global.b32 {register}, [%d10+{4 * BLOCK * i}];" for i, register in enumerate(d)]
    for step in range(product.steps if product.registers else 0):
        for i in range(4):
            lines.append(f"ld.global.b32 %r{10 + 4 * step + i}, [%d12+{4 * BLOCK * (4 * step + i)}];")
    lines += _descriptor("%d1", product, product.a_mn, 0) + _descriptor("%d2", product, product.b_mn, REGION)
    lines.append(f"setp.ne.u32 %p1, {int(product.accumulate)}, 0; setp.eq.u32 %p2, 0, 0; wgmma.fence.sync.aligned;")
    transposes = ""
    if product.a in ("bf16", "f16"):
        transposes = f", {int(product.b_mn)}" if product.registers else f", {int(product.a_mn)}, {int(product.b_mn)}"
    for step in range(product.steps):
        a = f"{{{', '.join(f'%r{10 + 4 * step + i}' for i in range(4))}}}" if product.registers else "%d1"
        scale = "" if product.values == "integer" else "".join(f", {s}" for s in product.negate)
        lines.append(
            f"wgmma.mma_async.sync.aligned.{product.kind} {{{', '.join(d)}}}, {a}, %d2, "
            f"%p{1 if step == 0 else 2}{scale}{transposes};"
        )
        lines.append(f"add.s64 %d1, %d1, {_advance(product, product.a_mn)};")
        lines.append(f"add.s64 %d2, %d2, {_advance(product, product.b_mn)};")
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
    lines += [f"st.global.b32 [%d11+{4 * BLOCK * i}], {register};" for i, register in enumerate(d)]
    return "\n".join(lines)


def _strides(product: Product, mn_major: bool) -> tuple[int, int]:
    """(leading, stride) byte offsets of the descriptor."""
    code, group = SWIZZLES[product.swizzle]
    if not mn_major:
        return (128, 256) if not code else (16, group)
    if not code:
        return 2048, 128  # eight k of eight rows are 128 bytes; the next rows follow, the next eight k lie 2 KiB on
    return 4096, group  # the next span of rows lies 4 KiB on, the next eight k follow


def _descriptor(register: str, product: Product, mn_major: bool, offset: int) -> list[str]:
    leading, stride = _strides(product, mn_major)
    fields = leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[product.swizzle][0] << 62
    if fields >= 1 << 63:
        fields -= 1 << 64
    return [
        f"add.u32 %r0, %s, {offset}; shr.u32 %r0, %r0, 4; and.b32 %r0, %r0, 0x3fff;",
        f"cvt.u64.u32 {register}, %r0; or.b64 {register}, {register}, {fields};",
    ]


def _advance(product: Product, mn_major: bool) -> int:
    """How far the next 32 bytes of k lie, in units of 16 bytes."""
    if mn_major:
        return 2 * (2048 if product.swizzle == "none" else SWIZZLES[product.swizzle][1]) >> 4
    rows = 64 * math.ceil(product.n / 64)
    return (32 * rows if product.swizzle == "none" else 32) >> 4
