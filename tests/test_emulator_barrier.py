"""emulator/ops/barrier: mbarrier phases and counts, named barriers, and the report of a deadlock."""

import numpy as np
import pytest
from ptx_kernels import fails, ptx, run

from generator.emulator import Deadlock, Hazard

LEADER = "setp.eq.u32 %p1, %tid, 0;"
INIT = LEADER + "@%p1 mbarrier.init.shared.b64 [%s], {count}; bar.sync 0;"


def wait(parity, address="[%s]", label="W") -> str:
    """A spin loop as the compiler writes it."""
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p9, {address}, {parity}, 10000000; @!%p9 bra {label};"


def probes(body: str, count: int, block=32) -> list[int]:
    """`body` leaves bits in %r1; what thread 0 saw."""
    y = np.zeros(block, np.uint32)
    run(f"mov.u32 %r1, 0; {INIT.format(count=count)} {body} st.global.b32 [%y_g], %r1;", block=block, y=y)
    assert (y == y[0]).all()
    return [int(b) for b in f"{y[0]:b}"[1:]] if y[0] else []


def probe(parity: int) -> str:
    return (
        f"mbarrier.test_wait.parity.shared::cta.b64 %p8, [%s], {parity}; selp.u32 %r9, 1, 0, %p8; max.u32 %r1, %r1, 1;"
        "mad.lo.u32 %r1, %r1, 2, %r9; bar.sync 0;"
    )


ARRIVE = "@%p1 mbarrier.arrive.shared.b64 %d9, [%s]; bar.sync 0;"


# -- phases ------------------------------------------------------------------------------------------------------------
def test_a_fresh_barrier_has_completed_the_phase_before():
    """(current phase & 1) != parity: parity 1 passes at once, which is how producers start."""
    assert probes(probe(0) + probe(1), 1) == [0, 1]


def test_parity_over_three_phases():
    both = probe(0) + probe(1)
    assert probes(both + ARRIVE + both + ARRIVE + both + ARRIVE + both, 1) == [0, 1, 1, 0, 0, 1, 1, 0]


def test_a_phase_needs_all_its_arrivals():
    assert probes(ARRIVE + ARRIVE + probe(0) + ARRIVE + probe(0), 3) == [0, 1]


def test_every_lane_arrives_for_itself():
    assert probes("mbarrier.arrive.shared.b64 %d9, [%s];" + probe(0), 64, block=64) == [1]
    assert probes("setp.lt.u32 %p2, %tid, 5; @%p2 mbarrier.arrive.shared.b64 %d9, [%s]; bar.sync 0;" + probe(0), 5) == [
        1
    ]


def test_an_arrival_may_count_several():
    assert probes("@%p1 mbarrier.arrive.shared.b64 _, [%s], 3; bar.sync 0;" + probe(0), 4) == [0]
    assert probes("@%p1 mbarrier.arrive.shared.b64 _, [%s], 4; bar.sync 0;" + probe(0), 4) == [1]


def test_pending_bytes_keep_the_phase_open():
    body = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s], 64; bar.sync 0;" + probe(0)
    assert probes(body, 1) == [0]
    assert probes(
        "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%s], 16; bar.sync 0;" + ARRIVE + probe(0), 1
    ) == [0]


def test_waiting_warps_wake_in_order():
    """Warp 1 works between two waits of warp 0: a ping-pong over two mbarriers for ten rounds."""
    y = np.zeros(64, np.uint32)
    run(
        f"""{LEADER} @%p1 mbarrier.init.shared.b64 [%s], 32; @%p1 mbarrier.init.shared.b64 [%s+8], 32;
        @%p1 st.shared.b32 [%s+16], %tid; bar.sync 0; mov.u32 %r1, 0; mov.u32 %r2, 0; setp.ge.u32 %p2, %tid, 32;
        @%p2 bra PONG;
        PING: and.b32 %r3, %r2, 1; ld.shared.b32 %r1, [%s+16]; bar.warp.sync -1; add.u32 %r1, %r1, 1;
        st.shared.b32 [%s+16], %r1;
        mbarrier.arrive.shared.b64 _, [%s]; {wait("%r3", "[%s+8]", "W0")}
        add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 10; @%p3 bra PING; bra END;
        PONG: and.b32 %r3, %r2, 1; {wait("%r3", "[%s]", "W1")} ld.shared.b32 %r1, [%s+16]; bar.warp.sync -1;
        mul.lo.u32 %r1, %r1, 2; st.shared.b32 [%s+16], %r1; mbarrier.arrive.shared.b64 _, [%s+8];
        add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 10; @%p3 bra PONG;
        END: bar.sync 0; ld.shared.b32 %r1, [%s+16]; st.global.b32 [%y_g], %r1;""",
        block=64,
        y=y,
    )
    value = 0
    for _ in range(10):
        value = (value + 1) * 2
    assert (y == value).all()


