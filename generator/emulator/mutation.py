"""Runs every mutant of a launch and says what became of it.

    outcomes = run_mutants(case, judge=lambda: None)

Each mutant runs in the strict emulator, in a forked process with a time limit, on the inputs of the original.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .equivalent import Context, why_equivalent
from .errors import Deadlock, Hazard, LaunchError
from .formal import Formal
from .gpu import LaunchCase
from .interrupt import each
from .lanes import LanesApart
from .memory import WINDOW_BASE
from .mutants import Mutant, Mutator
from .parse import parse_ptx
from .recorder import Recorder
from .snapshot import Snapshot

RESULTS = ("reported", "warned", "wrong numbers", "deadlocked", "equivalent", "not run", "missed")
TIME_LIMIT = 60.0  # seconds a mutant


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: one of RESULTS, and the message or the reason. "warned": what silicon tolerates is
    missing, see `formal`. "not run": the launch does not reach the
    mutated instruction, so it says nothing about it.
    """

    kernel: str
    kind: str
    line: int
    opcode: str
    change: str
    result: str
    message: str
    seconds: float


class _TimeIsUp(BaseException):
    pass


def mutator_of(case: LaunchCase, recorder: Recorder) -> Mutator:
    """The mutants of a case, with its mbarriers known from one run of the original and from its labels."""
    places: dict[int, set[int]] = {}
    for events in recorder.events.values():
        for event in events:
            places.setdefault(event.line, set()).update(offset for _, offset in event.places)
    names: dict[str, list[int]] = {}
    for first, count, name in case.labels.shared:
        if count == 8 and name.endswith("]"):
            names.setdefault(name.split("[")[0], []).append(first)
    rings = [tuple(sorted(offsets)) for offsets in names.values()]
    frozen = {line: frozenset(offsets) for line, offsets in places.items()}
    return Mutator(case.text, case.kernel, frozen, rings, WINDOW_BASE)


def run_mutants(
    case: LaunchCase,
    judge: Callable[[], str | None] | None = None,
    jobs: int = 2,
    limit: float = TIME_LIMIT,
    select: Callable[[Mutant], bool] = lambda mutant: True,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Every selected mutant of a launch, in the order of the text. Global memory is left as it was found.

    Args:
        judge: what is wrong with the outputs in global memory after a mutant ran, or None. Default: any byte of global
            memory that differs from what the original left, as nothing but the synchronization differs.
        jobs: processes. limit: seconds a mutant. done: called with each outcome as it comes.
    Raises:
        EmulatorError: the original does not pass.
    """
    before = Snapshot(case.gpu.gmem)
    recorder = Recorder()
    kernel = parse_ptx(case.text).kernels[case.kernel]
    case.run(program=recorder.program(kernel))
    after = Snapshot(case.gpu.gmem)
    before.restore()
    formal = _warnings(case, case.text)
    before.restore()
    mutator = mutator_of(case, recorder)
    mutants = [mutant for mutant in mutator.mutants() if select(mutant)]
    judge = judge or (lambda: _difference(after))
    cluster, threads = math.prod(case.cluster), math.prod(case.block)

    def lanes_apart(mutant: Mutant) -> None:
        before.restore()
        case.run(program=LanesApart().program(parse_ptx(mutant.text).kernels[case.kernel]))

    def watch(text: str) -> Recorder:
        before.restore()
        watching = Recorder(clocks=True)
        case.run(program=watching.program(parse_ptx(text).kernels[case.kernel]))
        return watching

    original = functools.cache(lambda: watch(case.text))

    def watched(mutant: Mutant | None) -> Recorder:
        return original() if mutant is None else watch(mutant.text)

    context = Context(kernel, recorder, tuple(mutator.rings), cluster, -(-threads // 32), lanes_apart, watched)

    def outcome_of(index: int) -> Outcome:
        outcome = _outcome(case, mutants[index], context, before, judge, limit)
        if outcome.result != "missed":
            return outcome
        before.restore()
        warnings = [text for key, text in _warnings(case, mutants[index].text).items() if key not in formal]
        return replace(outcome, result="warned", message=warnings[0]) if warnings else outcome

    found: dict[int, Outcome] = {}
    with _shared_with_children(outcome_of):
        for index, outcome in each(jobs, "fork", _run_one, ((index,) for index in range(len(mutants)))):
            found[index] = outcome
            done(outcome)
    return [found[index] for index in sorted(found)]


_work: list[Callable[[int], Outcome]] = []  # what forked children run: closures cannot be sent to them


@contextmanager
def _shared_with_children(work: Callable[[int], Outcome]) -> Iterator[None]:
    _work.append(work)
    try:
        yield
    finally:
        _work.pop()


def _run_one(index: int) -> Outcome:
    return _work[-1](index)


def _outcome(case, mutant: Mutant, context: Context, before: Snapshot, judge, limit: float) -> Outcome:
    start = time.perf_counter()
    if mutant.line not in context.recorder.lines:
        return Outcome(case.kernel, mutant.kind, mutant.line, mutant.opcode, mutant.change, "not run", "", 0.0)
    before.restore()
    try:
        with _time_limit(limit):
            case.run(text=mutant.text)
        why = judge()
        result, message = ("missed", "") if why is None else ("wrong numbers", why)
    except Deadlock as error:
        result, message = "deadlocked", str(error)
    except (Hazard, LaunchError) as error:
        result, message = "reported", str(error)
    except _TimeIsUp:
        result, message = "deadlocked", f"did not end within {limit:g} s"
    if result == "missed":
        reason = why_equivalent(mutant, context)
        result, message = ("missed", "") if reason is None else ("equivalent", reason)
    seconds = time.perf_counter() - start
    return Outcome(case.kernel, mutant.kind, mutant.line, mutant.opcode, mutant.change, result, message, seconds)


def _warnings(case: LaunchCase, text: str) -> dict[tuple[int, str], str]:
    checker = Formal()
    case.run(program=checker.program(parse_ptx(text).kernels[case.kernel]))
    return checker.warnings


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _difference(after: Snapshot) -> str | None:
    found = after.difference()
    if found is None:
        return None
    name, at, then, now = found
    return f"{name} at byte {at}: {now.tobytes().hex()} (hexadecimal), {then.tobytes().hex()} in the original"
