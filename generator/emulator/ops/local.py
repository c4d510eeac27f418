"""Local memory: the variables of each thread, poison until written (PTX ISA 9.1 §5.1.5, §9.7.9.8, §9.7.9.11)."""

from __future__ import annotations

import numpy as np

from ..errors import Hazard
from ..memory import LOCAL_BASE, REASONS, UINT, UNWRITTEN
from .memory import shape_of, to_register


def _memory(m) -> tuple[np.ndarray, np.ndarray]:
    """Data and written bytes, u8 [warp, CTA, 32 lanes, bytes]; made when the first instruction asks for them."""
    if not hasattr(m, "local"):
        shape = (m.n_warps, m.n_cta, 32, m.program.kernel.place_local()[1])
        m.local = np.full(shape, 0xFF, np.uint8), np.zeros(shape, bool)
    return m.local


def _cells(m, ws, active, instr, address, nbytes: int):
    """(indices of the bytes of each lane that runs, those lanes); checks bounds and alignment."""
    lanes = np.ones((*ws.lead, 32), bool) if active is None else ws.full(active)
    offsets = ws.full(address).astype(np.int64) - LOCAL_BASE
    size = _memory(m)[0].shape[-1]
    bad = lanes & ((offsets < 0) | (offsets + nbytes > size) | (offsets % nbytes != 0))
    if bad.any():
        raise Hazard(
            f"{m.where(ws, instr, bad, address)}: local memory access of {nbytes} bytes is out of bounds or misaligned "
            f"(a thread has {size} bytes)"
        )
    warps, ctas = (x.reshape(ws.lead) for x in ws.flat_pairs())
    at = [np.broadcast_to(x[..., None], lanes.shape)[lanes][:, None] for x in (warps, ctas)]
    lane = np.broadcast_to(np.arange(32), lanes.shape)[lanes][:, None]
    return (*at, lane, offsets[lanes][:, None] + np.arange(nbytes)), lanes


def ld_local(m, ws, active, instr, address):
    width, count = shape_of(instr)
    data, written = _memory(m)
    cells, lanes = _cells(m, ws, active, instr, address, width * count)
    fresh = np.zeros(lanes.shape, bool)
    fresh[lanes] = ~written[cells].all(axis=-1)
    if fresh.any():
        raise Hazard(f"{m.where(ws, instr, fresh, address)}: reads local memory although {REASONS[UNWRITTEN]}")
    words = np.ascontiguousarray(data[cells]).view(UINT[width])
    results = []
    for i in range(count):
        full = np.zeros(lanes.shape, UINT[width])
        full[lanes] = words[:, i]
        results.append(to_register(full, instr, width))
    return tuple(results) if count > 1 else results[0]


def st_local(m, ws, active, instr, address, values):
    width, count = shape_of(instr)
    data, written = _memory(m)
    cells, lanes = _cells(m, ws, active, instr, address, width * count)
    items = values if count > 1 else (values,)
    words = np.stack([ws.full(v)[lanes].astype(UINT[width]) for v in items], axis=1)
    data[cells] = np.ascontiguousarray(words).view(np.uint8)
    written[cells] = True


def thread_bytes(m, thread: tuple[int, int, int], address: int, nbytes: int, where) -> bytes:
    """Bytes of one thread's (warp, CTA, lane) local memory."""
    data, written = _memory(m)
    offset = address - LOCAL_BASE
    if offset + nbytes > data.shape[-1]:
        raise Hazard(f"{where}: local memory at offset {offset} is out of bounds (a thread has {data.shape[-1]} bytes)")
    if not written[(*thread, slice(offset, offset + nbytes))].all():
        raise Hazard(f"{where}: reads local memory although {REASONS[UNWRITTEN]}")
    return data[(*thread, slice(offset, offset + nbytes))].tobytes()