def test_ctas_have_barriers_of_their_own():
    """CTA c arrives c times; each sees only its own count."""
    y = np.zeros(4 * 32, np.uint32)
    loop = "mov.u32 %r2, 0; LOOP: setp.ge.u32 %p2, %r2, %cta; @%p2 bra DONE; @%p1 mbarrier.arrive.shared.b64 _, [%s];"
    run(
        f"""{INIT.format(count=2)} {loop} add.u32 %r2, %r2, 1; bra LOOP; DONE: bar.sync 0;
        mbarrier.test_wait.parity.shared.b64 %p3, [%s], 0; selp.u32 %r1, 1, 0, %p3; st.global.b32 [%y_g], %r1;""",
        grid=4,
        y=y,
    )
    assert y.reshape(4, 32).all(axis=1).tolist() == [False, False, True, True]


def test_one_elected_lane_waits_while_the_others_go_on():
    """A load or MMA warp as the compiler writes it: one lane spins, the rest wait for it at the join."""
    y = np.zeros(64, np.uint32)
    run(
        f"""{INIT.format(count=1)} setp.ge.u32 %p2, %tid, 32; @%p2 bra PRODUCE; elect.sync _|%p3, -1; @!%p3 bra JOIN;
        {wait(0)} ld.shared.b32 %r1, [%s+16]; add.u32 %r1, %r1, 1; st.shared.b32 [%s+20], %r1;
        JOIN: bar.warp.sync -1; ld.shared.b32 %r2, [%s+20]; st.global.b32 [%y_g], %r2; bra END;
        PRODUCE: setp.eq.u32 %p4, %tid, 32; mov.u32 %r3, 41; @%p4 st.shared.b32 [%s+16], %r3;
        @%p4 mbarrier.arrive.shared.b64 _, [%s]; END: bar.sync 0;""",
        block=64,
        y=y,
    )
    assert (y[:32] == 42).all() and (y[32:] == 0).all()


def test_a_probe_whose_result_is_used_later():
    y = np.zeros(32, np.uint32)
    run(
        f"""{INIT.format(count=1)} mbarrier.try_wait.parity.shared.b64 %p2, [%s], 0; selp.u32 %r1, 1, 0, %p2; @%p1
        mbarrier.arrive.shared.b64 _, [%s]; @%p2 bra DONE; {wait(0)} add.u32 %r1, %r1, 2;
        DONE: mbarrier.try_wait.parity.shared.b64 %p3, [%s], 0; @%p3 add.u32 %r1, %r1, 4; st.global.b32 [%y_g], %r1;""",
        y=y,
    )
    assert (y == 6).all()


