"""Tensor memory and the fifth-generation tensor core (PTX ISA 9.1 §9.7.16), cta_group::1."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..descriptors import Operand, Shape, decode_idesc, is_common, shared_operand
from ..errors import Hazard, UnsupportedInstruction
from ..memory import CP_PENDING, MMA_PENDING, REASONS, ST_PENDING, UNWRITTEN, VALID, VALID_WORD, TensorMemory
from ..product import Call, issue_product
from ..table import effect
from ..tensorcore import Mma, check_columns, require_shared, require_tmem
from .memory import shared_offsets

COLUMNS = TensorMemory.COLUMNS


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


@effect("tcgen05.alloc.cta_group::{1,2}.sync.aligned{,.shared::cta}.b32", "=a,u", "9.7.16.7.1")
def alloc(m, ws, active, instr, destination, columns):
    columns = _scalar(ws, columns)
    where = m.where(ws, instr)
    if not 32 <= columns <= COLUMNS or columns & (columns - 1):
        raise Hazard(f"{where}: tcgen05.alloc of {columns} columns: the count must be a power of two from 32 to 512")
    offset = _scalar(ws, shared_offsets(m, ws, None, instr, destination, 4))
    if m.races:
        m.races.access(ws, None, instr, np.int64(offset), 4, True)
    for cta in _one_warp_a_cta(m, ws, active, instr):
        if m.tmem.relinquished[cta]:
            raise Hazard(f"{where}: tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        if m.strict and columns > m.tmem.requested[cta]:
            before = f"after one of {m.tmem.requested[cta]}"
            raise Hazard(
                f"{where}: tcgen05.alloc of {columns} columns {before}: from one allocation to the next the count must "
                "not increase"
            )
        m.tmem.requested[cta] = columns
        m.tensor_core.checked.clear()
        start = m.tmem.allocate(cta, columns)
        if start is None:
            raise Hazard(
                f"{where}: {columns} TMEM columns are not free in CTA {m.name_cta(cta)}: the allocation "
                "would block for ever"
            )
        if m.races and "cta_group::1" in instr.opcode:  # a pair allocates together, and so knows of both CTAs
            m.races.allocate_columns(ws, instr, slice(start, start + columns), cta)
        m.smem.flat[4][(cta * m.smem.stride + offset) // 4] = start
        if m.strict:
            m.smem.flat_state[4][(cta * m.smem.stride + offset) // 4] = VALID_WORD[4]


@effect("tcgen05.dealloc.cta_group::{1,2}.sync.aligned.b32", "=u,u", "9.7.16.7.1")
def dealloc(m, ws, active, instr, address, columns):
    start, columns = _scalar(ws, address), _scalar(ws, columns)
    for cta in _one_warp_a_cta(m, ws, active, instr):
        if m.tmem.blocks[cta].get(start) != columns:
            raise Hazard(
                f"{m.where(ws, instr)}: tcgen05.dealloc of {columns} columns at {start:#x}, which is not "
                f"an allocation of CTA {m.name_cta(cta)}: {m.tmem.blocks[cta]}"
            )
        for code in (MMA_PENDING, CP_PENDING) if m.strict else ():
            if (m.tmem.state[start : start + columns, :, :, cta] == code).any():
                raise Hazard(f"{m.where(ws, instr)}: tcgen05.dealloc although {REASONS[code]}")
        if m.races:
            m.races.release_columns(ws, instr, slice(start, start + columns))
        del m.tmem.blocks[cta][start]
        m.tensor_core.checked.clear()
        m.tmem.allocated[start : start + columns, cta] = False
        if m.strict:
            m.tmem.state[start : start + columns, :, :, cta] = UNWRITTEN


@effect("tcgen05.relinquish_alloc_permit.cta_group::{1,2}.sync.aligned", "=", "9.7.16.7.1")
def relinquish(m, ws, active, instr):
    m.tmem.relinquished[_one_warp_a_cta(m, ws, active, instr)] = True


# -- tcgen05.ld, st, wait, §9.7.16.8 ----------------------------------------------------------------------------------
def warp_addresses(m, ws, active, instr, address, whole: bool = True):
    """Quarter, half, CTA and first column of each warp; `whole`: of an access to all 32 lanes of its quarter."""
    if active is not None:
        raise Hazard(
            f"{m.where(ws, instr, active)}: {instr.opcode} is executed by part of a warp: all 32 lanes "
            "must converge on it"
        )
    address = np.asarray(address)
    key = "taddr", whole, address.shape, address.tobytes()
    if key not in ws.known:
        ws.known[key] = _warp_addresses(m, ws, instr, address, whole)
    return ws.known[key]


def _warp_addresses(m, ws, instr, address: np.ndarray, whole: bool):
    per_warp = ws.full(address).reshape(-1, 32)
    uneven = (per_warp != per_warp[:, :1]).any(axis=1)
    if uneven.any():
        raise Hazard(f"{at_warps(m, ws, instr, uneven)}: the lanes of a warp give different TMEM addresses")
    taddr = per_warp[:, 0].astype(np.int64)
    warps, ctas = ws.flat_pairs()
    quarter, column, lane = warps % 4, taddr & 0xFFFF, taddr >> 16
    half = lane - quarter * 32
    foreign = half != 0 if whole else (half != 0) & (half != 16)
    if foreign.any():
        at = int(np.argmax(foreign))
        first = "lanes" if whole else "16 lanes of"
        raise Hazard(
            f"{at_warps(m, ws, instr, foreign)}: the warp addresses TMEM lane {lane[at]} (column {column[at]}), "
            f"but may touch only {first} {quarter[at] * 32} to {quarter[at] * 32 + 31}"
        )
    return quarter, half // 16, ctas, column


def require_columns(m, ws, instr, ctas, column, offsets: np.ndarray) -> None:
    """The columns at these offsets from `column[i]` exist and are allocated in CTA `ctas[i]`."""
    last = int(offsets[-1])
    outside = column + last >= COLUMNS
    if outside.any():
        raise Hazard(
            f"{at_warps(m, ws, instr, outside)}: TMEM columns {int(column.max())} to "
            f"{int(column.max()) + last} are out of bounds (512 columns)"
        )
    wide = column[:, None] + offsets
    free = ~m.tmem.allocated[wide, ctas[:, None]]
    if free.any():
        at = np.argwhere(free)[0]
        place = f"{m.labels.column_at(int(wide[tuple(at)]))} is not allocated in CTA {m.name_cta(ctas[at[0]])}"
        raise Hazard(f"{at_warps(m, ws, instr, free.any(axis=1))}: {place}")


def _cells(m, ws, active, instr, address, columns: int):
    """Quarter, CTA and first column of each warp for a 32x32b access, and the block that these make (see `_block`);
    checks lanes, bounds and allocation."""
    found = warp_addresses(m, ws, active, instr, address)
    quarter, _, ctas, column = found
    key = "block", id(found)
    if key not in ws.known:
        ws.known[key] = _block(ws, quarter, column), int(column.max())
    block, last = ws.known[key]
    if m.strict or last + columns > COLUMNS:
        require_columns(m, ws, instr, ctas, column, np.arange(columns))
    return quarter, ctas, column, block


def at_warps(m, ws, instr, bad: np.ndarray):
    """Where the first warp in `bad` (bool, one a warp of the batch) stands."""
    return m.where(ws, instr, bad.reshape(*ws.lead, 1))


def _require_cells(m, ws, instr, states, column, illegal: np.ndarray, what: tuple[str, str]) -> None:
    """Raise if any cell is in an illegal state; `states` u8 [columns, …] with the batch in two of the other axes."""
    if illegal.any():
        bad = illegal.any(axis=(0, 2))
        first = int(np.argmax(bad.reshape(-1)))
        which = int(np.argmax(np.moveaxis(illegal, 2, -1).any(axis=-1).reshape(len(illegal), -1)[:, first]))
        code = int(states[illegal][0])
        place = m.labels.column_at(int(column[first]) + which)
        raise Hazard(f"{at_warps(m, ws, instr, bad)}: {what[0]} {place}, which may not be {what[1]}: {REASONS[code]}")


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


@lru_cache(maxsize=64)
def _columns_of(opcode: str) -> int:
    return int(opcode.split(".x")[1].split(".")[0])


def ld_32x32b(m, ws, active, instr, address):
    columns = _columns_of(instr.opcode)
    quarter, ctas, column, block = _cells(m, ws, active, instr, address, columns)
    if block is not None:
        span = slice(int(column[0]), int(column[0]) + columns)
        values = m.tmem.data[span, block[0], block[1]].copy()
    else:
        wide = (column[:, None] + np.arange(columns)).T
        values = m.tmem.data[wide, quarter, ctas].reshape(columns, *ws.lead, 32)
    if m.strict:
        states = _states(m, block, quarter, ctas, column, columns)
        _require_cells(m, ws, instr, states, column, states != VALID, ("reads", "read"))
    if m.races:
        m.races.tmem_load(ws, instr, _cells_at(block, quarter, ctas, column, columns))
    return values


def st_32x32b(m, ws, active, instr, address, values):
    columns = len(values)
    quarter, ctas, column, block = _cells(m, ws, active, instr, address, columns)
    if block is not None:
        first = int(column[0])
        if isinstance(values, np.ndarray):
            m.tmem.data[first : first + columns, block[0], block[1]] = values
        else:
            for i, value in enumerate(values):
                m.tmem.data[first + i, block[0], block[1]] = value
    else:
        wide = (column[:, None] + np.arange(columns)).T
        for i, value in enumerate(values):
            m.tmem.data[wide[i], quarter, ctas] = ws.full(value).reshape(-1, 32)
    if not m.strict:
        return
    old = _states(m, block, quarter, ctas, column, columns)
    _require_cells(m, ws, instr, old, column, (old == MMA_PENDING) | (old == CP_PENDING), ("writes", "written"))
    m.tensor_core.check_columns_read(ctas, column, columns, m.where(ws, instr))
    m.races.tmem_store(ws, instr, _cells_at(block, quarter, ctas, column, columns))
    mark_cells(m, quarter, ctas, column, columns, ST_PENDING)
    m.stores.append((ws, quarter, ctas, column, columns))


def _cells_at(block, quarter, ctas, column, columns: int) -> tuple:
    """Index of the cells that a batch of warps touches in arrays like `TensorMemory.state`."""
    if block is not None:
        return slice(int(column[0]), int(column[0]) + columns), block[0], slice(None), block[1]
    return (column[:, None] + np.arange(columns)).T, quarter, slice(None), ctas


def _states(m, block, quarter, ctas, column, columns: int) -> np.ndarray:
    """States of the cells that a batch of warps touches."""
    return m.tmem.state[_cells_at(block, quarter, ctas, column, columns)]


def mark_cells(m, quarter, ctas, column, columns, state) -> None:
    """`columns`: how many from `column` on, or (their offsets, the half of each quarter)."""
    offsets, half = (np.arange(columns), slice(None)) if isinstance(columns, int) else columns
    m.tmem.state[(column[:, None] + offsets).T, quarter, half, ctas] = state


for _n in (1, 2, 4, 8, 16, 32, 64, 128):
    effect(f"tcgen05.ld.sync.aligned.32x32b.x{_n}.b32", "*u=a", "9.7.16.8.3")(ld_32x32b)
    effect(f"tcgen05.st.sync.aligned.32x32b.x{_n}.b32", "=a,*u", "9.7.16.8.4")(st_32x32b)


@effect("tcgen05.wait::st.sync.aligned", "=", "9.7.16.8.5")
def wait_st(m, ws, active, instr):
    """The warp's earlier tcgen05.st are complete."""
    if m.races:
        m.races.waited_for("st", ws, active)
    if not m.stores:
        return
    left = []
    mine = np.zeros((m.n_warps, m.n_cta), bool)
    mine[ws.index] = True
    for record in m.stores:
        other, quarter, ctas, column, columns = record
        if other is ws:
            mark_cells(m, quarter, ctas, column, columns, VALID)
            continue
        warps, _ = other.flat_pairs()
        done = mine[warps, ctas]
        if done.any():
            mark_cells(m, quarter[done], ctas[done], column[done], columns, VALID)
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
    """Loads deliver their registers at once, so nothing is pending but for clocks."""
    if m.races:
        m.races.waited_for("ld", ws, active)


