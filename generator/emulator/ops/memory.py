"""Loads, stores and fences on shared and global memory (PTX ISA 9.1 §9.7.9.8, §9.7.9.11, §9.7.13.4)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..cluster import OFFSET_MASK, RANK_SHIFT
from ..errors import Hazard
from ..memory import (
    COPIED,
    GENERIC,
    GENERIC_WORD,
    REASONS,
    REPEAT,
    UINT,
    UNDER_WAY,
    UNWRITTEN,
    VALID,
    VALID_WORD,
    WINDOW_BASE,
)
from ..table import effect
from ..warps import common

WIDTHS = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,  # as two 64-bit halves
}
FEW = 128  # elements of which it is quicker to ask first whether they are all the same
KIND = {1: "h", 2: "h", 4: "u", 8: "U"}
SIGNED_KIND = {1: "i", 2: "i", 4: "s", 8: "S"}
REGISTER = {1: np.uint16, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED_REGISTER = {1: np.int16, 2: np.int16, 4: np.int32, 8: np.int64}


def loaded_kind(kind: str) -> str:
    """Signature letter of what a load of this type delivers; the translator extends it by its sign (§9.4.1)."""
    return (SIGNED_KIND if kind[0] == "s" else KIND)[WIDTHS[kind]]


def to_register(raw, instr, width: int):
    """Bits from memory as a register's value: bytes widen to 16 bits, by sign where the type has one."""
    if instr.opcode[instr.opcode.rindex(".") + 1] == "s":
        return raw.view(f"i{width}").astype(SIGNED_REGISTER[width], copy=False)
    return raw.astype(REGISTER[width], copy=False)


def shape_of(instr) -> tuple[int, int]:
    """(bytes an element, elements) of a load or store, from its modifiers."""
    return _shape_of(instr.opcode)


@lru_cache(maxsize=1024)
def _shape_of(opcode: str) -> tuple[int, int]:
    parts = opcode.split(".")
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return (8, 2) if parts[-1] == "b128" else (WIDTHS[parts[-1]], count)


def owners(m, ws, active, instr, address) -> np.ndarray:
    """CTA index, broadcastable to the lanes, that each shared address lies in: a peer's for shared::cluster addresses.

    A .shared or .shared::cta access to a peer's window, and one to a CTA that has exited, is a Hazard.
    """
    if m.cluster.size == 1:
        return ws.cta
    own, addresses = ws.full(ws.cta), ws.full(address)
    on = np.ones(own.shape, bool) if active is None else ws.full(active)
    ranks = addresses.astype(np.int64) >> RANK_SHIFT
    if {"shared", "shared::cta", "shared::cluster"} & set(instr.opcode.split(".")) in ({"shared"}, {"shared::cta"}):
        foreign = on & (ranks != 0) & (ranks != m.cluster.rank(own))
        if foreign.any():
            raise Hazard(
                f"{m.where(ws, instr, foreign, address)}: a .shared::cta access to another CTA's shared memory: "
                "name the space shared::cluster"
            )
        return ws.cta
    targets = m.cluster.target(own, np.where(on, addresses, 0), m.where(ws, instr, on, address))
    left = on & (targets != own) & (m.pc == len(m.program.blocks)).all(axis=0)[targets]
    if left.any():
        raise Hazard(
            f"{m.where(ws, instr, left, address)}: touches the shared memory of a CTA that has exited: "
            "no CTA of a cluster may leave before its peers are done with it (barrier.cluster)"
        )
    return np.where(on, targets, own)


def common_offset(m, address, nbytes: int) -> int | None:
    """The legal shared offset that every lane gives, running or not, outside clusters; else None."""
    found = None if m.cluster.size > 1 else common(address)
    if found is None or not 0 <= found - WINDOW_BASE <= m.smem.size - nbytes or found % nbytes:
        return None
    return found - WINDOW_BASE


def shared_offsets(m, ws, active, instr, address, nbytes: int) -> np.ndarray:
    """Shared addresses → byte offsets int64; checks bounds and alignment to `nbytes` in the lanes that run.

    Inactive lanes get offset 0.
    """
    offsets = np.asarray(address).astype(np.int64)
    offsets = (offsets & OFFSET_MASK if m.cluster.size > 1 else offsets) - WINDOW_BASE
    if active is not None:
        offsets = np.where(active, offsets, 0)
    one = common(offsets) if offsets.size <= FEW else None
    if one is not None:
        legal = 0 <= one <= m.smem.size - nbytes and not one % nbytes
    else:
        low, high = (int(extreme.reduce(offsets, axis=None)) for extreme in (np.minimum, np.maximum))
        legal = low >= 0 and high + nbytes <= m.smem.size and not np.count_nonzero(offsets % nbytes)
    if not legal:
        bad = (offsets < 0) | (offsets + nbytes > m.smem.size) | (offsets % nbytes != 0)
        first = int(ws.full(offsets).reshape(-1)[np.argmax(ws.full(bad).reshape(-1))])
        kind = "misaligned" if first >= 0 and first + nbytes <= m.smem.size else "out of bounds"
        raise Hazard(
            f"{m.where(ws, instr, bad, address)}: shared memory access of {nbytes} bytes is {kind} (offset {first}, "
            f"the CTA has {m.smem.size} bytes, alignment {nbytes})"
        )
    return offsets


