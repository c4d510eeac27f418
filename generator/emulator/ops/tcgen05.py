"""Tensor memory and the fifth-generation tensor core (PTX ISA 9.1 §9.7.16), cta_group::1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import Hazard, UnsupportedInstruction
from ..formats import bf16_to_f32, f16_to_f32
from ..memory import MMA_PENDING, REASONS, ST_PENDING, UNWRITTEN, VALID, VALID_WORD, WINDOW_BASE, take_chunks
from ..table import effect
from .barrier import by_address
from .memory import shared_offsets

COLUMNS = 512


# -- allocation, §9.7.16.7.1 ------------------------------------------------------------------------------------------
def _one_warp_a_cta(m, ws, active, instr) -> np.ndarray:
    if active is not None:
        raise Hazard(f"{m.where(ws, instr, active)}: {instr.opcode} needs all 32 lanes of the warp")
    _, ctas = ws.flat_pairs()
    return ctas


def _scalar(ws, value) -> int:
    values = np.unique(np.asarray(value))
    if len(values) != 1:
        raise UnsupportedInstruction(f"operand that differs between lanes or warps: {values[:4]}")
    return int(values[0])


@effect("tcgen05.alloc.cta_group::1.sync.aligned{,.shared::cta}.b32", "=a,u", "9.7.16.7.1")
def alloc(m, ws, active, instr, destination, columns):
    columns = _scalar(ws, columns)
    where = m.where(ws, instr)
    if not 32 <= columns <= COLUMNS or columns & (columns - 1):
        raise Hazard(f"{where}: tcgen05.alloc of {columns} columns: the count must be a power of two from 32 to 512")
    offset = _scalar(ws, shared_offsets(m, ws, None, instr, destination, 4))
    for cta in _one_warp_a_cta(m, ws, active, instr):
        if m.tmem.relinquished[cta]:
            raise Hazard(f"{where}: tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        start = m.tmem.allocate(cta, columns)
        if start is None:
            raise Hazard(
                f"{where}: {columns} TMEM columns are not free in CTA {m.name_cta(cta)}: the allocation "
                "would block for ever"
            )
        m.smem.flat[4][(cta * m.smem.stride + offset) // 4] = start
        m.smem.flat_state[4][(cta * m.smem.stride + offset) // 4] = VALID_WORD[4]


@effect("tcgen05.dealloc.cta_group::1.sync.aligned.b32", "=u,u", "9.7.16.7.1")
def dealloc(m, ws, active, instr, address, columns):
    start, columns = _scalar(ws, address), _scalar(ws, columns)
    for cta in _one_warp_a_cta(m, ws, active, instr):
        if m.tmem.blocks[cta].get(start) != columns:
            raise Hazard(
                f"{m.where(ws, instr)}: tcgen05.dealloc of {columns} columns at {start:#x}, which is not "
                f"an allocation of CTA {m.name_cta(cta)}: {m.tmem.blocks[cta]}"
            )
        if (m.tmem.state[start : start + columns, :, :, cta] == MMA_PENDING).any():
            raise Hazard(f"{m.where(ws, instr)}: tcgen05.dealloc although {REASONS[MMA_PENDING]}")
        del m.tmem.blocks[cta][start]
        m.tmem.allocated[start : start + columns, cta] = False
        m.tmem.state[start : start + columns, :, :, cta] = UNWRITTEN


@effect("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "=", "9.7.16.7.1")
def relinquish(m, ws, active, instr):
    m.tmem.relinquished[_one_warp_a_cta(m, ws, active, instr)] = True


# -- tcgen05.ld, st, wait, §9.7.16.8 ----------------------------------------------------------------------------------
def _cells(m, ws, active, instr, address, columns: int):
    """Quarter, CTA and first column of each warp for a 32x32b access; checks lanes, bounds and allocation."""
    if active is not None:
        raise Hazard(
            f"{m.where(ws, instr, active)}: {instr.opcode} is executed by part of a warp: all 32 lanes "
            "must converge on it"
        )
    values = np.asarray(address)
    per_warp = ws.full(values).reshape(-1, 32)
    if (per_warp != per_warp[:, :1]).any():
        raise Hazard(f"{m.where(ws, instr)}: the lanes of a warp give different TMEM addresses")
    taddr = per_warp[:, 0].astype(np.int64)
    warps, ctas = ws.flat_pairs()
    quarter, column, lane = warps % 4, taddr & 0xFFFF, taddr >> 16
    foreign = lane != quarter * 32
    if foreign.any():
        at = int(np.argmax(foreign))
        raise Hazard(
            f"{m.where(ws, instr, True)}: warp {warps[at]} of CTA {m.name_cta(ctas[at])} addresses TMEM "
            f"lane {lane[at]} (column {column[at]}), "
            f"but may touch only lanes {quarter[at] * 32} to {quarter[at] * 32 + 31}"
        )
    if (column + columns > COLUMNS).any():
        raise Hazard(
            f"{m.where(ws, instr)}: TMEM columns {int(column.max())} to {int(column.max()) + columns - 1} "
            "are out of bounds (512 columns)"
        )
    wide = column[:, None] + np.arange(columns)
    free = ~m.tmem.allocated[wide, ctas[:, None]]
    if free.any():
        at = np.argwhere(free)[0]
        raise Hazard(
            f"{m.where(ws, instr)}: TMEM column {int(wide[tuple(at)])} is not allocated in CTA "
            f"{m.name_cta(ctas[at[0]])}"
        )
    return quarter, ctas, column


def _block(ws, quarter, column):
    """Slices (quarters, CTAs) when the batch is a product of neighbouring quarters and CTAs at one column, else
    None.
    """
    if not ws.sliced or column.min() != column.max():
        return None
    w0, w1 = ws.w_range
    if w0 % 4 + (w1 - w0) > 4:
        return None
    return slice(w0 % 4, w0 % 4 + w1 - w0), slice(*ws.c_range)


def ld_32x32b(m, ws, active, instr, address):
    columns = int(instr.opcode.split(".x")[1].split(".")[0])
    quarter, ctas, column = _cells(m, ws, active, instr, address, columns)
    block = _block(ws, quarter, column)
    if block is not None:
        span = slice(int(column[0]), int(column[0]) + columns)
        values = m.tmem.data[span, block[0], block[1]].copy()
        states = m.tmem.state[span, block[0], :, block[1]]
    else:
        wide = (column[:, None] + np.arange(columns)).T
        values = m.tmem.data[wide, quarter, ctas].reshape(columns, *ws.lead, 32)
        states = m.tmem.state[wide, quarter, :, ctas]
    if (states != VALID).any():
        code = int(states[states != VALID][0])
        bad = int(np.argwhere((states != VALID).reshape(columns, -1).any(axis=1))[0, 0])
        raise Hazard(
            f"{m.where(ws, instr)}: reads {m.labels.column_at(int(column[0]) + bad)}, which may not be "
            f"read: {REASONS[code]}"
        )
    return tuple(values)


def st_32x32b(m, ws, active, instr, address, values):
    columns = len(values)
    quarter, ctas, column = _cells(m, ws, active, instr, address, columns)
    block = _block(ws, quarter, column)
    if block is not None:
        first = int(column[0])
        for i, value in enumerate(values):
            m.tmem.data[first + i, block[0], block[1]] = value
        old = m.tmem.state[first : first + columns, block[0], :, block[1]]
    else:
        wide = (column[:, None] + np.arange(columns)).T
        for i, value in enumerate(values):
            m.tmem.data[wide[i], quarter, ctas] = ws.full(value).reshape(-1, 32)
        old = m.tmem.state[wide, quarter, :, ctas]
    if (old == MMA_PENDING).any():
        raise Hazard(
            f"{m.where(ws, instr)}: tcgen05.st writes {columns} columns from "
            f"{m.labels.column_at(int(column[0]))} on although {REASONS[MMA_PENDING]}"
        )
    _mark(m, quarter, ctas, column, columns, ST_PENDING)
    m.stores.append((ws, quarter, ctas, column, columns))


def _mark(m, quarter, ctas, column, columns, state) -> None:
    m.tmem.state[(column[:, None] + np.arange(columns)).T, quarter, :, ctas] = state


for _n in (1, 2, 4, 8, 16, 32, 64, 128):
    effect(f"tcgen05.ld.sync.aligned.32x32b.x{_n}.b32", "*u=a", "9.7.16.8.3")(ld_32x32b)
    effect(f"tcgen05.st.sync.aligned.32x32b.x{_n}.b32", "=a,*u", "9.7.16.8.4")(st_32x32b)


@effect("tcgen05.wait::st.sync.aligned", "=", "9.7.16.8.5")
def wait_st(m, ws, active, instr):
    """The warp's earlier tcgen05.st are complete."""
    left = []
    mine = np.zeros((m.n_warps, m.n_cta), bool)
    mine[ws.index] = True
    for record in m.stores:
        other, quarter, ctas, column, columns = record
        if other is ws:
            _mark(m, quarter, ctas, column, columns, VALID)
            continue
        warps, _ = other.flat_pairs()
        done = mine[warps, ctas]
        if done.any():
            _mark(m, quarter[done], ctas[done], column[done], columns, VALID)
        if not done.all():
            left.append((_Group(warps[~done], ctas[~done]), quarter[~done], ctas[~done], column[~done], columns))
    m.stores = left


