"""emulator/ops/access: qualifiers, generic addresses, 256-bit vectors, atomics."""

import numpy as np
import pytest
from ptx_kernels import aligned, fails, run

from generator.emulator import Hazard

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    "load, store",
    [
        ("ld.global.L1::evict_first.L2::cache_hint.b32 %r1, [%x_g], %d9;", "st.global.wt.b32 [%y_g], %r1;"),
        ("ld.relaxed.gpu.global.u32 %r1, [%x_g];", "st.release.sys.global.u32 [%y_g], %r1;"),
        ("ld.global.nc.L1::no_allocate.L2::256B.b32 %r1, [%x_g];", "st.global.L2::cache_hint.b32 [%y_g], %r1, %d9;"),
        ("ld.weak.global.b32 %r1, [%x_g];", "st.weak.b32 [%y_g], %r1;"),
        ("ld.b32 %r1, [%x_g];", "st.volatile.b32 [%y_g], %r1;"),
        ("ld.global.cv.b32 %r1, [%x_g];", "st.global.cs.b32 [%y_g], %r1;"),
    ],
)
def test_qualifiers_change_nothing_in_the_value(load, store):
    x, y = RNG.integers(0, 2**32, 64, np.uint32), np.zeros(64, np.uint32)
    policy = "createpolicy.fractional.L2::evict_last.b64 %d9, 0f3F800000;"
    run(policy + load + store, block=64, x=x, y=y)
    assert (x == y).all()


@pytest.mark.parametrize("kind, letter, count", [("b32", "r", 8), ("f32", "r", 8), ("b64", "d", 4), ("u64", "d", 4)])
def test_256_bit_vectors(kind, letter, count):
    x, y = aligned((32, 8), np.uint32), aligned((32, 8), np.uint32)
    x[:] = RNG.integers(0, 2**32, x.shape)
    regs = ", ".join(f"%{letter}{i + 10}" for i in range(count))
    run(
        f"""mad.wide.u32 %d1, %tid, 32, %x; mad.wide.u32 %d2, %tid, 32, %y;
        ld.global.L2::evict_last.v{count}.{kind} {{{regs}}}, [%d1]; st.global.v{count}.{kind} [%d2], {{{regs}}};""",
        x=x,
        y=y,
    )
    assert (x == y).all()


def test_a_256_bit_vector_needs_32_byte_alignment():
    x = aligned(64, np.uint32)
    load = "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%x+16]; // HERE"
    fails(Hazard, f"\n{load}\n", "misaligned", x=x)


def test_generic_addresses_name_shared_global_and_parameters():
    x, y = RNG.integers(0, 2**32, 32, np.uint32), np.zeros(32, np.uint32)
    run(
        """add.u32 %r5, %tid, 100; st.shared.b32 [%s4], %r5; cvt.u64.u32 %d1, %s4; cvta.shared.u64 %d2, %d1;
        and.b32 %r6, %tid, 1; setp.eq.u32 %p1, %r6, 1; selp.b64 %d3, %d2, %x_g, %p1;
        ld.b32 %r7, [%d3]; add.u32 %r7, %r7, 1; st.b32 [%d3], %r7; ld.shared.b32 %r8, [%s4]; ld.global.b32 %r9, [%x_g];
        add.u32 %r9, %r8, %r9; st.b32 [%y_g], %r9;""",
        x=x,
        y=y,
    )  # each lane raised one of its two places
    lanes = np.arange(32)
    assert (y == x + (lanes + 100) + (lanes % 2)).all()


def test_a_generic_load_is_as_strict_as_a_shared_one():
    body = "cvt.u64.u32 %d1, %s4; cvta.shared.u64 %d2, %d1;\nld.b32 %r1, [%d2]; // HERE\n"
    fails(Hazard, body, "never written")
    fails(Hazard, "mov.b64 %d1, 0x123456789000;\nst.b32 [%d1], %tid; // HERE\n", "out of bounds")


ATOMS = {
    "add.u32": (np.uint32, np.add),
    "add.s32": (np.int32, np.add),
    "add.u64": (np.uint64, np.add),
    "min.s32": (np.int32, np.minimum),
    "max.u32": (np.uint32, np.maximum),
    "min.u64": (np.uint64, np.minimum),
    "max.s64": (np.int64, np.maximum),
    "and.b32": (np.uint32, np.bitwise_and),
    "or.b64": (np.uint64, np.bitwise_or),
    "xor.b32": (np.uint32, np.bitwise_xor),
}


