"""What is ordered without it: proofs behind `equivalent` by the clocks of a mutant's run, for barriers that are spare.

A mutant whose run raised no hazard is free of races in every order of the instructions that ran: the clocks know
nothing of when things happened. What they do not see must be shown beside: that the barriers themselves work out in
every interleaving, that warps do not talk through global memory, and what lanes of one warp hand to each other.
Each function takes the Context of the original (see `equivalent`) and a Mutant that ran clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EmulatorError
from .known import knows_as_much
from .lanes import WARP_BARRIERS
from .recorder import Event, Recorder
from .syntax import Instr
from .unnoticed import Warp, all_known, is_over

if TYPE_CHECKING:
    from .equivalent import Context
    from .mutants import Mutant

# What the lanes of a warp may do between two of its barriers, for `handed_on_otherwise`.
FOLLOWED = (
    *("ld.shared.", "st.shared.", "ld.param", "tcgen05.", "elect.sync", "mbarrier.arrive", "setmaxnreg", "ret", "exit"),
    *("mbarrier.try_wait", "mbarrier.test_wait", "bar.arrive", "barrier.arrive", "shfl.sync", "vote.sync"),
    "wgmma.",  # warp-wide (.sync.aligned), and so is the wait for what it reads asynchronously
)
AFTER = (*FOLLOWED, "cp.async.bulk.")  # an asynchronous copy of one lane sees nothing that other lanes did


def anyway(context: Context, mutant: Mutant) -> bool:
    """A named barrier or a wait that is weakened or gone: nothing but the order of the barriers themselves changes."""
    if context.cluster != 1 or not all_known(context) or context.recorder.touches.conflict():
        return False
    events = list(context.events(mutant.line))
    kind = "wait" if mutant.kind.startswith("mbarrier") else "sync"
    if not events or any(event.kind != kind for _, event in events):
        return False
    if kind == "wait" and not all(is_over(context, who, event) for who, event in events):
        return False

    def changed(event: Event) -> Event | None:
        if event.line != mutant.line:
            return event
        if mutant.kind.endswith("only arrives"):
            return event._replace(kind="join")
        return event._replace(barrier=event.barrier ^ 8) if mutant.kind.endswith("another barrier") else None

    return context.proven(changed)


def knows_no_less(context: Context, mutant: Mutant) -> bool:
    """Every warp does the same in the same order, and at each of its events knows, by the clocks of the mutant's run,
    all that it knew in the original; the changed barrier program goes well in every interleaving, each wait in its
    phase. So what was ordered is ordered: each run of the mutant, however it is scheduled, is one of the original too.
    """
    if context.watched is None or not all_known(context):
        return False
    try:
        original, changed = context.watched(None), context.watched(mutant)
    except EmulatorError:
        return False
    warps = {*original.log, *changed.log}
    known = [(changed.knowledge(who), original.knowledge(who)) for who in warps]
    return (
        all(before for _, before in known)  # there is none without hazard checks
        and all(knows_as_much(*both, _unseen(changed)) for both in known)
        and all(_same_work(original, changed, who, mutant.line) for who in warps)
        and context.all_end(changed.events)
    )


def _unseen(run: Recorder) -> set[int]:
    """Slots of the mbarriers for which nobody waits and with which no bulk copy brings anything: that a phase of theirs
    is complete, nobody needs to know. (What the arriving warps did is known by these warps' own components.) Slots are
    numbered as mbarriers are initialized, in CTAs alike, by one warp; none where several do it.
    """
    used, orders = set(), set()
    for events in run.events.values():
        used |= {offset for event in events if event.kind in ("wait", "copy") for _, offset in event.places}
        orders.add(
            tuple(dict.fromkeys(offset for event in events if event.kind == "init" for _, offset in event.places))
        )
    orders.discard(())
    return {slot for slot, offset in enumerate(*orders) if offset not in used} if len(orders) == 1 else set()


def _same_work(one: Recorder, other: Recorder, who: Warp, line: int) -> bool:
    """Whether a warp runs the same instructions with the same effects on barriers in two runs, but for which barrier
    the instruction at `line` names. How often it polls does not count.
    """

    def blurred(event: Event) -> Event:
        place = {"places": (), "phase": 0, "barrier": -1} if event.line == line else {}
        return event._replace(knows=(), **place)

    def without_polls(log: list[Instr]) -> list[int]:
        return [i.line for i, after in zip(log, [*log[1:], None], strict=True) if after is None or _moves_on(i, after)]

    return without_polls(one.log[who]) == without_polls(other.log[who]) and [*map(blurred, one.events[who])] == [
        *map(blurred, other.events[who])
    ]


def _moves_on(instr: Instr, after: Instr) -> bool:
    return instr.line != after.line or not instr.opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait"))


def handed_on_otherwise(context: Context, mutant: Mutant) -> bool:
    """A bar.warp.sync before elect.sync, where lanes wait for one another as well: no lane learnt of anything alone
    since the warp's last barrier, no two lanes touch the same shared memory before it and after it, and nobody else
    needs to know what other lanes did from one of them.
    """
    found = False
    if not context.kernel.instrs[context.index(mutant) + 1].opcode.startswith("elect.sync"):
        return False
    for who, log in context.recorder.log.items():
        for at, instr in enumerate(log):
            if instr.line == mutant.line:
                found = True
                if not _lanes_keep_apart(context, who, at):
                    return False
    if not found or context.lanes_apart is None:
        return False
    try:
        context.lanes_apart(mutant)
    except EmulatorError:
        return False
    return True


def _lanes_keep_apart(context: Context, who: Warp, at: int) -> bool:
    log, whole = context.recorder.log[who], context.recorder.whole[who]

    def is_barrier(i: int) -> bool:
        return whole[i] and log[i].opcode.startswith(WARP_BARRIERS)

    start = next((i for i in reversed(range(at)) if is_barrier(i)), None)
    if start is None:
        return False
    end = next((i for i in range(at + 1, len(log)) if is_barrier(i)), len(log))
    before, after = range(start + 1, at), range(at + 1, end)
    learnt = any("wait" in log[i].opcode and not whole[i] for i in before)
    if learnt or not all(log[i].opcode.startswith(FOLLOWED) for i in before):
        return False
    if not all(log[i].opcode.startswith(AFTER) for i in after):
        return False
    shared = context.recorder.touches.shared[who]
    ours, theirs = ([shared[i] for i in span if i in shared] for span in (before, after))
    return not any(_lanes_meet(one, other) for one in ours for other in theirs)


def _lanes_meet(one: tuple[np.ndarray, int, bool], other: tuple[np.ndarray, int, bool]) -> bool:
    """Whether two lanes touch the same bytes, one of them writing: (offset of each lane or -1, bytes, written) each."""
    (a, a_bytes, a_written), (b, b_bytes, b_written) = one, other
    meet = (a[:, None] < b[None] + b_bytes) & (b[None] < a[:, None] + a_bytes) & (a[:, None] >= 0) & (b[None] >= 0)
    np.fill_diagonal(meet, False)
    return bool(meet.any()) and (a_written or b_written)
