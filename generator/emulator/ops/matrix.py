"""Matrix fragments of a warp: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.1 §9.7.14.5).

An 8x8 matrix of 16-bit elements lies across the warp with row t / 4 and columns 2 (t % 4) and the next in lane t.
"""

from __future__ import annotations

import numpy as np

from ..errors import Hazard
from ..formats import decode, pack16
from ..memory import COPY_PENDING, GENERIC_WORD, MBARRIER, REASONS, TMA_PENDING
from ..table import effect
from ..warps import LANES
from .memory import check_state, shared_offsets
from .warp import _check_converged

U16, U32 = np.uint16, np.uint32


def _rows_of(ws, offsets, matrix: int):
    """Offsets of the eight rows that lanes 8·matrix to 8·matrix + 7 give, [..., 8]."""
    return ws.full(offsets)[..., 8 * matrix : 8 * matrix + 8]


def _require_warp(m, ws, active, instr):
    _check_converged(m, ws, active, instr)
    if active is not None and not ws.full(active).all():
        raise Hazard(f"{m.where(ws, instr, ~ws.full(active))}: {instr.opcode} needs all 32 lanes")


def _row_addresses(m, ws, instr, address, count: int):
    """Offsets of the rows that are used; lanes from 8·count on may hold anything."""
    used = np.broadcast_to(8 * count > LANES, (*ws.lead, 32))
    return shared_offsets(m, ws, used, instr, address, 16)


def _element(ws, m, offsets, matrix: int, transposed: bool, half: int):
    """Index of a 16-bit element in flat shared memory for each lane: the fragment's low or high half."""
    rows = _rows_of(ws, offsets, matrix)
    row, column = LANES // 4, 2 * (LANES % 4) + half
    if transposed:
        row, column = column, row
    at = ws.cta * m.smem.stride + rows[..., row.astype(np.int64)]
    return (at + 2 * column.astype(np.int64)) // 2


def _ldmatrix(count: int, transposed: bool):
    def run(m, ws, active, instr, address):
        _require_warp(m, ws, active, instr)
        offsets = _row_addresses(m, ws, instr, address, count)
        data, state = m.smem.flat[2], m.smem.flat_state[2]
        results = []
        for matrix in range(count):
            halves = []
            for half in (0, 1):
                at = _element(ws, m, offsets, matrix, transposed, half)
                check_state(m, ws, None, instr, state[at], 2, at * 2 % m.smem.stride + 1024)
                halves.append(data[at])
            results.append(pack16(halves[1], halves[0]))
        return tuple(results)

    return run


