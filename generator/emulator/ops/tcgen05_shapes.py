"""tcgen05.ld and tcgen05.st in the shapes of 16 lanes, and with packed 16-bit elements (PTX ISA 9.1 §9.7.16.2.3, .8).

The 32x32b forms, which kernels use most, are in `tcgen05`. Lanes and columns of a fragment are relative to the address;
i is the register, t the thread of the warp:

    16x64b    lane t / 4 + 8 (t % 2)         column t / 2 % 2 + 2 i
    16x128b   lane t / 4 + 8 (i % 2)         column t % 4 + 4 (i / 2)
    16x256b   lane t / 4 + 8 (i / 2 % 2)     column 2 (t % 4) + i % 2 + 8 (i / 4)
    16x32bx2  lane t % 16                    column i, for t >= 16 from the immediate half-split offset on
    32x32b    lane t                         column i

With .pack::16b and .unpack::16b a 32-bit column of that map is the low halves of two columns in tensor memory, 2 c and
2 c + 1; the half-split offset counts those. An unpacking store clears the upper halves.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..errors import Hazard
from ..memory import CP_PENDING, MMA_PENDING, REASONS, ST_PENDING, VALID
from ..table import effect
from .tcgen05 import at_warps, mark_cells, require_columns, warp_addresses

PER_REPEAT = {"16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1, "32x32b": 1}  # registers a thread
LARGEST = {"16x64b": 128, "16x128b": 64, "16x256b": 32, "16x32bx2": 128, "32x32b": 128}


@cache
def fragment(shape: str, registers: int, split: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Relative lane [registers, 32] and columns [registers, 32, 1 or 2] of each register."""
    t, i = np.arange(32)[None], np.arange(registers)[:, None]
    lane, column = {
        "16x64b": (t // 4 + 8 * (t % 2), t // 2 % 2 + 2 * i),
        "16x128b": (t // 4 + 8 * (i % 2), t % 4 + 4 * (i // 2)),
        "16x256b": (t // 4 + 8 * (i // 2 % 2), 2 * (t % 4) + i % 2 + 8 * (i // 4)),
        "16x32bx2": (t % 16, i + 0 * t),
        "32x32b": (t, i),
    }[shape]
    lane, column = np.broadcast_to(lane, (registers, 32)), np.broadcast_to(column, (registers, 32))
    columns = np.stack([2 * column, 2 * column + 1], -1) if packed else column[..., None]
    return lane, columns + (split * (t // 16))[..., None]


class Access:
    """Where the warps of a batch touch tensor memory: checked for lanes, bounds and allocation.

    `quarter`, `half`, `ctas`, `column`: int [warps]; `offsets`: the columns that are touched, relative to `column`.
    """

    def __init__(self, m, ws, active, instr, address, registers: int, split: int = 0):
        parts = instr.opcode.split(".")
        self.shape, self.packed = parts[4], parts[-2] in ("pack::16b", "unpack::16b")
        if split < 0:
            raise Hazard(f"{m.where(ws, instr)}: immHalfSplitoff {split}: the offset must not be negative")
        self.lane, self.columns = fragment(self.shape, registers, split, self.packed)
        self.offsets = np.unique(self.columns)
        self.m, self.ws, self.instr = m, ws, instr
        whole = self.shape == "32x32b"
        self.quarter, self.half, self.ctas, self.column = warp_addresses(m, ws, active, instr, address, whole)
        if m.strict or (self.column + self.offsets[-1] >= m.tmem.COLUMNS).any():
            require_columns(m, ws, instr, self.ctas, self.column, self.offsets)
        self.halves = slice(None) if whole else None

    def by_half(self):
        """(the half that is touched, or both; which warps) of the batch."""
        if self.halves is not None:
            yield self.halves, np.ones(len(self.half), bool)
            return
        for half in np.unique(self.half):
            yield int(half), self.half == half

    def require(self, illegal: tuple[int, ...] | None, what: tuple[str, str]) -> None:
        """No cell is in one of the `illegal` states; None: every cell is VALID."""
        for half, chosen in self.by_half():
            wide = (self.column[chosen, None] + self.offsets).T
            states = self.m.tmem.state[wide, self.quarter[chosen], half, self.ctas[chosen]].reshape(*wide.shape, -1)
            bad = states != VALID if illegal is None else np.isin(states, illegal)
            if bad.any():
                warps = np.zeros(len(self.half), bool)
                warps[np.nonzero(chosen)[0][bad.any(axis=(0, 2))]] = True
                place = self.m.labels.column_at(int(wide[tuple(np.argwhere(bad)[0][:2])]))
                where = at_warps(self.m, self.ws, self.instr, warps)
                raise Hazard(f"{where}: {what[0]} {place}, which may not be {what[1]}: {REASONS[int(states[bad][0])]}")

    def cells(self):
        """(index into arrays like `TensorMemory.state`, which warps of the batch it is for)."""
        for half, chosen in self.by_half():
            yield ((self.column[chosen, None] + self.offsets).T, self.quarter[chosen], half, self.ctas[chosen]), chosen

    def index(self, part: int):
        """Index into the data of tensor memory, [registers, warps, 32]; `part`: which of a pair of columns."""
        column = self.column[None, :, None] + self.columns[:, None, :, part]
        lane = self.lane[:, None] + 16 * self.half[None, :, None]
        return column, self.quarter[None, :, None], self.ctas[None, :, None], lane


def load(m, ws, active, instr, address, split=0):
    shape, repeat = instr.opcode.split(".")[4:6]
    access = Access(m, ws, active, instr, address, PER_REPEAT[shape] * int(repeat[1:]), int(split))
    values = m.tmem.data[access.index(0)]
    if access.packed:
        values = values & np.uint32(0xFFFF) | m.tmem.data[access.index(1)] << np.uint32(16)
    if m.strict:
        access.require(None, ("reads", "read"))
    if m.races:
        for cells, chosen in access.cells():
            m.races.tmem_load(ws, instr, cells, chosen)
    return tuple(values.reshape(len(values), *ws.lead, 32))


def store(m, ws, active, instr, address, *rest):
    values, split = rest[-1], int(rest[0]) if len(rest) == 2 else 0
    access = Access(m, ws, active, instr, address, len(values), split)
    words = np.stack([ws.full(value).reshape(-1, 32) for value in values])
    if m.strict:
        access.require((MMA_PENDING, CP_PENDING), ("writes", "written"))
        extent = int(access.offsets[-1]) + 1
        lanes = access.quarter, access.halves if access.halves is not None else access.half
        m.tensor_core.check_columns_read(access.ctas, access.column, extent, m.where(ws, instr), lanes)
    if access.packed:
        m.tmem.data[access.index(1)] = words >> np.uint32(16)
        words = words & np.uint32(0xFFFF)
    m.tmem.data[access.index(0)] = words
    if not m.strict:
        return
    for cells, chosen in access.cells():
        m.races.tmem_store(ws, instr, cells, chosen)
    warps, _ = ws.flat_pairs()
    for half, chosen in access.by_half():
        cells = access.quarter[chosen], access.ctas[chosen], access.column[chosen], (access.offsets, half)
        mark_cells(m, *cells, ST_PENDING)
        m.stores.append((StoreGroup(warps[chosen], access.ctas[chosen]), *cells))


class StoreGroup:
    """Warps of a store that has not been waited for."""

    def __init__(self, warps: np.ndarray, ctas: np.ndarray):
        self.warps, self.ctas = warps, ctas

    def flat_pairs(self):
        return self.warps, self.ctas


for _shape, _largest in LARGEST.items():
    for _power in range(_largest.bit_length()):
        _name = f"sync.aligned.{_shape}.x{1 << _power}"
        _split = ",k" if _shape == "16x32bx2" else ""
        _ends = (".pack::16b",) if _shape == "32x32b" else ("", ".pack::16b")
        for _end in _ends:
            effect(f"tcgen05.ld.{_name}{_end}.b32", f"*u=a{_split}", "9.7.16.8.3")(load)
            effect(f"tcgen05.st.{_name}{_end and '.un' + _end[1:]}.b32", f"=a{_split},*u", "9.7.16.8.4")(store)
