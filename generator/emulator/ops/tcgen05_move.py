"""tcgen05.cp and tcgen05.shift: from shared to tensor memory, and within it (PTX ISA 9.1 §9.7.16.9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..datapath import EVERY_LANE, Cells, require_columns, require_states
from ..descriptors import Operand, shared_operand
from ..elements import contained
from ..errors import Hazard
from ..memory import CP_PENDING, MMA_PENDING, REASONS, ST_PENDING, VALID, take_chunks
from ..table import effect
from ..tensorcore import require_inside, require_shared
from .tcgen05 import one_lane_each, taking_part

# shape → (rows of the source, 16-byte chunks a row, lanes of the destination of each source row)
_ALL = np.arange(128)
SHAPES = {
    "128x256b": (128, 2, _ALL[:, None]),
    "128x128b": (128, 1, _ALL[:, None]),
    "4x256b": (4, 2, 32 * np.arange(4)[:, None]),
    "64x128b.warpx2::02_13": (64, 1, np.arange(64)[:, None] + [0, 64]),
    "64x128b.warpx2::01_23": (64, 1, (np.arange(64) % 32 + np.arange(64) // 32 * 64)[:, None] + [0, 32]),
    "32x128b.warpx4": (32, 1, np.arange(32)[:, None] + [0, 32, 64, 96]),
}
FORMATS = {"": 0, ".b8x16.b6x16_p32": 6, ".b8x16.b4x16_p64": 4}
SHIFT_COLUMNS = 8  # 32 bytes


@dataclass
class Copy:
    """One tcgen05.cp in the tensor core's queue."""

    bits: int
    source: Operand
    bits_each: int  # of packed elements that become bytes, 0 for a plain copy
    lanes: np.ndarray  # [rows, copies]: the lanes of each source row
    cells: Cells
    where: object
    remaining: int = 0
    pending = CP_PENDING
    opcode = "tcgen05.cp"

    def shared_operands(self) -> list[tuple[str, Operand]]:
        return [("the source", self.source)]

    def cells_read(self) -> list[tuple[str, Cells]]:
        return []

    def cells_written(self) -> Cells:
        return self.cells

    def flop(self) -> int:
        return 0

    def execute(self, m, ctas: np.ndarray) -> None:
        _require_source(m, ctas, self.source, self.bits_each, self.where.during("when it executes"))
        data = take_chunks(m.smem.chunks, ctas, self.source.chunks)[..., None].view(np.uint8)
        data = contained(data, self.bits_each) if self.bits_each else data
        words = np.ascontiguousarray(data).view(np.uint32).reshape(len(ctas), len(self.lanes), -1)
        words = words.transpose(2, 1, 0)[:, :, None]  # [columns, rows, 1, n]
        column = np.arange(self.cells.start, self.cells.stop)[:, None, None, None]
        lanes = self.lanes[None, :, :, None]
        m.tmem.data[column, lanes // 32, ctas, lanes % 32] = words


@dataclass
class Shift:
    """One tcgen05.shift: of 32 lanes, each but the last takes what the next one holds."""

    bits: int
    cells: Cells
    quarter: int
    where: object
    remaining: int = 0
    pending = CP_PENDING
    opcode = "tcgen05.shift"

    def shared_operands(self) -> list[tuple[str, Operand]]:
        return []

    def cells_read(self) -> list[tuple[str, Cells]]:
        return [("the rows", self.cells)]

    def cells_written(self) -> Cells:
        return self.cells

    def flop(self) -> int:
        return 0

    def execute(self, m, ctas: np.ndarray) -> None:
        view = m.tmem.data[self.cells.start : self.cells.stop, self.quarter]
        rows = view[:, ctas]
        rows[..., :-1] = rows[..., 1:].copy()
        view[:, ctas] = rows


def _require_source(m, ctas, source: Operand, bits_each: int, where) -> None:
    if not bits_each or not m.strict:
        require_shared(m, ctas, source, "the source", where)
        return
    require_inside(m, source, "the source", where)
    states = take_chunks(m.smem.chunk_state, ctas, source.chunks)[..., None].view(np.uint8)[..., : 2 * bits_each]
    if (states != VALID).any():
        raise Hazard(f"{where}: the source may not be read: {REASONS[int(states[states != VALID][0])]}")


def _issued(m, ws, active, instr, operands):
    """(CTAs, operands, where) for each set of CTAs that agrees on the operands."""
    rows, lanes, where = one_lane_each(m, ws, active, instr)
    group = int(instr.opcode.split("cta_group::")[1][0])
    values = list(zip(*(ws.full(x).reshape(-1, 32)[rows, lanes].tolist() for x in operands), strict=True))
    chosen = ws.flat_pairs()[1][rows]
    for key in dict.fromkeys(values):
        same = np.array([value == key for value in values])
        yield taking_part(m, chosen[same], group, where), key, where


def _claim(m, ctas, cells: Cells, what: str, where) -> int:
    """Check a destination in tensor memory and mark it as pending."""
    require_columns(m, ctas, cells, what, where)
    if m.strict:
        state = m.tmem.state[cells.index(ctas)]
        for code in (MMA_PENDING, ST_PENDING):
            if (state == code).any():
                raise Hazard(f"{where}: {what} may not be written: {REASONS[code]}")
        m.tmem.state[cells.index(ctas)] = CP_PENDING
    return m.queue.sets.bits(ctas)


def _copy(shape: str, bits_each: int):
    rows, chunks, lanes = SHAPES[shape]

    def run(m, ws, active, instr, address, descriptor):
        for ctas, (taddr, source), where in _issued(m, ws, active, instr, (address, descriptor)):
            operand = shared_operand(source, rows, False, where, 8, chunks)
            _require_source(m, ctas, operand, bits_each, where)
            lane, used = taddr >> 16, EVERY_LANE
            if shape == "4x256b" and lane < 32:
                used = np.zeros((4, 2), bool)
                used[:, lane // 16] = True
            elif lane:
                raise Hazard(f"{where}: tcgen05.cp.{shape} to TMEM lane {lane}: it must start at lane 0")
            cells = Cells(taddr & 0xFFFF, 4 * chunks, used)
            bits = _claim(m, ctas, cells, "the destination", where)
            m.tensor_core.issue(Copy(bits, operand, bits_each, lanes + lane, cells, where))

    return run


for _shape in SHAPES:
    for _format, _bits in FORMATS.items():
        effect(f"tcgen05.cp.cta_group::{{1,2}}.{_shape}{_format}", "=a,U", "9.7.16.9.2")(_copy(_shape, _bits))


@effect("tcgen05.shift.cta_group::{1,2}.down", "=a", "9.7.16.9.3")
def shift_down(m, ws, active, instr, address):
    for ctas, (taddr,), where in _issued(m, ws, active, instr, (address,)):
        lane = taddr >> 16
        if lane % 32 or lane >= 128:
            raise Hazard(f"{where}: tcgen05.shift of TMEM lane {lane}: the lane must be a multiple of 32 below 128")
        used = np.zeros((4, 2), bool)
        used[lane // 32] = True
        cells = Cells(taddr & 0xFFFF, SHIFT_COLUMNS, used)
        require_columns(m, ctas, cells, "the rows", where)
        if m.strict:
            require_states(m, ctas, cells, (VALID, CP_PENDING), "the rows", where)
        bits = _claim(m, ctas, cells, "the rows", where)
        m.tensor_core.issue(Shift(bits, cells, lane // 32, where))
