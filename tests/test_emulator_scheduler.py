"""emulator/scheduler: who runs next, arms of a branch, and who wakes when a phase completes."""

import ctypes

import numpy as np
import pytest
from ptx_kernels import run

from generator.emulator.scheduler import EVERYBODY_EXITED, NOBODY_READY, _choose_block, _Warps

END = 9


def choose(pc, stalled=-1, barred=0, diverged=0, last_run=0, turn=0):
    """(block, chosen, lowest block of the others, diverged ones among the chosen) as scheduler.c sees these warps."""
    n = len(pc)
    types = (np.int32, np.int32, np.uint8, np.uint8, np.int64)
    arrays = [
        np.broadcast_to(np.array(a, t), n).copy()
        for a, t in zip((pc, stalled, barred, diverged, last_run), types, strict=True)
    ]
    chosen = np.zeros(n, np.uint8)
    view = _Warps(*(a.ctypes.data for a in (*arrays, chosen)), n, END, turn)
    block = _choose_block()(ctypes.addressof(view))
    return block, chosen.tolist(), view.lowest, view.apart


def test_the_lowest_block_at_which_a_warp_is_ready():
    assert choose([4, 3, 7, 3]) == (3, [0, 1, 0, 1], 4, 0)
    assert choose([4, 3, 7, 3], stalled=[-1, 3, -1, 2]) == (
        3,
        [0, 0, 0, 1],
        4,
        0,
    )  # asleep at 3; awake, having moved on
    assert choose([4, 3, 7, 3], barred=[0, 1, 0, 1], diverged=[1, 1, 0, 0]) == (4, [1, 0, 0, 0], 7, 1)
    assert choose([END, END, 7]) == (7, [0, 0, 1], END, 0)


def test_a_turn_for_the_warp_that_waited_longest():
    assert choose([4, 3, 7, 7], last_run=[5, 6, 2, 9], turn=1) == (7, [0, 0, 1, 1], 3, 0)
    assert choose([4, 3, 7, 7], last_run=[5, 6, 2, 9], stalled=[-1, -1, 7, -1], turn=1)[0] == 4


def test_nobody_is_ready_or_everybody_has_exited():
    assert choose([END, 3], barred=[0, 1])[0] == NOBODY_READY
    assert choose([2, 3], stalled=[2, 3])[0] == NOBODY_READY
    assert choose([END, END], barred=1)[0] == EVERYBODY_EXITED


@pytest.mark.parametrize("lanes", [(0,), (3, 4, 31), tuple(range(31)), tuple(range(32)), ()])
def test_lanes_of_a_branch_and_the_others_meet_after_it(lanes):
    """Every number of lanes, in one warp of three: the arm, whole warps and none."""
    y, z = np.zeros(96, np.uint32), np.zeros(96, np.uint32)
    mask = sum(1 << lane for lane in lanes)
    body = f"""mov.u32 %r3, 7; shr.u32 %r1, %tid, 5; rem.u32 %r2, %tid, 32; shr.b32 %r4, {mask:#x}, %r2;
    and.b32 %r4, %r4, 1; setp.ne.b32 %p1, %r1, 1; setp.eq.or.b32 %p1, %r4, 0, %p1;
    @%p1 bra MEET; add.u32 %r3, %r3, %tid; st.global.b32 [%z_g], %r3;
    MEET: add.u32 %r3, %r3, 1; shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1; st.global.b32 [%y_g], %r5;"""
    report = run(body, block=96, y=y, z=z)
    thread = np.arange(96)
    inside = (thread // 32 == 1) & np.isin(thread % 32, lanes)
    value = np.where(inside, 7 + thread, 7)
    assert (y == value[thread ^ 1] + 1).all() and (z == np.where(inside, value, 0)).all()
    assert report.opcodes["st.global.b32"] == 3 + (len(lanes) > 0), "a warp whose lanes all skip does not run the arm"


def test_an_arm_inside_a_loop_of_many_ctas():
    """A lane of each warp, another one every time, signals; the state of a batch is that of its lanes."""
    y = np.zeros(64 * 40, np.uint32)
    body = """mov.u32 %r1, 0; rem.u32 %r2, %tid, 32; add.u32 %r2, %r2, %cta; rem.u32 %r2, %r2, 32; mov.u32 %r3, 0;
    LOOP: setp.ne.u32 %p1, %r1, %r2; @%p1 bra MEET; add.u32 %r3, %r1, 100;
    MEET: add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 32; @%p2 bra LOOP; st.global.b32 [%y_g], %r3;"""
    report = run(body, block=64, grid=40, y=y)
    thread, cta = np.arange(64), np.arange(40)[:, None]
    assert (y.reshape(40, 64) == (thread % 32 + cta) % 32 + 100).all()
    assert report.opcodes["add.u32"] == 80 * (2 * 32 + 1)


BARRIERS = """setp.ne.u32 %p1, %tid, 0; @%p1 bra READY; mbarrier.init.shared::cta.b64 [%s], 1;
mbarrier.init.shared::cta.b64 [%s+8], 1; READY: bar.sync 0; shr.u32 %r1, %tid, 5; rem.u32 %r2, %tid, 32;
setp.eq.u32 %p2, %r1, 0; setp.ne.u32 %p3, %r2, 0;"""


def test_a_warp_wakes_with_the_mbarrier_that_it_waits_for_and_no_other():
    """Warp 1 waits for the second of two; warp 0 completes the first four times before."""
    y = np.zeros(64, np.uint32)
    first = "mbarrier.arrive.shared::cta.b64 _, [%s]; W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%s], {p};"
    rounds = "".join((first + "@!%p4 bra W{n};").format(n=n, p=n & 1) for n in range(4))
    body = f"""{BARRIERS} @%p2 bra SIGNAL;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%s+8], 0; @!%p5 bra WAIT; bra DONE;
    SIGNAL: @%p3 bra DONE; {rounds} mbarrier.arrive.shared::cta.b64 _, [%s+8];
    DONE: st.global.b32 [%y_g], 1;"""
    report = run(body, block=64, y=y)
    assert (y == 1).all()
    waits = report.opcodes["mbarrier.try_wait.parity.shared::cta.b64"]
    assert waits == 4 + 2, "once before it sleeps, once when it is woken"


@pytest.mark.parametrize("order", [(0, 8), (8, 0)])
def test_lanes_of_a_warp_that_wait_for_different_mbarriers_wake_with_either(order):
    """Lanes below 16 of warp 1 wait for one, the others for another; both complete, far apart, in either order."""
    y = np.zeros(64, np.uint32)
    pause = "mov.u32 %r5, 0; LOOP: add.u32 %r5, %r5, 1; setp.lt.u32 %p8, %r5, 50; @%p8 bra LOOP;"
    signals = pause.join(f"mbarrier.arrive.shared::cta.b64 _, [%s+{offset}];" for offset in order)
    body = f"""{BARRIERS} @%p2 bra SIGNAL; setp.lt.u32 %p6, %r2, 16; mov.u32 %r4, %s; @%p6 bra WAIT; add.u32 %r4, %s, 8;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r4], 0; @!%p5 bra WAIT; bra DONE;
    SIGNAL: @%p3 bra DONE; {signals}
    DONE: st.global.b32 [%y_g], 1;"""
    report = run(body, block=64, y=y)
    assert (y == 1).all()
    assert 2 <= report.opcodes["mbarrier.try_wait.parity.shared::cta.b64"] <= 6, "it slept between"
