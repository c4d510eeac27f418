"""Instructions whose lanes see each other: shuffles, votes, matches, reductions, election, carries, atomics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..case import Array, Case, Rule
from .inputs import float_bits, integer_bits

BLOCK, GRID = 128, 4
COUNT = BLOCK * GRID


def cases(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng([seed, 1])
    yield from _shuffles(rng)
    yield from _votes(rng)
    yield from _reductions(rng)
    yield from _elections()
    yield from _carries(rng)
    yield from _atomics(rng)
    yield from _float_atomics(rng)


def _case(name: str, body: str, inputs: dict[str, np.ndarray], outputs: dict[str, int], kind: str = "bits") -> Case:
    """`body` reads %r0 … (b32, one an input of 32 bits; %d1 … for 64) and leaves outputs in %r100 … (or %d20 …)."""
    lines, arguments = [], []
    for i, (array, value) in enumerate(inputs.items()):
        width = value.dtype.itemsize
        register = f"%r{i}" if width == 4 else f"%d{i + 1}"
        lines.append(f"mad.wide.u32 %d0, %g, {width}, %{array}; ld.global.b{8 * width} {register}, [%d0];")
        arguments.append(Array(array, value))
    lines.append(body)
    for i, (array, width) in enumerate(outputs.items()):
        register = f"%r{100 + i}" if width == 4 else f"%d{20 + i}"
        lines.append(f"mad.wide.u32 %d0, %g, {width}, %{array}; st.global.b{8 * width} [%d0], {register};")
        arguments.append(
            Array(array, np.full(COUNT, 0xA5A5A5A5 if width == 4 else 0xA5A5A5A5A5A5A5A5, f"u{width}"), True)
        )
    return Case("warp", name, "\n".join(lines), arguments, Rule(kind), GRID, BLOCK)


def _per_warp(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return np.repeat(rng.choice(values, COUNT // 32), 32).astype(np.uint32)


def _shuffles(rng: np.random.Generator) -> Iterator[Case]:
    for mode in ("idx", "bfly", "up", "down"):
        for segment in (32, 16, 8, 4):
            clamp = 0 if mode == "up" else 31
            value = integer_bits(32, COUNT, rng)
            lanes = rng.integers(0, 40, COUNT).astype(np.uint32) if mode == "idx" else _per_warp(rng, np.arange(32))
            c = np.full(COUNT, (32 - segment) << 8 | clamp, np.uint32)
            body = f"shfl.sync.{mode}.b32 %r100|%p0, %r0, %r1, %r2, -1; selp.b32 %r101, 1, 0, %p0;"
            inputs = {"x": value, "lane_in": lanes, "c": c}
            yield _case(f"shfl.sync.{mode}.b32 in segments of {segment}", body, inputs, {"y": 4, "in_range": 4})
        value, lanes = integer_bits(32, COUNT, rng), rng.integers(0, 64, COUNT).astype(np.uint32)
        c = rng.integers(0, 0x2000, COUNT).astype(np.uint32)
        body = f"shfl.sync.{mode}.b32 %r100|%p0, %r0, %r1, %r2, -1; selp.b32 %r101, 1, 0, %p0;"
        inputs = {"x": value, "lane_in": lanes, "c": c}
        yield _case(f"shfl.sync.{mode}.b32 with any operands a lane", body, inputs, {"y": 4, "in_range": 4})


def _votes(rng: np.random.Generator) -> Iterator[Case]:
    bits = np.repeat(rng.choice(np.array([0.0, 0.5, 1.0]), COUNT // 32), 32)
    flags = (rng.random(COUNT) < bits).astype(np.uint32)
    for mode in ("any", "all", "uni"):
        body = f"setp.ne.b32 %p0, %r0, 0; vote.sync.{mode}.pred %p1, %p0, -1; selp.b32 %r100, 1, 0, %p1;"
        yield _case(f"vote.sync.{mode}.pred", body, {"x": flags}, {"y": 4})
    body = "setp.ne.b32 %p0, %r0, 0; vote.sync.ballot.b32 %r100, %p0, -1;"
    yield _case("vote.sync.ballot.b32", body, {"x": flags}, {"y": 4})
    few32 = rng.integers(0, 4, COUNT).astype(np.uint32)
    few64 = rng.choice(np.array([7, 7 << 40, 9], np.uint64), COUNT)
    same = _per_warp(rng, np.array([3, 5]))
    for kind, value, register in (("b32", few32, "%r0"), ("b64", few64, "%d1"), ("b32", same, "%r0")):
        name = f"match.any.sync.{kind}" + (" of equal values" if value is same else "")
        yield _case(name, f"match.any.sync.{kind} %r100, {register}, -1;", {"x": value}, {"y": 4})
        body = f"match.all.sync.{kind} %r100|%p0, {register}, -1; selp.b32 %r101, 1, 0, %p0;"
        yield _case(name.replace("any", "all"), body, {"x": value}, {"y": 4, "same": 4})


def _reductions(rng: np.random.Generator) -> Iterator[Case]:
    for operation in ("add.u32", "add.s32", "min.u32", "min.s32", "max.u32", "max.s32", "and.b32", "or.b32", "xor.b32"):
        value = integer_bits(32, COUNT, rng)
        if operation == "and.b32":
            value |= integer_bits(32, COUNT, rng) | integer_bits(32, COUNT, rng)
        yield _case(f"redux.sync.{operation}", f"redux.sync.{operation} %r100, %r0, -1;", {"x": value}, {"y": 4})


def _elections() -> Iterator[Case]:
    body = "elect.sync %r100|%p0, -1; selp.b32 %r101, 1, 0, %p0;"
    yield _case("elect.sync of a whole warp", body, {}, {"leader": 4, "elected": 4})
    for mask in (0xFFFFFFFE, 0xF0, 0x80000000, 0x00FF0F00):
        body = f"""mov.u32 %r100, 0; mov.u32 %r101, 0; shr.u32 %r1, {mask:#x}, %lane; and.b32 %r1, %r1, 1;
setp.eq.u32 %p1, %r1, 0; @%p1 bra END_{mask:x};
elect.sync %r100|%p0, {mask:#x}; selp.b32 %r101, 1, 0, %p0; activemask.b32 %r102;
END_{mask:x}: @%p1 mov.u32 %r102, 0;"""
        yield _case(f"elect.sync of lanes {mask:#010x}", body, {}, {"leader": 4, "elected": 4, "active": 4})


def _carries(rng: np.random.Generator) -> Iterator[Case]:
    for kind, width, out, first in (("u32", 32, "%r", 100), ("u64", 64, "%d", 20)):
        base = 0 if width == 32 else 1
        words = {f"x{i}": integer_bits(width, COUNT, rng) for i in range(4)}
        a, b, c, d = (f"{out}{base + i}" for i in range(4))
        y0, y1, y2 = (f"{out}{first + i}" for i in range(3))
        outputs = {"y0": width // 8, "y1": width // 8, "y2": width // 8}
        for op in ("add", "sub"):
            body = f"{op}.cc.{kind} {y0}, {a}, {c}; {op}c.cc.{kind} {y1}, {b}, {d}; {op}c.{kind} {y2}, 0, 0;"
            yield _case(f"{op}.cc.{kind}, {op}c.cc, {op}c", body, words, outputs)
        body = f"""mad.lo.cc.{kind} {y0}, {a}, {b}, {c}; madc.hi.cc.{kind} {y1}, {a}, {b}, {d};
madc.lo.{kind} {y2}, {a}, {c}, {d};"""
        yield _case(f"mad.lo.cc.{kind}, madc.hi.cc, madc.lo", body, words, outputs)


_ATOMICS = {
    "u32": ("add", "min", "max", "inc", "dec"), "s32": ("add", "min", "max"), "b32": ("and", "or", "xor"),
    "u64": ("add", "min", "max"), "s64": ("min", "max"), "b64": ("and", "or", "xor"),
}  # fmt: skip


def _atomics(rng: np.random.Generator) -> Iterator[Case]:
    """Sixteen places that all threads of a CTA update: integers, so the order does not matter."""
    for kind, operations in _ATOMICS.items():
        width = int(kind[1:]) // 8
        register = "%r" if width == 4 else "%d"
        base = 0 if width == 4 else 1
        value, start = integer_bits(8 * width, COUNT, rng), integer_bits(8 * width, 16 * GRID, rng)
        for operation in operations:
            if operation in ("inc", "dec"):
                value = np.full(COUNT, 5, np.uint32)
            for space in ("global", "shared"):
                yield _atomic(f"{operation}.{kind}", width, space, f"{register}{base}", value, start)


def _atomic(operation: str, width: int, space: str, value_register: str, value: np.ndarray, start: np.ndarray) -> Case:
    load = f"mad.wide.u32 %d0, %g, {width}, %x; ld.global.b{8 * width} {value_register}, [%d0];"
    # thread t updates place t % 16 of its CTA; the first 16 threads move the places to shared memory and back
    place = "and.b32 %r1, %thread, 15; mad.lo.u32 %r2, %block, 16, %r1;"
    scratch = "%r9" if width == 4 else "%d9"
    body = f"{load}\n{place}\nmad.wide.u32 %d5, %r2, {width}, %y;\n"
    if space == "global":
        body += f"red.global.{operation} [%d5], {value_register};"
    else:
        body += f"""setp.lt.u32 %p0, %thread, 16; mad.lo.u32 %r3, %r1, {width}, %s;
@%p0 ld.global.b{8 * width} {scratch}, [%d5]; @%p0 st.shared.b{8 * width} [%r3], {scratch}; bar.sync 0;
atom.shared.{operation} {scratch}, [%r3], {value_register}; bar.sync 0;
@%p0 ld.shared.b{8 * width} {scratch}, [%r3]; @%p0 st.global.b{8 * width} [%d5], {scratch};"""
    arguments = [Array("x", value), Array("y", start, True)]
    name = f"{'red.global' if space == 'global' else 'atom.shared'}.{operation}"
    return Case("warp", name, body, arguments, Rule(), GRID, BLOCK, smem_bytes=1024)


def _float_atomics(rng: np.random.Generator) -> Iterator[Case]:
    """Additions of floats to places of their own, so that the order does not matter."""
    for kind, width in (("f32", 4), ("f64", 8)):
        value, start = (float_bits(kind, COUNT, rng) for _ in range(2))
        register = "%r0" if width == 4 else "%d1"
        body = f"""mad.wide.u32 %d0, %g, {width}, %x; ld.global.b{8 * width} {register}, [%d0];
mad.wide.u32 %d5, %g, {width}, %y; red.global.add.{kind} [%d5], {register};"""
        yield Case(
            "warp",
            f"red.global.add.{kind}",
            body,
            [Array("x", value), Array("y", start, True)],
            Rule(kind, any_nan=kind == "f64"),
            GRID,
            BLOCK,
        )
