"""emulator/ordered, lanes, touches: barriers that are spare are proven so, and their near relatives are not."""

import numpy as np
import pytest
from test_mutation import outcomes_of

from generator.emulator.clocks import Clocks
from generator.emulator.known import Known, knows_as_much
from generator.emulator.touches import meet, merged

# Two warps store to words of their own, meet, and load them again; then they leave what they loaded in y.
OWN_WORDS = """st.shared.b32 [%s4+64], %tid;
{barrier}
ld.shared.b32 %r5, [{place}+64]; {between}
st.global.b32 [%y_g], %r5;"""
SPARE = {"bar.sync removed", "bar.sync: only arrives", "bar.sync: another barrier"}
REVERSED = "sub.u32 %r1, 63, %tid; mad.lo.u32 %r2, %r1, 4, %s;"


def results(body: str, kinds: tuple[str, ...] = ("bar.sync", "bar.warp.sync")) -> dict[str, str]:
    y = np.zeros(64, np.uint32)
    found = outcomes_of(body, y, lambda mutant: mutant.kind.startswith(kinds))
    assert y.any(), "the original ran last"
    return {outcome.kind: outcome.result for outcome in found}


def test_a_barrier_between_accesses_of_one_warp_is_spare():
    found = results(OWN_WORDS.format(barrier="bar.sync 1, 64;", place="%s4", between=""))
    assert {kind for kind, result in found.items() if result == "equivalent"} == SPARE


def test_a_barrier_between_accesses_of_two_warps_is_not():
    found = results(REVERSED + OWN_WORDS.format(barrier="bar.sync 1, 64;", place="%r2", between=""))
    assert found["bar.sync removed"] == found["bar.sync: only arrives"] == "reported"
    assert found["bar.sync: another barrier"] == "equivalent", "all warps go to the other one"


def test_a_barrier_that_is_used_again():
    body = OWN_WORDS.format(barrier="bar.sync 1, 64;", place="%s4", between="bar.arrive 1, 64;")
    found = results(body, ("bar.sync",))
    assert found["bar.sync: only arrives"] == "reported"
    assert found["bar.sync removed"] == found["bar.sync: another barrier"] == "equivalent"


# Warp 0 gives two words, each with a signal of its own; warp 1 waits for the first and takes it, then the second.
TWO_SIGNALS = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 32;
@%p1 mbarrier.init.shared.b64 [%s+8], 32; bar.sync 0; mov.u32 %r1, 0; setp.ge.u32 %p2, %tid, 32;
{place} @%p2 bra TAKES;
GIVES: add.u32 %r2, %r1, 7; {store}; add.u32 %r9, %r9, 128; add.u64 %d1, %d1, 128;
mad.lo.u32 %r4, %r1, 8, %s; mbarrier.arrive.shared.b64 _, [%r4];
W2: mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 0; @!%p3 bra W2;
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 2; @%p4 bra GIVES; bra END;
TAKES:
W0: mbarrier.try_wait.parity.shared.b64 %p3, [%s], 0; @!%p3 bra W0; {first};
W1: mbarrier.try_wait.parity.shared.b64 %p3, [%s+8], 0; @!%p3 bra W1; {second}; add.u32 %r5, %r2, %r3;
st.global.b32 [%y_g], %r5; END:"""
IN_SHARED = {
    "place": "and.b32 %r9, %tid, 31; mad.lo.u32 %r9, %r9, 4, %s; mov.u64 %d1, 0;",
    "store": "st.shared.b32 [%r9+64], %r2",
    "first": "ld.shared.b32 %r2, [%r9+64]",
    "second": "ld.shared.b32 %r3, [%r9+192]",
}
IN_GLOBAL = {  # where no clock sees them
    "place": "and.b32 %r9, %tid, 31; mad.wide.u32 %d1, %r9, 4, %y;",
    "store": "st.global.b32 [%d1], %r2",
    "first": "ld.global.b32 %r2, [%d1]",
    "second": "ld.global.b32 %r3, [%d1+128]",
}
MOVED = "mbarrier wait: stage index off by one"


@pytest.mark.parametrize("words, too_early", [(IN_SHARED, {"reported"}), (IN_GLOBAL, {"missed", "wrong numbers"})])
def test_a_wait_for_a_later_signal_of_the_same_warp(words, too_early):
    """Whoever waits for the second signal knows the first; whoever waits for the first knows nothing of the second."""
    y = np.zeros(96, np.uint32)
    _, late, early = outcomes_of(TWO_SIGNALS.format(**words), y, lambda mutant: mutant.kind == MOVED)
    assert late.line < early.line and (y[32:64] == 15).all() | (y[:32] == 7).all()
    assert late.result == "equivalent" and "knows (by the vector clocks" in late.message
    assert early.result in too_early


@pytest.mark.parametrize("words, too_early", [(IN_SHARED, {"reported"}), (IN_GLOBAL, {"missed", "wrong numbers"})])
def test_a_signal_that_nobody_waits_for_any_more(words, too_early):
    """Moved, the wait for the first signal leaves that mbarrier to itself: its phases are nobody's to know."""
    own = "W2: mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 0; @!%p3 bra W2;"
    body = TWO_SIGNALS.format(**words)
    assert own in body
    y = np.zeros(96, np.uint32)
    late, early = outcomes_of(body.replace(own, ""), y, lambda mutant: mutant.kind == MOVED)
    assert late.line < early.line and late.result == "equivalent" and early.result in too_early


