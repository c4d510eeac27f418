"""mbarriers (PTX ISA 9.1 §9.7.13.15)."""

from __future__ import annotations

import numpy as np

from ..errors import Hazard
from ..memory import MBARRIER, UNWRITTEN
from ..table import effect
from ..warps import common
from .memory import common_offset, shared_offsets

COUNT_BITS = 20  # of a pending count


def by_address(m, ws, active, instr, address, each=1):
    """Group the lanes that run by mbarrier: yields (shared offset, CTAs it lies in, the sum of `each` over the lanes of
    each CTA).
    """
    offset, amount = common_offset(m, address, 8), common(each)
    if offset is not None and amount is not None:
        unique, lanes = ws.lanes_by_cta(active)
        yield offset, unique, lanes * amount
        return
    offsets = shared_offsets(m, ws, active, instr, address, 8)
    _, ctas = ws.flat_pairs()
    on = np.ones((len(ctas), 32), bool) if active is None else ws.full(active).reshape(-1, 32)
    lanes_of = np.broadcast_to(ctas[:, None], on.shape)[on]
    targets = m.cluster.target(lanes_of, ws.full(address).reshape(-1, 32)[on], m.where(ws, instr, on.any()))
    places = ws.full(offsets).reshape(-1, 32)[on]
    amounts = ws.full(each).reshape(-1, 32)[on].astype(np.int64)
    for offset in np.unique(places):
        here = places == offset
        totals = np.bincount(targets[here], amounts[here], m.n_cta).astype(np.int64)
        unique = np.unique(targets[here])
        yield int(offset), unique, totals[unique]


@effect("mbarrier.init{,.shared,.shared::cta}.b64", "=a,u", "9.7.13.15.9")
def mbarrier_init(m, ws, active, instr, address, count):
    offsets = ws.full(shared_offsets(m, ws, active, instr, address, 8))
    lanes = np.ones(offsets.shape, bool) if active is None else ws.full(active)
    for offset, ctas, inits in by_address(m, ws, active, instr, address):
        where = m.where(ws, instr, lanes & (offsets == offset))
        if m.strict and (inits > 1).any():
            if not _alike(ws, lanes & (offsets == offset), count):
                raise Hazard(
                    f"{where}: {int(inits.max())} lanes initialize the same mbarrier; to do so with a live one is "
                    "undefined: elect one"
                )
            if m.races.advice:
                m.races.advice.initialized_by_all(instr, int(inits.max()))
        value = _uniform(ws, lanes & (offsets == offset), count, where)
        m.mbarriers.init(offset, ctas, value, where)
        if m.races:
            m.races.mbarrier_init(ws, active, instr, m.mbarriers.slot(offset), ctas, where)
        if m.strict:
            m.smem.state[ctas, offset : offset + 8] = MBARRIER


@effect("mbarrier.inval{,.shared,.shared::cta}.b64", "=a", "9.7.13.15.10")
def mbarrier_inval(m, ws, active, instr, address):
    for offset, ctas, _ in by_address(m, ws, active, instr, address):
        slot = m.mbarriers.slot(offset)
        m.mbarriers.require_live(slot, ctas, m.where(ws, instr))
        if m.races:
            m.races.mbarrier_inval(ws, active, slot, ctas, m.where(ws, instr))
        m.mbarriers.invalidate(slot, ctas)
        if m.strict:
            m.smem.state[ctas, offset : offset + 8] = UNWRITTEN


def _arrive(m, ws, active, instr, address, count, nbytes):
    where = m.where(ws, instr, True if active is None else active)
    no_complete, drops = ".noComplete" in instr.opcode, "arrive_drop" in instr.opcode
    if m.races:
        m.races.arrivals(ws, active, instr, address)
    wanted = getattr(instr.operands[0], "index", None) in m.program.read  # most throw it away
    state = _states(m, ws, active, instr, address, count) if wanted else np.uint64(0)
    if nbytes is not None:
        for offset, ctas, total in by_address(m, ws, active, instr, address, nbytes):
            m.mbarriers.add_tx(m.mbarriers.slot(offset), ctas, total, where)
    for offset, ctas, arrivals in by_address(m, ws, active, instr, address, 1 if count is None else count):
        slot = m.mbarriers.slot(offset)
        if no_complete and (m.mbarriers.pending[slot, ctas] <= arrivals).any():
            raise Hazard(f"{where}: an arrival with .noComplete completes the phase of the {m.mbarriers.name(slot)}")
        if drops:
            m.mbarriers.drop(slot, ctas, arrivals, where)
        m.wake(slot, m.mbarriers.arrive(slot, ctas, arrivals, where))
    return state