def test_warps_wait_for_different_barriers_at_one_instruction():
    """Warp w waits for mbarrier w, which warp w - 1 completes after its own wait: a chain through one spin loop."""
    y = np.zeros(128, np.uint32)
    run(
        f"""shr.u32 %r1, %tid, 5; mad.lo.u32 %r2, %r1, 8, %s; and.b32 %r3, %tid, 31; setp.eq.u32 %p1, %r3, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 st.shared.b32 [%r2+64], %r1; bar.sync 0; setp.ne.u32 %p2, %r1, 0;
        @!%p2 bra GO; {wait(0, "[%r2]")} GO: ld.shared.b32 %r4, [%s+64]; bar.warp.sync -1; add.u32 %r4, %r4, 1;
        @%p1 st.shared.b32 [%s+64], %r4; setp.lt.u32 %p3, %r1, 3; and.pred %p4, %p1, %p3;
        @%p4 mbarrier.arrive.shared.b64 _, [%r2+8]; st.global.b32 [%y_g], %r4;""",
        block=128,
        y=y,
    )
    assert (y == np.arange(128) // 32 + 1).all()


# -- misuse ------------------------------------------------------------------------------------------------------------
def test_too_many_arrivals():
    body = INIT.format(count=3) + "\nmbarrier.arrive.shared.b64 _, [%s]; // HERE\n"
    fails(Hazard, body, "arrival overflow", "shared offset 0x0", "32 arrivals in phase 0, which expects 3")


def test_the_overflow_names_its_phase():
    body = INIT.format(count=1) + ARRIVE + ARRIVE + "\n@%p1 mbarrier.arrive.shared.b64 _, [%s], 2; // HERE\n"
    fails(Hazard, body, "2 arrivals in phase 2, which expects 1", "warp 0, lane 0")


@pytest.mark.parametrize(
    "use",
    ["mbarrier.arrive.shared.b64 _, [%s+8]", "mbarrier.arrive.expect_tx.shared.b64 _, [%s+8], 16",
     "mbarrier.inval.shared.b64 [%s+8]",
     "mbarrier.try_wait.parity.shared.b64 %p2, [%s+8], 0", "mbarrier.expect_tx.shared.b64 [%s+8], 16"],
)  # fmt: skip
def test_use_before_init(use):
    fails(Hazard, f"{INIT.format(count=1)}\n{use}; // HERE\n", "shared offset 0x8 before mbarrier.init")


def test_use_after_inval():
    body = (
        INIT.format(count=1)
        + "@%p1 mbarrier.inval.shared.b64 [%s];\n@%p1 mbarrier.arrive.shared.b64 _, [%s]; // HERE\n"
    )
    fails(Hazard, body, "before mbarrier.init (or after inval)")


def test_init_of_a_live_barrier():
    fails(Hazard, INIT.format(count=1) + "\n@%p1 mbarrier.init.shared.b64 [%s], 2; // HERE\n", "live mbarrier", "0x0")


def test_one_lane_inits_an_mbarrier():
    body = "mad.lo.u32 %r1, %tid, 8, %s; add.u32 %r2, %tid, 1; mbarrier.init.shared.b64 [%r1], %r2; bar.sync 0;"
    run(body + LEADER + "@%p1 mbarrier.arrive.shared.b64 _, [%s+80], 11;" + wait(0, "[%s+80]"))
    message = "32 lanes initialize the same mbarrier"
    fails(Hazard, "mbarrier.init.shared.b64 [%s], 32; // HERE\n", "elect one", block=64)
    fails(Hazard, "add.u32 %r1, %tid, 1;\nmbarrier.init.shared.b64 [%s], %r1; // HERE\n", message)


@pytest.mark.parametrize("count", [0, 1 << 20])
def test_init_counts(count):
    fails(
        Hazard,
        f"{LEADER}\n@%p1 mbarrier.init.shared.b64 [%s], {count}; // HERE\n",
        f"count {count}, outside 1 to 1048575",
    )


def test_transaction_count_limit():
    body = INIT.format(count=9) + "@%p1 mbarrier.expect_tx.shared.b64 [%s], 1048575;"
    fails(Hazard, body + "\n@%p1 mbarrier.expect_tx.shared.b64 [%s], 1; // HERE\n", "transaction count beyond")


def test_a_misaligned_barrier():
    fails(Hazard, LEADER + "\n@%p1 mbarrier.init.shared.b64 [%s+4], 1; // HERE\n", "misaligned")


# -- named barriers ----------------------------------------------------------------------------------------------------
def test_all_threads_meet_at_barrier_0():
    y = np.zeros(256, np.uint32)
    run(
        """st.shared.b32 [%s4], %tid; bar.sync 0; xor.b32 %r1, %tid, 255; mad.lo.u32 %r1, %r1, 4, %s;
        ld.shared.b32 %r2, [%r1]; st.global.b32 [%y_g], %r2;""",
        block=256,
        y=y,
    )
    assert (y == 255 - np.arange(256)).all()


PRODUCER = "setp.lt.u32 %p1, %tid, 64; @%p1 bra PRODUCE; {consume} bra END; PRODUCE: {produce} END:"


def test_producers_arrive_and_go_on_while_consumers_sync():
    y = np.zeros(96, np.uint32)
    produce = "st.shared.b32 [%s4], %tid; bar.arrive 3, 96;"
    consume = "bar.sync 3, 96; sub.u32 %r1, %s4, 256; ld.shared.b32 %r2, [%r1]; st.global.b32 [%y_g], %r2;"
    run(PRODUCER.format(consume=consume, produce=produce), block=96, y=y)
    assert (y[64:] == np.arange(32)).all() and (y[:64] == 0).all()


def test_a_barrier_number_in_a_register_pairs_warps():
    y = np.zeros(128, np.uint32)
    run(
        """shr.u32 %r1, %tid, 6; add.u32 %r1, %r1, 1; st.shared.b32 [%s4], %tid; barrier.cta.sync.aligned %r1, 64;
        xor.b32 %r2, %tid, 32; mad.lo.u32 %r2, %r2, 4, %s; ld.shared.b32 %r3, [%r2]; mad.lo.u32 %r3, %r1, 1000, %r3;
        st.global.b32 [%y_g], %r3;""",
        block=128,
        y=y,
    )
    threads = np.arange(128)
    assert (y == (threads // 64 + 1) * 1000 + (threads ^ 32)).all()


def test_a_barrier_is_reset_and_used_again():
    y = np.zeros(64, np.uint32)
    run(
        """st.shared.b32 [%s4], %tid; mov.u32 %r1, 0; xor.b32 %r2, %tid, 32; mad.lo.u32 %r2, %r2, 4, %s;
        LOOP: bar.sync 5, 64; ld.shared.b32 %r3, [%r2]; bar.sync 5, 64; add.u32 %r3, %r3, 1; st.shared.b32 [%s4], %r3;
        add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 7; @%p1 bra LOOP; st.global.b32 [%y_g], %r3;""",
        block=64,
        y=y,
    )
    assert (y == (np.arange(64) ^ 32) + 7).all()


@pytest.mark.parametrize("operands, words", [("16", "named barrier 16, outside 0 to 15"), ("1, 33",
    "positive multiple of 32"),
                                             ("1, 0", "positive multiple of 32")])  # fmt: skip
def test_illegal_numbers_and_counts(operands, words):
    fails(Hazard, f"\nbar.sync {operands}; // HERE\n", words)


def test_warps_that_disagree_about_the_count():
    body = "setp.lt.u32 %p1, %tid, 32; @%p1 bra A;\nbar.sync 1, 64; bra END; A:\nbar.sync 1, 96; // HERE\nEND:"
    fails(Hazard, body, "named barrier 1 is used with 96 threads while others use it with 64", "warp 0", block=64)


def test_more_threads_than_expected():
    fails(Hazard, "\nbar.sync 1, 32; // HERE\n", "64 threads arrived where 32 are expected", block=64)


# -- deadlocks ---------------------------------------------------------------------------------------------------------
def deadlock(body: str, *lines: str, **options) -> str:
    """The report holds every line, each with the PTX line of the wait that its `{}` marks."""
    text = ptx(body, **{k: v for k, v in options.items() if k not in ("block", "grid")})
    numbers = {n: i for i, line in enumerate(text.splitlines(), 1) for n in ("A", "B") if f"// {n}" in line}
    return fails(Deadlock, body, "no warp can run", *(line.format(**numbers) for line in lines), **options)


def test_the_report_says_who_waits_for_which_parity():
    body = INIT.format(count=2) + ARRIVE + "\n" + wait(0) + " // A\n"
    deadlock(body, "CTA (0, 0, 0):",
             "warps 0, 1: waiting at PTX line {A} for parity 0 of the mbarrier at shared offset 0x0",
             "phase 0, 1 of 2 arrivals and 0 bytes missing", block=64)  # fmt: skip


def test_the_report_counts_outstanding_bytes():
    body = INIT.format(count=1) + "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s], 4096;\n" + wait(0) + " // A\n"
    deadlock(body, "parity 0", "0 of 1 arrivals and 4096 bytes missing")


def test_the_report_tells_exited_waiting_and_barred_warps_apart():
    body = f"""{INIT.format(count=1)} setp.lt.u32 %p2, %tid, 32; @%p2 ret; setp.lt.u32 %p3, %tid, 64; @%p3 bra NAMED;
    {wait(0)} // A
    bra END; NAMED:
    bar.sync 7, 64; // B
    END:"""
    deadlock(body, "warp 0: exited", "warp 1: waiting at PTX line {B} for named barrier 7: 32 of 64 threads arrived",
             "warp 2: waiting at PTX line {A} for parity 0", block=96)  # fmt: skip


def test_ctas_that_stand_alike_are_reported_once():
    body = (
        INIT.format(count=1)
        + "setp.eq.u32 %p2, %cta, 2; and.pred %p3, %p1, %p2; @%p3 mbarrier.arrive.shared.b64 _, [%s];\n"
    )
    message = deadlock(body + wait(0) + " // A\n", "CTA (0, 0, 0):", "CTA (2, 0, 0):\n    warp 0: exited", grid=4)
    assert message.count("CTA (") == 2


def test_a_flipped_parity_deadlocks_one_phase_later():
    body = INIT.format(count=32) + "mbarrier.arrive.shared.b64 _, [%s];" + wait(0, label="V") + "\n" + wait(0) + "\n"
    run(body)  # the phase with parity 0 stays complete until the next one is
    body = INIT.format(count=32) + "mbarrier.arrive.shared.b64 _, [%s];" + wait(1) + " // A\n"
    deadlock(body, "waiting at PTX line {A} for parity 1", "phase 1, 32 of 32 arrivals")


def test_a_barrier_that_an_exited_warp_never_reaches():
    deadlock("setp.lt.u32 %p1, %tid, 32; @%p1 ret;\nbar.sync 0; // A\n", "warp 0: exited",
             "warp 1: waiting at PTX line {A} for named barrier 0: 32 of 64 threads arrived", block=64)  # fmt: skip
