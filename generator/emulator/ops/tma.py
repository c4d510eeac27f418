"""Bulk tensor copies between global and shared memory (PTX ISA 9.1 §9.7.9.27)."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np

from ..errors import Hazard
from ..formats import encode
from ..memory import MBARRIER, PARAM_BASE, REASONS, TMA_PENDING, UNWRITTEN, VALID, WINDOW_BASE
from ..table import effect
from ..tensormap import Part, TensorMap, decode_tensor_map
from .memory import shared_offsets


def tensor_map(m, address: int, where: str) -> TensorMap:
    """The tensor map at a generic address: of a kernel parameter, or in global or constant memory."""
    raw = m.param_bytes
    offset = address - PARAM_BASE
    if offset < 0:
        start, raw = m.gmem.require(address, address + 128, where.during("for its tensor map"))
        offset = address - start
    elif offset > len(raw) - 128:
        raise Hazard(f"{where}: tensor map at {address:#x}, which is not a kernel parameter")
    if address % 64:
        raise Hazard(f"{where}: tensor map at {address:#x}, {address % 64} bytes beyond a multiple of 64")
    found = m.params_maps[address] = _decoded(bytes(raw[offset : offset + 128]))
    return found


_decoded = lru_cache(maxsize=256)(decode_tensor_map)


def _memory(m, tensor: TensorMap, part: Part, where) -> tuple[int, np.ndarray]:
    """The array that holds this part of the tensor: its address and its bytes."""
    found = m.gmem.find(part.address, part.address + part.nbytes)
    if found is None:
        shown = where.during(f"its tensor map has sizes {tensor.sizes} and strides {tensor.strides}")
        found = m.gmem.require(part.address, part.address + part.nbytes, shown)
    return found


def _lanes(m, ws, active, arrays):
    """One row a lane that runs: (warp, cta, lane) and the arrays' values there."""
    key = "lanes", None if active is None else np.asarray(active).tobytes()
    if key not in ws.known:
        ws.known[key] = np.nonzero(ws.full(True if active is None else active).reshape(-1, 32))
    rows, lanes = ws.known[key]
    warps, ctas = ws.flat_pairs()
    return warps[rows], ctas[rows], lanes, [ws.pick(a, rows, lanes) for a in arrays]


def _check_place(m, tensor: TensorMap, offset: int, where: str) -> None:
    """Destination or source box inside shared memory, aligned to 128 bytes (CUDA programming guide, tensor copies)."""
    if offset % 128:
        raise Hazard(f"{where}: shared address offset {offset:#x} of a tensor copy must be a multiple of 128")
    if offset < 0 or offset + tensor.shared_bytes > m.smem.size:
        raise Hazard(
            f"{where}: a box of {tensor.shared_bytes} bytes at shared offset {offset:#x} leaves the CTA's "
            f"{m.smem.size} bytes"
        )


def _check_start(tensor: TensorMap, point, where, is_store: bool) -> None:
    """What an H200 answers with an illegal instruction: a box that starts off 16 bytes, a store at negative ones."""
    if point[0] * tensor.element_bytes % 16:
        raise Hazard(
            f"{where}: the box starts at element {point[0]} of {tensor.element_bytes} bytes: the first coordinate must "
            "be a multiple of 16 bytes"
        )
    if is_store and min(point) < 0:
        raise Hazard(f"{where}: a store starts at coordinates {point}: they must not be negative (§9.7.9.27.1.1)")


