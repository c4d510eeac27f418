"""Cluster launch control, bar.red, the cluster barrier in part of a warp."""

import numpy as np
import pytest
from ptx_kernels import fails, ptx, run

from generator.emulator import Deadlock, Gpu, Hazard, LaunchError, UnsupportedInstruction

LEADER = "setp.eq.u32 %p1, %tid, 0; "


# -- cluster launch control --------------------------------------------------------------------------------------------
def persistent(multicast: str = "") -> str:
    """Each CTA notes in y which blocks it did: its own, then those whose launch it cancels."""
    count = "1" if not multicast else "1"
    return f"""{LEADER} @%p1 mbarrier.init.shared.b64 [%s+64], {count}; fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r1, %ctaid.x; mov.u32 %r2, 0; mov.u32 %r20, %ctaid.x;
    LOOP: mul.wide.u32 %d1, %r1, 4; add.u64 %d1, %d1, %y; add.u32 %r5, %r20, 1; @%p1 red.global.add.u32 [%d1], %r5;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+64], 16; mov.u32 %r9, %cluster_ctarank; setp.eq.u32 %p3, %r9, 0;
    and.pred %p3, %p3, %p1; barrier.cluster.arrive; barrier.cluster.wait;
    @%p3 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{multicast}.b128 [%s], [%s+64];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p9, [%s+64], %r2; @!%p9 bra WAIT; xor.b32 %r2, %r2, 1;
    ld.shared.b128 %q1, [%s]; clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %q1; @!%p4 bra DONE;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q1;
    clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {{%r11, %r12, %r13, %r14}}, %q1;
    add.u32 %r11, %r11, %r12; add.u32 %r11, %r11, %r13; sub.u32 %r11, %r11, %r1; add.u32 %r1, %r1, %r11;
    add.u32 %r1, %r1, %r9; fence.proxy.async.shared::cta; bar.sync 0; bra.uni LOOP; DONE:"""


@pytest.mark.parametrize("blocks", [1, 4, 5, 37])
def test_every_block_is_done_once(blocks):
    y = np.zeros(blocks, np.uint32)
    run(persistent(), declare=".reg .b128 %q<2>;", block=64, grid=blocks, y=y)
    assert (y > 0).all() and (y <= 4).all()  # by one of the four CTAs that started
    assert y[:4].tolist() == [1, 2, 3, 4][:blocks]


def test_a_cluster_takes_over_a_cluster():
    y = np.zeros(24, np.uint32)
    run(persistent(".multicast::cluster::all"), declare=".reg .b128 %q<2>;", block=64, grid=24, cluster=2, y=y)
    assert (y.reshape(-1, 2)[:, 1] == y.reshape(-1, 2)[:, 0] + 1).all() and (y > 0).all() and (y <= 4).all()


def test_the_answer_is_waited_for_and_may_be_no():
    text = persistent().replace("WAIT: mbarrier.try_wait.parity.shared.b64 %p9, [%s+64], %r2; @!%p9 bra WAIT;", "")
    fails(Hazard, text, "may not be read", declare=".reg .b128 %q<2>;", grid=5, y=np.zeros(5, np.uint32))
    text = persistent().replace("@!%p4 bra DONE;", "")  # takes a CTA that there is not
    fails(Hazard, text, "red.global", "out of bounds", declare=".reg .b128 %q<2>;", grid=1, y=np.zeros(1, np.uint32))


# -- bar.red -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [32, 96, 80])
@pytest.mark.parametrize("limit", [0, 1, 40, 200])
def test_reductions_over_a_barrier(threads, limit):
    y = np.zeros((3, threads), np.uint32)
    body = f"""setp.lt.u32 %p1, %tid, {limit}; bar.red.popc.u32 %r1, 0, %p1; st.global.b32 [%y_g], %r1;
    barrier.cta.red.and.aligned.pred %p2, 1, {-(-threads // 32) * 32}, %p1; selp.u32 %r2, 1, 0, %p2;
    st.global.b32 [%y_g+{4 * threads}], %r2; bar.cta.red.or.pred %p3, 0, !%p1; selp.u32 %r3, 1, 0, %p3;
    st.global.b32 [%y_g+{8 * threads}], %r3;"""
    run(body, block=threads, y=y)
    assert (
        (y[0] == min(limit, threads)).all() and (y[1] == (limit >= threads)).all() and (y[2] == (limit < threads)).all()
    )


