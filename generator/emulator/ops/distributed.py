"""Asynchronous stores, reductions and copies into a peer's shared memory, each with its bytes counted on an mbarrier
there (PTX ISA 9.1 §9.7.9.12, §9.7.13.8, §9.7.9.25.4.1, §9.7.9.25.4.2).

All of them take effect as late as the waits of the program allow; until then their destination is ASYNC_PENDING.
Reductions may overlap with each other, and with nothing else.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..errors import Hazard
from ..memory import ASYNC_PENDING, COPIED, GENERIC, MBARRIER, REASONS, TMA_PENDING, VALID
from ..table import effect
from .atomic import DTYPES, LETTER, combiner
from .memory import owners, shape_of, shared_offsets
from .tma import _lanes, _require_valid, _span


class Destinations:
    """Bytes of shared memory that asynchronous stores and reductions will write: how many of them, by CTA and byte."""

    def __init__(self, m):
        self.m = m
        self.pending = np.zeros(m.smem.data.shape, np.uint16)

    def begin(self, cta: int, offset: int, nbytes: int, reduces: bool, where) -> None:
        m, span = self.m, slice(offset, offset + nbytes)
        m.check_overwrite(np.full(2, cta), np.array([offset, offset + nbytes - 1]) // 16, where)
        if not m.strict:
            return
        state, pending = m.smem.state[cta, span], self.pending[cta, span]
        legal = (VALID, GENERIC, COPIED) if reduces else None
        for code in np.unique(state[pending == 0] if reduces else state).tolist():
            if code not in legal if reduces else code in (MBARRIER, TMA_PENDING, ASYNC_PENDING):
                verb = "reduces into" if reduces else "writes"
                raise Hazard(f"{where}: {verb} {m.labels.shared_at(offset)}, which it may not: {REASONS[code]}")
        pending += 1
        state[:] = ASYNC_PENDING

    def finish(self, cta: int, offset: int, nbytes: int, state: int) -> None:
        """`state`: GENERIC for what the generic proxy wrote, VALID for the asynchronous one."""
        if not self.m.strict:
            return
        at = np.arange(offset, offset + nbytes)
        self.pending[cta, at] -= 1
        done = at[self.pending[cta, at] == 0]
        self.m.smem.state[cta, done] = state
        if state == GENERIC:
            self.m.smem.unfenced.append((1, cta * self.m.smem.stride + done))


def _destinations(m) -> Destinations:
    """Made when the first instruction asks for it."""
    if not hasattr(m, "destinations"):
        m.destinations = Destinations(m)
    return m.destinations


def _enqueue(m, jobs: dict[int, list], signals: dict[int, int], finish) -> None:
    """`finish(job)` takes effect, in the CTAs that issued the jobs."""

    def complete(done: int) -> None:
        for cta in m.queue.sets.array(done).tolist():
            for job in jobs[cta]:
                finish(*job)

    if jobs:
        m.queue.add(m.queue.sets.bits(np.array(sorted(jobs))), signals, complete)


def _targets(m, ws, active, instr, address, barrier, nbytes: int):
    """(offsets, CTAs of the data, offsets of the mbarriers) by lane; data and mbarrier must lie in one CTA."""
    offsets = shared_offsets(m, ws, active, instr, address, nbytes)
    bars = shared_offsets(m, ws, active, instr, barrier, 8)
    data, signalled = (ws.full(owners(m, ws, active, instr, a)) for a in (address, barrier))
    apart = data != signalled if active is None else (data != signalled) & ws.full(active)
    if apart.any():
        raise Hazard(f"{m.where(ws, instr, apart, address)}: the mbarrier lies in another CTA than the destination")
    return offsets, data, bars


# -- st.async and red.async --------------------------------------------------------------------------------------------
def st_async(m, ws, active, instr, address, values, barrier):
    width, count = shape_of(instr)
    values = values if count > 1 else (values,)
    _by_lane(m, ws, active, instr, address, values, barrier, f"u{width}", None)


def _red_async(operation: str, kind: str):
    function = combiner(operation, kind, True)

    def run(m, ws, active, instr, address, value, barrier):
        _by_lane(m, ws, active, instr, address, (value,), barrier, DTYPES[kind], function)

    return run


def _by_lane(m, ws, active, instr, address, values, barrier, dtype: str, function) -> None:
    """Each lane that runs stores its values, or combines one with what is there."""
    where = m.where(ws, instr, True if active is None else active, address)
    width = np.dtype(dtype).itemsize
    nbytes = width * len(values)
    offsets, data, bars = _targets(m, ws, active, instr, address, barrier, nbytes)
    warps, ctas, _, (places, owner, slots, *items) = _lanes(m, ws, active, (offsets, data, bars, *values))
    raw = np.stack([np.ascontiguousarray(i).astype(f"u{width}") for i in items], axis=1)
    jobs: dict[int, list] = {}
    signals: Counter[int] = Counter()
    for i, cta in enumerate(ctas.tolist()):
        slot = m.mbarriers.slot(int(slots[i]))
        m.mbarriers.require_live(slot, owner[i : i + 1], where)
        _destinations(m).begin(int(owner[i]), int(places[i]), nbytes, function is not None, where)
        signals[slot] |= 1 << cta
        jobs.setdefault(cta, []).append((int(owner[i]), int(places[i]), raw[i], slot))

    if m.races:
        slots = np.array([m.mbarriers.slot(slot) for slot in slots.tolist()])
        rows = warps, ctas, owner, slots, places
        m.races.stores(instr, *rows, nbytes, function is not None, where)

    def finish(cta: int, offset: int, words: np.ndarray, slot: int) -> None:
        cells = m.smem.data[cta, offset : offset + nbytes].view(dtype)
        given = words.view(dtype)
        cells[:] = given if function is None else function(cells, given, None)
        _destinations(m).finish(cta, offset, nbytes, GENERIC)
        m.wake(slot, m.mbarriers.complete_tx(slot, np.array([cta]), nbytes, where))

    _enqueue(m, jobs, dict(signals), finish)


_BYTES = "mbarrier::complete_tx::bytes"
for _types, _letter, _counts in (("b32,u32,s32,f32", "u", (1, 2, 4)), ("b64,u64,s64,f64", "U", (1, 2))):
    for _n in _counts:
        _vector, _star = (f".v{_n}", "*") if _n > 1 else ("", "")
        effect(
            f"st.async{{,.weak}}{{,.shared::cluster}}.{_BYTES}{_vector}.{{{_types}}}",
            f"=a,{_star}{_letter},a",
            "9.7.9.12",
        )(st_async)
_ASYNC = {"add": ("u32", "s32", "u64", "s64"), **dict.fromkeys(("min", "max"), ("u32", "s32"))}
_ASYNC |= {**dict.fromkeys(("and", "or", "xor"), ("b32",)), **dict.fromkeys(("inc", "dec"), ("u32",))}
for _operation, _kinds in _ASYNC.items():
    for _kind in _kinds:
        effect(
            f"red.async.relaxed.cluster{{,.shared::cluster}}.{_BYTES}.{_operation}.{_kind}",
            f"=a,{LETTER[np.dtype(DTYPES[_kind]).itemsize]},a",
            "9.7.13.8",
        )(_red_async(_operation, _kind))


# -- bulk copies and reductions between CTAs ---------------------------------------------------------------------------
def _bulk(operation: str | None, kind: str):
    """shared::cta → shared::cluster: a copy, or a reduction with what is there."""
    dtype = DTYPES[kind]
    function = None if operation is None else combiner(operation, kind, True)

    def run(m, ws, active, instr, destination, source, size, barrier):
        where = m.where(ws, instr, True if active is None else active)
        offsets, data, bars = _targets(m, ws, active, instr, destination, barrier, 16)
        sources = shared_offsets(m, ws, active, instr, source, 16)
        warps, ctas, _, rows = _lanes(m, ws, active, (offsets, data, bars, sources, size))
        jobs: dict[int, list] = {}
        signals: Counter[int] = Counter()
        for i, cta in enumerate(ctas.tolist()):
            offset, owner, bar, start, nbytes = (int(row[i]) for row in rows)
            if nbytes % 16:
                raise Hazard(f"{where}: a bulk copy of {nbytes} bytes: the size must be a multiple of 16")
            if max(offset, start) + nbytes > m.smem.size:
                raise Hazard(f"{where}: {nbytes} bytes from shared offset {max(offset, start):#x} on leave the CTA")
            if not nbytes:
                continue
            chunks = np.arange(start // 16, (start + nbytes) // 16)
            _require_valid(m, cta, chunks, where)
            _destinations(m).begin(owner, offset, nbytes, function is not None, where)
            slot = m.mbarriers.slot(bar)
            m.mbarriers.require_live(slot, np.array([owner]), where)
            if m.races:
                there = owner, offset, nbytes, slot
                m.races.copy_between(instr, int(warps[i]), cta, chunks, *there, function is not None, where)
            m.sources[_span(cta, chunks)] += 1
            signals[slot] |= 1 << cta
            jobs.setdefault(cta, []).append((cta, chunks, owner, offset, nbytes, slot))

        def finish(cta: int, chunks: np.ndarray, owner: int, offset: int, nbytes: int, slot: int) -> None:
            _require_valid(m, cta, chunks, where)
            m.sources -= Counter([_span(cta, chunks)])
            words = m.smem.chunks[cta, chunks].view(dtype)
            cells = m.smem.data[owner, offset : offset + nbytes].view(dtype)
            cells[:] = words if function is None else function(cells, words, None)
            _destinations(m).finish(owner, offset, nbytes, VALID)
            m.wake(slot, m.mbarriers.complete_tx(slot, np.array([owner]), nbytes, where))

        _enqueue(m, jobs, dict(signals), finish)

    return run


effect(f"cp.async.bulk.shared::cluster.shared::cta.{_BYTES}", "=a,a,u,a", "9.7.9.25.4.1")(_bulk(None, "b32"))
SHARED_REDUCTIONS = {
    "add": ("u32", "s32", "u64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32")),
    **dict.fromkeys(("inc", "dec"), ("u32",)),
    **dict.fromkeys(("and", "or", "xor"), ("b32",)),
}
for _operation, _kinds in SHARED_REDUCTIONS.items():
    for _kind in _kinds:
        effect(
            f"cp.reduce.async.bulk.shared::cluster.shared::cta.{_BYTES}.{_operation}.{_kind}",
            "=a,a,u,a",
            "9.7.9.25.4.2",
        )(_bulk(_operation, _kind))
