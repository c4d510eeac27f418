"""Explores every interleaving of a barrier program, or proves that a part of them is enough.

    result = explore(program)      # result.fault is None: no deadlock, no aliased phase, no overflow, no underflow

Breadth first with state merging; identical warps are interchangeable, so their positions are kept sorted. Counters only
grow, so the graph has no cycle and every interleaving is finite.

Reduction. In a state, one transition t of an agent P (a warp, or asynchronous work under way) may be explored alone if
no transition that others can make while P stands still depends on t: then every interleaving from here reaches the
same states, or the same faults, as one that begins with t (a persistent set of one, Godefroid 1996; without cycles
nothing is ignored for ever). What the others can do while P stands still is bounded from above by `_Reach`: all of them
run as far as they get when every wait that its count of phases, or a wrong parity, allows is passed, asynchronous work
completes at once, and transaction counts hold nothing back. This only grows with progress, so the order in which it is
computed does not matter. Dependence on t:
  issue        none: it only adds work of its own (tensor-core work: if no other warp feeds the same queue)
  wait         whoever completes another phase of the same mbarrier: its count while P stands still must not pass the
               phase that is waited for
  arrive, and  the same mbarrier: no phase of it may complete without P, the arrivals of all must fit into the phase,
  completion   nobody may stand at a wait for a later phase (it would pass too early only before t), and if t expects
               or brings bytes: what is expected must cover all that is under way, and no other warp may bring bytes
               that it did not expect before. Then no order of the others lets the count fall short, or come to zero
               without t, and sums need no order: the CTAs of a pair, which fill a phase together, go one by one
  sync, join   the same named barrier must not complete without P, and all who come must fit into it
  init         nobody may touch the mbarrier
An order in which t comes later and somebody misses a phase that t completes is not lost: with t first the phase is
missed as well, by the same wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from .barrier_program import BarrierProgram, Step
from .barrier_state import ROUND, Fault, Move, Semantics, State

LIMIT = 2_000_000  # states


@dataclass(frozen=True)
class Exploration:
    """What was found. `fault`: why the program is wrong, with the schedule that shows it; None: it is right.
    `complete`: False when the limit of states was reached before.
    """

    states: int
    seconds: float
    fault: str | None
    schedule: tuple[str, ...]
    complete: bool = True

    def __str__(self) -> str:
        size = f"{self.states} states, {self.seconds:.2f} s"
        if self.fault is None:
            end = "no deadlock, no aliased phase, no overflow" if self.complete else "not explored to the end"
            return f"{end} ({size})"
        lines = [f"  {number:3}. {text}" for number, text in enumerate(self.schedule, 1)]
        return "\n".join([f"{self.fault} ({size}); the shortest schedule that was found:", *lines])


def explore(program: BarrierProgram, reduced: bool = True, symmetric: bool = True, limit: int = LIMIT) -> Exploration:
    """Look for a fault in any interleaving. With a fault found, all interleavings up to its depth are looked at for a
    shorter schedule, as far as `limit` states go.
    """
    found = _search(program, reduced, symmetric, limit)
    if found.fault is None or not reduced:
        return found
    shorter = _search(program, False, symmetric, max(20 * found.states, 20_000))
    if shorter.fault is None or len(shorter.schedule) >= len(found.schedule):
        return found
    return Exploration(found.states, found.seconds + shorter.seconds, shorter.fault, shorter.schedule)


def _search(program: BarrierProgram, reduced: bool, symmetric: bool, limit: int) -> Exploration:
    start = time.perf_counter()
    semantics = Semantics(program)
    twins = _twins(program) if symmetric else []
    first = semantics.start()
    came_from: dict[State, tuple[State, Move] | None] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        move = None
        try:
            moves = semantics.moves(state)
            if not moves and not semantics.over(state):
                raise Fault(_deadlock(semantics, state))
            for move in _enough(semantics, state, moves) if reduced else moves:
                after = _canonical(semantics, semantics.after(state, move), twins)
                if after not in came_from:
                    came_from[after] = state, move
                    waiting.append(after)
        except Fault as fault:
            path = _path(semantics, came_from, state)
            if move is not None:
                path.append(_describe(semantics, state, move))
            return Exploration(len(came_from), time.perf_counter() - start, str(fault), tuple(path))
        if len(came_from) > limit:
            return Exploration(len(came_from), time.perf_counter() - start, None, (), False)
    return Exploration(len(came_from), time.perf_counter() - start, None, ())


# --- symmetry ---------------------------------------------------------------------------------------------------------
def _twins(program: BarrierProgram) -> list[list[int]]:
    """Groups of warps with the same steps that issue nothing asynchronous."""
    groups: dict[tuple[Step, ...], list[int]] = {}
    for warp, steps in enumerate(program.steps):
        if not any(step.kind in ("issue", "fifo") for step in steps):
            groups.setdefault(steps, []).append(warp)
    return [warps for warps in groups.values() if len(warps) > 1]


def _canonical(semantics: Semantics, state: State, twins: list[list[int]]) -> State:
    """Of states that behave alike, one: twins by position, asynchronous work by warp, that of a queue in its order."""
    if len(state.under_way) > 1:
        in_order = [work for work in state.under_way if semantics.steps[work[0]][work[1]].kind == "fifo"]
        others = sorted(work for work in state.under_way if semantics.steps[work[0]][work[1]].kind != "fifo")
        state = state._replace(under_way=(*others, *in_order))
    if not twins:
        return state
    position = list(state.position)
    for warps in twins:
        for warp, at in zip(warps, sorted((position[w] for w in warps), reverse=True), strict=True):
            position[warp] = at
    return state._replace(position=tuple(position))


# --- reduction --------------------------------------------------------------------------------------------------------
def _enough(semantics: Semantics, state: State, moves: list[Move]) -> list[Move]:
    """One transition that may be explored alone, or all of them."""
    if len(moves) < 2:
        return moves
    for move in moves:
        step = _step(semantics, state, move)
        free = step.kind == "issue" or (step.kind == "fifo" and semantics.feeds_alone[move[0]])
        if move[1] < 0 and free and all(state.expected[b] for b in (step.barrier, *step.more)):
            return [move]
    for move in moves:
        if _alone(semantics, state, move):
            return [move]
    return moves


def _step(semantics: Semantics, state: State, move: Move) -> Step:
    warp, at = move
    return semantics.steps[warp][at] if at >= 0 else semantics.step_of(state, warp)


def _alone(semantics: Semantics, state: State, move: Move) -> bool:
    """Whether no transition that others can make while this one waits depends on it."""
    step = _step(semantics, state, move)
    if step.kind == "meet":
        return True
    if move[1] < 0 and step.kind == "fifo":
        return False
    reach = _Reach(semantics, state, move)
    if step.kind in ("sync", "join", "part"):
        here = step.barrier
        fits = state.arrived[here] % ROUND + 32 * (reach.coming[here] + 1) <= step.count
        return fits and not reach.rounds[here] and here in semantics.one_count
    if step.kind == "init":
        return step.barrier not in reach.touched
    if not all(state.expected[b] for b in (step.barrier, *step.more)):
        return False
    if step.kind == "wait":
        return reach.phase[step.barrier] <= step.phase + 1 == state.phase[step.barrier]
    return all(_signal_alone(state, reach, step, barrier, move) for barrier in (step.barrier, *step.more))


def _signal_alone(state: State, reach: _Reach, step: Step, barrier: int, move: Move) -> bool:
    if reach.phase[barrier] != state.phase[barrier] or barrier in reach.order_matters:
        return False
    if reach.arrivals[barrier] + step.count > state.pending[barrier]:
        return False
    if not step.nbytes:
        return True
    under_way = reach.under_way[barrier] + (step.nbytes if move[1] >= 0 else 0)
    return under_way <= state.tx[barrier] and barrier not in reach.short


class _Reach:
    """How far everybody else gets, at most, while the agent of `move` stands still."""

    def __init__(self, semantics: Semantics, state: State, move: Move):
        self.semantics, self.frozen = semantics, move
        n, named = len(state.phase), len(state.arrived)
        self.phase, self.pending, self.expected = list(state.phase), list(state.pending), list(state.expected)
        self.arrivals, self.under_way = [0] * n, [0] * n  # that others bring to each mbarrier; bytes on their way now
        self.arrived, self.rounds, self.coming = [n % ROUND for n in state.arrived], [0] * named, [0] * named
        self.generation = list(state.generation)
        self.position = list(state.position)
        self.touched: set[int] = set()
        self.balance: dict[tuple[int, int], int] = {}  # (warp, mbarrier) → bytes it expects from now on, less issued
        self.short: set[int] = set()  # mbarriers to which a warp may bring bytes that it did not expect before
        self.order_matters: set[int] = (
            set()
        )  # mbarriers where somebody waits for a phase to come, or only expects bytes
        self.before = state.phase
        for work in state.under_way:
            if work != move:
                step = semantics.steps[work[0]][work[1]]
                for barrier in (step.barrier, *step.more):
                    self.under_way[barrier] += step.nbytes
                self._complete(step)
        self._saturate()

    def _saturate(self) -> None:
        moved = True
        while moved:
            moved = False
            for warp in range(len(self.position)):
                if self.frozen != (warp, -1):
                    while self._advance(warp):
                        moved = True

    def _advance(self, warp: int) -> bool:
        steps, at = self.semantics.steps[warp], self.position[warp]
        if at % 2 or at // 2 >= len(steps):
            return False
        step = steps[at // 2]
        if step.kind in ("sync", "join", "part", "meet"):
            return self._named(warp, step, at)
        self.touched.update((step.barrier, *step.more))
        if step.kind == "wait":
            if step.phase > self.before[step.barrier]:
                self.order_matters.add(step.barrier)
            fits = (step.phase + 1) & 1 != step.parity
            if fits and self.phase[step.barrier] <= step.phase:
                return False
        elif step.kind == "init":
            if not self.expected[step.barrier]:
                self.expected[step.barrier] = self.pending[step.barrier] = step.count
        elif step.kind == "arrive":
            self._bytes(warp, step.barrier, step.nbytes)
            if not step.count:  # it may come before or after the last arrival
                self.order_matters.add(step.barrier)
            self._arrive(step.barrier, step.count)
        else:
            for barrier in (step.barrier, *step.more):
                self._bytes(warp, barrier, -step.nbytes)
            self._complete(step)
        self.position[warp] = at + 2
        return True

    def _bytes(self, warp: int, barrier: int, nbytes: int) -> None:
        """A warp expects bytes, or issues a copy that brings them (negative)."""
        balance = self.balance[warp, barrier] = self.balance.get((warp, barrier), 0) + nbytes
        if balance < 0:
            self.short.add(barrier)

    def _complete(self, step: Step) -> None:
        for barrier in (step.barrier, *step.more):
            self._arrive(barrier, step.count)

    def _arrive(self, barrier: int, count: int) -> None:
        self.arrivals[barrier] += count
        self.pending[barrier] -= count
        while self.pending[barrier] <= 0 and self.expected[barrier] and not self._held(barrier):
            self.phase[barrier] += 1
            self.pending[barrier] += self.expected[barrier]

    def _held(self, barrier: int) -> bool:
        """The frozen work holds the present phase of the mbarrier open."""
        warp, at = self.frozen
        if at < 0:
            return False
        step = self.semantics.steps[warp][at]
        return barrier in (step.barrier, *step.more) and step.nbytes > 0 and self.phase[barrier] == self.before[barrier]

    def _named(self, warp: int, step: Step, at: int) -> bool:
        here = step.barrier
        if step.kind == "meet":
            if self.generation[here] < self.semantics.meetings[warp][at // 2]:
                return False
            self.position[warp] = at + 2
            return True
        self.coming[here] += 1
        self.arrived[here] += 32
        self.position[warp] = at + (1 if step.kind == "sync" else 2)
        if self.arrived[here] >= step.count:
            self.arrived[here] -= step.count
            self.rounds[here] += 1
            self.generation[here] += 1
            for other, place in enumerate(self.position):
                stands = place % 2 and self.semantics.steps[other][place // 2].barrier == here
                if stands and self.frozen != (other, -1):
                    self.position[other] = place + 1
        return True


# --- messages ---------------------------------------------------------------------------------------------------------
def _path(semantics: Semantics, came_from: dict, state: State) -> list[str]:
    lines = []
    while (step := came_from[state]) is not None:
        state, move = step
        lines.append(_describe(semantics, state, move))
    return lines[::-1]


def _describe(semantics: Semantics, state: State, move: Move) -> str:
    program, (warp, at) = semantics.program, move
    step = _step(semantics, state, move)
    who = program.warps[warp]
    if step.kind in ("sync", "join", "part", "meet"):
        verb = {"join": "arrives at", "part": "arrives at", "meet": "passes"}.get(step.kind, "comes to")
        return f"{who}, PTX line {step.line}: {verb} {program.named[step.barrier]}"
    names = " and ".join(program.mbarriers[b] for b in (step.barrier, *step.more))
    if at >= 0:
        what = f"{step.nbytes} bytes land and signal" if step.nbytes else "tensor-core work completes and signals"
        return f"asynchronous work of {who}, PTX line {step.line}: {what} {names}"
    expected = f", expects {step.nbytes} bytes" if step.nbytes else ""
    verbs = {
        "init": f"initializes {names} with count {step.count}",
        "arrive": f"arrives on {names}{expected}",
        "wait": f"passes its wait for phase {step.phase} of {names}",
        "issue": f"issues a copy of {step.nbytes} bytes that will signal {names}",
        "fifo": f"commits work that will signal {names}",
    }
    return f"{who}, PTX line {step.line}: {verbs[step.kind]}"


def _deadlock(semantics: Semantics, state: State) -> str:
    return "deadlock: " + "; ".join(_blocked(semantics, state))


def _blocked(semantics: Semantics, state: State) -> Iterator[str]:
    program = semantics.program
    for warp, name in enumerate(program.warps):
        step = semantics.step_of(state, warp)
        if step is None:
            continue
        here = step.barrier
        if step.kind != "wait":
            yield f"{name} stands at PTX line {step.line} in {program.named[here]}"
            continue
        missing = f"{state.pending[here]} arrivals and {state.tx[here]} bytes missing"
        what = f"phase {step.phase} of {program.mbarriers[here]} (phase {state.phase[here]}: {missing})"
        yield f"{name} waits at PTX line {step.line} for {what}"