@effect("tcgen05.fence::{before,after}_thread_sync", "=", "9.7.16.6.4")
def fence(m, ws, active, instr):
    """Orders tcgen05 work around a thread synchronization; that it is there is all that can be seen of it here."""
    if m.races and m.races.advice:
        m.races.advice.fenced(*m.races.chosen(ws, active), "before" in instr.opcode)


# -- tcgen05.mma and commit, §9.7.16.10 --------------------------------------------------------------------------------
@effect(
    "tcgen05.mma.cta_group::{1,2}.kind::f16"
    "{,.collector::a::discard,.collector::a::lastuse,.collector::a::fill,.collector::a::use}",
    "=a,x,U,u,?*u,?p,?k",
    "9.7.16.10.9.1",
)
def mma(m, ws, active, instr, d, a, b, idesc, disabled=None, accumulate=True, scale=0, factors=(), blocks=0):
    """Issue D = A·B (+ D): queued; operands are read and D is written when a commit that follows it completes."""
    rows, lanes, where = one_lane_each(m, ws, active, instr)
    kind, stationary, group = _modifiers(instr.opcode)
    disabled = () if disabled is None else disabled
    if disabled and len(disabled) != 4 * group:
        raise Hazard(f"{where}: disable-output-lane has {len(disabled)} words, cta_group::{group} takes {4 * group}")

    operands = (d, a[1], b, idesc, accumulate, *disabled, *factors)
    chosen = ws.flat_pairs()[1][rows]
    for key, mine in _alike(ws, rows, lanes, chosen, operands):
        ctas, words = taking_part(m, mine, group, where), key[5:]
        plain = kind == "f16" and not stationary and not scale and not any(words)
        if plain and is_common(key[3], group):
            _issue(m, ctas, group, a[0], *key[:5], where)
            continue
        call = Call(
            kind, group, stationary, blocks, a[0] == "tmem", *key[:5], int(scale), *_split(words, len(disabled))
        )
        issue_product(m, ctas, call, where)