def check_state(m, ws, active, instr, states, width: int, address) -> None:
    """Raise unless every byte that is loaded holds a value that may be used."""
    if np.all((states == VALID_WORD[width]) | (states == GENERIC_WORD[width])):
        return
    if np.all(states == COPIED * REPEAT[width]):
        return
    codes = np.ascontiguousarray(ws.full(states).astype(UINT[width])).view(np.uint8).reshape(*ws.lead, 32, width)
    illegal = (codes != VALID) & (codes != GENERIC) & (codes != COPIED)
    if m.allow_uninitialized:
        illegal &= codes != UNWRITTEN
    if active is not None:
        illegal &= np.broadcast_to(active, illegal.shape[:-1])[..., None]
    if illegal.any():
        code = int(codes[illegal][0])
        bad = illegal.any(axis=-1)
        offset = int(ws.full(address)[bad][0]) - WINDOW_BASE
        raise Hazard(
            f"{m.where(ws, instr, bad, address)}: reads {m.labels.shared_at(offset)}, "
            f"which may not be read: {REASONS[code]}"
        )


def ld_shared(m, ws, active, instr, address):
    width, count = shape_of(instr)
    offsets = shared_offsets(m, ws, active, instr, address, width * count)
    ctas = owners(m, ws, active, instr, address)
    at = (ctas * m.smem.stride + offsets) // width
    data, state = m.smem.flat[width], m.smem.flat_state.get(width)
    results = []
    for i in range(count):
        if m.strict:
            check_state(m, ws, active, instr, state[at + i], width, address)
        results.append(to_register(data[at + i], instr, width))
    if m.races:
        m.races.access(ws, active, instr, offsets, width * count, False, ctas)
    return tuple(results) if count > 1 else results[0]


