"""emulator/ops/warp: elect, shuffles, votes and reductions against a loop over the lanes."""

import functools
import operator

import numpy as np
import pytest
from ptx_kernels import fails, run

from generator.emulator import Hazard, UnsupportedInstruction

VALUES = np.random.default_rng(5).integers(0, 2**32, 64, np.uint32)
FULL = 0xFFFFFFFF


def shuffled(mode: str, values, b, c: int) -> list[tuple[int, bool]]:
    """ISA 9.7.9.6, lane by lane: the value each lane receives and whether its source lay in range."""
    out = []
    for lane in range(32):
        clamp, segment, offset = c & 31, c >> 8 & 31, b[lane] & 31
        highest = lane & segment | clamp & ~segment & 31
        lowest = lane & segment
        if mode == "up":
            source, valid = lane - offset, lane - offset >= highest
        elif mode == "down":
            source, valid = lane + offset, lane + offset <= highest
        elif mode == "bfly":
            source, valid = lane ^ offset, lane ^ offset <= highest
        else:
            source = lowest | offset & ~segment & 31
            valid = source <= highest
        out.append((int(values[source if valid else lane]), valid))
    return out


WIDTHS = {32: 0, 16: 16, 8: 24, 4: 28, 2: 30}
CLAMPS = [
    (w, s << 8 | (0 if mode == "up" else 31), mode) for w, s in WIDTHS.items() for mode in ("up", "down", "bfly", "idx")
]
CLAMPS += [(32, 0x0B, m) for m in ("up", "down", "bfly", "idx")] + [(32, 0x1C1F, "idx"), (32, 0x0705, "idx")]


@pytest.mark.parametrize("width, c, mode", CLAMPS)
@pytest.mark.parametrize("offset", [0, 1, 3, 16, 31, "lane"])
def test_shuffles(mode, width, c, offset):
    y = np.zeros(64, np.uint32)
    amount = "%r2" if offset == "lane" else offset
    run(
        f"""ld.global.b32 %r1, [%x_g]; mad.lo.u32 %r2, %tid, 7, 3; shfl.sync.{mode}.b32 %r3, %r1, {amount}, {c}, -1;
        st.global.b32 [%y_g], %r3;""",
        block=64,
        x=VALUES,
        y=y,
    )
    for warp in (0, 1):
        b = [(7 * (32 * warp + lane) + 3) & 31 if offset == "lane" else offset for lane in range(32)]
        expected = shuffled(mode, VALUES[32 * warp : 32 * warp + 32], b, c)
        assert y[32 * warp : 32 * warp + 32].tolist() == [v for v, _ in expected]


def test_a_predicate_destination_where_none_belongs_is_refused_by_name():
    body = "\nredux.sync.add.u32 %r3|%p1, %tid, -1; // HERE\n"
    fails(UnsupportedInstruction, body, "redux.sync.add.u32 with a predicate destination")


def test_elect_takes_one_lane_a_warp():
    y, z = np.full(96, 77, np.uint32), np.zeros(96, np.uint32)
    run(
        "elect.sync %r1|%p1, -1; st.global.b32 [%y_g], %r1; mov.u32 %r2, 1; @%p1 st.global.b32 [%z_g], %r2;",
        block=96,
        y=y,
        z=z,
    )
    assert (z.reshape(3, 32).sum(axis=1) == 1).all()
    assert (y.reshape(3, 32) == z.reshape(3, 32).argmax(axis=1)[:, None]).all()


def test_elect_among_the_lanes_of_a_mask_and_with_a_sink():
    z = np.zeros(32, np.uint32)
    run("elect.sync _|%p1, 0xFF000; mov.u32 %r2, 1; @%p1 st.global.b32 [%z_g], %r2;", z=z)
    assert z.sum() == 1 and 12 <= z.argmax() < 20


