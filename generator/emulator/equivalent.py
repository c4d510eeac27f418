"""Mutants that cannot be told from the original: a reviewed list by kind and context, each entry with its proof.

An entry looks at the program around the mutated instruction and at what a run of the original did there, never at line
numbers, so that it holds for kernels that nobody has seen yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import ordered, unnoticed
from .barrier_program import number_barriers, split
from .explore import explore
from .flow import MOVES, defs_and_uses
from .labels import Labels
from .mutants import Mutant
from .recorder import Event, Place, Recorder
from .syntax import Instr, Kernel

# What tells other warps, or the asynchronous proxy, that something before it is done.
SIGNALS = ("mbarrier.arrive", "bar", "tcgen05.commit", "tcgen05.mma", "tcgen05.st", "tcgen05.dealloc", "cp.async.bulk")
STORES = ("st.", "stmatrix", "red.", "atom.", "cp.async.c")


@dataclass(frozen=True)
class Context:
    """The original kernel, and what its warps did in one run: CTAs of `n_warps` warps, in clusters of `cluster`. rings:
    arrays of mbarriers, by offset. lanes_apart: runs a mutant as `lanes` has it; watched: what a run of a mutant, or of
    the original, does and knows (see `known`); None where nothing can be run.
    """

    kernel: Kernel
    recorder: Recorder
    rings: tuple[tuple[int, ...], ...] = ()
    cluster: int = 1
    n_warps: int = 1
    lanes_apart: Callable[[Mutant], None] | None = None
    watched: Callable[[Mutant | None], Recorder] | None = None

    def index(self, mutant: Mutant) -> int:
        return next(
            i
            for i, instr in enumerate(self.kernel.instrs)
            if instr.line == mutant.line and instr.opcode == mutant.opcode
        )

    def events(self, line: int) -> Iterator[tuple[tuple[int, int], Event]]:
        """((CTA, warp), event) of every event at a PTX line."""
        for who, events in self.recorder.events.items():
            yield from ((who, event) for event in events if event.line == line)

    def last_waited(self, place: Place) -> int:
        """The last phase of an mbarrier that some warp waits for; -1 for none."""
        waits = (e for es in self.recorder.events.values() for e in es if e.kind == "wait" and place in e.places)
        return max((event.phase for event in waits), default=-1)

    def moved_is_proven(self, line: int) -> bool:
        """With the mbarriers of the instruction at `line` replaced by their neighbours, every interleaving of the
        barrier program still ends, and every wait passes in the phase that it passed in here.
        """

        def moved(event: Event) -> Event:
            if event.line != line:
                return event
            return event._replace(places=tuple((cta, self.neighbour(offset)) for cta, offset in event.places))

        return self.proven(moved)

    def proven(self, change: Callable[[Event], Event | None]) -> bool:
        """With every event put through `change` (None: left out), every interleaving of the barrier program ends, and
        every wait passes in the phase that it passed in here.
        """
        events = {
            who: [new for event in mine if (new := change(event)) is not None]
            for who, mine in self.recorder.events.items()
        }
        return self.all_end(events)

    def all_end(self, events: dict[tuple[int, int], list[Event]]) -> bool:
        """Every interleaving of the barrier program of these events ends, every wait in the phase it says."""
        parts = split(number_barriers(events, Labels(), self.cluster, self.n_warps))
        return all(found.fault is None and found.complete for found in map(explore, parts))

    def neighbour(self, offset: int) -> int:
        """The mbarrier that follows in its ring."""
        ring = next(ring for ring in self.rings if offset in ring)
        return ring[(ring.index(offset) + 1) % len(ring)]

    def guarded_by(self, index: int) -> list[Instr]:
        """Instructions that the branch after instruction `index` jumps over."""
        for at in range(index + 1, min(index + 6, len(self.kernel.instrs))):
            instr = self.kernel.instrs[at]
            if instr.opcode.startswith("bra") and instr.guard is not None:
                end = self.kernel.labels[instr.operands[0].name]
                return self.kernel.instrs[at + 1 : end]
        return []


def _passes_at_once(context: Context, mutant: Mutant) -> bool:
    """A wait for the phase before the first, every time."""
    return unnoticed.before_the_first(context, mutant.line)


def _after_such_a_wait(context: Context, mutant: Mutant) -> bool:
    """The wait before the fence, a few instructions up, is such a one."""
    instrs, index = context.kernel.instrs, context.index(mutant)
    for instr in reversed(instrs[max(index - 6, 0) : index]):
        if instr.opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
            return unnoticed.before_the_first(context, instr.line)
    return False


def _passes_at_once_at_the_neighbour(context: Context, mutant: Mutant) -> bool:
    return _passes_at_once(context, mutant) and context.moved_is_proven(mutant.line)


def _not_waited_for_at_the_neighbour(context: Context, mutant: Mutant) -> bool:
    """The last commit of its warp, which alone commits to either mbarrier."""
    if not _never_waited_for(context, mutant):
        return False
    for who, event in context.events(mutant.line):
        for cta, offset in event.places:
            there = (cta, context.neighbour(offset))
            for other, events in context.recorder.events.items():
                signals = [e for e in events if e.kind in ("arrive", "commit", "copy", "expect") and there in e.places]
                at = next(i for i, e in enumerate(context.recorder.events[who]) if e is event)
                if signals and (other != who or any(e is late for e in signals for late in events[at:])):
                    return False
    return context.moved_is_proven(mutant.line)


def _never_waited_for(context: Context, mutant: Mutant) -> bool:
    """Every arrival of the instruction completes a phase later than the last that anybody waits for."""
    found = False
    for who, event in context.events(mutant.line):
        for place in event.places:
            arrivals = [
                (other, e)
                for other, events in context.recorder.events.items()
                for e in events
                if e.kind in ("arrive", "commit") and place in e.places
            ]
            inits = [
                e.count for es in context.recorder.events.values() for e in es if e.kind == "init" and place in e.places
            ]
            if len(inits) != 1 or {other for other, _ in arrivals} != {who}:
                return False
            number = next(i for i, (_, e) in enumerate(arrivals) if e is event)
            if number // inits[0] <= context.last_waited(place):
                return False
            found = True
    return found


def _registers_used(context: Context, mutant: Mutant) -> bool:
    """Every register of the tcgen05.ld before the wait is used by an instruction before the next signal."""
    instrs, start = context.kernel.instrs, context.index(mutant)
    loaded: set[int] = set()
    while start and not instrs[start - 1].opcode.startswith(("tcgen05.wait::ld", "bra", "ret", *SIGNALS)):
        start -= 1
        if instrs[start].opcode.startswith("tcgen05.ld"):
            loaded |= {reg.index for reg in defs_and_uses(instrs[start])[0]}
    if not loaded:
        return False
    return _used_on_every_way(context, start, frozenset(loaded))


def _used_on_every_way(context: Context, start: int, loaded: frozenset[int]) -> bool:
    """Whether whatever way a warp takes from there on, each of these registers, or one that a move has put it into, is
    an operand of some instruction before the warp signals anybody or ends.
    """
    instrs = context.kernel.instrs
    ways, seen = [(start, loaded, {})], set()  # copies: register → loaded registers that moves have put into it
    while ways:
        at, left, copies = ways.pop()
        while left:
            if (at, left) in seen:
                break  # it has come to where another way went on from
            seen.add((at, left))
            instr, at = instrs[at], at + 1
            if instr.opcode.startswith("bra"):
                target = context.kernel.labels[instr.operands[0].name]
                if instr.guard is not None:
                    ways.append((target, left, dict(copies)))
                else:
                    at = target
                continue
            defs, uses = defs_and_uses(instr)
            held = {origin for reg in uses for origin in copies.get(reg.index, {reg.index} & left)}
            if instr.opcode in MOVES:
                copies |= {reg.index: held for reg in defs}
            else:
                left -= held
            signals = instr.opcode.startswith((*SIGNALS, "ret", "exit")) and not instr.opcode.startswith("bar.warp")
            if left and (signals or at == len(instrs)):
                return False
    return True


def _lanes_in_step(context: Context, mutant: Mutant) -> bool:
    """Since the last bar.warp.sync no lane stored to memory, tensor-core work was waited for, elect.sync follows."""
    instrs, index = context.kernel.instrs, context.index(mutant)
    if not instrs[index + 1].opcode.startswith("elect.sync"):
        return False
    waited = False
    for instr in reversed(instrs[:index]):
        if instr.opcode.startswith(STORES):
            return False
        waited = waited or instr.opcode.startswith(("tcgen05.wait::", "wgmma.wait_group"))
        if instr.opcode.startswith(("bar.warp", "bar.sync", "barrier.sync")):
            break
    return waited


def _repeats_a_store(context: Context, mutant: Mutant) -> bool:
    """The elected lane only issues bulk stores from shared memory and commits them."""
    instrs = [
        i
        for i in context.guarded_by(context.index(mutant))
        if i.opcode.startswith((*SIGNALS, "st.", "cp.", "mbarrier"))
    ]
    stores = [i for i in instrs if ".global.shared::cta" in i.opcode and ".reduce" not in i.opcode]
    return bool(stores) and all(i in stores or i.opcode == "cp.async.bulk.commit_group" for i in instrs)


@dataclass(frozen=True)
class Equivalence:
    """Kinds of mutants, the context in which they change nothing, and why they do not."""

    kinds: tuple[str, ...]
    holds: Callable[[Context, Mutant], bool]
    reason: str


EQUIVALENT: tuple[Equivalence, ...] = (
    Equivalence(
        ("mbarrier wait removed",),
        _passes_at_once,
        "the wait is for the phase before the first (parity 1 on a fresh mbarrier), which counts as complete, in every "
        "interleaving of the barrier program: it never blocks and orders nothing",
    ),
    Equivalence(
        ("tcgen05.commit removed", "mbarrier.arrive removed"),
        _never_waited_for,
        "the phase that this arrival completes is later than the last that any warp waits for, and nothing else "
        "arrives on the mbarrier: nobody can see the difference",
    ),
    Equivalence(
        ("tcgen05.fence::after_thread_sync removed",),
        _after_such_a_wait,
        "the wait before it is for the phase before the first (parity 1 on a fresh mbarrier): nobody's work "
        "comes before it that the fence could order",
    ),
    Equivalence(
        ("mbarrier wait: stage index off by one",),
        _passes_at_once_at_the_neighbour,
        "both the mbarrier and its neighbour are in the phase before the first whenever the wait runs, which passes at "
        "once: shown by exploring every interleaving of the barrier program with the neighbour in its place",
    ),
    Equivalence(
        ("tcgen05.commit: stage index off by one",),
        _not_waited_for_at_the_neighbour,
        "it is the last signal on either mbarrier, and completes a phase that nobody waits for: shown by exploring "
        "every interleaving of the barrier program with the neighbour in its place",
    ),
    Equivalence(
        ("tcgen05.wait::ld removed",),
        _registers_used,
        "every register of the loads is, on every way, an operand before the warp signals anybody: the true "
        "dependency waits for the loads (ISA 9.7.16.6.4.5)",
    ),
    Equivalence(
        ("bar.warp.sync removed",),
        _lanes_in_step,
        "since the warp's last barrier no lane stored to memory; the tcgen05.wait or wgmma.wait_group before is "
        "warp-wide (.sync.aligned), and elect.sync, which follows, lets no lane go on before all have come: no other "
        "lane has left anything for the elected one to signal",
    ),
    Equivalence(
        ("elect.sync: every lane",),
        _repeats_a_store,
        "the lane only copies shared memory to global memory: 32 lanes write the same bytes to the same place, each "
        "commits and waits for its own copy",
    ),
    Equivalence(
        ("mbarrier.init removed", "mbarrier.init: count + 1", "mbarrier.init: count - 1"),
        unnoticed.unused,
        "the launch does nothing else to the mbarrier",
    ),
    Equivalence(
        ("mbarrier.init: count + 1",),
        unnoticed.phases_unwaited,
        "nobody waits for a phase of the mbarrier other than the one before the first: shown by exploring every "
        "interleaving of the barrier program with the other count",
    ),
    Equivalence(
        ("mbarrier.arrive removed", "mbarrier.arrive.expect_tx removed"),
        unnoticed.removed_beyond,
        "the arrival counts for a phase later than the last that any warp waits for: shown by exploring every "
        "interleaving of the barrier program without it",
    ),
    Equivalence(
        tuple(f"mbarrier.arrive.expect_tx: {what}" for what in ("bytes + 16", "bytes - 16", "only arrives")),
        unnoticed.expected_beyond,
        "the bytes are expected in a phase later than the last that any warp waits for: shown by exploring every "
        "interleaving of the barrier program with the other number",
    ),
    Equivalence(
        ("mbarrier.arrive: stage index off by one",),
        unnoticed.moved_unwaited,
        "neither there nor at the neighbour anybody waits for the phase that the arrival counts for: shown by "
        "exploring every interleaving of the barrier program with the neighbour in its place",
    ),
    Equivalence(
        ("mbarrier wait removed",),
        unnoticed.ends_silently,
        "after the wait the warp does nothing that anybody could notice before it exits (it waits, or arrives for a "
        "phase that nobody waits for), its CTA is a cluster of its own, and what it waited for comes from warps, or "
        "from tensor-core work that another warp waits for",
    ),
    Equivalence(
        ("bar.sync removed", "bar.sync: only arrives", "bar.sync: another barrier", "mbarrier wait removed"),
        ordered.anyway,
        "without it every two accesses to shared or tensor memory are ordered still (the vector clocks of the mutant's "
        "run judge every order of its instructions), no two warps of a CTA touch the same global memory, one of them "
        "writing, and exploring every interleaving of the changed barrier program shows that all end, each wait in its "
        "phase",
    ),
    Equivalence(
        ("mbarrier wait: stage index off by one", "bar.sync: another barrier"),
        ordered.knows_no_less,
        "every warp does the same in the same order, and at each of its waits, barriers and signals knows (by the "
        "vector clocks of the mutant's run) all that it knew in the original; exploring every interleaving of the "
        "changed barrier program shows that all end, each wait in its phase: what was ordered is ordered still",
    ),
    Equivalence(
        ("bar.warp.sync removed",),
        ordered.handed_on_otherwise,
        "elect.sync, which follows, lets no lane go on before all have come; what the lanes did to shared memory since "
        "the warp's barrier before is handed on by signals that every lane gives itself, and no lane touches there "
        "what another one did: with clocks by which one lane's signal hands on nothing that other lanes did, every two "
        "accesses to shared or tensor memory are ordered still",
    ),
    Equivalence(
        ("wgmma.fence removed",),
        unnoticed.fenced_already,
        "on the only way from the fence before it no instruction touches a register of the wgmma.mma_async that "
        "follow: that fence orders the same accesses",
    ),
    Equivalence(
        tuple(
            f"cp.async.bulk.{what}"
            for what in (
                "commit_group removed",
                *(f"wait_group{read}{how}" for read in ("", ".read") for how in (" removed", ": one group more left")),
            )
        ),
        unnoticed.waits_again,
        "before anything that others could notice (an arrival that somebody waits for, another access to memory) the "
        "warp commits and waits until no group is left",
    ),
)


def why_equivalent(mutant: Mutant, context: Context) -> str | None:
    """The reason why a mutant is equivalent to the original, None if it is not known to be."""
    for entry in EQUIVALENT:
        if mutant.kind in entry.kinds and entry.holds(context, mutant):
            return entry.reason
    return None