def test_a_reduction_waits_for_all():
    fails(
        Deadlock,
        "setp.lt.u32 %p1, %tid, 32; @%p1 bra W; ret; W: bar.red.popc.u32 %r1, 1, 64, %p1;",
        "32 of 64 threads",
        block=64,
    )


# -- barrier.cluster, lane by lane -------------------------------------------------------------------------------------
def test_lanes_arrive_apart_and_wait_together():
    y = np.zeros(64, np.uint32)
    body = """setp.lt.u32 %p1, %tid, 5; @%p1 bra A; barrier.cluster.arrive; bra.uni B;
    A: barrier.cluster.arrive.relaxed;
    B: barrier.cluster.wait; mov.u32 %r1, 7; st.global.b32 [%y_g], %r1;"""
    run(body, grid=2, cluster=2, y=y)
    assert (y == 7).all()
    y[:] = 0
    run(
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; st.global.b32 [%y_g], 1;".replace(
            " 1;", " %r1;"
        ).replace("barrier.cluster.arrive.aligned", "mov.u32 %r1, 1; barrier.cluster.arrive.aligned"),
        block=20,
        grid=2,
        cluster=2,
        y=y,
    )
    assert (y[:40] == 1).all()  # a warp that is not full


def test_lanes_that_do_not_arrive_are_waited_for():
    body = "setp.lt.u32 %p1, %tid, 5; @%p1 bra A; barrier.cluster.arrive; A: nop; bar.warp.sync -1;"
    fails(Hazard, body + "\nbarrier.cluster.wait; // HERE\n", "without an arrive", grid=2, cluster=2)
    fails(
        Hazard,
        "setp.lt.u32 %p1, %tid, 5; @%p1 bra A;\nbarrier.cluster.arrive.aligned; // HERE\nA: nop;",
        "part of a warp",
        grid=2,
        cluster=2,
    )
    apart = "barrier.cluster.arrive; setp.lt.u32 %p1, %tid, 5; @%p1 bra A;\nbarrier.cluster.wait; // HERE\n"
    apart += "A: nop; bar.warp.sync -1;"
    fails(UnsupportedInstruction, apart, "whose other lanes go on", grid=2, cluster=2)


# -- cooperative launches ----------------------------------------------------------------------------------------------
GRID_BARRIER = """setp.eq.u32 %p1, %tid, 0; ld.global.b32 %r9, [%n]; @!%p1 bra MET;
    atom.release.gpu.global.add.u32 %r1, [%y], 1;
SPIN: ld.acquire.gpu.global.u32 %r2, [%y]; setp.lt.u32 %p2, %r2, %r9; @%p2 bra SPIN; MET: bar.sync 0;"""


def test_a_barrier_of_the_whole_grid():
    y, n = np.zeros(1, np.uint32), np.array([100], np.uint32)
    text = ptx(GRID_BARRIER, y=y, n=n)
    gpu = Gpu()
    gpu.add_array(y, "y")
    gpu.add_array(n, "n")
    params = [int(a.ctypes.data).to_bytes(8, "little") for a in (y, n)]
    gpu.launch(gpu.load_ptx(text), "k", (100, 1, 1), (64, 1, 1), params=params, cooperative=True)
    assert y[0] == 100
    with pytest.raises(LaunchError, match="4737 CTAs .* 4736 fit on sm_100a at once"):
        gpu.launch(gpu.load_ptx(text), "k", (4737, 1, 1), (64, 1, 1), params=params, cooperative=True)
