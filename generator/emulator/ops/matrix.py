"""Matrix fragments of a warp: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.1 §9.7.14.5).

An 8x8 matrix of 16-bit elements lies across the warp with row t / 4 and columns 2 (t % 4) and the next in lane t.
"""

from __future__ import annotations

import itertools

import numpy as np

from ..accumulate import fused_dot, mma_model, split_fp8_dot
from ..errors import Hazard, UnsupportedInstruction
from ..formats import decode, f16_bits, hardware_nan, pack16
from ..memory import GENERIC_WORD, REASONS, UNDER_WAY
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
        data, state = m.smem.flat[2], m.smem.flat_state.get(2)
        results = []
        for matrix in range(count):
            halves = []
            for half in (0, 1):
                at = _element(ws, m, offsets, matrix, transposed, half)
                if m.strict:
                    check_state(m, ws, None, instr, state[at], 2, at * 2 % m.smem.stride + 1024)
                halves.append(data[at])
            results.append(pack16(halves[1], halves[0]))
        if m.races:
            m.races.rows(ws, instr, ws.full(offsets)[..., : 8 * count], False)
        return tuple(results)

    return run


def _stmatrix(count: int, transposed: bool):
    def run(m, ws, active, instr, address, values):
        _require_warp(m, ws, active, instr)
        offsets = _row_addresses(m, ws, instr, address, count)
        data, state = m.smem.flat[2], m.smem.flat_state.get(2)
        where = m.where(ws, instr, True, address)
        if m.races:
            m.races.rows(ws, instr, ws.full(offsets)[..., : 8 * count], True)
        for matrix in range(count):
            word = ws.full(values[matrix])
            for half in (0, 1):
                at = _element(ws, m, offsets, matrix, transposed, half)
                data[at] = (word >> U32(16 * half)).astype(U16)
                if not m.strict:
                    continue
                ctas, chunks = np.divmod(np.ravel(at) * 2, m.smem.stride)
                m.check_overwrite(ctas, chunks // 16, where)
                for code in UNDER_WAY:
                    if (state[at] & U16(0xFF) == code).any():
                        raise Hazard(f"{where}: writes shared memory although {REASONS[code]}")
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
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "s4": 4, "u4": 4}


def _element_values(bits, form: str):
    """Elements in the low part of u32 words → float64."""
    if form == "tf32":  # the hardware reads the upper 19 bits
        return decode(form, bits & U32(0xFFFFE000))
    if form[0] == "s":
        unused = U32(32 - BITS[form])
        return ((bits << unused).view(np.int32) >> unused.view(np.int32)).astype(np.float64)
    return bits.astype(np.float64) if form[0] == "u" else decode(form, bits)


def _gather(ws, words, form: str, outer: int, k: int, registers):
    """A fragment → float64 [..., outer, k]; `registers` gives (first outer row, first k) of each register."""
    out = np.zeros((*ws.lead, outer, k))
    size = BITS[form]
    mask = U32((1 << size) - 1) if size < 32 else ~U32(0)
    for (row, column), word in zip(registers, words, strict=True):
        word = ws.full(word)
        for i in range(32 // size):
            value = _element_values((word >> U32(size * i)) & mask, form)
            out[..., _G + row, column + _T * (32 // size) + i] = value
    return out


def _places(kind: str, rows: int):
    """(register, half, row, column) of each element of C and D that a lane holds, across the warp."""
    for i in range(rows // 4):
        row, column = _G + 8 * (i // 2), 2 * _T + i % 2
        yield (i // 2, i % 2, row, column) if kind == "f16" else (i, 0, row, column)


def _accumulator(ws, words, kind: str, rows: int):
    """C as float64 [..., rows, 8]."""
    out = np.zeros((*ws.lead, rows, 8))
    for register, half, row, column in _places(kind, rows):
        word = ws.full(words[register])
        if kind == "f16":
            out[..., row, column] = (word >> U32(16 * half)).astype(U16).view(np.float16)
        else:
            out[..., row, column] = word.view(np.float32 if kind == "f32" else np.int32)
    return out


def _registers(d, kind: str, rows: int):
    """D float64 [..., rows, 8] → its registers."""
    results: dict[int, list] = {}
    for register, _, row, column in _places(kind, rows):
        value = d[..., row, column]
        bits = value.astype(np.int64).astype(U32) if kind == "s32" else None
        if bits is None:
            bits = hardware_nan(value.astype(np.float32)) if kind == "f32" else f16_bits(value)
        results.setdefault(register, []).append(bits)
    return tuple(pack16(parts[1], parts[0]) if kind == "f16" else parts[0] for parts in results.values())


def _mma(form_a: str, form_b: str, rows: int, k: int, kind: str, saturate: bool = False):
    """D = A·B + C for one tile of `rows` by 8: products exact, summed in float64 and rounded once, or as `accumulate`
    says. Integers wrap around, or saturate.
    """
    span = 4 * (32 // BITS[form_a])  # columns of k that one register covers across four lanes
    a_places = [(row, column) for column in range(0, k, span) for row in range(0, rows, 8)]
    b_places = [(0, column) for column in range(0, k, span)]
    counts = len(a_places), len(b_places), rows // 8 if kind == "f16" else rows // 4

    def run(m, ws, active, instr, a, b, c):
        _require_warp(m, ws, active, instr)
        if (len(a), len(b), len(c)) != counts:
            found = f"{instr.opcode} with {len(a)}, {len(b)} and {len(c)} registers"
            raise UnsupportedInstruction(f"PTX line {instr.line}: {found}, it takes {counts}")
        left = _gather(ws, a, form_a, rows, k, a_places)
        right = _gather(ws, b, form_b, 8, k, b_places)
        start = _accumulator(ws, c, kind, rows)
        if kind != "s32" and m.accumulation == "exact":
            if BITS[form_a] == 8:
                return _registers(split_fp8_dot(left, right, start, kind), kind, rows)
            return _registers(fused_dot(left, right, start, (form_a, form_b), mma_model(kind)), kind, rows)
        d = left @ np.swapaxes(right, -1, -2) + start
        return _registers(np.clip(d, -(2.0**31), 2.0**31 - 1) if saturate else d, kind, rows)

    return run


for _a, _b, _k, _kinds in (
    *(("f16", "f16", k, ("f32", "f16")) for k in (8, 16)),
    *(("bf16", "bf16", k, ("f32",)) for k in (8, 16)),
    *(("tf32", "tf32", k, ("f32",)) for k in (4, 8)),
    *((a, b, k, ("f32", "f16")) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for k in (16, 32)),
):
    for _kind in _kinds:
        _name = f"mma.sync.aligned.m16n8k{_k}.row.col.{_kind}.{_a}.{_b}.{_kind}"
        effect(_name, "*u=*u,*u,*u", "9.7.14.5.14")(_mma(_a, _b, 16, _k, _kind))
for _size, _shapes in ((8, ((8, 16), (16, 16), (16, 32))), (4, ((8, 32), (16, 32), (16, 64)))):
    for _a, _b, (_rows, _k) in itertools.product((f"s{_size}", f"u{_size}"), (f"s{_size}", f"u{_size}"), _shapes):
        _name = f"mma.sync.aligned.m{_rows}n8k{_k}.row.col.s32.{_a}.{_b}.s32{{}}"
        for _saturate in (False, True):
            _run = _mma(_a, _b, _rows, _k, "s32", _saturate)
            effect(_name.format(".satfinite" if _saturate else ""), "*u=*u,*u,*u", "9.7.14.5.14")(_run)
