"""Loads, stores and copies of every width, and the matrix moves between shared memory and registers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..case import Array, Case, Rule

BLOCK, GRID = 128, 2
COUNT = BLOCK * GRID
WIDTHS = {"u8": 1, "s8": 1, "b8": 1, "u16": 2, "s16": 2, "b16": 2, "u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}


def cases(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng([seed, 3])
    yield from _loads_and_stores(rng)
    yield from _sign_extensions(rng)
    yield from _async_copies(rng)
    yield from _matrix_moves(rng)
    yield from _bulk_copies(rng)


def _bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, count, np.uint8)


def _poison(count: int) -> np.ndarray:
    return np.full(count, 0xA5, np.uint8)


def _loads_and_stores(rng: np.random.Generator) -> Iterator[Case]:
    """Global → registers → shared memory, rotated by one thread → registers → global."""
    for kind, width in WIDTHS.items():
        for count in (1, 2, 4):
            size = width * count
            if size > 16:
                continue
            file = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[width]
            names = [f"{file}{10 + i}" for i in range(count)]
            vector = f".v{count}" if count > 1 else ""
            value = f"{{{', '.join(names)}}}" if count > 1 else names[0]
            body = f"""mad.wide.u32 %d0, %g, {size}, %x; ld.global{vector}.{kind} {value}, [%d0];
mad.lo.u32 %r0, %thread, {size}, %s; st.shared{vector}.{kind} [%r0], {value}; bar.sync 0;
add.u32 %r1, %thread, 1; and.b32 %r1, %r1, {BLOCK - 1}; mad.lo.u32 %r1, %r1, {size}, %s;
ld.shared{vector}.{kind} {value}, [%r1];
mad.wide.u32 %d0, %g, {size}, %y; st.global{vector}.{kind} [%d0], {value};"""
            arguments = [Array("x", _bytes(rng, COUNT * size)), Array("y", _poison(COUNT * size), True)]
            yield Case("memory", f"ld/st{vector}.{kind}", body, arguments, Rule(), GRID, BLOCK, smem_bytes=BLOCK * size)


def _sign_extensions(rng: np.random.Generator) -> Iterator[Case]:
    """A narrow load into a wider register."""
    for kind, width in (("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2), ("u32", 4), ("s32", 4)):
        for bits, file in ((16, "%h"), (32, "%r"), (64, "%d")):
            if bits < 8 * width:
                continue
            body = f"""mad.wide.u32 %d0, %g, {width}, %x; ld.global.{kind} {file}10, [%d0];
mad.wide.u32 %d0, %g, {bits // 8}, %y; st.global.b{bits} [%d0], {file}10;"""
            arguments = [Array("x", _bytes(rng, COUNT * width)), Array("y", _poison(COUNT * bits // 8), True)]
            yield Case("memory", f"ld.global.{kind} into {bits} bits", body, arguments, Rule(), GRID, BLOCK)


def _async_copies(rng: np.random.Generator) -> Iterator[Case]:
    for cache, size, given in (("ca", 4, 4), ("ca", 8, 8), ("ca", 16, 16), ("cg", 16, 16), ("cg", 16, 7), ("ca", 8, 3)):
        source = f", {given}" if given != size else ""
        body = f"""mad.wide.u32 %d0, %g, {size}, %x; mad.lo.u32 %r0, %thread, {size}, %s;
cp.async.{cache}.shared.global [%r0], [%d0], {size}{source}; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
mad.wide.u32 %d1, %g, {size}, %y;
"""
        for at in range(0, size, 4):
            body += f"ld.shared.b32 %r1, [%r0+{at}]; st.global.b32 [%d1+{at}], %r1;\n"
        arguments = [Array("x", _bytes(rng, COUNT * size)), Array("y", _poison(COUNT * size), True)]
        name = f"cp.async.{cache} of {given} of {size} bytes"
        yield Case("memory", name, body, arguments, Rule(), GRID, BLOCK, smem_bytes=BLOCK * size)


def _matrix_moves(rng: np.random.Generator) -> Iterator[Case]:
    """ldmatrix, stmatrix, movmatrix: 32 rows of 16 bytes a warp."""
    address = "shr.u32 %r0, %thread, 5; mad.lo.u32 %r0, %r0, 512, %s; mad.lo.u32 %r1, %lane, 16, %r0;"
    fill = "mad.wide.u32 %d0, %g, 16, %x; ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d0];"
    out = "mad.wide.u32 %d1, %g, 16, %y;"
    for count in (1, 2, 4):
        names = ", ".join(f"%r{30 + i}" for i in range(count))
        given = ", ".join(f"%r{20 + i}" for i in range(count))
        for trans in ("", ".trans"):
            body = f"""{address} {fill} {out} st.shared.v4.b32 [%r1], {{%r20, %r21, %r22, %r23}}; bar.sync 0;
mov.u32 %r30, 0; mov.u32 %r31, 0; mov.u32 %r32, 0; mov.u32 %r33, 0;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r1];
st.global.v4.b32 [%d1], {{%r30, %r31, %r32, %r33}};"""
            yield _matrix_case(f"ldmatrix.x{count}{trans}", body, rng)
            body = f"""{address} {fill} {out} mov.u32 %r2, 0;
st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}}; bar.sync 0;
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{given}}}; bar.sync 0;
ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r1]; st.global.v4.b32 [%d1], {{%r30, %r31, %r32, %r33}};"""
            yield _matrix_case(f"stmatrix.x{count}{trans}", body, rng)
    body = f"""{fill} {out} movmatrix.sync.aligned.m8n8.trans.b16 %r30, %r20;
st.global.v4.b32 [%d1], {{%r30, %r21, %r22, %r23}};"""
    yield _matrix_case("movmatrix.trans", body, rng)


def _matrix_case(name: str, body: str, rng: np.random.Generator) -> Case:
    arguments = [Array("x", _bytes(rng, COUNT * 16)), Array("y", _poison(COUNT * 16), True)]
    return Case("memory", name, body, arguments, Rule(), GRID, BLOCK, smem_bytes=BLOCK * 16)


def _bulk_copies(rng: np.random.Generator) -> Iterator[Case]:
    """cp.async.bulk: global → shared, waited for on an mbarrier, → global, by one thread a CTA."""
    for size in (16, 48, 1024, 4096):
        body = f"""setp.ne.u32 %p0, %thread, 0; @%p0 bra END_{size};
add.u32 %r0, %s, {size}; mbarrier.init.shared.b64 [%r0], 1; fence.mbarrier_init.release.cluster;
mad.wide.u32 %d0, %block, {size}, %x; mad.wide.u32 %d1, %block, {size}, %y;
mbarrier.arrive.expect_tx.shared.b64 %d2, [%r0], {size};
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%d0], {size}, [%r0];
WAIT_{size}: mbarrier.try_wait.parity.shared.b64 %p1, [%r0], 0; @!%p1 bra WAIT_{size};
cp.async.bulk.global.shared::cta.bulk_group [%d1], [%s], {size}; cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END_{size}:"""
        arguments = [Array("x", _bytes(rng, GRID * size)), Array("y", _poison(GRID * size), True)]
        yield Case("memory", f"cp.async.bulk of {size} bytes", body, arguments, Rule(), GRID, 32, smem_bytes=size + 16)
