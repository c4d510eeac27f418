"""Where a matrix lies in tensor memory: the data-path layouts of tcgen05.mma (PTX ISA 9.1 §9.7.16.10.5).

The 128 lanes of a CTA are one, two or four groups of lanes; a group holds all rows that the CTA has of D, and its own
share of the columns. The names are the ISA's:

    A, D   128 rows                     one group                 M = 256 of a pair, M = 128
    B, E   64 rows                      two groups of N / 2       M = 128 of a pair, M = 64 weight stationary
    G      32 rows                      four groups of N / 4      M = 32 weight stationary
    F      64 rows, 16 of every 32      one group                 M = 64; the address says which 16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import Hazard
from .memory import REASONS, TensorMemory


class Datapath(NamedTuple):
    """`rows` of D a CTA holds, `groups` of lanes that share the columns, `half` of every 32 lanes (layout F)."""

    rows: int
    groups: int
    half: int | None = None

    @property
    def lanes(self) -> np.ndarray:
        """Which halves of which quarters are used: bool [4, 2]."""
        used = np.ones((4, 2), bool)
        if self.half is not None:
            used[:, 1 - self.half] = False
        return used


@dataclass(frozen=True)
class Cells:
    """`count` columns from `start` on, in the halves of quarters that `lanes` (bool [4, 2]) says."""

    start: int
    count: int
    lanes: np.ndarray

    @property
    def stop(self) -> int:
        return self.start + self.count

    def index(self, ctas: np.ndarray):
        """Index into the states of tensor memory: [columns, halves of quarters …, CTAs]."""
        if self.lanes.all():
            return slice(self.start, self.stop), slice(None), slice(None), ctas
        quarters, halves = np.nonzero(self.lanes)
        return np.arange(self.start, self.stop)[:, None, None], quarters[:, None], halves[:, None], ctas

    def overlaps(self, other: Cells) -> bool:
        return self.start < other.stop and other.start < self.stop and bool((self.lanes & other.lanes).any())


EVERY_LANE = np.ones((4, 2), bool)


def read(tmem: TensorMemory, ctas: np.ndarray, start: int, columns: int, path: Datapath) -> np.ndarray:
    """u32 [CTAs, groups, rows, columns]."""
    block = tmem.data[start : start + columns][:, :, ctas].transpose(2, 1, 3, 0)  # [n, 4, 32, columns]
    if path.half is not None:
        block = block[:, :, 16 * path.half : 16 * path.half + 16]
    return np.ascontiguousarray(block).reshape(len(ctas), path.groups, path.rows, columns)


def write(tmem: TensorMemory, ctas: np.ndarray, start: int, path: Datapath, words: np.ndarray) -> None:
    """The inverse of `read`."""
    columns = words.shape[-1]
    block = words.reshape(len(ctas), 4, -1, columns).transpose(3, 1, 0, 2)
    lanes = slice(None) if path.half is None else slice(16 * path.half, 16 * path.half + 16)
    view = tmem.data[start : start + columns, :, :, lanes]
    view[:, :, ctas] = block


def require_columns(m, ctas: np.ndarray, cells: Cells, what: str, where) -> None:
    """The columns exist and are allocated; whether they exist is asked even when nothing else is checked."""
    inside = cells.stop <= TensorMemory.COLUMNS
    if inside and (not m.strict or m.tmem.allocated[cells.start : cells.stop, ctas].all()):
        return
    raise Hazard(f"{where}: {what} in TMEM columns {cells.start} to {cells.stop - 1}, which are not all allocated")


def require_states(m, ctas: np.ndarray, cells: Cells, legal: tuple[int, ...], what: str, where) -> None:
    """Every cell is in one of the `legal` states."""
    state = m.tmem.state[cells.index(ctas)]
    bad = ~np.isin(state, legal)
    if bad.any():
        place = m.labels.column_at(cells.start + int(np.argwhere(bad)[0, 0]))
        raise Hazard(f"{where}: {what} at {place} may not be used: {REASONS[int(state[bad][0])]}")