def test_a_wait_for_an_earlier_signal_of_the_same_warp():
    """The signals in the other order, and what the later one stands for taken first: moved, that wait is too early."""
    swapped = {**IN_GLOBAL, "first": IN_GLOBAL["second"], "second": IN_GLOBAL["first"]}
    turn, index = "xor.b32 %r1, %r1, 1;", "mad.lo.u32 %r4, %r1, 8, %s;"
    body = TWO_SIGNALS.format(**swapped).replace(index, f"{turn} {index} {turn}")
    _, early, late = outcomes_of(body, np.zeros(96, np.uint32), lambda mutant: mutant.kind == MOVED)
    assert early.result in ("missed", "wrong numbers") and late.result == "equivalent"


def test_a_cluster_that_meets_at_another_barrier():
    body = REVERSED + OWN_WORDS.format(barrier="bar.sync 1, 64;", place="%r2", between="")
    found = {o.kind: o for o in outcomes_of(body, np.zeros(128, np.uint32), lambda m: "bar" in m.kind, cluster=2)}
    assert found["bar.sync: another barrier"].result == "equivalent"
    assert "knows (by the vector clocks" in found["bar.sync: another barrier"].message
    assert found["bar.sync removed"].result == found["bar.sync: only arrives"].result == "reported"


def known(kinds, *rows, line=7):
    clocks = Clocks(2, 2, 1)
    for kind in kinds:
        clocks.component(*kind)
    clock = np.ones((2, clocks.capacity), np.int64)
    clock[:, : len(rows)] = rows
    return Known(line, clock, clocks)


def test_clocks_of_two_runs_are_compared_by_what_their_components_are():
    mma, bar = ("mma", 4), ("mbarrier", 0)
    one, other = known([mma, bar], 5, 6, 7, 8), known([bar, mma], 5, 6, 8, 7)
    assert knows_as_much([one], [other]) and knows_as_much([other], [one])
    more = known([bar, mma], 5, 6, 9, 7)
    assert knows_as_much([more], [one]) and not knows_as_much([one], [more])
    assert not knows_as_much([known([mma], 5, 6, 7)], [one]), "it knows nothing of the mbarrier"
    assert knows_as_much([one], [known([mma], 5, 6, 7)])
    assert not knows_as_much([one], [one._replace(line=8)]) and not knows_as_much([one], [one, one])


TALK = """mad.wide.u32 %d1, %tid, 4, %y; setp.lt.u32 %p1, %tid, 32; mov.u32 %r5, 3;
@%p1 st.global.b32 [%d1], %r5;
bar.sync 1, 64;
@%p1 bra END; {load} st.global.b32 [%d1], %r5; END:"""


@pytest.mark.parametrize("load, spare", [("", True), ("ld.global.b32 %r5, [%d1{}];".format("+-128"), False)])
def test_warps_that_talk_through_global_memory(load, spare):
    """Warp 1 reads what warp 0 stored to global memory before the barrier; no clock sees it."""
    found = results(TALK.format(load=load))
    assert (found["bar.sync removed"] == "equivalent") == spare


def test_stretches_of_bytes():
    one = merged([(4, 8), (8, 12), (20, 24), (4, 6)])
    assert [x.tolist() for x in one] == [[4, 20], [12, 24]]
    assert meet(one, merged([(11, 30)])) and meet(merged([(23, 24)]), one)
    assert not meet(one, merged([(0, 4), (12, 20), (24, 25)])) and not meet(one, merged([(12, 13)]))


# Lanes of warp 0 store, every lane hands its word on by bar.arrive, and one of them signals an mbarrier for all.
HANDS_ON = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+8], 1; bar.sync 0;
and.b32 %r9, %tid, 31; mad.lo.u32 %r9, %r9, 4, %s; setp.ge.u32 %p2, %tid, 32; @%p2 bra TAKES;
st.shared.b32 [%s4+64], %tid; mov.u32 %r5, 1; bar.arrive 1, 64;
bar.warp.sync -1;
elect.sync _|%p3, -1; @%p3 mbarrier.arrive.shared.b64 _, [%s+8];
{then} bra END;
TAKES: {takes} END: bar.sync 0; st.global.b32 [%y_g], %r5;"""
MEETS, WAITS = "bar.sync 1, 64; ", "W: mbarrier.try_wait.parity.shared.b64 %p4, [%s+8], 0; @!%p4 bra W; "
LOADS = "ld.shared.b32 %r5, [%r9+64]; "
KIND = "bar.warp.sync removed"


@pytest.mark.parametrize("takes, then, result", [
    (MEETS + LOADS + WAITS, "", "equivalent"),
    (WAITS + LOADS + MEETS, "", "warned"),  # one lane's signal for what all did
    (MEETS + LOADS + WAITS, "ld.shared.b32 %r5, [%s4+64];", "equivalent"),  # each lane its own word
    (MEETS + LOADS + WAITS, "xor.b32 %r6, %tid, 1; mad.lo.u32 %r6, %r6, 4, %s; ld.shared.b32 %r5, [%r6+64];", "warned"),
])  # fmt: skip
def test_lanes_that_one_of_them_speaks_for(takes, then, result):
    body = HANDS_ON.format(takes=takes, then=then)
    assert results(body, ("bar.warp",)) == {KIND: result}
