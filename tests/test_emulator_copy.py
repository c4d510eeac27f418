"""emulator/ops/copy: cp.async with its groups and mbarriers, bulk copies, hints."""

import numpy as np
import pytest
from ptx_kernels import aligned, fails, run

from generator.emulator import Deadlock, Hazard

COPY = "mad.wide.u32 %d1, %tid, 16, %x; cp.async.cg.shared.global [%s16], [%d1], 16;"
BACK = """ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%s16]; mad.wide.u32 %d2, %tid, 16, %y;
st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};"""


def data():
    x = aligned((32, 4), np.uint32)
    x[:] = np.random.default_rng(2).integers(0, 2**32, x.shape)
    return x, aligned((32, 4), np.uint32)


@pytest.mark.parametrize("wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_a_copy_arrives_with_its_wait(wait):
    x, y = data()
    run(COPY + wait + BACK, x=x, y=y)
    assert (x == y).all()


def test_a_copy_that_nobody_waited_for_may_not_be_read():
    x, y = data()
    load = "\nld.shared.b32 %r1, [%s16]; // HERE\n"
    fails(Hazard, COPY + load, "cp.async", x=x, y=y)
    fails(Hazard, COPY + "cp.async.commit_group; cp.async.wait_group 1;" + load, "cp.async", x=x, y=y)
    fails(Hazard, COPY + "cp.async.wait_group 0;" + load, "cp.async", x=x, y=y)  # never committed


def test_a_store_may_not_overtake_a_copy():
    x, y = data()
    fails(Hazard, COPY + "\nst.shared.b32 [%s16], %tid; // HERE\n", "writes shared memory", "cp.async", x=x, y=y)


def test_groups_complete_in_order_and_empty_ones_count():
    x, y = data()
    groups = "cp.async.commit_group; add.u32 %r9, %s16, 512;"
    late = "cp.async.ca.shared.global [%r9], [%d1], 16; cp.async.commit_group; cp.async.wait_group 1;"
    run(COPY + groups + late + BACK + "cp.async.wait_all;", smem=2048, x=x, y=y)
    assert (x == y).all()
    fails(Hazard, COPY + groups + late + "\nld.shared.b32 %r1, [%r9]; // HERE\n", "cp.async", smem=2048, x=x, y=y)
    y[:] = 0
    run(COPY + "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;" + BACK, x=x, y=y)
    assert (x == y).all()


def test_bytes_beyond_the_source_size_are_zero():
    x, y = data()
    body = """mad.wide.u32 %d1, %tid, 16, %x; and.b32 %r20, %tid, 15; setp.lt.u32 %p1, %tid, 31;
    selp.b32 %r20, %r20, 0, %p1; selp.b64 %d1, %d1, 0, %p1;
    cp.async.ca.shared.global.L2::128B [%s16], [%d1], 16, %r20; cp.async.wait_all;"""
    run(body + BACK, x=x, y=y)
    expected = x.view(np.uint8).reshape(32, 16).copy()
    for lane in range(32):
        expected[lane, 0 if lane == 31 else lane % 16 :] = 0
    assert (y.view(np.uint8).reshape(32, 16) == expected).all()


@pytest.mark.parametrize("noinc, count", [(".noinc", 32), ("", 1)])
def test_an_mbarrier_completes_after_the_copies_of_its_threads(noinc, count):
    x, y = data()
    bar = f"""setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+512], {count}; bar.sync 0;{COPY}
    cp.async.mbarrier.arrive{noinc}.shared.b64 [%s+512];"""
    if not noinc:
        bar += "@%p1 mbarrier.arrive.shared.b64 %d9, [%s+512];"
    wait = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%s+512], 0; @!%p2 bra W;"
    run(bar + wait + BACK, x=x, y=y)
    assert (x == y).all()
    fails(Hazard, bar + "\nld.shared.b32 %r1, [%s16]; // HERE\n" + wait, "cp.async", x=x, y=y)


def test_too_few_arrivals_deadlock():
    x, y = data()
    bar = f"""setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+512], 33; bar.sync 0;{COPY}
    cp.async.mbarrier.arrive.noinc.shared.b64 [%s+512];
    W: mbarrier.try_wait.parity.shared.b64 %p2, [%s+512], 0; @!%p2 bra W;"""
    fails(Deadlock, bar, "1 of 33 arrivals", x=x, y=y)


def test_bounds_alignment_and_sizes():
    x, y = data()
    fails(Hazard, "\ncp.async.ca.shared.global [%s], [%x+4096], 16; // HERE\n", "out of bounds", x=x)
    fails(Hazard, "\ncp.async.ca.shared.global [%s], [%x+4], 8; // HERE\n", "misaligned", x=x)
    fails(Hazard, "\ncp.async.ca.shared.global [%s+2], [%x], 4; // HERE\n", "misaligned", x=x)
    fails(Hazard, "\ncp.async.cg.shared.global [%s], [%x], 8; // HERE\n", "16 only", x=x)
    fails(Hazard, "\ncp.async.ca.shared.global [%s], [%x], 8, 9; // HERE\n", "src-size 9", x=x)


BULK = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+512], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %d9, [%s+512], 512;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%x], 512, [%s+512];"""
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%s+512], 0; @!%p2 bra W;"


def test_a_bulk_load_and_a_bulk_store():
    x, y = data()
    store = """bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 512;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    run(BULK + WAIT + store, x=x, y=y)
    assert (x == y).all()
    fails(Hazard, BULK + "\nld.shared.b32 %r1, [%s16]; // HERE\n" + WAIT, "TMA", x=x, y=y)


def test_a_bulk_store_needs_a_proxy_fence_and_a_wait():
    x, y = data()
    stores = "st.shared.v4.b32 [%s16], {%tid, %tid, %tid, %tid}; bar.sync 0; setp.eq.u32 %p1, %tid, 0;"
    copy = "\n@%p1 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 512; // HERE\n"
    fails(Hazard, stores + copy, "fence.proxy.async", x=x, y=y)
    done = "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
    run(stores + "fence.proxy.async;" + copy + done, x=x, y=y)
    assert (y == np.arange(32)[:, None]).all()
    fails(Hazard, stores + "fence.proxy.async;" + copy, "exits with a bulk store", x=x, y=y)


def test_bulk_copies_count_in_units_of_16_bytes():
    x, y = data()
    bad = BULK.replace("[%x], 512", "[%x], 504").replace("@%p1 cp.", "\n@%p1 cp.") + " // HERE\n"
    fails(Hazard, bad, "multiples of 16", x=x, y=y)


def test_hints_touch_nothing():
    x, y = data()
    run("prefetch.global.L2 [%x]; prefetchu.L1 [%x]; cp.async.bulk.prefetch.L2.global [%x], 512;", x=x, y=y)
    assert not y.any()
