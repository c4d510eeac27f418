"""mbarriers, named barriers (PTX ISA 9.1 §9.7.13.1, §9.7.13.15)."""

from __future__ import annotations

import numpy as np

from ..errors import Hazard, UnsupportedInstruction
from ..memory import MBARRIER, UNWRITTEN
from ..table import effect
from ..warps import LANES
from .memory import shared_offsets

SHARED = "{.shared,.shared::cta}"
ANYWHERE = "{.shared,.shared::cta,.shared::cluster}"


def by_address(m, ws, active, instr, address):
    """Group the lanes that run by mbarrier: yields (shared offset, CTAs it lies in, lanes of each that arrive)."""
    offsets = shared_offsets(m, ws, active, instr, address, 8)
    _, ctas = ws.flat_pairs()
    if active is None and m.cluster.size == 1 and np.min(offsets) == np.max(offsets):
        totals = np.bincount(ctas, minlength=m.n_cta) * 32
        unique = np.nonzero(totals)[0]
        yield int(np.asarray(offsets).flat[0]), unique, totals[unique]
        return
    on = np.ones((len(ctas), 32), bool) if active is None else ws.full(active).reshape(-1, 32)
    lanes_of = np.broadcast_to(ctas[:, None], on.shape)[on]
    targets = m.cluster.target(lanes_of, ws.full(address).reshape(-1, 32)[on], m.where(ws, instr, on.any()))
    places = ws.full(offsets).reshape(-1, 32)[on]
    for offset in np.unique(places):
        totals = np.bincount(targets[places == offset], minlength=m.n_cta)
        unique = np.nonzero(totals)[0]
        yield int(offset), unique, totals[unique]


@effect(f"mbarrier.init{SHARED}.b64", "=a,u", "9.7.13.15.9")
def mbarrier_init(m, ws, active, instr, address, count):
    offsets = ws.full(shared_offsets(m, ws, active, instr, address, 8))
    lanes = np.ones(offsets.shape, bool) if active is None else ws.full(active)
    for offset, ctas, inits in by_address(m, ws, active, instr, address):
        where = m.where(ws, instr, lanes & (offsets == offset))
        if (inits > 1).any():
            raise Hazard(
                f"{where}: {int(inits.max())} lanes initialize the same mbarrier; to do so with a live one is "
                "undefined: elect one"
            )
        value = _uniform(ws, lanes & (offsets == offset), count, where)
        m.mbarriers.init(offset, ctas, value, where)
        if m.races:
            m.races.mbarrier_init(ws, active, instr, m.mbarriers.slot(offset), ctas, where)
        if m.strict:
            m.smem.state[ctas, offset : offset + 8] = MBARRIER


@effect(f"mbarrier.inval{SHARED}.b64", "=a", "9.7.13.15.10")
def mbarrier_inval(m, ws, active, instr, address):
    for offset, ctas, _ in by_address(m, ws, active, instr, address):
        slot = m.mbarriers.slot(offset)
        m.mbarriers.require_live(slot, ctas, m.where(ws, instr))
        if m.races:
            m.races.mbarrier_inval(ws, active, slot, ctas, m.where(ws, instr))
        m.mbarriers.live[slot, ctas] = False
        if m.strict:
            m.smem.state[ctas, offset : offset + 8] = UNWRITTEN


def _arrive(m, ws, active, instr, address, count, nbytes):
    where = m.where(ws, instr, True if active is None else active)
    if m.races:
        m.races.arrivals(ws, active, instr, address)
    for offset, ctas, lanes in by_address(m, ws, active, instr, address):
        slot = m.mbarriers.slot(offset)
        if nbytes is not None:
            m.mbarriers.add_tx(slot, ctas, lanes * _uniform(ws, active, nbytes, where), where)
        each = 1 if count is None else _uniform(ws, active, count, where)
        m.wake(m.mbarriers.arrive(slot, ctas, lanes * each, where))
    return np.uint64(0)


def _uniform(ws, active, value, where) -> int:
    values = ws.full(value)
    values = values.reshape(-1) if active is None else values[ws.full(active)]
    if values.min() != values.max():
        raise Hazard(f"{where}: lanes give different counts to one mbarrier, which the emulator does not support")
    return int(values[0])


@effect(f"mbarrier.arrive{{,.release.cta,.release.cluster}}{ANYWHERE}.b64", "U=a,?u", "9.7.13.15.13")
def mbarrier_arrive(m, ws, active, instr, address, count=None):
    return _arrive(m, ws, active, instr, address, count, None)


@effect(f"mbarrier.arrive.expect_tx{{,.release.cta,.release.cluster}}{ANYWHERE}.b64", "U=a,u", "9.7.13.15.13")
def mbarrier_arrive_expect_tx(m, ws, active, instr, address, nbytes):
    return _arrive(m, ws, active, instr, address, None, nbytes)


@effect(f"mbarrier.expect_tx{{,.relaxed.cta}}{SHARED}.b64", "=a,u", "9.7.13.15.11")
def mbarrier_expect_tx(m, ws, active, instr, address, nbytes):
    where = m.where(ws, instr, True if active is None else active)
    if m.races:
        m.races.arrivals(ws, active, instr, address, publish=False)
    for offset, ctas, lanes in by_address(m, ws, active, instr, address):
        m.mbarriers.add_tx(m.mbarriers.slot(offset), ctas, lanes * _uniform(ws, active, nbytes, where), where)