@dataclass
class _Group:
    """Warps of a store that other warps of its batch have already waited for."""

    warps: np.ndarray
    ctas: np.ndarray

    def flat_pairs(self):
        return self.warps, self.ctas


@effect("tcgen05.wait::ld.sync.aligned", "=", "9.7.16.8.5")
def wait_ld(m, ws, active, instr):
    """Loads deliver their registers at once, so nothing is pending."""


@effect("tcgen05.fence::{before,after}_thread_sync", "=", "9.7.16.6.4")
def fence(m, ws, active, instr):
    """Orders tcgen05 work around a thread synchronization; the emulator runs it in program order of each warp."""


# -- tcgen05.mma and commit, §9.7.16.10 --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operand:
    """An MMA operand in shared memory: indices of its 16-byte chunks.

    K-major: `chunks` [rows, 2] of eight k each; MN-major: [16 k, rows / 8] of eight rows each.
    """

    chunks: np.ndarray
    mn_major: bool
    low: int  # shared offsets that the tile spans, in bytes
    high: int


_operands: dict[tuple[int, int, bool], Operand] = {}


def shared_operand(descriptor: int, rows: int, mn_major: bool, where: str) -> Operand:
    """Decode a shared-memory descriptor (§9.7.16.4.1, Table 40) of a 16-bit operand of `rows` rows and 16 k."""
    key = (descriptor, rows, mn_major)
    if key in _operands:
        return _operands[key]
    start, lbo, sbo = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 46 & 7 != 1:
        raise Hazard(f"{where}: shared-memory descriptor {descriptor:#018x}: bits 46-48 must be 0b001")
    if descriptor >> 49 & 7:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: a base offset other than 0 is not supported"
        )
    if descriptor >> 52 & 1:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: absolute leading-dimension mode is not supported"
        )
    bits = {0: 0, 2: 3, 4: 2, 6: 1}.get(descriptor >> 61)
    if bits is None:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: swizzle mode {descriptor >> 61} is not supported"
        )
    span = 16 << bits
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(2)[None]
        linear = start + row % 8 * (span if bits else 16) + row // 8 * sbo + chunk * (16 if bits else lbo)
    else:
        k, group = np.arange(16)[:, None], np.arange(rows // 8)[None]
        if bits:
            wide = span // 2 // 8
            linear = start + group % wide * 16 + group // wide * lbo + k % 8 * span + k // 8 * sbo
        else:
            linear = start + group * sbo + k % 8 * 16 + k // 8 * lbo
    address = linear ^ ((linear >> 3) & (((1 << bits) - 1) << 4))
    chunks = (address - WINDOW_BASE) >> 4
    found = _operands[key] = Operand(chunks, mn_major, int(chunks.min()) * 16, int(chunks.max() + 1) * 16)
    return found


@dataclass(frozen=True)
class Shape:
    """What an instruction descriptor (§9.7.16.4.2, Table 42) says."""

    m: int
    n: int
    a_bf16: bool
    b_bf16: bool
    a_mn: bool
    b_mn: bool
    a_sign: int
    b_sign: int


_shapes: dict[int, Shape] = {}


def decode_idesc(idesc: int, where: str) -> Shape:
    """Decode the instruction descriptor of kind::f16 with float32 accumulation."""
    if idesc in _shapes:
        return _shapes[idesc]
    if idesc & 7 or idesc >> 4 & 3 != 1 or idesc >> 30:
        raise UnsupportedInstruction(
            f"{where}: instruction descriptor {idesc:#010x}: only dense float32 accumulation is supported"
        )
    if (idesc >> 7 & 7) > 1 or (idesc >> 10 & 7) > 1:
        raise Hazard(f"{where}: instruction descriptor {idesc:#010x}: kind::f16 takes f16 or bf16 operands")
    shape = Shape(
        (idesc >> 24 & 31) << 4,
        (idesc >> 17 & 63) << 3,
        bool(idesc >> 7 & 1),
        bool(idesc >> 10 & 1),
        bool(idesc >> 15 & 1),
        bool(idesc >> 16 & 1),
        -1 if idesc >> 13 & 1 else 1,
        -1 if idesc >> 14 & 1 else 1,
    )
    if shape.m != 128:
        raise UnsupportedInstruction(f"{where}: M = {shape.m}: only M = 128 is supported with cta_group::1 so far")
    if not 16 <= shape.n <= 256 or shape.n % 16:
        raise Hazard(f"{where}: N = {shape.n} with M = 128: N must be a multiple of 16 from 16 to 256")
    _shapes[idesc] = shape
    return shape


@dataclass
class Mma:
    """One tcgen05.mma in one set of CTAs that agree on every operand."""

    ctas: np.ndarray
    d: int
    shape: Shape
    a: Operand | int  # shared chunks, or the first TMEM column
    b: Operand
    accumulate: bool
    where: object

    def fuses_with(self, later: Mma) -> bool:
        """Same accumulator and kind of operands, and `later` adds to it: their k extents may be concatenated."""
        return (
            later.accumulate
            and later.d == self.d
            and later.shape == self.shape
            and isinstance(later.a, int) == isinstance(self.a, int)
            and len(later.ctas) == len(self.ctas)
            and bool((later.ctas == self.ctas).all())
        )


@effect(
    "tcgen05.mma.cta_group::1.kind::f16"
    "{,.collector::a::discard,.collector::a::lastuse,.collector::a::fill,.collector::a::use}",
    "=a,x,U,u,?*u,?p,?k",
    "9.7.16.10.9.1",
)
def mma(m, ws, active, instr, d, a, b, idesc, disabled=None, accumulate=None, scale=None):
    """Issue D = A·B (+ D): queued; operands are read and D is written when a commit that follows it completes."""
    if scale is not None:
        raise UnsupportedInstruction(f"PTX line {instr.line}: scale-input-d is not supported yet")
    if disabled is not None and any(np.any(np.asarray(lanes)) for lanes in disabled):
        raise UnsupportedInstruction(f"PTX line {instr.line}: disable-output-lane is not supported yet")
    on = np.ones((*ws.lead, 32), bool) if active is None else ws.full(active)
    rows, lanes = np.nonzero(on.reshape(-1, 32))
    _, ctas = ws.flat_pairs()
    where = m.where(ws, instr, on)
    if len(np.unique(rows)) != len(rows):
        raise Hazard(f"{where}: tcgen05.mma is issued by several lanes of a warp: elect one")
    pick = lambda x: ws.full(x).reshape(-1, 32)[rows, lanes]  # noqa: E731
    columns = list(
        zip(
            pick(d).tolist(),
            pick(a[1]).tolist(),
            pick(b).tolist(),
            pick(idesc).tolist(),
            pick(True if accumulate is None else accumulate).tolist(),
            strict=True,
        )
    )
    chosen = ctas[rows]
    for key in dict.fromkeys(columns):
        same = np.array([c == key for c in columns])
        _issue(m, chosen[same], a[0], *key, where, instr.line)


def _issue(m, ctas, a_kind, d, a, b, idesc, accumulate, where, line) -> None:
    shape = decode_idesc(idesc, where)
    if d >> 16:
        raise Hazard(f"{where}: the accumulator's TMEM address {d:#x} must start at lane 0")
    ctas = np.sort(ctas)
    _check_columns(m, ctas, d, shape.n, "accumulator", where)
    state = m.tmem.state[d : d + shape.n, :, :, ctas]
    if (state == ST_PENDING).any():
        raise Hazard(f"{where}: the accumulator may not be used: {REASONS[ST_PENDING]}")
    if accumulate and (state == UNWRITTEN).any():
        raise Hazard(
            f"{where}: accumulates onto {shape.n} columns from {m.labels.column_at(d)} on, which were "
            "never written: the first MMA must not accumulate"
        )
    if a_kind == "tmem":
        if a >> 16 or shape.a_mn:
            raise Hazard(f"{where}: A in TMEM must start at lane 0 and cannot be transposed")
        _check_columns(m, ctas, a, 8, "A operand", where)
        _require_tmem(m, ctas, a, 8, where, (VALID,))
        operand_a: Operand | int = a
    else:
        operand_a = shared_operand(a, shape.m, shape.a_mn, where)
        _require_shared(m, ctas, operand_a, "A", where)
    operand_b = shared_operand(b, shape.n, shape.b_mn, where)
    _require_shared(m, ctas, operand_b, "B", where)
    m.tmem.state[d : d + shape.n, :, :, ctas] = MMA_PENDING
    m.tensor_core.issue(Mma(ctas, d, shape, operand_a, operand_b, bool(accumulate), where), line)


def _check_columns(m, ctas, start, count, what, where) -> None:
    if start + count > COLUMNS or not m.tmem.allocated[start : start + count, ctas].all():
        raise Hazard(f"{where}: {what} in TMEM columns {start} to {start + count - 1}, which are not all allocated")


def _require_tmem(m, ctas, start, count, where, legal) -> None:
    state = m.tmem.state[start : start + count, :, :, ctas]
    bad = ~np.isin(state, legal)
    if bad.any():
        raise Hazard(
            f"{where}: the A operand at {m.labels.column_at(start + int(np.argwhere(bad)[0, 0]))} may not "
            f"be read: {REASONS[int(state[bad][0])]}"
        )


def _require_shared(m, ctas, operand: Operand, name: str, where: str) -> None:
    if operand.low < 0 or operand.high > m.smem.size:
        raise Hazard(
            f"{where}: the descriptor of {name} reaches shared offsets {operand.low} to "
            f"{operand.high - 1}, the CTA has {m.smem.size} bytes"
        )
    found = m.smem.invalid_chunk(ctas, operand.chunks)
    if found is not None:
        cta, chunk, state = found
        raise Hazard(
            f"{where}: operand {name} of CTA {m.name_cta(cta)} at {m.labels.shared_at(chunk * 16)} may not "
            f"be read: {REASONS[state]}"
        )


class TensorCore:
    """Runs queued MMAs in issue order; neighbours that accumulate onto each other become one matrix product."""

    def __init__(self, machine):
        self.machine = machine
        self.waiting: list[Mma] = []
        self.issued: list[tuple[Mma, np.ndarray]] = []  # not executed yet, with the CTAs (bool) where that is so

    def issue(self, op: Mma, line: int) -> None:
        remaining = np.zeros(self.machine.n_cta, bool)
        remaining[op.ctas] = True
        self.issued.append((op, remaining))
        self.machine.queue.add(op.ctas, -1, lambda ctas: self._take(op, ctas), line, fifo=True)

    def _take(self, op: Mma, ctas: np.ndarray) -> None:
        for issued, remaining in self.issued:
            if issued is op:
                remaining[ctas] = False
        self.issued = [(issued, remaining) for issued, remaining in self.issued if remaining.any()]
        if len(ctas) != len(op.ctas):
            op = Mma(ctas, op.d, op.shape, op.a, op.b, op.accumulate, op.where)
        if self.waiting and not self.waiting[-1].fuses_with(op):
            self.flush()
        self.waiting.append(op)

    def flush(self) -> None:
        """Execute what has been collected."""
        if not self.waiting:
            return
        ops, self.waiting = self.waiting, []
        m, first = self.machine, ops[0]
        shape, ctas, n = first.shape, first.ctas, len(first.ctas)
        for op in ops:
            if isinstance(op.a, int):
                _require_tmem(m, ctas, op.a, 8, op.where.during("when it executes"), (VALID, MMA_PENDING))
            else:
                _require_shared(m, ctas, op.a, "A", op.where.during("when it executes"))
            _require_shared(m, ctas, op.b, "B", op.where.during("when it executes"))
        a = self._a(ops, ctas) * np.float32(shape.a_sign) if shape.a_sign < 0 else self._a(ops, ctas)
        b = self._shared([op.b for op in ops], ctas, shape.b_bf16)
        if shape.b_sign < 0:
            b = -b
        product = np.matmul(b, a)  # [n, N, M]: the transpose of D
        span = slice(first.d, first.d + shape.n)
        rows = product.reshape(n, shape.n, 4, 32).transpose(1, 2, 0, 3)
        view = m.tmem.data.view(np.float32)
        if first.accumulate:
            rows = rows + view[span, :, ctas]
        view[span, :, ctas] = rows
        m.tmem.state[span, :, :, ctas] = VALID
        for (
            later,
            remaining,
        ) in self.issued:  # an MMA further back in the queue will overwrite it: still not for reading
            still = ctas[remaining[ctas]]
            if len(still) and later.d < span.stop and span.start < later.d + later.shape.n:
                m.tmem.state[later.d : later.d + later.shape.n, :, :, still] = MMA_PENDING

    def _a(self, ops: list[Mma], ctas: np.ndarray) -> np.ndarray:
        """A transposed: float32 [n, K, M]."""
        shape = ops[0].shape
        if isinstance(ops[0].a, int):
            columns = np.concatenate([np.arange(op.a, op.a + 8) for op in ops])
            packed = self.machine.tmem.data[columns][:, :, ctas]  # [8·steps, 4, n, 32]
            halves = packed.view(np.uint16).reshape(*packed.shape, 2)
            bits = halves.transpose(2, 0, 4, 1, 3).reshape(len(ctas), -1, 128)
            return (bf16_to_f32 if shape.a_bf16 else f16_to_f32)(np.ascontiguousarray(bits))
        return self._shared([op.a for op in ops], ctas, shape.a_bf16).swapaxes(1, 2)

    def _shared(self, operands: list[Operand], ctas: np.ndarray, bf16: bool) -> np.ndarray:
        """A shared operand: float32 [n, rows, K]."""
        mn_major = operands[0].mn_major
        chunks = np.concatenate([o.chunks for o in operands], axis=0 if mn_major else 1)
        bits = take_chunks(self.machine.smem.chunks, ctas, chunks).view(np.uint16)  # [n, rows or K, the other]
        values = (bf16_to_f32 if bf16 else f16_to_f32)(bits)
        return values.swapaxes(1, 2) if mn_major else values


@effect("tcgen05.commit.cta_group::1.mbarrier::arrive::one{,.shared::cluster,.shared::cta}.b64", "=a", "9.7.16.10.10")
def commit(m, ws, active, instr, address):
    """One arrival on the mbarrier when all earlier asynchronous tcgen05 work of the thread is complete."""
    where = m.where(ws, instr, True if active is None else active)
    for offset, ctas, lanes in by_address(m, ws, active, instr, address):
        if (lanes != 1).any():
            raise Hazard(f"{where}: tcgen05.commit is issued by {int(lanes.max())} lanes of a CTA: elect one")
        slot = m.mbarriers.slot(offset)
        m.mbarriers.require_live(slot, ctas, where)

        def complete(done, slot=slot):
            m.tensor_core.flush()
            m.wake(m.mbarriers.arrive(slot, done, 1, where))

        m.queue.add(ctas, slot, complete, instr.line, fifo=True)