def _alike(ws, rows, lanes, ctas, operands) -> list[tuple[tuple, np.ndarray]]:
    """Operands that issuing lanes agree on, and the CTAs of these lanes."""
    if len(rows) == 1:
        at = int(rows[0]) * 32 + int(lanes[0])
        return [(tuple(ws.item(x, at) for x in operands), ctas)]
    columns = list(zip(*(ws.pick(x, rows, lanes).tolist() for x in operands), strict=True))
    different = dict.fromkeys(columns)
    if len(different) == 1:
        return [(columns[0], ctas)]
    return [(key, ctas[[i for i, c in enumerate(columns) if c == key]]) for key in different]


@lru_cache(maxsize=256)
def _modifiers(opcode: str) -> tuple[str, bool, int]:
    """Kind, weight-stationary, and CTAs of a group."""
    parts = opcode.split(".")
    return opcode.split("kind::")[1].split(".")[0], parts[2] == "ws", int(opcode.split("cta_group::")[1][0])


def _split(words: tuple, count: int) -> tuple[tuple, tuple]:
    return words[:count], words[count:]


def one_lane_each(m, ws, active, instr):
    """(warps of the batch, lanes) that issue an operation of one thread, and where."""
    key = "issue", None if active is None else np.asarray(active).tobytes()
    if key not in ws.known:
        on = ws.full(True if active is None else active)
        ws.known[key] = (*np.nonzero(on.reshape(-1, 32)), on)
    rows, lanes, on = ws.known[key]
    where = m.where(ws, instr, on)
    if len(rows) > 1 and (rows[1:] == rows[:-1]).any():
        name = ".".join(instr.opcode.split(".")[:2])
        raise Hazard(f"{where}: {name} is issued by several lanes of a warp: elect one")
    return rows, lanes, where


