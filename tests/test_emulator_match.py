"""emulator/ops/warp, the rest: shuffles with their predicate, match, float redux, special registers, trap."""

import numpy as np
import pytest
from ptx_kernels import fails, run

from generator.emulator import Hazard

RNG = np.random.default_rng(4)
LANES = np.arange(32)


@pytest.mark.parametrize(
    "mode, source, inside",
    [
        ("up", LANES - 3, LANES >= 3),
        ("down", LANES + 3, LANES + 3 < 32),
        ("bfly", LANES ^ 3, LANES >= 0),
        ("idx", LANES * 0 + 3, LANES >= 0),
    ],
)
def test_a_shuffle_writes_whether_its_source_lies_in_range(mode, source, inside):
    y, z = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    clamp = 0 if mode == "up" else 31
    run(
        f"""add.u32 %r1, %tid, 50; shfl.sync.{mode}.b32 %r2|%p1, %r1, 3, {clamp}, -1; selp.b32 %r3, 1, 0, %p1;
        st.global.b32 [%y_g], %r2; st.global.b32 [%z_g], %r3; shfl.sync.{mode}.b32 %r4, %r1, 3, {clamp}, -1;
        setp.ne.u32 %p2, %r4, %r2; @%p2 trap; shfl.sync.{mode}.b32 _|%p3, %r1, 3, {clamp}, -1;
        xor.pred %p4, %p3, %p1; @%p4 trap;""",
        y=y,
        z=z,
    )
    assert (y == np.where(inside, source, LANES) + 50).all()
    assert (z == inside).all()


@pytest.mark.parametrize("kind, dtype, letter", [("b32", np.uint32, "r"), ("b64", np.uint64, "d")])
def test_match(kind, dtype, letter):
    mask = 0x0FF0FFFF
    x = RNG.integers(0, 4, (2, 32)).astype(dtype) << dtype(8 * np.dtype(dtype).itemsize - 3)
    x[1] = 7
    x[1, 17] = 8  # not a member
    any_, all_, p = (np.zeros((2, 32), np.uint32) for _ in range(3))
    run(
        f"""ld.global.{kind} %{letter}1, [%x_g]; and.b32 %r4, %tid, 31; shr.u32 %r5, {mask}, %r4; and.b32 %r5, %r5, 1;
        setp.eq.u32 %p1, %r5, 1; mov.b32 %r2, 0; mov.b32 %r3, 0; setp.ne.u32 %p2, %tid, %tid;
        @%p1 match.any.sync.{kind} %r2, %{letter}1, {mask}; @%p1 match.all.sync.{kind} %r3|%p2, %{letter}1, {mask};
        st.global.b32 [%a_g], %r2; st.global.b32 [%b_g], %r3; selp.b32 %r6, 1, 0, %p2; st.global.b32 [%p_g], %r6;""",
        block=64,
        x=x,
        a=any_,
        b=all_,
        p=p,
    )
    member = mask >> LANES & 1 == 1
    for warp in range(2):
        for lane in LANES:
            same = member & member[lane] & (x[warp] == x[warp, lane])
            assert any_[warp, lane] == sum(1 << int(i) for i in LANES[same])
    assert (all_[0] == 0).all() and (p[0] == 0).all()
    assert (all_[1] == np.where(member, mask, 0)).all() and (p[1] == member).all()


@pytest.mark.parametrize("name", [f"{o}{a}{n}" for o in ("min", "max") for a in ("", ".abs") for n in ("", ".NaN")])
@pytest.mark.parametrize("nans", [0, 3, 32])
def test_redux_of_floats(name, nans):
    x, y = RNG.standard_normal(32).astype(np.float32), np.zeros(32, np.float32)
    x[RNG.permutation(32)[:nans]] = np.nan
    run(f"ld.global.b32 %r1, [%x_g]; redux.sync.{name}.f32 %r2, %r1, -1; st.global.b32 [%y_g], %r2;", x=x, y=y)
    values = np.abs(x) if "abs" in name else x
    if nans == 32 or (nans and "NaN" in name):
        assert np.isnan(y).all()
    else:
        assert (y == (np.nanmin if name.startswith("min") else np.nanmax)(values)).all()


def test_redux_orders_the_zeros():
    x, y = np.zeros(32, np.float32), np.zeros(32, np.float32)
    x[7] = -0.0
    run("ld.global.b32 %r1, [%x_g]; redux.sync.min.f32 %r2, %r1, -1; st.global.b32 [%y_g], %r2;", x=x, y=y)
    assert np.signbit(y).all()


def test_lane_masks_and_other_special_registers():
    out = np.zeros((9, 64), np.uint32)
    names = [*(f"lanemask_{o}" for o in ("eq", "lt", "le", "gt", "ge")), "nwarpid", "warpid", "smid", "nsmid"]
    body = "".join(f"mov.u32 %r1, %{n}; st.global.b32 [%o_g+{256 * i}], %r1;" for i, n in enumerate(names))
    run(body, block=64, o=out)
    lane = np.arange(64) % 32
    for row, test in enumerate(
        [lambda i, j: i == j, lambda i, j: i < j, lambda i, j: i <= j, lambda i, j: i > j, lambda i, j: i >= j]
    ):
        expected = [sum(1 << i for i in range(32) if test(i, j)) for j in lane.tolist()]
        assert out[row].tolist() == expected
    assert (out[5] == 2).all() and (out[6] == np.arange(64) // 32).all() and (out[7] < out[8]).all()


def test_clocks_go_forward():
    y = np.zeros(32, np.uint64)
    run(
        """mov.u64 %d1, %globaltimer; nanosleep.u32 20; mov.u64 %d2, %globaltimer; sub.u64 %d3, %d2, %d1;
        mov.u32 %r1, %clock; mov.u64 %d4, %clock64; st.global.b64 [%y_g], %d3;""",
        y=y,
    )
    assert (y > 0).all() and (y < 1 << 32).all()


def test_trap_ends_the_launch():
    fails(Hazard, "setp.eq.u32 %p1, %tid, 5;\n@%p1 trap; // HERE\n", "lane 5", "trap")
