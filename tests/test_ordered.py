"""emulator/ordered, lanes, touches: barriers that are spare are proven so, and their near relatives are not."""

import numpy as np
import pytest
from test_mutation import outcomes_of

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
