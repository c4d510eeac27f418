"""Tensor copies: ranks, element types, swizzles, and boxes that reach over every edge of the tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from ..case import Array, Case, Map, Rule

BLOCK = 128
WAITS = 1_000_000  # tries before a case gives up on its mbarrier and says so
ELEMENT_BYTES = {0: 1, 2: 4, 3: 4, 6: 2, 7: 4, 9: 2, 11: 4}
TYPES = {0: "u8", 2: "u32", 3: "s32", 6: "f16", 7: "f32", 9: "bf16", 11: "tf32"}
SWIZZLES = {0: "none", 1: "32B", 2: "64B", 3: "128B"}


def cases(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng([seed, 4])
    for kind in TYPES:
        yield from _load(rng, kind, (48, 20), (16, 8), 0)
    for kind, swizzle in itertools.product((6, 7), (1, 2, 3)):
        inner = (16 << swizzle) // ELEMENT_BYTES[kind]
        yield from _load(rng, kind, (inner + 8, 20), (inner, 16), swizzle)
        yield from _load(rng, kind, (inner + 8, 20), (inner // 2, 16), swizzle)
    yield from _load(rng, 6, (200,), (64,), 0)
    for kind, inner in ((0, 24), (0, 7), (6, 21), (7, 5), (9, 20)):  # rows that do not end on 16 bytes
        box = 32 // ELEMENT_BYTES[kind]
        yield from _load(rng, kind, (inner, 20), (box, 8), 0)
        yield from _store(rng, kind, (inner, 20), (box, 8), 0)
        yield from _store(rng, kind, (inner, 20), (box, 8), 1)
    yield from _load(rng, 9, (40, 7, 5), (32, 4, 2), 2)
    yield from _load(rng, 9, (40, 7, 3, 5), (32, 4, 2, 2), 2)
    yield from _load(rng, 6, (24, 5, 3, 2, 3), (16, 2, 2, 2, 2), 1)
    for kind, swizzle in ((6, 0), (6, 3), (7, 2), (0, 0)):
        inner = (16 << swizzle) // ELEMENT_BYTES[kind] if swizzle else 16
        yield from _store(rng, kind, (inner + 8, 20), (inner, 16), swizzle)
    yield from _store(rng, 6, (72, 20), (32, 16), 3)
    yield from _store(rng, 9, (40, 7, 3, 5), (32, 4, 2, 2), 2)


def _coordinates(sizes: tuple[int, ...], box: tuple[int, ...], unit: int, negative: bool) -> np.ndarray:
    """int32 [points, 5]: inside, over each edge, far outside, every combination of the first two dimensions."""
    axes = []
    for n, b in zip(sizes, box, strict=True):
        places = [0, 1, max(n - b, 0), n - b + 1, n - 1, n, n + 100]
        axes.append(places + ([-1, -b + 1, -b, -200] if negative else []))
    axes[0] = [x // unit * unit for x in axes[0]]  # the first coordinate moves by 16 bytes
    points = [(*p, *(0,) * (5 - len(p))) for p in itertools.product(*axes[:2])]
    for d in range(2, len(sizes)):
        points += [tuple(x if i == d else 0 for i in range(5)) for x in axes[d]]
    points = [p for p in points if negative or min(p) >= 0]
    return np.array(list(dict.fromkeys((*p, *(0,) * (5 - len(p))) for p in points)), np.int32)


def _tensor(rng: np.random.Generator, kind: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Random bytes (finite floats) and the strides in bytes; rows are padded to 16 bytes and a little more."""
    size = ELEMENT_BYTES[kind]
    strides, step = [], -(-sizes[0] * size // 16) * 16 + 16
    for extent in sizes[1:]:
        strides.append(step)
        step *= extent
    values = rng.integers(0, 256, step, np.uint8)
    if kind == 11:  # float32 numbers with the low bits that decide how they are rounded to tf32
        words = rng.standard_normal(step // 4).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        special = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FE000, 1], np.uint32)
        words[::17] = rng.choice(special, len(words[::17]))
        words |= rng.choice(np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32), len(words))
        values = words.view(np.uint8)
    return values, tuple(strides)


def _prologue(rank: int) -> str:
    """%r10 … : the coordinates of this CTA's point."""
    lines = ["mad.wide.u32 %d0, %block, 20, %points;"]
    lines += [f"ld.global.b32 %r{10 + i}, [%d0+{4 * i}];" for i in range(rank)]
    return "\n".join(lines)


def _shared_bytes(kind: int, box: tuple[int, ...], swizzle: int) -> int:
    """Bytes that the box takes up in shared memory: a swizzled row fills its span."""
    return math.prod(box[1:]) * (16 << swizzle if swizzle else box[0] * ELEMENT_BYTES[kind])


def _load(rng, kind: int, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: int) -> Iterator[Case]:
    rank, box_bytes, shared = len(sizes), math.prod(box) * ELEMENT_BYTES[kind], _shared_bytes(kind, box, swizzle)
    points = _coordinates(sizes, box, 16 // ELEMENT_BYTES[kind], True)
    values, strides = _tensor(rng, kind, sizes)
    coordinates = ", ".join(f"%r{10 + i}" for i in range(rank))
    bar = -(-shared // 1024) * 1024
    body = f"""{_prologue(rank)}
mov.u32 %r4, %thread; mov.u32 %r20, 0x5a5a5a5a;
CLEAR: setp.ge.u32 %p3, %r4, {shared // 16}; @%p3 bra CLEARED;
mad.lo.u32 %r5, %r4, 16, %s; st.shared.v4.b32 [%r5], {{%r20, %r20, %r20, %r20}}; add.u32 %r4, %r4, {BLOCK}; bra CLEAR;
CLEARED: fence.proxy.async.shared::cta; bar.sync 0;
add.u32 %r1, %s, {bar}; setp.ne.u32 %p0, %thread, 0; mov.u32 %r2, 1;
@%p0 bra INITIALIZED; mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster; INITIALIZED: bar.sync 0;
@%p0 bra ISSUED; mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], {box_bytes};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
[%s], [%map, {{{coordinates}}}], [%r1];
ISSUED: mov.u32 %r3, 0;
WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @%p1 bra DONE;
add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, {WAITS}; @%p2 bra WAIT; mov.u32 %r2, 0; bra REPORT;
DONE: mov.u32 %r4, %thread;
COPY: setp.ge.u32 %p3, %r4, {shared // 16}; @%p3 bra REPORT;
mad.lo.u32 %r5, %r4, 16, %s; ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r5];
mad.lo.u32 %r6, %block, {shared // 16}, %r4; mad.wide.u32 %d2, %r6, 16, %y;
st.global.v4.b32 [%d2], {{%r20, %r21, %r22, %r23}}; add.u32 %r4, %r4, {BLOCK}; bra COPY;
REPORT: mad.wide.u32 %d3, %g, 4, %arrived; st.global.b32 [%d3], %r2;"""
    grid = len(points)
    arguments = [
        Array("x", values),
        Map("map", "x", kind, sizes, strides, box, swizzle),
        Array("points", points),
        Array("y", np.full(grid * shared, 0xA5, np.uint8), True),
        Array("arrived", np.zeros(grid * BLOCK, np.uint32), True),
    ]
    name = f"load {TYPES[kind]} {sizes} box {box} swizzle {SWIZZLES[swizzle]}, {grid} places"
    yield Case("tma", name, body, arguments, Rule(), grid, BLOCK, smem_bytes=bar + 16)


def _store(rng, kind: int, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: int) -> Iterator[Case]:
    """One CTA a place, each into a copy of the tensor of its own (one more dimension)."""
    rank, shared = len(sizes), _shared_bytes(kind, box, swizzle)
    points = _coordinates(sizes, box, 16 // ELEMENT_BYTES[kind], False)
    values, strides = _tensor(rng, kind, sizes)
    whole = (strides[-1] if strides else 0) * sizes[-1]
    copies = np.tile(values[:whole], len(points))
    coordinates = ", ".join([*(f"%r{10 + i}" for i in range(rank)), "%block"])
    grid = len(points)
    body = f"""{_prologue(rank)}
mov.u32 %r4, %thread;
FILL: setp.ge.u32 %p3, %r4, {shared // 16}; @%p3 bra FILLED;
mad.lo.u32 %r6, %block, {shared // 16}, %r4; mad.wide.u32 %d2, %r6, 16, %x;
ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d2]; mad.lo.u32 %r5, %r4, 16, %s;
st.shared.v4.b32 [%r5], {{%r20, %r21, %r22, %r23}}; add.u32 %r4, %r4, {BLOCK}; bra FILL;
FILLED: fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 %p0, %thread, 0; @%p0 bra END;
cp.async.bulk.tensor.{rank + 1}d.global.shared::cta.tile.bulk_group [%map, {{{coordinates}}}], [%s];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
END:"""
    arguments = [
        Array("x", rng.integers(0, 256, grid * shared, np.uint8)),
        Array("points", points),
        Array("y", copies, True),
        Map("map", "y", kind, (*sizes, grid), (*strides, whole), (*box, 1), swizzle),
    ]
    name = f"store {TYPES[kind]} {sizes} box {box} swizzle {SWIZZLES[swizzle]}, {grid} places"
    yield Case("tma", name, body, arguments, Rule(), grid, BLOCK, smem_bytes=-(-shared // 1024) * 1024)
