"""Asynchronous copies that need no tensor map: cp.async, cp.async.bulk, prefetches (PTX ISA 9.1 §9.7.9.25, §9.7.9.15).

A cp.async reads its source and writes its destination as late as the waits of its thread allow; until then the
destination is COPY_PENDING.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..errors import Hazard
from ..memory import COPIED, COPY_PENDING, MBARRIER, REASONS, TMA_PENDING, UNWRITTEN
from ..table import effect
from ..tensormap import TensorMap
from .mbarrier import by_address
from .memory import shared_offsets
from .tma import _begin, _finish_load, _lanes, _require_valid, _span


# -- cp.async ----------------------------------------------------------------------------------------------------------
def _copies(m) -> dict:
    """(warp, CTA, lane) → groups of cp.async under way; the last group is open. Made on first use."""
    if not hasattr(m, "copies"):
        m.copies = {}
    return m.copies


def cp_async(m, ws, active, instr, destination, source, size, used=None, policy=None):
    """`used` bytes come from the source, the rest of the `size` bytes are zero."""
    where = m.where(ws, instr, True if active is None else active)
    if size not in ((16,) if ".cg." in instr.opcode else (4, 8, 16)):
        raise Hazard(f"{where}: cp.async of {size} bytes: 4, 8 or 16 (.cg: 16 only)")
    places = shared_offsets(m, ws, active, instr, destination, size)
    arrays = (places, source, size if used is None else used)
    warps, ctas, lanes, (offsets, addresses, counts) = _lanes(m, ws, active, arrays)
    if (counts > size).any():
        raise Hazard(f"{where}: cp.async with src-size {int(counts.max())}, more than cp-size {size}")
    if (addresses % np.uint64(size)).any():
        raise Hazard(f"{where}: the source of cp.async is misaligned: it must be a multiple of {size}")
    copies = _copies(m)
    m.check_overwrite(ctas, offsets // 16, where)
    times = m.races.copies(instr, warps, ctas, offsets, size) if m.races else {}
    for warp, cta, lane, offset, address, count in zip(
        *(x.tolist() for x in (warps, ctas, lanes, offsets, addresses, counts)), strict=True
    ):
        if count:
            m.gmem.require(address, address + count, where)
        if m.strict:
            state = m.smem.state[cta, offset : offset + size]
            for code in (MBARRIER, TMA_PENDING):
                if (state == code).any():
                    raise Hazard(f"{where}: writes shared memory although {REASONS[code]}")
            state[:] = COPY_PENDING
        job = (offset, address, size, count, where, times.get((warp, cta)))
        copies.setdefault((warp, cta, lane), [[]])[-1].append(job)


def _finish(m, cta: int, jobs: list) -> None:
    """Copies take effect, through the generic proxy: the asynchronous one needs a fence to see them."""
    for offset, address, size, count, where, _ in jobs:
        raw = np.zeros(size, np.uint8)
        if count:
            start, view = m.gmem.require(address, address + count, where)
            written = m.gmem.written.get(start)
            if written is not None and not written[address - start : address - start + count].all():
                raise Hazard(f"{where}: copies global memory although {REASONS[UNWRITTEN]}")
            raw[:count] = view[address - start : address - start + count]
        m.smem.data[cta, offset : offset + size] = raw
        if m.strict:
            m.smem.state[cta, offset : offset + size] = COPIED
            m.smem.unfenced.append((1, cta * m.smem.stride + offset + np.arange(size)))
    jobs.clear()


_PREFETCH = "{,.L2::64B,.L2::128B,.L2::256B}"
for _level in ("ca", "cg"):
    effect(f"cp.async.{_level}{{.shared,.shared::cta}}.global{_PREFETCH}", "=a,a,k,?u", "9.7.9.25.3.1")(cp_async)
    effect(
        f"cp.async.{_level}{{.shared,.shared::cta}}.global.L2::cache_hint{_PREFETCH}", "=a,a,k,?u,?U", "9.7.9.25.3.1"
    )(cp_async)


def _threads(m, ws, active):
    warps, ctas, lanes, _ = _lanes(m, ws, active, ())
    return zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True)


@effect("cp.async.commit_group", "=", "9.7.9.25.3.2")
def commit_group(m, ws, active, instr):
    """An empty group counts too."""
    copies = _copies(m)
    for key in _threads(m, ws, active):
        copies.setdefault(key, [[]]).append([])


@effect("cp.async.wait_group", "=k", "9.7.9.25.3.3")
def wait_group(m, ws, active, instr, pending):
    copies = _copies(m)
    for key in _threads(m, ws, active):
        groups = copies.get(key)
        while groups is not None and len(groups) - 1 > pending:
            _finish(m, key[1], groups.pop(0))
    _know(m, ws, active)


@effect("cp.async.wait_all", "=", "9.7.9.25.3.3")
def wait_all(m, ws, active, instr):
    copies = _copies(m)
    for key in _threads(m, ws, active):
        for jobs in copies.pop(key, ()):
            _finish(m, key[1], jobs)
    _know(m, ws, active)


def _know(m, ws, active) -> None:
    """After a wait the warp knows of its copies but those that some lane has not waited for."""
    if m.races:
        for warp, cta in {key[:2] for key in _threads(m, ws, active)}:
            mine = [jobs for lane in range(32) for jobs in _copies(m).get((warp, cta, lane), ())]
            m.races.known_before("cp", warp, cta, [job[5] for jobs in mine for job in jobs])


def _arrive_on_copies(noinc: bool):
    """The mbarrier sees one arrival a thread once all earlier copies of that thread are complete. Without .noinc the
    pending count is raised by one first, so that the phase waits for more than the count it was initialized with."""

    def run(m, ws, active, instr, address):
        where = m.where(ws, instr, True if active is None else active)
        left: dict[int, list] = {}
        if m.races:
            m.races.arrivals(ws, active, instr, address, also="cp")
        for key in _threads(m, ws, active):
            left.setdefault(key[1], []).extend(jobs for jobs in _copies(m).get(key, ()) if jobs)
        for offset, ctas, lanes in by_address(m, ws, active, instr, address):
            slot = m.mbarriers.slot(offset)
            m.mbarriers.require_live(slot, ctas, where)
            counts = dict(zip(ctas.tolist(), lanes.tolist(), strict=True))
            if not noinc:
                m.mbarriers.pending[slot, ctas] += lanes

            def complete(done: int, slot=slot, counts=counts) -> None:
                for cta in m.queue.sets.array(done).tolist():
                    for jobs in left.get(cta, ()):
                        _finish(m, cta, jobs)
                    m.wake(slot, m.mbarriers.arrive(slot, np.array([cta]), counts[cta], where))

            bits = m.queue.sets.bits(ctas)
            m.queue.add(bits, {slot: bits}, complete)

    return run


effect("cp.async.mbarrier.arrive{,.shared,.shared::cta}.b64", "=a", "9.7.13.15.17")(_arrive_on_copies(False))
effect("cp.async.mbarrier.arrive.noinc{,.shared,.shared::cta}.b64", "=a", "9.7.13.15.17")(_arrive_on_copies(True))


# -- cp.async.bulk -----------------------------------------------------------------------------------------------------
def _line(m, address: int, offset: int, size: int, where) -> tuple[TensorMap, np.ndarray]:
    """A bulk copy as a one-dimensional tensor copy of bytes, and its 16-byte chunks of shared memory."""
    if size % 16 or offset % 16 or address % 16:
        raise Hazard(f"{where}: size {size} and both addresses of a bulk copy must be multiples of 16")
    if offset < 0 or offset + size > m.smem.size:
        raise Hazard(f"{where}: {size} bytes at shared offset {offset:#x} leave the CTA's {m.smem.size} bytes")
    m.gmem.require(address, address + size, where)
    return TensorMap(address, 1, (size,), (1,), (size,), 0), np.arange(offset // 16, (offset + size) // 16)


def bulk_load(m, ws, active, instr, destination, source, size, barrier, policy=None, mask=None):
    """With a multicast mask, the bytes and their count reach the same offsets in every CTA of the mask."""
    where = m.where(ws, instr, True if active is None else active)
    dst = shared_offsets(m, ws, active, instr, destination, 16)
    mbar = shared_offsets(m, ws, active, instr, barrier, 8)
    warps, ctas, _, rows = _lanes(
        m, ws, active, (dst, source, size, mbar, destination, barrier, 0 if mask is None else mask)
    )
    places, bars = (m.cluster.target(ctas, named, where).tolist() for named in rows[4:6])
    begun = []
    jobs: dict[int, list] = {}
    signals: Counter[int] = Counter()
    for i, cta in enumerate(ctas.tolist()):
        offset, address, nbytes, bar = (int(row[i]) for row in rows[:4])
        if not nbytes:
            continue
        tensor, chunks = _line(m, address, offset, nbytes, where)
        slot = m.mbarriers.slot(bar)
        signals[slot] |= 1 << cta
        both = [(places[i], bars[i])]
        if mask is not None:
            both = [(peer, peer) for peer in m.cluster.peers(cta, int(rows[6][i]))]
        for reached, bar in both:
            _begin(m, reached, chunks, where)
            begun.append((int(warps[i]), cta, reached, bar, slot, offset, nbytes))
        jobs.setdefault(cta, []).append((tensor, (0,), chunks, slot, both))

    if m.races:
        m.races.loads(instr, begun, where)

    def complete(done: int) -> None:
        for cta in m.queue.sets.array(done).tolist():
            for job in jobs[cta]:
                _finish_load(m, *job, where)

    if jobs:
        m.queue.add(m.queue.sets.bits(np.array(sorted(jobs))), dict(signals), complete)


effect(
    "cp.async.bulk.{shared::cta,shared::cluster}.global.mbarrier::complete_tx::bytes{,.L2::cache_hint}",
    "=a,a,u,a,?U",
    "9.7.9.25.4.1",
)(bulk_load)


def _multicast(m, ws, active, instr, destination, source, size, barrier, mask, policy=None):
    bulk_load(m, ws, active, instr, destination, source, size, barrier, None, mask)


effect(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster{,.L2::cache_hint}",
    "=a,a,u,a,h,?U",
    "9.7.9.25.4.1",
)(_multicast)


def bulk_store(m, ws, active, instr, destination, source, size, policy=None, combine=None):
    """Reads its source as late as the wait on its bulk group. `combine`: of a reduction, see Part.write."""
    where = m.where(ws, instr, True if active is None else active)
    src = shared_offsets(m, ws, active, instr, source, 16)
    warps, ctas, lanes, rows = _lanes(m, ws, active, (destination, src, size))
    for i, key in enumerate(zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True)):
        address, offset, nbytes = (int(row[i]) for row in rows)
        if nbytes:
            tensor, chunks = _line(m, address, offset, nbytes, where)
            _require_valid(m, key[1], chunks, where)
            time = m.races.bulk_read(instr, *key[:2], chunks) if m.races else 0
            m.bulk.setdefault(key, [[]])[-1].append((tensor, (0,), chunks, where, combine, time))
            m.work["stored_bytes"] += tensor.box_bytes
            m.sources[_span(key[1], chunks)] += 1


effect("cp.async.bulk.global.shared::cta.bulk_group{,.L2::cache_hint}", "=a,a,u,?U", "9.7.9.25.4.1")(bulk_store)


# -- hints -------------------------------------------------------------------------------------------------------------
@effect(
    "prefetch{,.global,.local}.{L1,L2} prefetch.global.L2::{evict_last,evict_normal} prefetchu.L1", "=a", "9.7.9.15"
)
@effect("applypriority{,.global}.L2::evict_normal", "=a,k", "9.7.9.16")
@effect("cp.async.bulk.prefetch.tensor.{1d,2d,3d,4d,5d}.L2.global{,.tile}{,.L2::cache_hint}", "=T,?U", "9.7.9.27.1.4")
@effect("cp.async.bulk.prefetch.L2.global", "=a,u", "9.7.9.25.4.3")
@effect("cp.async.bulk.prefetch.L2.global.L2::cache_hint", "=a,u,U", "9.7.9.25.4.3")
def hint(m, ws, active, instr, *operands):
    """Caches are not modelled."""