@effect(
    f"mbarrier.{{try_wait,test_wait}}.parity{{,.acquire.cta,.acquire.cluster}}{SHARED}.b64",
    "p=a,u,?u",
    "9.7.13.15.16",
    starts_block=True,
)
def mbarrier_wait(m, ws, active, instr, address, parity, hint=None):
    """True iff the phase with this parity has completed: (current phase & 1) != parity."""
    offsets = shared_offsets(m, ws, active, instr, address, 8)
    low = int(np.min(offsets))
    if low != int(np.max(offsets)):
        if active is not None:
            raise Hazard(
                f"{m.where(ws, instr, active)}: divergent lanes wait on different mbarriers, which the "
                "emulator does not support"
            )
        return _wait_each(m, ws, instr, ws.full(offsets), ws.full(parity))
    slot = m.mbarriers.slot(low)
    m.mbarriers.require_live(slot, np.unique(ws.cta), m.where(ws, instr, True if active is None else active))
    done = (m.mbarriers.phase[slot][ws.cta] & 1) != parity
    if m.races:
        m.races.waited(ws, active, instr, slot, done, parity)
    failed = ~done if active is None else ~done & active
    if failed.any():
        m.stall(
            ws, failed, slot, np.asarray(parity).flat[0] if np.size(parity) == 1 else ws.full(parity)[..., 0], instr
        )
    return done


def _wait_each(m, ws, instr, offsets, parity):
    """Warps of one batch that wait on different mbarriers."""
    done = np.zeros(offsets.shape, bool)
    slots = np.zeros(offsets.shape[:-1], np.int64)
    for offset in np.unique(offsets):
        here = offsets == offset
        slot = m.mbarriers.slot(int(offset))
        ctas = np.broadcast_to(ws.cta, here.shape)
        m.mbarriers.require_live(slot, np.unique(ctas[here]), m.where(ws, instr, here))
        done |= here & ((m.mbarriers.phase[slot][ctas] & 1) != parity)
        slots[here[..., 0]] = slot
    if m.races:
        m.races.waited(ws, None, instr, slots, done, parity)
    if not done.all():
        m.stall(ws, ~done, slots, parity[..., 0], instr)
    return done


def _barrier(blocking):
    def bar(m, ws, active, instr, barrier, count=None):
        exists = ws.warp * 32 + LANES < m.threads  # the last warp may lack lanes; the barrier counts it as a whole
        if active is not None and (exists & ~active).any():
            raise Hazard(
                f"{m.where(ws, instr, active)}: an aligned barrier is executed by part of a warp; make all "
                "lanes converge on it"
            )
        ids, counts = np.unique(np.asarray(barrier)), None if count is None else np.unique(np.asarray(count))
        if len(ids) != 1 or (counts is not None and len(counts) != 1):
            return _bar_each(
                m, ws, instr, ws.full(barrier)[..., 0], None if count is None else ws.full(count)[..., 0], blocking
            )
        m.bar(ws, int(ids[0]), None if counts is None else int(counts[0]), instr, blocking)
        return None

    return bar


def _bar_each(m, ws, instr, barriers, counts, blocking):
    """Warps of one batch at different named barriers."""
    from ..warps import Warps

    warps, ctas = ws.flat_pairs()
    flat_ids = np.broadcast_to(barriers, ws.lead).reshape(-1)
    for barrier in np.unique(flat_ids):
        here = flat_ids == barrier
        count = None if counts is None else int(np.broadcast_to(counts, ws.lead).reshape(-1)[here][0])
        m.bar(Warps(warps[here], ctas[here]), int(barrier), count, instr, blocking)


effect("bar{,.cta}.sync barrier{,.cta}.sync barrier{,.cta}.sync.aligned", "=u,?u", "9.7.13.1", ends_block=True)(
    _barrier(True)
)
effect("bar{,.cta}.arrive barrier{,.cta}.arrive barrier{,.cta}.arrive.aligned", "=u,u", "9.7.13.1")(_barrier(False))


@effect("bar.warp.sync", "=u", "9.7.13.2")
def bar_warp_sync(m, ws, active, instr, mask):
    """Lanes of a converged warp are in step already; a diverged warp must name only lanes that are here."""
    if active is not None:
        wanted = (ws.full(mask)[..., :1] >> np.arange(32, dtype=np.uint32)) & 1 == 1
        missing = wanted & ~ws.full(active) & ws.full(active).any(axis=-1, keepdims=True)
        if missing.any():
            raise Hazard(
                f"{m.where(ws, instr, missing)}: bar.warp.sync names a lane that is elsewhere: the warp has diverged"
            )


@effect("barrier.cluster.arrive{,.release,.relaxed}{,.aligned}", "=", "9.7.13.3")
def cluster_arrive(m, ws, active, instr):
    _whole_warps(m, ws, active, instr)
    m.cluster_arrive(ws, instr)


@effect("barrier.cluster.wait{,.acquire}{,.aligned}", "=", "9.7.13.3", ends_block=True)
def cluster_wait(m, ws, active, instr):
    _whole_warps(m, ws, active, instr)
    m.cluster_wait(ws, instr)


def _whole_warps(m, ws, active, instr) -> None:
    if active is not None:
        raise UnsupportedInstruction(f"{m.where(ws, instr, active)}: the cluster barrier in part of a warp")