def taking_part(m, issuing: np.ndarray, group: int, where) -> np.ndarray:
    """CTAs of an MMA, ascending: the issuing ones, and with cta_group::2 the odd CTA of each pair."""
    if group == 1:
        return issuing if len(issuing) == 1 else np.sort(issuing)
    if m.cluster.size % 2 or (m.cluster.rank(issuing) % 2).any():
        raise Hazard(f"{where}: cta_group::2 needs a cluster of CTA pairs, and the even CTA issues")
    return np.sort(np.concatenate([issuing, issuing + 1]))


def _issue(m, ctas, group, a_kind, d, a, b, idesc, accumulate, where) -> None:
    bits = m.queue.sets.bits(ctas)
    key = bits, group, a_kind, d, a, b, idesc
    checked = m.tensor_core.checked.get(key)
    if checked is None:
        checked = _check_operands(m, ctas, group, a_kind, d, a, b, idesc, where)
        if not m.strict:
            m.tensor_core.checked[key] = checked
    shape, operand_a, operand_b = checked
    if m.strict:
        _check_accumulator(m, ctas, d, shape, accumulate, where)
        m.tmem.state[d : d + shape.n, :, :, ctas] = MMA_PENDING
    m.tensor_core.issue(Mma(ctas, bits, d, shape, operand_a, operand_b, bool(accumulate), where))