def _stmatrix(count: int, transposed: bool):
    def run(m, ws, active, instr, address, values):
        _require_warp(m, ws, active, instr)
        offsets = _row_addresses(m, ws, instr, address, count)
        data, state = m.smem.flat[2], m.smem.flat_state[2]
        where = m.where(ws, instr, True, address)
        for matrix in range(count):
            word = ws.full(values[matrix])
            for half in (0, 1):
                at = _element(ws, m, offsets, matrix, transposed, half)
                ctas, chunks = np.divmod(np.ravel(at) * 2, m.smem.stride)
                m.check_overwrite(ctas, chunks // 16, where)
                for code in (MBARRIER, TMA_PENDING, COPY_PENDING):
                    if (state[at] & U16(0xFF) == code).any():
                        raise Hazard(f"{where}: writes shared memory although {REASONS[code]}")
                data[at] = (word >> U32(16 * half)).astype(U16)
                state[at] = GENERIC_WORD[2]
                m.smem.unfenced.append((2, np.ravel(at)))

    return run


for _count in (1, 2, 4):
    for _trans in ("", ".trans"):
        _end = f".sync.aligned.m8n8.x{_count}{_trans}{{.shared,.shared::cta}}.b16"
        effect(f"ldmatrix{_end}", "*u=a", "9.7.14.5.15")(_ldmatrix(_count, bool(_trans)))
        effect(f"stmatrix{_end}", "=a,*u", "9.7.14.5.16")(_stmatrix(_count, bool(_trans)))


@effect("movmatrix.sync.aligned.m8n8.trans.b16", "u=u", "9.7.14.5.17")
def movmatrix(m, ws, active, instr, value):
    """The transpose of an 8x8 matrix."""
    _require_warp(m, ws, active, instr)
    value = ws.full(value)
    row = (LANES // 4).astype(np.int64)
    halves = []
    for half in (0, 1):
        source_row = (2 * (LANES % 4) + half).astype(np.int64)
        word = value[..., source_row * 4 + row // 2]
        halves.append((word >> (U32(16) * (row % 2).astype(U32))).astype(U16))
    return pack16(halves[1], halves[0])


# -- mma.sync ----------------------------------------------------------------------------------------------------------
_T, _G = (LANES % 4).astype(np.int64), (LANES // 4).astype(np.int64)
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}


def _unpack(words, form: str):
    """Registers u32 → float64 [register, element of it, ..., 32 lanes]."""
    size = BITS[form]
    mask = U32((1 << size) - 1) if size < 32 else ~U32(0)
    if form == "tf32":  # the hardware reads the upper 19 bits
        mask = U32(0xFFFFE000)
    return [[decode(form, (w >> U32(size * i)) & mask) for i in range(32 // size)] for w in words]


def _gather(ws, words, form: str, outer: int, k: int, registers):
    """A fragment → float64 [..., outer, k]; `registers` gives (first outer row, first k) of each register."""
    out = np.zeros((*ws.lead, outer, k))
    per = 32 // BITS[form]
    for (row, column), elements in zip(registers, _unpack([ws.full(w) for w in words], form), strict=True):
        for i, value in enumerate(elements):
            out[..., _G + row, column + _T * per + i] = value
    return out


def _mma(form_a: str, form_b: str, k: int, half_result: bool):
    """D = A·B + C for one m16n8 tile: products exact, summed in float64, rounded once (hardware truncates: §3.5)."""
    span = 4 * (32 // BITS[form_a])  # columns of k that one register covers across four lanes
    a_places = [(row, column) for column in range(0, k, span) for row in (0, 8)]
    b_places = [(0, column) for column in range(0, k, span)]

    def run(m, ws, active, instr, a, b, c):
        _require_warp(m, ws, active, instr)
        left = _gather(ws, a, form_a, 16, k, a_places)
        right = _gather(ws, b, form_b, 8, k, b_places)
        product = left @ np.swapaxes(right, -1, -2)
        results = []
        for i in range(2 if half_result else 4):
            row = _G + 8 * (i if half_result else i // 2)
            if half_result:
                parts = []
                for half in (0, 1):
                    old = (ws.full(c[i]) >> U32(16 * half)).astype(U16).view(np.float16).astype(np.float64)
                    parts.append((product[..., row, 2 * _T + half] + old).astype(np.float16).view(U16))
                results.append(pack16(parts[1], parts[0]))
            else:
                old = ws.full(c[i]).view(np.float32).astype(np.float64)
                results.append((product[..., row, 2 * _T + i % 2] + old).astype(np.float32).view(U32))
        return tuple(results)

    return run


for _a, _b, _k in (
    *((t, t, k) for t in ("f16", "bf16") for k in (8, 16)),
    *(("tf32", "tf32", k) for k in (4, 8)),
    *((a, b, 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
):
    _name = f"mma.sync.aligned.m16n8k{_k}.row.col"
    effect(f"{_name}.f32.{_a}.{_b}.f32", "*u=*u,*u,*u", "9.7.14.5.14")(_mma(_a, _b, _k, False))
    if _a == "f16":
        effect(f"{_name}.f16.{_a}.{_b}.f16", "*u=*u,*u,*u", "9.7.14.5.14")(_mma(_a, _b, _k, True))