def _states(m, ws, active, instr, address, count) -> np.ndarray:
    """The opaque state that each lane's arrival finds: its phase, and in the low bits the pending count before it."""
    offsets = ws.full(shared_offsets(m, ws, active, instr, address, 8)).reshape(-1, 32)
    _, ctas = ws.flat_pairs()
    on = np.ones(offsets.shape, bool) if active is None else ws.full(active).reshape(-1, 32)
    amounts = np.where(on, ws.full(1 if count is None else count).reshape(-1, 32), 0).astype(np.int64)
    found = np.zeros(offsets.shape, np.uint64)
    for cta, offset in {*zip(np.broadcast_to(ctas[:, None], on.shape)[on].tolist(), offsets[on].tolist(), strict=True)}:
        slot = m.mbarriers.slot(offset)
        here = on & (offsets == offset) & (ctas[:, None] == cta)
        before = np.cumsum(np.where(here, amounts, 0)).reshape(on.shape) - amounts
        state = (m.mbarriers.phase[slot, cta] << COUNT_BITS) + m.mbarriers.pending[slot, cta] - before
        found[here] = state[here].astype(np.uint64)
    return found.reshape(*ws.lead, 32)


def _alike(ws, lanes, count) -> bool:
    """Whether the lanes belong to one warp of each CTA and give one count: silicon then writes it as often."""
    _, ctas = ws.flat_pairs()
    some = ctas[lanes.reshape(-1, 32).any(axis=1)]
    counts = ws.full(count)[lanes]
    return len(np.unique(some)) == len(some) and counts.min() == counts.max()


def _uniform(ws, active, value, where) -> int:
    values = ws.full(value)
    values = values.reshape(-1) if active is None else values[ws.full(active)]
    if values.min() != values.max():
        raise Hazard(f"{where}: lanes give different counts to one mbarrier, which the emulator does not support")
    return int(values[0])


_ORDER = "{,.release.cta,.release.cluster,.relaxed.cta,.relaxed.cluster}"
_PLACE = "{,.shared,.shared::cta,.shared::cluster}"
_OWN = "{,.shared,.shared::cta}"


@effect(f"mbarrier.arrive{_ORDER}{_PLACE}.b64", "U=a,?u", "9.7.13.15.13")
@effect(f"mbarrier.arrive_drop{_ORDER}{_PLACE}.b64", "U=a,?u", "9.7.13.15.14")
@effect(f"mbarrier.arrive.noComplete{{,.release.cta}}{_OWN}.b64", "U=a,u", "9.7.13.15.13")
@effect(f"mbarrier.arrive_drop.noComplete{{,.release.cta}}{_OWN}.b64", "U=a,u", "9.7.13.15.14")
def mbarrier_arrive(m, ws, active, instr, address, count=None):
    return _arrive(m, ws, active, instr, address, count, None)


@effect(f"mbarrier.arrive.expect_tx{_ORDER}{_PLACE}.b64", "U=a,u", "9.7.13.15.13")
@effect(f"mbarrier.arrive_drop.expect_tx{_ORDER}{_PLACE}.b64", "U=a,u", "9.7.13.15.14")
def mbarrier_arrive_expect_tx(m, ws, active, instr, address, nbytes):
    return _arrive(m, ws, active, instr, address, None, nbytes)


@effect(f"mbarrier.expect_tx{{,.relaxed.cta,.relaxed.cluster}}{_PLACE}.b64", "=a,u", "9.7.13.15.11")
def mbarrier_expect_tx(m, ws, active, instr, address, nbytes):
    where = m.where(ws, instr, True if active is None else active)
    if m.races:
        m.races.arrivals(ws, active, instr, address, publish=False)
    for offset, ctas, total in by_address(m, ws, active, instr, address, nbytes):
        m.mbarriers.add_tx(m.mbarriers.slot(offset), ctas, total, where)


@effect(f"mbarrier.complete_tx{{,.relaxed.cta,.relaxed.cluster}}{_PLACE}.b64", "=a,u", "9.7.13.15.12")
def mbarrier_complete_tx(m, ws, active, instr, address, nbytes):
    """Counts bytes without moving any."""
    where = m.where(ws, instr, True if active is None else active)
    if m.races:
        m.races.arrivals(ws, active, instr, address, publish=False)
    for offset, ctas, total in by_address(m, ws, active, instr, address, nbytes):
        slot = m.mbarriers.slot(offset)
        m.wake(slot, m.mbarriers.complete_tx(slot, ctas, total, where))


