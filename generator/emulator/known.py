"""What the warps of a run knew, as clocks, and whether those of another run knew as much: the proof that a mutant's
runs are runs of the original.

A clock says what happened before, and nothing of when. Where every wait passes in the phase that it passed in here, in
every interleaving of the barriers (`explore`), what a warp knows at each of its steps is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from .clocks import Clocks


class Known(NamedTuple):
    """What a warp knows to have happened: after a wait that it passed, or before another event of its, or its end.

    line: of the instruction, 0 for the end. clock: int64 [2, components]; clocks: those of its wave, which name the
    components.
    """

    line: int
    clock: np.ndarray
    clocks: Clocks


def clocks_of(m, running: list[tuple[int, int, bool]]) -> dict[tuple[int, int], np.ndarray]:
    """(CTA, warp) → a copy of its clock, of the warps (warp, CTA, ...) of a batch."""
    return {(cta, warp): m.races.clocks.warps[warp, cta].copy() for warp, cta, _ in running}


def knows_as_much(mine: list[Known], theirs: list[Known], unseen: Collection[int] = ()) -> bool:
    """Whether a warp, step by step at the same lines, knows all that it knew in another run. unseen: slots of mbarriers
    whose own count of phases nobody needs to know.
    """
    if [known.line for known in mine] != [known.line for known in theirs]:
        return False
    return not mine or all(_covers(*pair, unseen) for pair in zip(mine, theirs, strict=True))


def _covers(mine: Known, theirs: Known, unseen: Collection[int]) -> bool:
    width = max(len(mine.clocks.kinds), len(theirs.clocks.kinds)) * mine.clocks.size
    here = _wide(mine.clock, width)[:, _places(mine.clocks, theirs.clocks)]
    needed = [not (kind == "mbarrier" and number in unseen) for kind, number in theirs.clocks.kinds]
    needed = np.repeat(needed, theirs.clocks.size)
    return bool((here >= _wide(theirs.clock, width)[:, : here.shape[1]])[:, needed].all())


def _wide(clock: np.ndarray, width: int) -> np.ndarray:
    """A clock of `width` components and one more of which nothing is known: it may be older than some of them."""
    wide = np.ones((2, width + 1), np.int64)
    known = min(width, clock.shape[1])
    wide[:, :known] = clock[:, :known]
    return wide


def _places(mine: Clocks, theirs: Clocks) -> np.ndarray:
    """For each of their components, mine of the same kind and rank; -1 where there is none."""
    local = {kind: number for number, kind in enumerate(mine.kinds)}
    numbers = np.array([local.get(kind, -1) for kind in theirs.kinds])[:, None]
    return np.where(numbers < 0, -1, numbers * mine.size + np.arange(mine.size)).reshape(-1)
