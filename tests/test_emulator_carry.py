"""Instructions with two results or a flag: carry chains, packed comparisons, lop3 with a predicate."""

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import fails, run
from scalar_oracle import compare_floats

from generator.emulator import Hazard

RNG = np.random.default_rng(11)
EDGES = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64 - 2**32, 2**31], np.uint64)


def numbers(lanes: int, words: int) -> list[np.ndarray]:
    """Words of wide numbers: edges and random bits."""
    wild = RNG.integers(0, 2**64, (words, lanes), np.uint64)
    return list(np.where(RNG.random((words, lanes)) < 0.6, EDGES[RNG.integers(0, len(EDGES), (words, lanes))], wild))


@pytest.mark.parametrize("operation", ["add", "sub"])
def test_a_chain_adds_and_subtracts_192_bits(operation):
    lanes = 256
    a, b = numbers(lanes, 3), numbers(lanes, 3)
    out = [np.zeros(lanes, np.uint64) for _ in range(3)]
    arrays = {f"{n}{i}": w for n, words in (("a", a), ("b", b), ("y", out)) for i, w in enumerate(words)}
    loads = "".join(f"ld.global.b64 %d{i}, [%a{i}_g]; ld.global.b64 %d{i + 10}, [%b{i}_g];" for i in range(3))
    first, middle, last = f"{operation}.cc.u64", f"{operation}c.cc.u64", f"{operation}c.u64"
    body = f"{first} %d20, %d0, %d10; {middle} %d21, %d1, %d11; {last} %d22, %d2, %d12;"
    run(loads + body + "".join(f"st.global.b64 [%y{i}_g], %d{i + 20};" for i in range(3)), block=lanes, **arrays)
    for lane in range(lanes):
        x, y, z = (sum(int(w[lane]) << 64 * i for i, w in enumerate(words)) for words in (a, b, out))
        assert z == (x + y if operation == "add" else x - y) % 2**192


def test_a_product_of_64_bits_by_32_bit_multiplications():
    lanes = 256
    a, b, low, high = *numbers(lanes, 2), np.zeros(lanes, np.uint64), np.zeros(lanes, np.uint64)
    run(
        """ld.global.b64 %d1, [%a_g]; ld.global.b64 %d2, [%b_g]; mov.b64 {%r1, %r2}, %d1; mov.b64 {%r3, %r4}, %d2;
        mul.lo.u32 %r10, %r1, %r3; mul.hi.u32 %r11, %r1, %r3; mul.lo.u32 %r12, %r2, %r4; mul.hi.u32 %r13, %r2, %r4;
        mad.lo.cc.u32 %r11, %r1, %r4, %r11; madc.hi.cc.u32 %r12, %r1, %r4, %r12; addc.u32 %r13, %r13, 0;
        mad.lo.cc.u32 %r11, %r2, %r3, %r11; madc.hi.cc.u32 %r12, %r2, %r3, %r12; addc.u32 %r13, %r13, 0;
        mov.b64 %d3, {%r10, %r11}; mov.b64 %d4, {%r12, %r13};
        st.global.b64 [%l_g], %d3; st.global.b64 [%h_g], %d4;""",
        block=lanes,
        a=a,
        b=b,
        l=low,
        h=high,
    )
    for x, y, lo, hi in zip(a.tolist(), b.tolist(), low.tolist(), high.tolist(), strict=True):
        assert hi << 64 | lo == x * y


def test_a_guarded_addition_leaves_the_carry_of_other_lanes():
    y = np.zeros(32, np.uint32)
    run(
        """mov.b32 %r1, -1; add.cc.u32 %r2, %r1, 1; setp.lt.u32 %p1, %tid, 9; @%p1 add.cc.u32 %r2, 1, 1;
        addc.u32 %r3, 0, 0; st.global.b32 [%y_g], %r3;""",
        y=y,
    )
    assert (y == (np.arange(32) >= 9)).all()


def test_a_carry_that_nobody_wrote_is_a_hazard():
    fails(Hazard, "\naddc.u32 %r1, %tid, 1; // HERE\n", "carry flag")
    guarded = "setp.lt.u32 %p1, %tid, 31; @%p1 add.cc.u32 %r2, 1, 1;\naddc.u32 %r3, 0, 0; // HERE\n"
    fails(Hazard, guarded, "lane 31", "carry flag")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("compare", ["eq", "lt", "geu", "nan", "ne"])
def test_a_packed_comparison_writes_one_predicate_a_half(dtype, compare):
    kind = np.float16 if dtype == "f16" else ml_dtypes.bfloat16
    values = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, 2.0, 1e-3]).astype(kind)
    a, b = values[RNG.integers(0, 8, (2, 512))].reshape(2, 256, 2)
    x, y = (np.ascontiguousarray(v).view(np.uint32).reshape(-1) for v in (a, b))
    low, high = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    run(
        f"""ld.global.b32 %r1, [%x_g]; ld.global.b32 %r2, [%y_g]; setp.{compare}.{dtype}x2 %p1|%p2, %r1, %r2;
        selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 1, 0, %p2; st.global.b32 [%l_g], %r3; st.global.b32 [%h_g], %r4;""",
        block=256,
        x=x,
        y=y,
        l=low,
        h=high,
    )
    for half, got in ((0, low), (1, high)):
        expected = [compare_floats(compare, float(p[half]), float(q[half])) for p, q in zip(a, b, strict=True)]
        assert got.astype(bool).tolist() == expected


@pytest.mark.parametrize("combine", ["and", "or"])
def test_lop3_tests_its_result(combine):
    x, y, z = RNG.integers(0, 4, 64, np.uint32), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    run(
        f"""ld.global.b32 %r1, [%x_g]; setp.lt.u32 %p1, %tid, 20; lop3.{combine}.b32 %r2|%p2, %r1, 1, 0, 0xC0, %p1;
        selp.b32 %r3, 1, 0, %p2; st.global.b32 [%y_g], %r2; st.global.b32 [%z_g], %r3;
        lop3.{combine}.b32 _|%p3, %r1, 1, 0, 0xC0, %p1; xor.pred %p4, %p3, %p2; @%p4 trap;""",
        block=64,
        x=x,
        y=y,
        z=z,
    )
    q = np.arange(64) < 20
    assert (y == (x & 1)).all()
    assert (z == ((x & 1 != 0) & q if combine == "and" else (x & 1 != 0) | q)).all()
