"""The barrier program of one launch: what each warp does to barriers, in order, with everything else left out.

`extract` runs the launch once and keeps, for every warp, its synchronization events; `explore` then looks at every
interleaving of them. Which events a warp goes through may depend on the data, not on the schedule: an mbarrier probe
(test_wait, try_wait) that fails and is followed by a loop counts as one wait. Tensor-core products have no event of
their own, their commits have: a commit completes when the commits before it have, in issue order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import UnsupportedInstruction
from .gpu import LaunchCase
from .labels import Labels
from .parse import parse_ptx
from .recorder import Event, Place, Recorder


class Step(NamedTuple):
    """One step of a warp; numbers instead of names.

    kind: init, arrive, wait, issue (asynchronous work that will signal), fifo (the same, in issue order), sync, join.
    barrier: index of the mbarrier or of the named barrier; more: further mbarriers of a multicast commit.
    count: arrivals, the initial count, or the threads that a named barrier expects; nbytes: bytes expected (arrive) or
    delivered (issue). parity, phase: of a wait.
    """

    kind: str
    line: int
    barrier: int
    more: tuple[int, ...] = ()
    count: int = 0
    nbytes: int = 0
    parity: int = 0
    phase: int = 0


@dataclass
class BarrierProgram:
    """Steps of each warp, and names for messages. `queues`: the tensor core that each warp's commits go to."""

    steps: list[tuple[Step, ...]]
    mbarriers: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    warps: list[str] = field(default_factory=list)
    queues: list[int] = field(default_factory=list)

    def __post_init__(self):
        count = len(self.steps)
        highest = max((max((s.barrier, *s.more)) for steps in self.steps for s in steps), default=-1) + 1
        self.mbarriers = self.mbarriers or [f"mbarrier {i}" for i in range(highest)]
        self.named = self.named or [f"named barrier {i}" for i in range(highest)]
        self.warps = self.warps or [f"warp {i}" for i in range(count)]
        self.queues = self.queues or list(range(count))

    def without(self, drop: Callable[[int, Step], bool]) -> BarrierProgram:
        """The same without the steps for which drop(warp, step) holds."""
        kept = [tuple(s for s in steps if not drop(w, s)) for w, steps in enumerate(self.steps)]
        return BarrierProgram(kept, self.mbarriers, self.named, self.warps, self.queues)

    def changed(self, change: Callable[[int, Step], Step]) -> BarrierProgram:
        """The same with every step put through change(warp, step)."""
        steps = [tuple(change(w, s) for s in steps) for w, steps in enumerate(self.steps)]
        return BarrierProgram(steps, self.mbarriers, self.named, self.warps, self.queues)


def extract(case: LaunchCase) -> BarrierProgram:
    """The barrier program of a launch. CTAs that share no barrier are alike or apart: see `split`.

    Raises whatever the launch raises, and UnsupportedInstruction for an operation on mbarriers that has no `Step`.
    """
    recorder = Recorder()
    case.run(program=recorder.program(parse_ptx(case.text).kernels[case.kernel]))
    unknown = sorted({e.line for events in recorder.events.values() for e in events if e.kind == "unknown"})
    if unknown:
        opcode = next(i.opcode for i in parse_ptx(case.text).kernels[case.kernel].instrs if i.line == unknown[0])
        raise UnsupportedInstruction(f"PTX line {unknown[0]}: {opcode} cannot be part of a barrier program yet")
    size = case.cluster[0] * case.cluster[1] * case.cluster[2]
    threads = case.block[0] * case.block[1] * case.block[2]
    return number_barriers(recorder.events, case.labels, size, -(-threads // 32))


def number_barriers(events: dict, labels: Labels, cluster: int, n_warps: int) -> BarrierProgram:
    """The barrier program of events by (CTA, warp), of clusters of CTAs of `n_warps` warps."""
    places: dict[Place, int] = {}
    named: dict[tuple[int, int], int] = {}
    steps, warps, queues = [], [], []
    for (cta, warp), of_warp in sorted(events.items()):
        here = []
        for event in of_warp:
            for place in event.places:
                places.setdefault(place, len(places))
            here.append(_step(event, cta, cluster, n_warps, places, named))
        steps.append(tuple(here))
        warps.append(f"warp {warp}" + (f" of CTA {cta}" if cta else ""))
        queues.append(cta)
    mbarriers = [f"{labels.shared_at(offset)}" + (f" of CTA {cta}" if cta else "") for cta, offset in places]
    names = [_named_name(cta, number, cluster) for cta, number in named]
    return BarrierProgram(steps, mbarriers, names, warps, queues)


def _named_name(cta: int, number: int, cluster: int) -> str:
    return "the cluster barrier" if number < 0 else f"named barrier {number}" + (f" of CTA {cta}" if cta else "")


def _step(event: Event, cta: int, cluster: int, n_warps: int, places: dict, named: dict) -> Step:
    if event.kind in ("sync", "join", "cluster_arrive", "cluster_wait"):
        whole = event.kind.startswith("cluster")
        key = (cta // cluster * cluster, -1) if whole else (cta, event.barrier)
        index = named.setdefault(key, len(named))
        count = 32 * n_warps * cluster if whole else event.count
        kind = {"cluster_arrive": "part", "cluster_wait": "meet"}.get(event.kind, event.kind)
        return Step(kind, event.line, index, count=count)
    first, *more = (places[place] for place in event.places)
    kind = {"copy": "issue", "commit": "fifo", "expect": "arrive"}.get(event.kind, event.kind)
    return Step(kind, event.line, first, tuple(more), event.count, event.nbytes, event.parity, event.phase)


def split(program: BarrierProgram) -> list[BarrierProgram]:
    """The program in parts that share no barrier (CTAs, or clusters of them); equal parts are kept once."""
    parent = list(range(len(program.steps)))

    def root(warp: int) -> int:
        while parent[warp] != warp:
            warp = parent[warp]
        return warp

    users: dict[tuple[str, int], int] = {}
    for warp, steps in enumerate(program.steps):
        for step in steps:
            space = "named" if step.kind in ("sync", "join", "part", "meet") else "mbarrier"
            for barrier in (step.barrier, *step.more):
                parent[root(warp)] = root(users.setdefault((space, barrier), warp))
        parent[root(warp)] = root(users.setdefault(("queue", program.queues[warp]), warp))
    parts: dict[int, list[int]] = {}
    for warp in range(len(program.steps)):
        parts.setdefault(root(warp), []).append(warp)
    unique: dict[tuple, BarrierProgram] = {}
    for warps in parts.values():
        part = _part(program, warps)
        unique.setdefault(tuple(part.steps), part)
    return list(unique.values())


def _part(program: BarrierProgram, warps: list[int]) -> BarrierProgram:
    """Some warps, their barriers numbered anew."""
    mbarriers: dict[int, int] = {}
    named: dict[int, int] = {}
    steps = []
    for warp in warps:
        here = []
        for step in program.steps[warp]:
            table = named if step.kind in ("sync", "join", "part", "meet") else mbarriers
            first, *more = (table.setdefault(b, len(table)) for b in (step.barrier, *step.more))
            here.append(step._replace(barrier=first, more=tuple(more)))
        steps.append(tuple(here))
    names = [
        [all_names[i] for i in table] for all_names, table in ((program.mbarriers, mbarriers), (program.named, named))
    ]
    queues: dict[int, int] = {}
    of = [queues.setdefault(program.queues[warp], len(queues)) for warp in warps]
    return BarrierProgram(steps, *names, [program.warps[warp] for warp in warps], of)
