"""Proves, launch by launch, that no interleaving of a kernel's barriers goes wrong; an observer of a Gpu.

gpu.observers.append(proof := Exhaustive())
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .barrier_program import extract, split
from .errors import Deadlock, EmulatorError
from .explore import explore
from .gpu import LaunchCase
from .snapshot import Snapshot


class Exhaustive:
    """Before each launch: extracts its barrier program by running it once, and explores every interleaving.

    `proofs` collects one line a launch. Raises Deadlock with the schedule that shows a fault, EmulatorError when the
    program has too many states; what the run itself raises comes first.
    """

    def __init__(self):
        self.proofs: list[str] = []

    @contextmanager
    def __call__(self, case: LaunchCase) -> Iterator[None]:
        before = Snapshot(case.gpu.gmem)
        parts = split(extract(case))
        before.restore()
        results = []
        for part in parts:
            found = explore(part)
            if found.fault is not None:
                raise Deadlock(f"some interleaving of the barriers of {case.kernel} goes wrong: {found}")
            if not found.complete:
                raise EmulatorError(f"the barriers of {case.kernel} have more than {found.states} states: launch fewer")
            results.append(found)
        states, seconds = sum(r.states for r in results), sum(r.seconds for r in results)
        self.proofs.append(
            f"{case.kernel}: every interleaving of its barriers ends, no phase is aliased, no count overflows "
            f"({len(parts)} different groups of warps, {states} states, {seconds:.2f} s)"
        )
        yield