@pytest.mark.parametrize("space", ["", ".global", ".shared"])
@pytest.mark.parametrize("name", ATOMS)
def test_atomics_of_many_lanes_on_few_places(name, space):
    dtype, operation = ATOMS[name]
    size = np.dtype(dtype).itemsize
    letter = "r" if size == 4 else "d"
    unsigned = f"u{size}"
    start = RNG.integers(0, 2**31, 4).astype(unsigned)
    x, y, old = RNG.integers(0, 2 ** (8 * size - 1), 64).astype(unsigned), start.copy(), np.zeros(64, unsigned)
    local = f"""mad.lo.u32 %r2, %r1, {size}, %s; setp.lt.u32 %p1, %tid, 4; mad.wide.u32 %d5, %r1, {size}, %y;
        @%p1 ld.global.b{size * 8} %{letter}20, [%d5]; @%p1 st.shared.b{size * 8} [%r2], %{letter}20; bar.sync 0;"""
    place = "[%r2]" if space == ".shared" else "[%d5]"
    back = f"bar.sync 0; @%p1 ld.shared.b{size * 8} %{letter}20, [%r2]; @%p1 st.global.b{size * 8} [%d5], %{letter}20;"
    run(
        f"""and.b32 %r1, %tid, 3; ld.global.b{size * 8} %{letter}10, [%x_g]; {local}
        atom.relaxed.gpu{space}.{name} %{letter}11, {place}, %{letter}10; st.global.b{size * 8} [%o_g], %{letter}11;
        red{space}.{name} {place}, %{letter}10; {back if space == ".shared" else ""}""",
        block=64,
        x=x,
        y=y,
        o=old,
    )
    for i in range(4):
        mine = x[i::4].view(dtype)
        total = start[i : i + 1].view(dtype)
        for value in np.concatenate([mine, mine]):
            total = operation(total, value)
        assert y[i] == total.view(unsigned)[0]
        assert old[i] == start[i]  # the lowest lane comes first


def test_exchange_compare_and_swap_and_wrapping_counters():
    y = np.array([5, 5, 2, 0], np.uint32)
    out = np.zeros((4, 32), np.uint32)
    run(
        """atom.global.exch.b32 %r1, [%y], %tid; st.global.b32 [%o_g], %r1;
        atom.global.cas.b32 %r1, [%y+4], 5, 9; st.global.b32 [%o_g+128], %r1;
        atom.global.inc.u32 %r1, [%y+8], 3; st.global.b32 [%o_g+256], %r1;
        atom.global.dec.u32 %r1, [%y+12], 3; st.global.b32 [%o_g+384], %r1;""",
        y=y,
        o=out,
    )
    lanes = np.arange(32)
    assert y.tolist() == [31, 9, (2 + 32) % 4, 0]
    assert (out[0] == np.where(lanes == 0, 5, lanes - 1)).all()
    assert (out[1] == np.where(lanes == 0, 5, 9)).all()
    assert (out[2] == (2 + lanes) % 4).all() and (out[3] == -lanes % 4).all()


def test_floating_point_additions():
    x = RNG.standard_normal(32).astype(np.float32)
    y, z, h = np.zeros(4, np.float32), np.zeros(1, np.float64), np.zeros(2, np.float16)
    run(
        """ld.global.b32 %r1, [%x_g]; mov.b32 %r2, 0f3F800000; red.global.add.f32 [%y], %r1;
        cvt.f64.f32 %d1, %r1; atom.global.add.f64 %d2, [%z], %d1;
        cvt.rn.f16x2.f32 %r3, %r2, %r1; red.global.add.noftz.f16x2 [%h], %r3;
        setp.lt.u32 %p1, %tid, 2; @%p1 red.global.add.v2.f32 [%y+8], {%r2, %r1};""",
        x=x,
        y=y.view(np.float32),
        z=z,
        h=h,
    )
    single, half = np.float32(0), np.float16(0)
    for value in x:
        single, half = single + value, np.float16(np.float64(half) + np.float64(np.float16(value)))
    assert y[0] == single and y[2] == 2.0 and y[3] == x[0] + x[1]
    assert z[0] == np.cumsum(x.astype(np.float64))[-1]
    assert h.tolist() == [half, 32.0]


def test_an_atomic_on_fresh_or_foreign_memory_is_a_hazard():
    fails(Hazard, "\natom.shared.add.u32 %r1, [%s], 1; // HERE\n", "never written")
    fails(Hazard, "\nred.shared.add.u32 [%s+4096], 1; // HERE\n", "out of bounds")
    y = np.zeros(2, np.uint32)
    fails(Hazard, "\nred.global.add.u32 [%y+8], 1; // HERE\n", "out of bounds", y=y)
    fails(Hazard, "\nred.global.add.u64 [%y+4], 1; // HERE\n", "misaligned", y=aligned(4, np.uint64))
