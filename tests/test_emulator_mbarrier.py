"""emulator/ops/mbarrier: states, arrive_drop, noComplete, counts of bytes, remote forms."""

import numpy as np
import pytest
from ptx_kernels import fails, run

from generator.emulator import Deadlock, Hazard

LEADER = "setp.eq.u32 %p1, %tid, 0; setp.ne.u32 %p8, %tid, %tid; "
INIT = LEADER + "@%p1 mbarrier.init.shared.b64 [%s], {}; bar.sync 0; "
OUT = "st.global.b32 [%y_g], %r1;"
ASK = "mbarrier.test_wait{}.shared::cta.b64 %p8, [%s], %d9; selp.u32 %r1, 1, 0, %p8; "


def result(body, block=32, **arguments):
    y = np.zeros(block, np.uint32)
    run(body + OUT, block=block, y=y, **arguments)
    return y


def test_a_state_waits_for_its_phase():
    """Each thread's state is that of the phase that its arrival counts in."""
    arrive = INIT.format(33) + "mbarrier.arrive.release.cta.shared::cta.b64 %d9, [%s]; "
    assert not result(arrive + ASK.format("")).any()
    last = "@%p1 mbarrier.arrive.relaxed.cluster.shared::cta.b64 _, [%s]; bar.sync 0; "
    assert result(arrive + last + ASK.format(".acquire.cluster")).all()
    spin = "W: mbarrier.try_wait.relaxed.cta.shared::cta.b64 %p8, [%s], %d9, 1000; @!%p8 bra W; mov.u32 %r1, 5; "
    assert (result(arrive + last + spin) == 5).all()
    fails(Deadlock, arrive + spin, "1 of 33 arrivals")


def test_a_state_is_of_this_phase_or_the_one_before():
    body = (
        INIT.format(1) + "@%p1 mbarrier.arrive.shared.b64 %d9, [%s];" * 2 + "@%p1 mbarrier.arrive.shared.b64 _, [%s];"
    )
    ok = INIT.format(1) + "@%p1 mbarrier.arrive.shared.b64 %d9, [%s];" * 2
    ask = "\n@%p1 mbarrier.test_wait.shared.b64 %p8, [%s], %d9; // HERE\n"
    run(ok + ask)
    fails(Hazard, body + ask, "not of this phase or the one before")


def test_the_pending_count_before_each_arrival():
    body = INIT.format(100) + "add.u32 %r2, %tid, 1; setp.lt.u32 %p2, %tid, 5; mov.u32 %r1, 0;"
    y = result(body + "@%p2 mbarrier.arrive.shared.b64 %d9, [%s], %r2; @%p2 mbarrier.pending_count.b64 %r1, %d9; ")
    assert y[:5].tolist() == [100, 99, 97, 94, 90] and not y[5:].any()


def test_dropped_arrivals_are_missing_from_every_later_phase():
    drop = INIT.format(33) + "mbarrier.arrive_drop.shared::cta.b64 _, [%s]; "
    drop += "@%p1 mbarrier.arrive.shared.b64 _, [%s]; bar.sync 0; "
    phase = "@%p1 mbarrier.arrive.shared.b64 %d9, [%s]; bar.sync 0; "
    phase += "@%p1 mbarrier.test_wait.shared.b64 %p8, [%s], %d9; selp.u32 %r1, 1, 0, %p8; "
    assert result(drop + phase)[0] == 1  # one arrival a phase is left
    both = INIT.format(2) + "@%p1 mbarrier.arrive_drop.expect_tx.relaxed.cluster.shared::cta.b64 _, [%s], 16; "
    both += "@%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%s], 16; "
    both += "@%p1 mbarrier.arrive.shared.b64 %d9, [%s]; bar.sync 0; "
    assert result(both + phase)[0] == 1
    fails(Hazard, INIT.format(1) + "\n@%p1 mbarrier.arrive_drop.shared.b64 _, [%s], 2; // HERE\n", "below zero")


def test_an_arrival_that_may_not_complete():
    fine = "@%p1 mbarrier.arrive.noComplete.shared.b64 %d9, [%s], 2; @%p1 mbarrier.arrive.shared.b64 _, [%s]; "
    run(INIT.format(3) + fine)
    fails(
        Hazard,
        INIT.format(2) + "\n@%p1 mbarrier.arrive.noComplete.release.cta.shared.b64 %d9, [%s], 2; // HERE\n",
        ".noComplete",
    )


@pytest.mark.parametrize("place", ["[%s]", "[%d1]"])
def test_bytes_are_counted_lane_by_lane(place):
    space = ".shared::cta" if place == "[%s]" else ""
    body = (
        INIT.format(1)
        + f"""cvt.u64.u32 %d1, %s; cvta.shared.u64 %d1, %d1;
    mbarrier.expect_tx.relaxed.cta{space}.b64 {place}, %tid; @%p1 mbarrier.arrive{space}.b64 %d9, {place}; bar.sync 0;
    @!%p1 mbarrier.complete_tx{space}.b64 {place}, %tid; bar.sync 0;
    @%p1 mbarrier.test_wait{space}.b64 %p8, {place}, %d9;
    selp.u32 %r1, 1, 0, %p8;"""
    )
    assert result(body)[0] == 1
    fails(
        Hazard, INIT.format(2) + "\n@%p1 mbarrier.complete_tx.shared.b64 [%s], 2000000; // HERE\n", "transaction count"
    )


def test_remote_bytes_and_arrivals():
    """CTA 0 expects and completes bytes on CTA 1's barrier, whose thread 0 waits for them."""
    body = LEADER + "@%p1 mbarrier.init.shared.b64 [%s], 2; fence.mbarrier_init.release.cluster; "
    body += "barrier.cluster.arrive; barrier.cluster.wait; "
    body += """mov.u32 %r5, %cluster_ctarank; setp.eq.u32 %p2, %r5, 0; and.pred %p3, %p1, %p2; mov.u32 %r6, 1;
    mapa.shared::cluster.u32 %r7, %s, %r6; @%p3 mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r7], 64;
    @%p3 mbarrier.arrive_drop.release.cluster.shared::cluster.b64 _, [%r7];
    @%p3 mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r7];
    @%p3 mbarrier.complete_tx.shared::cluster.b64 [%r7], 64; @%p2 bra DONE;
    W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p8, [%s], 0; @!%p8 bra W; DONE: mov.u32 %r1, 3;
    barrier.cluster.arrive; barrier.cluster.wait;"""
    y = np.zeros(64, np.uint32)
    run(body + OUT, grid=2, cluster=2, y=y)
    assert (y == 3).all()