def _check_operands(m, ctas, group, a_kind, d, a, b, idesc, where) -> tuple[Shape, Operand | int, Operand]:
    """What the words say; they are legal, and what they name may be used."""
    shape = decode_idesc(idesc, group, where)
    if d >> 16:
        raise Hazard(f"{where}: the accumulator's TMEM address {d:#x} must start at lane 0")
    check_columns(m, ctas, d, shape.n, "accumulator", where)
    if a_kind == "tmem":
        if a >> 16 or shape.a_mn:
            raise Hazard(f"{where}: A in TMEM must start at lane 0 and cannot be transposed")
        check_columns(m, ctas, a, 8, "A operand", where)
        require_tmem(m, ctas, a, 8, where, (VALID,))
        operand_a: Operand | int = a
    else:
        operand_a = shared_operand(a, shape.m, shape.a_mn, where)
        require_shared(m, ctas, operand_a, "A", where)
    operand_b = shared_operand(b, shape.n // group, shape.b_mn, where)
    require_shared(m, ctas, operand_b, "B", where)
    return shape, operand_a, operand_b


def _check_accumulator(m, ctas, d, shape, accumulate, where) -> None:
    state = m.tmem.state[d : d + shape.n, :, :, ctas]
    for code in (ST_PENDING, CP_PENDING):
        if (state == code).any():
            raise Hazard(f"{where}: the accumulator may not be used: {REASONS[code]}")
    if accumulate and (state == UNWRITTEN).any():
        raise Hazard(
            f"{where}: accumulates onto {shape.n} columns from {m.labels.column_at(d)} on, which were "
            "never written: the first MMA must not accumulate"
        )


@effect(
    "tcgen05.commit.cta_group::{1,2}.mbarrier::arrive::one{,.shared::cluster,.shared::cta}.b64", "=a", "9.7.16.10.10"
)
@effect(
    "tcgen05.commit.cta_group::{1,2}.mbarrier::arrive::one{,.shared::cluster}.multicast::cluster.b64",
    "=a,h",
    "9.7.16.10.10",
)
def commit(m, ws, active, instr, address, mask=None):
    """One arrival on the mbarrier when all earlier asynchronous tcgen05 work of the thread is complete.

    With a multicast mask it arrives at the same offset in every CTA of the mask.
    """
    rows, lanes, where = one_lane_each(m, ws, active, instr)
    all_warps, all_ctas = ws.flat_pairs()
    issuing = all_ctas[rows]
    if len(issuing) > 1 and len(np.unique(issuing)) != len(issuing):
        raise Hazard(f"{where}: tcgen05.commit is issued by several lanes of a CTA: elect one")
    addresses = ws.pick(address, rows, lanes)
    offsets = ws.pick(shared_offsets(m, ws, active, instr, address, 8), rows, lanes)
    named = m.cluster.target(issuing, addresses, where)
    masks = None if mask is None else ws.pick(mask, rows, lanes)
    group = int(instr.opcode.split("cta_group::")[1][0])
    clocks = m.races.commit(all_warps[rows], issuing) if m.races else None
    for offset in dict.fromkeys(offsets.tolist()):
        here = np.nonzero(offsets == offset)[0]
        slot = m.mbarriers.slot(offset)
        targets = {
            int(issuing[i]): [int(named[i])] if masks is None else m.cluster.peers(int(issuing[i]), int(masks[i]))
            for i in here
        }
        reached = np.array(sorted({cta for ctas in targets.values() for cta in ctas}))
        m.mbarriers.require_live(slot, reached, where)
        published = {}
        if m.races:
            m.races.commit_uses(slot, targets, all_warps[rows][here], issuing[here], where)
            published = {int(issuing[i]): (int(all_warps[rows[i]]), int(issuing[i]), clocks[i]) for i in here}

        def complete(done, slot=slot, targets=targets, published=published):
            m.tensor_core.flush()
            for cta in m.queue.sets.array(done).tolist() if m.races else ():
                if cta in targets:
                    m.races.commit_arrives(slot, targets[cta], *published[cta])
            arrivals = Counter(t for cta in m.queue.sets.array(done).tolist() for t in targets.get(cta, ()))
            ctas = np.array(sorted(arrivals))
            counts = np.array([arrivals[cta] for cta in ctas.tolist()])
            m.wake(slot, m.mbarriers.arrive(slot, ctas, counts, where))

        bits = m.queue.sets.bits(taking_part(m, issuing[here], group, where))
        m.queue.add(bits, {slot: bits}, complete, fifo=True)