def load(m, ws, active, instr, destination, source, barrier, mask=None, policy=None):
    """cp.async.bulk.tensor global → shared; the full box counts on the mbarrier, out-of-bounds elements are zero.

    Destination and mbarrier name their CTAs independently; with a multicast mask, the box and its byte count reach the
    same offsets in every CTA of the mask; with .cta_group::2 the count goes to one CTA of each pair.
    """
    where = m.where(ws, instr, True if active is None else active)
    address, coords = source
    dst = shared_offsets(m, ws, active, instr, destination, 16)
    mbar = shared_offsets(m, ws, active, instr, barrier, 8)
    arrays = (dst, mbar, destination, barrier, address, 0 if mask is None else mask, *coords)
    warps, ctas, _, (dsts, mbars, places, bars, addresses, masks, *coordinates) = _lanes(m, ws, active, arrays)
    data_cta, bar_cta = (m.cluster.target(ctas, named, where).tolist() for named in (places, bars))
    points = list(zip(*(c.tolist() for c in coordinates), strict=True))
    jobs: dict[int, list] = {}
    signals: dict[int, int] = {}
    begun = []
    for i, cta in enumerate(ctas.tolist()):
        tensor = tensor_map(m, int(addresses[i]), where)
        if tensor.rank != len(coords):
            raise Hazard(f"{where}: {len(coords)} coordinates for a tensor map of rank {tensor.rank}")
        offset = int(dsts[i])
        _check_place(m, tensor, offset, where)
        _check_start(tensor, points[i], where, False)
        slot = m.mbarriers.slot(int(mbars[i]))
        signals[slot] = signals.get(slot, 0) | 1 << cta
        chunks = tensor.chunks_at(offset + WINDOW_BASE) - WINDOW_BASE // 16
        both = [(data_cta[i], bar_cta[i])]
        if mask is not None:
            both = [(peer, peer) for peer in m.cluster.peers(cta, int(masks[i]))]
            if "cta_group::2" in instr.opcode:  # in each pair, the CTA of the parity that the mbarrier's CTA has
                parity = int(m.cluster.rank(bar_cta[i])) % 2
                both = [(peer, peer - int(m.cluster.rank(peer)) % 2 + parity) for peer, _ in both]
        for reached, bar in both:
            _begin(m, reached, chunks, where)
            begun.append((int(warps[i]), cta, reached, bar, slot, offset, tensor.box_bytes))
        jobs.setdefault(cta, []).append((tensor, points[i], chunks, slot, both))

    if m.races:
        m.races.loads(instr, begun, where)

    def complete(done: int) -> None:
        for cta in m.queue.sets.array(done).tolist():
            for job in jobs[cta]:
                _finish_load(m, *job, where)

    m.queue.add(m.queue.sets.bits(np.array(sorted(jobs))), signals, complete)


def _begin(m, cta: int, chunks: np.ndarray, where) -> None:
    """From now on these chunks of the CTA wait for a load."""
    if not m.strict:
        return
    state = m.smem.state[cta].reshape(-1, 16)
    if (state[chunks] == MBARRIER).any():
        raise Hazard(f"{where}: a TMA load overwrites shared memory although {REASONS[MBARRIER]}")
    m.check_overwrite(np.full(len(chunks), cta), chunks, where)
    state[chunks] = TMA_PENDING


def _finish_load(m, tensor: TensorMap, point, chunks: np.ndarray, slot: int, both, where) -> None:
    """A load takes effect: its box in each (CTA of the data, CTA of the mbarrier)."""
    box = _read_box(m, tensor, point, where)
    m.work["loaded_bytes"] += tensor.box_bytes * len(both)
    for data_cta, bar_cta in both:
        m.smem.chunks[data_cta, chunks] = box.view(np.complex128)
        if m.strict:
            m.smem.state[data_cta].reshape(-1, 16)[chunks] = VALID
        m.wake(slot, m.mbarriers.complete_tx(slot, np.array([bar_cta]), tensor.box_bytes, where))


def _load_one(m, ws, active, instr, destination, source, barrier, policy=None):
    """A load without a multicast mask."""
    return load(m, ws, active, instr, destination, source, barrier, None, policy)


for _rank in range(1, 6):
    for _multicast, _run, _signature in (("", _load_one, "=a,T,a,?U"), (".multicast::cluster", load, "=a,T,a,h,?U")):
        _spaces = "shared::cluster" if _multicast else "{shared::cta,shared::cluster}"
        _names = [
            f"cp.async.bulk.tensor.{_rank}d.{_spaces}.global{{,.tile}}"
            f".mbarrier::complete_tx::bytes{_multicast}{_suffix}"
            for _suffix in (
                "{,.L2::cache_hint}",
                ".cta_group::{1,2}{,.L2::cache_hint}",
                ".L2::cache_hint.cta_group::{1,2}",
            )
        ]
        effect(" ".join(_names), _signature, "9.7.9.27.1.2")(_run)


def store(m, ws, active, instr, destination, source, policy=None, combine=None):
    """cp.async.bulk.tensor shared → global: reads its source as late as the wait on its bulk group.

    `combine(element, where)`: how a reduction combines elements of the tensor, see Part.write.
    """
    where = m.where(ws, instr, True if active is None else active)
    address, coords = destination
    src = shared_offsets(m, ws, active, instr, source, 16)
    warps, ctas, lanes, (sources, addresses, *coordinates) = _lanes(m, ws, active, (src, address, *coords))
    points = np.stack(coordinates, axis=1)
    seen = set()  # a copy that several lanes of a warp execute alike is one
    for i, cta in enumerate(ctas):
        tensor = tensor_map(m, int(addresses[i]), where)
        if tensor.rank != len(coords):
            raise Hazard(f"{where}: {len(coords)} coordinates for a tensor map of rank {tensor.rank}")
        point = tuple(int(c) for c in points[i])
        _check_start(tensor, point, where, True)
        _check_place(m, tensor, int(sources[i]), where)
        chunks = tensor.chunks_at(int(sources[i]) + WINDOW_BASE) - WINDOW_BASE // 16
        _require_valid(m, cta, chunks, where)
        key = (int(warps[i]), int(cta), int(lanes[i]))
        time = m.races.bulk_read(instr, *key[:2], chunks) if m.races else 0
        reduce = None if combine is None else combine(tensor.element, where)
        m.bulk.setdefault(key, [[]])[-1].append((tensor, point, chunks, where, reduce, time))
        if (copy := (key[:2], addresses[i], sources[i], point)) not in seen:
            seen.add(copy)
            m.work["stored_bytes"] += tensor.box_bytes
        m.sources[_span(int(cta), chunks)] += 1


