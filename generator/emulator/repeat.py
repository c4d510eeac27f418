"""Repeats a launch under several schedules: its result may not depend on which warp runs first."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .errors import Deadlock, Hazard, LaunchError
from .memory import GlobalMemory
from .schedule import Adversary
from .snapshot import Snapshot

# Additions of floats in the order in which they come: the result may differ in its last bits.
_FLOAT_ATOMIC = re.compile(r"(atom|red|cp\.reduce)\b.*\.add\b.*\.(f16|bf16|f16x2|bf16x2|f32|f64)\b")


def check_schedules(schedules: int, seed: int) -> None:
    """Raise LaunchError unless these are at least 1, and 0."""
    for name, value, least in (("schedules", schedules, 1), ("schedule_seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LaunchError(f"{name} is {value!r}: a whole number of at least {least}")


def repeat(run: Callable[[Adversary | None], object], gmem: GlobalMemory, opcodes, schedules: int, seed: int) -> object:
    """`run` once in the deterministic schedule, then under the seeds from `seed` on, on the same inputs.

    Args:
        run: executes the launch under a schedule. opcodes: those of the kernel. schedules: how many runs in all.
    Returns:
        what the first run returned.
    Raises:
        Hazard: two schedules leave different bits in global memory, and the kernel adds no floats atomically.
        Whatever a run raises, with its seed.
    """
    before = Snapshot(gmem) if schedules > 1 else None
    result = run(None)
    if before is None:
        return result
    after, exact = Snapshot(gmem), not any(map(_FLOAT_ATOMIC.match, opcodes))
    for this in range(seed, seed + schedules - 1):
        before.restore()
        adversary = Adversary(this)
        try:
            run(adversary)
        except (Hazard, Deadlock) as error:
            raise type(error)(f"{error}\n{_replay(adversary)}") from error
        found = after.difference() if exact else None
        if found is not None:
            raise Hazard(_differs(found, adversary))
    return result


def _differs(found: tuple[str, int, np.ndarray, np.ndarray], adversary: Adversary) -> str:
    name, at, then, now = found
    return (
        f"the result depends on the schedule: array {name!r} at byte {at} is {now.tobytes().hex()} (hexadecimal), and "
        f"{then.tobytes().hex()} in the deterministic schedule: some read or write is not ordered\n{_replay(adversary)}"
    )


def _replay(adversary: Adversary) -> str:
    return (
        f"schedule seed {adversary.seed} ({adversary.style}, asynchronous work {adversary.delays}); to see it again: "
        f"--schedules 2 --schedule-seed {adversary.seed}"
    )
