"""States of a barrier program and its transitions: what a step, or the completion of asynchronous work, does."""

from __future__ import annotations

from typing import NamedTuple

from .barrier_program import BarrierProgram, Step

ROUND = 1 << 16  # State.arrived: threads at a named barrier, plus ROUND times those expected once somebody is there


class Fault(Exception):
    """A transition, or a state, that must not be: the text says why."""


class State(NamedTuple):
    """Everything that the future depends on.

    position: of each warp, twice its step, plus 1 while it stands in a barrier that it has arrived at.
    phase, pending, expected, tx: of each mbarrier (expected 0: not initialized); arrived, threads at each named
    barrier; generation: of named barriers; under_way: (warp, step) of asynchronous work, in issue order.
    """

    position: tuple[int, ...]
    phase: tuple[int, ...]
    pending: tuple[int, ...]
    expected: tuple[int, ...]
    tx: tuple[int, ...]
    arrived: tuple[int, ...]
    generation: tuple[int, ...]
    under_way: tuple[tuple[int, int], ...]


Move = tuple[int, int]  # (warp, -1): its next step; (warp, step): that asynchronous work completes


class Semantics:
    """Transitions of one program."""

    def __init__(self, program: BarrierProgram):
        self.program = program
        self.steps = program.steps
        self.ends = [2 * len(steps) for steps in program.steps]
        self.meetings = [self._meetings(steps) for steps in program.steps]

        counts: dict[int, set[int]] = {}
        for step in (step for steps in program.steps for step in steps if step.kind in ("sync", "join", "part")):
            counts.setdefault(step.barrier, set()).add(step.count)
        self.one_count = {barrier for barrier, found in counts.items() if len(found) == 1}  # named barriers
        feeders = [any(step.kind == "fifo" for step in steps) for steps in program.steps]
        mates = [[w for w, queue in enumerate(program.queues) if queue == mine] for mine in program.queues]
        self.feeds_alone = [
            sum(feeders[w] for w in here) == 1 for here in mates
        ]  # whether no other warp uses the queue

    @staticmethod
    def _meetings(steps: tuple[Step, ...]) -> list[int]:
        """For each step, how often the warp has arrived at the cluster barrier before."""
        counts, seen = [], 0
        for step in steps:
            counts.append(seen)
            seen += step.kind == "part"
        return counts

    def start(self) -> State:
        n, named = len(self.program.mbarriers), len(self.program.named)
        zeros, none = (0,) * n, (0,) * named
        return State((0,) * len(self.steps), zeros, zeros, zeros, zeros, none, none, ())

    def step_of(self, state: State, warp: int) -> Step | None:
        """The step that a warp stands at, None at its end."""
        at = state.position[warp] // 2
        return self.steps[warp][at] if at < len(self.steps[warp]) else None

    def moves(self, state: State) -> list[Move]:
        """Every transition that can happen now."""
        found: list[Move] = [(w, -1) for w in range(len(self.steps)) if self.ready(state, w)]
        queues = set()
        for warp, at in state.under_way:
            if self.steps[warp][at].kind == "fifo":
                if self.program.queues[warp] in queues:
                    continue
                queues.add(self.program.queues[warp])
            found.append((warp, at))
        return found

    def ready(self, state: State, warp: int) -> bool:
        """Whether a warp can take its next step. Raises Fault for a wait whose phase went by."""
        step = self.step_of(state, warp)
        if step is None or state.position[warp] % 2:
            return False
        if step.kind == "meet":
            return state.generation[step.barrier] >= self.meetings[warp][state.position[warp] // 2]
        if step.kind != "wait" or not state.expected[step.barrier]:
            return True
        phase = state.phase[step.barrier]
        if (phase & 1) != step.parity:
            return True
        if phase > step.phase + 1:
            raise Fault(
                f"{self.program.warps[warp]} waits at PTX line {step.line} for phase {step.phase} of "
                f"{self.program.mbarriers[step.barrier]}, which {phase} phases have passed: its parity {step.parity} "
                "came round again"
            )
        return False

    def check(self, state: State) -> None:
        """Raise Fault for a wait whose phase went by: also one that another order of steps hides."""
        for warp in range(len(self.steps)):
            self.ready(state, warp)

    def after(self, state: State, move: Move) -> State:
        """The state that a transition leads to. Raises Fault."""
        warp, at = move
        now = _Draft(self.program, state)
        if at >= 0:
            now.under_way.remove(move)
            step = self.steps[warp][at]
            who = f"the asynchronous work that {self.program.warps[warp]} issued at PTX line {step.line}"
            for barrier in (step.barrier, *step.more):
                now.signal(barrier, step.count, -step.nbytes, who)
            return now.freeze()
        step, index = self.step_of(state, warp), state.position[warp] // 2
        who = f"{self.program.warps[warp]} at PTX line {step.line}"
        now.position[warp] += 2
        if step.kind == "init":
            now.init(step.barrier, step.count, who)
        elif step.kind == "arrive":
            now.signal(step.barrier, step.count, step.nbytes, who)
        elif step.kind == "wait":
            now.require(step.barrier, who)
            if state.phase[step.barrier] != step.phase + 1:
                raise Fault(
                    f"{who} waits for phase {step.phase} of {self.program.mbarriers[step.barrier]} and goes on after "
                    f"{state.phase[step.barrier]} phases: parity {step.parity} is that of another phase"
                )
        elif step.kind in ("issue", "fifo"):
            for barrier in (step.barrier, *step.more):
                now.require(barrier, who)
            now.under_way.append((warp, index))
        elif step.kind in ("sync", "join", "part"):
            now.meet(self, warp, step, who)
        return now.freeze()

    def over(self, state: State) -> bool:
        return all(at >= end for at, end in zip(state.position, self.ends, strict=True))


class _Draft:
    """A state that is being changed."""

    def __init__(self, program: BarrierProgram, state: State):
        self.program = program
        self.position, self.phase, self.pending, self.expected = (list(x) for x in state[:4])
        self.tx, self.arrived, self.generation, self.under_way = (list(x) for x in state[4:])

    def freeze(self) -> State:
        lists = (self.position, self.phase, self.pending, self.expected, self.tx, self.arrived, self.generation)
        return State(*map(tuple, lists), tuple(self.under_way))

    def require(self, barrier: int, who: str) -> None:
        if not self.expected[barrier]:
            raise Fault(f"{who} uses {self.program.mbarriers[barrier]} before mbarrier.init")

    def init(self, barrier: int, count: int, who: str) -> None:
        if self.expected[barrier]:
            raise Fault(f"{who} initializes {self.program.mbarriers[barrier]}, which is live")
        self.expected[barrier] = self.pending[barrier] = count

    def signal(self, barrier: int, count: int, nbytes: int, who: str) -> None:
        """Arrivals and a change of the transaction count; the phase completes when both come to zero."""
        self.require(barrier, who)
        self.tx[barrier] += nbytes
        self.pending[barrier] -= count
        name = self.program.mbarriers[barrier]
        if self.pending[barrier] < 0:
            raise Fault(f"{who} arrives on {name} in phase {self.phase[barrier]}, of which no arrival is left")
        if self.tx[barrier] < 0:
            raise Fault(f"{who} brings {name} {-self.tx[barrier]} bytes more than phase {self.phase[barrier]} expects")
        if self.pending[barrier] == 0 and self.tx[barrier] == 0:
            self.phase[barrier] += 1
            self.pending[barrier] = self.expected[barrier]

    def meet(self, semantics: Semantics, warp: int, step: Step, who: str) -> None:
        """A warp arrives at a named barrier, and stands in it if it is `sync`; the last one lets all go on."""
        barrier, name = step.barrier, self.program.named[step.barrier]
        threads, expected = self.arrived[barrier] % ROUND, self.arrived[barrier] // ROUND or step.count
        if expected != step.count:
            raise Fault(f"{who} comes to {name} with {step.count} threads, others with {expected}")
        threads += 32
        if step.kind == "sync":
            self.position[warp] -= 1
        if threads > expected:
            raise Fault(f"{who} is one warp too many at {name}, which {expected} threads share")
        self.arrived[barrier] = threads + ROUND * expected
        if threads < expected:
            return
        self.arrived[barrier] = 0
        self.generation[barrier] += 1
        for other, at in enumerate(self.position):
            if at % 2 and semantics.steps[other][at // 2].barrier == barrier:
                self.position[other] = at + 1