def _require_valid(m, cta, chunks, where) -> None:
    if not m.strict:
        return
    found = m.smem.invalid_chunk(np.array([cta]), chunks)
    if found is not None:
        raise Hazard(
            f"{where}: the copy reads {m.labels.shared_at(found[1] * 16)}, which may not be read: {REASONS[found[2]]}"
        )


def _read_box(m, tensor: TensorMap, point, where) -> np.ndarray:
    """The box at `point` as u8 [box bytes]; elements outside the tensor are zero, those of a tf32 tensor rounded."""
    out = np.zeros((*tensor.box[::-1], tensor.element_bytes), np.uint8)
    part = tensor.part(point)
    if part is not None:
        start, view = _memory(m, tensor, part, where)
        written = m.gmem.written.get(start)
        if written is not None and not part.of(start, written).all():
            raise Hazard(f"{where}: loads global memory although {REASONS[UNWRITTEN]}")
        out[part.place] = part.of(start, view)
    if tensor.element == "tf32":
        return encode("tf32", out.view(np.float32).astype(np.float64)).view(np.uint8).reshape(-1)
    return out.reshape(-1)


def _span(cta: int, chunks: np.ndarray) -> tuple[int, int, int]:
    return cta, int(chunks.min()), int(chunks.max()) + 1


def finish_store(m, cta: int, jobs) -> None:
    """A store or reduction takes effect."""
    for tensor, point, chunks, where, combine, _ in jobs:
        _require_valid(m, cta, chunks, where)
        m.sources -= Counter([_span(cta, chunks)])  # drops what reaches zero
        part = tensor.part(point, whole=True)
        if part is None:
            continue
        start, view = _memory(m, tensor, part, where)
        written = m.gmem.written.get(start)
        if combine is not None and written is not None and not part.of(start, written).all():
            raise Hazard(f"{where}: reduces into global memory although {REASONS[UNWRITTEN]}")
        box = m.smem.chunks[cta, chunks].view(np.uint8).reshape(*tensor.box[::-1], tensor.element_bytes)
        part.write(start, view, box, combine)
        if written is not None:
            part.of(start, written)[...] = 1


for _rank in range(1, 6):
    effect(
        f"cp.async.bulk.tensor.{_rank}d.global.shared::cta{{,.tile}}.bulk_group{{,.L2::cache_hint}}",
        "=T,a,?U",
        "9.7.9.27.1.2",
    )(store)


@effect("cp.async.bulk.commit_group", "=", "9.7.9.25.1.1")
def commit_group(m, ws, active, instr):
    warps, ctas, lanes, _ = _lanes(m, ws, active, ())
    for key in zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True):
        if key in m.bulk and m.bulk[key][-1]:
            m.bulk[key].append([])


@effect("cp.async.bulk.wait_group{,.read}", "=k", "9.7.9.25.1.2")
def wait_group(m, ws, active, instr, pending):
    """At most `pending` of the lane's committed groups may be under way; older ones complete now, in order."""
    warps, ctas, lanes, _ = _lanes(m, ws, active, ())
    for key in zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True):
        groups = m.bulk.get(key)
        while groups is not None and len(groups) - 1 > pending:
            finish_store(m, key[1], groups.pop(0))
    if m.races:
        for warp, cta in set(zip(warps.tolist(), ctas.tolist(), strict=True)):
            mine = [g for lane in range(32) for g in m.bulk.get((warp, cta, lane), ())]
            m.races.known_before("bulk", warp, cta, [job[5] for group in mine for job in group])


def check_bulk_at_exit(m) -> None:
    """Every bulk store must have been waited for before its CTA ends, or shared memory may be gone before it is
    read. Without checks what is left completes.
    """
    for (warp, cta, lane), groups in m.bulk.items():
        left = [job for group in groups for job in group]
        if left and not m.strict:
            finish_store(m, cta, left)
        elif left:
            raise Hazard(
                f"{left[0][3]}: CTA {m.name_cta(cta)}, warp {warp}, lane {lane} exits with a bulk store "
                "whose source may not have been read: "
                "commit it and wait (cp.async.bulk.wait_group.read 0)"
            )