@pytest.mark.parametrize("mask", [-1, 0x00FF00FF])
@pytest.mark.parametrize("bound", [0, 1, 9, 31, 32])
def test_votes(mask, bound):
    y = np.zeros((32, 4), np.uint32)
    run(
        f"""setp.lt.u32 %p1, %tid, {bound}; vote.sync.ballot.b32 %r1, %p1, {mask}; vote.sync.any.pred %p2, %p1, {mask};
        vote.sync.all.pred %p3, %p1, {mask}; vote.sync.uni.pred %p4, %p1, {mask}; selp.u32 %r2, 1, 0, %p2;
        selp.u32 %r3, 1, 0, %p3; selp.u32 %r4, 1, 0, %p4; mad.wide.u32 %d1, %tid, 16, %y;
        st.global.v2.b32 [%d1], {{%r1, %r2}};
        st.global.v2.b32 [%d1+8], {{%r3, %r4}};""",
        y=y,
    )
    lanes = [t for t in range(32) if mask & FULL & 1 << t]
    votes = [t < bound for t in lanes]
    ballot = sum(1 << t for t in lanes if t < bound)
    member = y[lanes]
    assert (member == [ballot, any(votes), all(votes), len(set(votes)) == 1]).all()


REDUCE = {"add": operator.add, "min": min, "max": max, "and": operator.and_, "or": operator.or_, "xor": operator.xor}


@pytest.mark.parametrize("operation", [f"{o}.{t}" for o in ("add", "min", "max") for t in ("u32", "s32")]
                         + ["and.b32", "or.b32", "xor.b32"])  # fmt: skip
@pytest.mark.parametrize("mask", [-1, 0x0F0F0FF0])
def test_redux(operation, mask):
    y = np.zeros(64, np.uint32)
    run(f"ld.global.b32 %r1, [%x_g]; redux.sync.{operation} %r2, %r1, {mask}; st.global.b32 [%y_g], %r2;",
        block=64, x=VALUES, y=y)  # fmt: skip
    name, kind = operation.split(".")
    values = VALUES.view(np.int32) if kind == "s32" else VALUES
    lanes = [t for t in range(32) if mask & FULL & 1 << t]
    for warp in (0, 1):
        members = [int(values[32 * warp + t]) for t in lanes]
        assert (y[32 * warp + np.array(lanes)] == functools.reduce(REDUCE[name], members) & FULL).all()


def test_a_butterfly_sum_over_the_warp():
    x, y = np.random.default_rng(1).standard_normal(64).astype(np.float32), np.zeros(64, np.float32)
    steps = "".join(f"shfl.sync.bfly.b32 %r2, %r1, {d}, 31, -1; add.f32 %r1, %r1, %r2;" for d in (16, 8, 4, 2, 1))
    run(f"ld.global.b32 %r1, [%x_g]; {steps} st.global.b32 [%y_g], %r1;", block=64, x=x, y=y)
    values = x.reshape(2, 32)
    for d in (16, 8, 4, 2, 1):
        values = values + values[:, np.arange(32) ^ d]
    assert (y.reshape(2, 32) == values).all()


@pytest.mark.parametrize("count", [16, 20, 260])
def test_setmaxnreg_counts(count):
    fails(Hazard, f"\nsetmaxnreg.dec.sync.aligned.u32 {count}; // HERE\n", f"setmaxnreg {count}", "from 24 to 256")
    run("setmaxnreg.dec.sync.aligned.u32 24; setmaxnreg.inc.sync.aligned.u32 256;")


def test_setmaxnreg_takes_an_immediate():
    fails(
        UnsupportedInstruction, "mov.u32 %r1, 64;\nsetmaxnreg.inc.sync.aligned.u32 %r1; // HERE\n", "needs an immediate"
    )


def test_a_shuffle_in_a_last_warp_that_is_not_full_raises():
    fails(Hazard, "\nshfl.sync.idx.b32 %r1, %tid, 0, 31, -1; // HERE\n", "all 32 lanes", "warp 1", block=40)