@effect("mbarrier.pending_count.b64", "u=U", "9.7.13.15.18")
def pending_count(m, ws, active, instr, state):
    return (state & np.uint64((1 << COUNT_BITS) - 1)).astype(np.uint32)


_WAITS = "{,.acquire.cta,.acquire.cluster,.relaxed.cta,.relaxed.cluster}"


@effect(f"mbarrier.test_wait{_WAITS}{_OWN}.b64", "p=a,U", "9.7.13.15.16", starts_block=True)
@effect(f"mbarrier.try_wait{_WAITS}{_OWN}.b64", "p=a,U,?u", "9.7.13.15.16", starts_block=True)
def mbarrier_wait_state(m, ws, active, instr, address, state, hint=None):
    """True iff the phase that `state` was made in has completed: it is the current one or the one before."""
    offsets = ws.full(shared_offsets(m, ws, active, instr, address, 8))
    phases = (ws.full(state) >> np.uint64(COUNT_BITS)).astype(np.int64)
    on = np.ones(offsets.shape, bool) if active is None else ws.full(active)
    now = np.zeros(offsets.shape, np.int64)
    ctas = ws.full(ws.cta)
    for offset in np.unique(offsets[on]):
        here = on & (offsets == offset)
        slot = m.mbarriers.slot(int(offset))
        m.mbarriers.require_live(slot, np.unique(ctas[here]), m.where(ws, instr, here))
        now[here] = m.mbarriers.phase[slot, ctas[here]]
    stale = on & ((phases > now) | (phases < now - 1))
    if stale.any():
        raise Hazard(f"{m.where(ws, instr, stale)}: waits with a state that is not of this phase or the one before")
    return mbarrier_wait(m, ws, active, instr, address, (phases & 1).astype(np.uint32))


@effect(
    f"mbarrier.try_wait.parity{_WAITS}{_OWN}.b64",
    "p=a,u,?u",
    "9.7.13.15.16",
    starts_block=True,
)
@effect(f"mbarrier.test_wait.parity{_WAITS}{_OWN}.b64", "p=a,u", "9.7.13.15.16", starts_block=True)
def mbarrier_wait(m, ws, active, instr, address, parity, hint=None):
    """True iff the phase with this parity has completed: (current phase & 1) != parity."""
    offset = common_offset(m, address, 8) if active is None else None
    if offset is None:
        offsets = shared_offsets(m, ws, active, instr, address, 8)
        offset = int(np.min(offsets))
        if offset != int(np.max(offsets)):
            return _wait_each(m, ws, active, instr, ws.full(offsets), ws.full(parity))
    slot = m.mbarriers.slot(offset)
    if not m.mbarriers.everywhere[slot]:
        m.mbarriers.require_live(slot, ws.ctas(), m.where(ws, instr, True if active is None else active))
    done = (ws.of_cta(m.mbarriers.phase[slot]) & 1) != parity
    if m.races:
        m.races.waited(ws, active, instr, slot, done, parity)
    failed = ~done if active is None else ~done & active
    if np.count_nonzero(failed):
        one = common(parity)
        m.stall(ws, failed, slot, ws.full(parity)[..., 0] if one is None else one, instr)
    return done


def _wait_each(m, ws, active, instr, offsets, parity):
    """Warps, or lanes of diverged warps, that wait on different mbarriers."""
    on = np.ones(offsets.shape, bool) if active is None else ws.full(active)
    done = np.zeros(offsets.shape, bool)
    slots = np.zeros(offsets.shape, np.int64)
    for offset in np.unique(offsets[on]):
        here = on & (offsets == offset)
        slot = m.mbarriers.slot(int(offset))
        ctas = np.broadcast_to(ws.cta, here.shape)
        m.mbarriers.require_live(slot, np.unique(ctas[here]), m.where(ws, instr, here))
        done |= here & ((m.mbarriers.phase[slot][ctas] & 1) != parity)
        slots[here] = slot
        if m.races:
            m.races.waited(ws, here, instr, slot, here & done, parity)
    failed = on & ~done
    if failed.any():  # a warp sleeps on what its first lane that failed waits for
        first = failed.argmax(axis=-1)[..., None]
        m.stall(ws, failed, *(np.take_along_axis(x, first, -1)[..., 0] for x in (slots, parity)), instr)
    return done
