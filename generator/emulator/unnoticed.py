"""What nobody can notice, by the events of one run: the proofs behind `equivalent` that look at every warp of a launch.

Each function takes the Context of the original (see `equivalent`) and a Mutant, and answers whether the mutant cannot
be told from the original in this launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .flow import defs_and_uses, registers
from .recorder import Event, Place
from .syntax import Vector

if TYPE_CHECKING:
    from .equivalent import Context
    from .mutants import Mutant

Warp = tuple[int, int]  # CTA, warp
SIGNALS = ("arrive", "commit", "copy", "expect")  # kinds of events that may end a phase
# What no other warp, and no asynchronous work, can notice.
SILENT = ("mbarrier.try_wait", "mbarrier.test_wait", "bar.warp.sync", "elect.sync", "ld.param", "ret", "exit")
BULK_STORES = ("cp.async.bulk.global.shared::cta", *(f"cp.async.bulk.tensor.{n}d.global" for n in range(1, 6)))


def _of(context: Context, place: Place) -> list[tuple[Warp, Event]]:
    """Every event on an mbarrier."""
    return [(who, e) for who, events in context.recorder.events.items() for e in events if place in e.places]


def all_known(context: Context) -> bool:
    """Every operation on mbarriers is recorded with its mbarrier."""
    return not any(e.kind == "unknown" for events in context.recorder.events.values() for e in events)


def before_the_first(context: Context, line: int) -> bool:
    """Every wait at a line is for the phase before the first, in every interleaving: it never blocks."""
    events = [event for _, event in context.events(line)]
    waits = bool(events) and all(e.kind == "wait" and e.phase < 0 for e in events)
    return waits and all_known(context) and context.proven(lambda event: event)


def unused(context: Context, mutant: Mutant) -> bool:
    """Nothing but mbarrier.init, with a legal count, ever happens to the mbarriers of the instruction."""
    if mutant.kind.endswith("- 1") and any(event.count < 2 for _, event in context.events(mutant.line)):
        return False
    places = {place for _, event in context.events(mutant.line) for place in event.places}
    kinds = {e.kind for place in places for _, e in _of(context, place)}
    return kinds == {"init"} and all_known(context)


def phases_unwaited(context: Context, mutant: Mutant) -> bool:
    """Waits for the mbarriers of the instruction are at most for the phase before the first, and with one arrival more
    to a phase every interleaving of the barriers ends, each wait in its phase.
    """
    places = {place for _, event in context.events(mutant.line) for place in event.places}
    if not places or not all_known(context) or any(context.last_waited(place) >= 0 for place in places):
        return False

    return context.proven(lambda e: e._replace(count=e.count + 1) if e.line == mutant.line else e)


def moved_unwaited(context: Context, mutant: Mutant) -> bool:
    """An arrival, here and at the neighbour, ends at most phases that nobody waits for: without it, and with it at the
    neighbour, every interleaving ends, each wait in its phase.
    """
    free = all(
        context.last_waited(place) < 0 or knows_the_last(context, who, event, place)
        for who, event in context.events(mutant.line)
        for place in ((cta, context.neighbour(at)) for cta, at in event.places)
    )
    return free and beyond(context, mutant.line) and context.moved_is_proven(mutant.line)


def knows_the_last(context: Context, who: Warp, event: Event, place: Place) -> bool:
    """At an arrival its warp knows that the last phase of an mbarrier (of its own CTA) that anybody waits for is
    complete: what happened before holds in every interleaving.
    """
    cta, offset = place
    return cta == who[0] and dict(event.knows).get(offset, 0) > context.last_waited(place)


def beyond(context: Context, line: int) -> bool:
    """Every arrival at a line counts for a phase later than the last that anybody waits for: where somebody does wait,
    its warp knows that the last phase waited for is complete, or only its warp arrives there, and has filled the phases
    waited for before.
    """
    found = False
    for who, event in context.events(line):
        for place in event.places:
            if knows_the_last(context, who, event, place):
                found = True
                continue
            mine = context.recorder.events[who]
            at = next(i for i, e in enumerate(mine) if e is event)
            inits = [e.count for _, e in _of(context, place) if e.kind == "init"]
            others = {w for w, e in _of(context, place) if e.kind in SIGNALS} - {who}
            earlier = sum(e.count for e in mine[:at] if e.kind in ("arrive", "commit") and place in e.places)
            last = context.last_waited(place)
            mixed = len({e.kind for _, e in _of(context, place) if e.kind in ("arrive", "commit")}) > 1
            if len(inits) != 1 or (last >= 0 and (others or mixed or earlier < inits[0] * (last + 1))):
                return False
            found = True
    return found and all_known(context) and context.proven(lambda event: event)


def removed_beyond(context: Context, mutant: Mutant) -> bool:
    """Without arrivals for phases that nobody waits for, every interleaving ends, each wait in its phase."""
    return beyond(context, mutant.line) and context.proven(lambda e: None if e.line == mutant.line else e)


def expected_beyond(context: Context, mutant: Mutant) -> bool:
    """The bytes are expected in a phase that nobody waits for and no copy comes in: with the change every interleaving
    ends, each wait in its phase.
    """
    change = {"+ 16": 16, "- 16": -16}.get(mutant.kind[-4:])

    def changed(event: Event) -> Event:
        if event.line != mutant.line:
            return event
        return event._replace(nbytes=0 if change is None else event.nbytes + change)

    return beyond(context, mutant.line) and context.proven(changed)


def ends_silently(context: Context, mutant: Mutant) -> bool:
    """Since the instruction no warp that ran it does anything that others could notice, until it exits; and what it
    waited for is over before the CTA ends without it.
    """
    if context.cluster != 1 or not all_known(context):
        return False
    ran = {who for who, _ in context.events(mutant.line)}
    for who in ran:
        log = context.recorder.log[who]
        first = next(i for i, instr in enumerate(log) if instr.line == mutant.line)
        for instr in log[first + 1 :]:
            if not instr.opcode.startswith(SILENT) and instr.line != mutant.line and not _idle(context, instr):
                return False
    return bool(ran) and all(is_over(context, who, event) for who, event in context.events(mutant.line))


def _idle(context: Context, instr) -> bool:
    """An arrival for a phase that nobody waits for."""
    return instr.opcode.startswith("mbarrier.arrive") and beyond(context, instr.line)


def is_over(context: Context, who: Warp, event: Event) -> bool:
    """What a wait at a warp's end waited for comes from warps, or from tensor-core work before a commit that another
    warp waits for.
    """
    for place in event.places:
        for other, signal in _of(context, place):
            if signal.kind in ("copy", "expect") or (signal.kind == "arrive" and signal.nbytes):
                return False
            if signal.kind == "commit" and not _commit_known(context, who, other, signal):
                return False
    return True


def _commit_known(context: Context, who: Warp, committer: Warp, commit: Event) -> bool:
    """This commit, a later one of its warp, or one before it with no tensor-core work between is waited for."""
    mine = context.recorder.events[committer]
    at = next(i for i, e in enumerate(mine) if e is commit)
    log = context.recorder.log[committer]
    end = max(i for i, instr in enumerate(log) if instr.line == commit.line)
    work = max(
        (i for i, instr in enumerate(log[:end]) if instr.opcode.startswith(("tcgen05.mma", "tcgen05.cp"))), default=0
    )
    same = {instr.line for instr in log[work:end] if instr.opcode.startswith("tcgen05.commit")}
    if any(e.line == commit.line for e in mine[at + 1 :]):
        same = set()
    last = {e.line: e for e in mine[:at] if e.line in same}
    for later in [*mine[at:], *last.values()]:
        for place in later.places if later.kind == "commit" else ():
            events = _of(context, place)
            inits = [e.count for _, e in events if e.kind == "init"]
            signals = [e for _, e in events if e.kind in SIGNALS]
            waited = max((e.phase for w, e in events if e.kind == "wait" and w != who), default=-1)
            if inits == [1] and {e.kind for e in signals} == {"commit"} and waited == len(signals) - 1:
                return True
    return False


def fenced_already(context: Context, mutant: Mutant) -> bool:
    """The wgmma.fence before it orders the same: on the only way from there no instruction touches a register of D or
    A of a wgmma.mma_async that can follow before the next wgmma.fence.
    """
    instrs, labels, here = context.kernel.instrs, context.kernel.labels, context.index(mutant)
    before = next((i for i in reversed(range(here)) if instrs[i].opcode.startswith("wgmma.fence")), None)
    if before is None or any(i.opcode.startswith("brx") for i in instrs):
        return False
    for at, instr in enumerate(instrs):
        if instr.opcode.startswith("bra"):
            inside, into = before < at < here, before < labels[instr.operands[0].name] <= here
            if inside != into:
                return False
    between = instrs[before + 1 : here]
    if any(instr.opcode.startswith(("ret", "exit", "call")) for instr in between):
        return False
    touched = {reg.index for instr in between for regs in defs_and_uses(instr) for reg in regs}
    return not touched & _matrix_registers(context, here)


def _matrix_registers(context: Context, fence: int) -> set[int]:
    """Registers of D and A of every wgmma.mma_async that can follow a wgmma.fence before the next one."""
    instrs, labels = context.kernel.instrs, context.kernel.labels
    found, seen, paths = set(), set(), [fence + 1]
    while paths:
        at = paths.pop()
        if at in seen or at >= len(instrs) or instrs[at].opcode.startswith("wgmma.fence"):
            continue
        seen.add(at)
        instr = instrs[at]
        if instr.opcode.startswith("wgmma.mma_async"):
            d, a = instr.operands[:2]
            found |= {
                reg.index for operand in ((d, a) if isinstance(a, Vector) else (d,)) for reg in registers(operand)
            }
        if instr.opcode.startswith("bra"):
            paths.append(labels[instr.operands[0].name])
        if instr.guard is not None or not instr.opcode.startswith(("bra", "ret", "exit")):
            paths.append(at + 1)
    return found


def waits_again(context: Context, mutant: Mutant) -> bool:
    """From the instruction to the warp's next cp.async.bulk.wait_group of no group, of the same kind, it only issues
    further copies, commits and waits for them, waits for mbarriers and arrives where nobody waits.
    """
    ran = False
    for who in context.recorder.log:
        log = context.recorder.log[who]
        for at, instr in enumerate(log):
            if instr.line == mutant.line:
                ran = True
                if not _until_all(context, log[at + 1 :], mutant.kind.startswith("cp.async.bulk.commit_group")):
                    return False
    return ran


def _until_all(context: Context, rest: list, commit: bool) -> bool:
    committed = not commit
    for instr in rest:
        if instr.opcode.startswith("cp.async.bulk.wait_group"):
            if int(instr.operands[0].value) == 0:
                return committed
        elif instr.opcode == "cp.async.bulk.commit_group":
            committed = True
        elif not instr.opcode.startswith((*SILENT, *BULK_STORES)) and not _idle(context, instr):
            return False
    return False