def st_shared(m, ws, active, instr, address, values):
    width, count = shape_of(instr)
    offsets = shared_offsets(m, ws, active, instr, address, width * count)
    values = values if count > 1 else (values,)
    ctas = owners(m, ws, active, instr, address)
    at = ws.full((ctas * m.smem.stride + offsets) // width)
    chosen = ... if active is None else ws.full(active)
    at = at[chosen]
    if m.strict:
        _note_store(m, ws, active, instr, address, at, width, count)
    if m.races:
        m.races.access(ws, active, instr, offsets, width * count, True, ctas)
    data = m.smem.flat[width]
    for i, value in enumerate(values):
        data[at + i] = ws.full(value)[chosen].astype(UINT[width], copy=False)


def _note_store(m, ws, active, instr, address, at, width: int, count: int) -> None:
    """`count` neighbouring elements from each index in `at` on are stored: they may be, and what that makes of them."""
    state = m.smem.flat_state[width]
    if m.tensor_core.issued or m.sources or m.wgmma.chains:
        ctas, chunks = np.divmod(np.ravel(at) * width, m.smem.stride)
        m.check_overwrite(ctas, chunks // 16, m.where(ws, instr, True if active is None else active, address))
    for i in range(count):
        for code in UNDER_WAY:
            if (state[at + i] & UINT[width](0xFF) == code).any():
                where = m.where(ws, instr, True if active is None else active, address)
                raise Hazard(f"{where}: writes shared memory although {REASONS[code]}")
        state[at + i] = GENERIC_WORD[width]
        m.smem.unfenced.append((width, np.ravel(at + i)))


def global_parts(m, ws, active, instr, address, nbytes: int):
    """One part an array that the running lanes touch: (its bytes, offsets int64, lanes bool, written bytes).

    Checks bounds and alignment. Written bytes are None for an array that came initialized.
    """
    addresses = ws.full(address)
    lanes = np.ones(addresses.shape, bool) if active is None else np.broadcast_to(active, addresses.shape)
    chosen = addresses[lanes]
    low, high = int(chosen.min()), int(chosen.max()) + nbytes
    if (chosen % np.uint64(nbytes)).any():
        bad = lanes & (addresses % np.uint64(nbytes) != 0)
        raise Hazard(
            f"{m.where(ws, instr, bad, address)}: global address is misaligned: it must be a multiple of {nbytes}"
        )
    found = m.gmem.find(low, high)
    if found is not None:
        start, view = found
        return [(view, addresses.astype(np.int64) - start, lanes, m.gmem.written.get(start))]
    parts: dict[int, tuple] = {}
    for value in np.unique(chosen):  # the lanes lie in several arrays, or one of them is out of bounds
        here = lanes & (addresses == value)
        start, view = m.gmem.require(int(value), int(value) + nbytes, m.where(ws, instr, here, address))
        before = parts[start][1] if start in parts else False
        parts[start] = (view, before | here)
    return [
        (view, addresses.astype(np.int64) - start, here, m.gmem.written.get(start))
        for start, (view, here) in parts.items()
    ]


def ld_global(m, ws, active, instr, address):
    width, count = shape_of(instr)
    merged = None
    for part in global_parts(m, ws, active, instr, address, width * count):
        found = _ld_part(m, ws, instr, address, width, count, part)
        merged = found if merged is None else [np.where(part[2], f, o) for f, o in zip(found, merged, strict=True)]
    return tuple(merged) if count > 1 else merged[0]


def _ld_part(m, ws, instr, address, width: int, count: int, part) -> list[np.ndarray]:
    view, offsets, lanes, written = part
    offsets = np.where(lanes, offsets, offsets[lanes][0])
    if written is not None:
        fresh = (written[offsets[..., None] + np.arange(width * count)] == 0).any(axis=-1)
        if fresh.any():
            raise Hazard(f"{m.where(ws, instr, fresh, address)}: reads global memory although {REASONS[UNWRITTEN]}")
    results = []
    for i in range(count):
        index = (offsets + i * width)[..., None] + np.arange(width)
        results.append(to_register(view[index].view(UINT[width])[..., 0], instr, width))
    return results


def st_global(m, ws, active, instr, address, values):
    width, count = shape_of(instr)
    for view, offsets, lanes, written in global_parts(m, ws, active, instr, address, width * count):
        if written is not None:
            written[offsets[lanes][:, None] + np.arange(width * count)] = 1
        for i, value in enumerate(values if count > 1 else (values,)):
            raw = np.ascontiguousarray(ws.full(value)[lanes].astype(UINT[width])).view(np.uint8).reshape(-1, width)
            view[(offsets[lanes] + i * width)[:, None] + np.arange(width)] = raw


@effect("fence.proxy.async{,.shared::cta,.shared::cluster} membar.proxy.async", "=", "9.7.13.4")
@effect("fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster", "=", "9.7.13.4")
@effect("fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster", "=", "9.7.13.4")
def fence_proxy_async(m, ws, active, instr):
    """Ordinary stores before it are visible to TMA and the tensor core after it. Any thread's fence serves its CTA: one
    by the issuing thread, after a barrier, is as good as one by the writers.
    """
    if m.strict:
        m.smem.fence_proxy(ws.ctas())
    if m.races:
        m.races.fence_proxy(ws, active)


_SCOPES = "{cta,cluster,gpu,sys}"


@effect("fence.proxy.{alias,async.global} membar.proxy.alias", "=", "9.7.13.4")
@effect(f"fence.proxy.tensormap::generic.release.{_SCOPES} fence.mbarrier_init.release.cluster", "=", "9.7.13.4")
@effect("fence.{acquire.sync_restrict::shared::cluster,release.sync_restrict::shared::cta}.cluster", "=", "9.7.13.4")
@effect(f"fence{{,.sc,.acq_rel,.acquire,.release}}.{_SCOPES} membar.{{cta,gl,sys}}", "=", "9.7.13.4")
def fence(m, ws, active, instr):
    """Orders proxies and scopes. Lanes of the emulator see each other's stores at once: only clocks care."""
    if m.races:
        m.races.fence(ws, active, instr)


@effect("prefetch{,.const,.param}.tensormap", "=a", "9.7.9.17")
def prefetch_tensormap(m, ws, active, instr, address):
    """A hint."""


_POLICY = "L2::{evict_last,evict_first,evict_normal,evict_unchanged}{,.L2::evict_unchanged,.L2::evict_first}.b64"


@effect(f"createpolicy.fractional.{_POLICY}", "U=?f", "9.7.9.18")
@effect(f"createpolicy.range{{,.global}}.{_POLICY}", "U=a,u,u", "9.7.9.18")
@effect("createpolicy.cvt.L2.b64", "U=U", "9.7.9.18")
def createpolicy(m, ws, active, instr, *operands):
    """An opaque cache policy; caches are not modelled."""
    return np.uint64(0)
