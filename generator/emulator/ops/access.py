"""Loads and stores with cache qualifiers, generic addresses and 256-bit vectors; atomics (PTX ISA 9.1 §9.7.9.8,
§9.7.9.11, §9.7.13.5, §9.7.13.7). A generic address below 2^32 lies in the shared or the local window, one in the
parameter window names a kernel parameter, any other lies in global memory.
"""

from __future__ import annotations

import numpy as np

from ..cluster import OFFSET_MASK
from ..errors import Hazard
from ..memory import COPIED, GENERIC, LOCAL_BASE, PARAM_BASE, REASONS, UINT, UNWRITTEN, VALID, WINDOW_BASE
from ..table import family
from .local import ld_local, st_local
from .memory import KIND, WIDTHS, ld_global, ld_shared, loaded_kind, shape_of, st_global, st_shared, to_register

SHARED_TOP = np.uint64(1 << 32)  # generic addresses below it are shared ones


# -- generic loads and stores ------------------------------------------------------------------------------------------
def _spaces(ws, active, address):
    """(name, lanes) of each space that the running lanes touch."""
    addresses = ws.full(np.asarray(address).astype(np.uint64))
    on = np.ones(addresses.shape, bool) if active is None else ws.full(active)
    shared, param = addresses < SHARED_TOP, addresses >= np.uint64(PARAM_BASE)
    local = shared & (addresses >= np.uint64(LOCAL_BASE))
    for name, lanes in (("shared", shared & ~local), ("local", local), ("param", param), ("global", ~shared & ~param)):
        if (lanes & on).any():
            yield name, None if active is None and lanes.all() else lanes & on


def _ld_param(m, ws, active, instr, address):
    width, count = shape_of(instr)
    raw = np.frombuffer(m.param_bytes, np.uint8)
    offsets = (ws.full(address) - np.uint64(PARAM_BASE)).astype(np.int64)
    bad = (offsets < 0) | (offsets + width * count > len(raw)) | (offsets % (width * count) != 0)
    bad = bad if active is None else bad & active
    if bad.any():
        raise Hazard(
            f"{m.where(ws, instr, bad, address)}: leaves the {len(raw)} bytes of the parameters, or misaligned"
        )
    offsets = np.clip(offsets, 0, len(raw) - width * count)
    index = offsets[..., None] + np.arange(width)
    results = [to_register(raw[index + i * width].view(UINT[width])[..., 0], instr, width) for i in range(count)]
    return tuple(results) if count > 1 else results[0]


_LOADS = {"shared": ld_shared, "global": ld_global, "param": _ld_param, "local": ld_local}


_STORES = {"shared": st_shared, "global": st_global, "local": st_local}


def ld_generic(m, ws, active, instr, address):
    merged = None
    for name, lanes in _spaces(ws, active, address):
        found = _LOADS[name](m, ws, lanes, instr, address)
        if lanes is None:
            return found
        found = found if isinstance(found, tuple) else (found,)
        merged = found if merged is None else tuple(np.where(lanes, f, o) for f, o in zip(found, merged, strict=True))
    return merged if len(merged) > 1 else merged[0]


def st_generic(m, ws, active, instr, address, values):
    for name, lanes in _spaces(ws, active, address):
        if name == "param":
            raise Hazard(
                f"{m.where(ws, instr, True if lanes is None else lanes, address)}: stores to a kernel parameter"
            )
        _STORES[name](m, ws, lanes, instr, address, values)


def _without_policy(f):
    """.L2::cache_hint: one more operand, a cache policy, which is a hint."""
    return lambda m, ws, active, instr, *operands: f(m, ws, active, instr, *operands[:-1])


_L1 = "{,.L1::evict_normal,.L1::evict_unchanged,.L1::evict_first,.L1::evict_last,.L1::no_allocate}"
_L2 = "{,.L2::evict_last,.L2::evict_normal,.L2::evict_first}"  # 256-bit accesses only
_PREFETCH = "{,.L2::64B,.L2::128B,.L2::256B}"
_SCOPES = "{cta,cluster,gpu,sys}"
_HINT = "{,.L2::cache_hint}"
_CACHES = {"ld": "{ca,cg,cs,lu,cv}", "st": "{wb,cg,cs,wt}"}
_STRONG = {"ld": "ld.{relaxed,acquire}", "st": "st.{relaxed,release}"}
_ISA = {"ld": "9.7.9.8", "st": "9.7.9.11"}


def _spellings(mnemonic: str, tail: str) -> dict[str, list[str]]:
    """Patterns of a load or store by state space; `tail`: its vector and type."""
    weak, strong, found = f"{mnemonic}{{,.weak}}", f"{_STRONG[mnemonic]}.{_SCOPES}", {}
    for space in ("", ".global"):
        prefetch = _PREFETCH if mnemonic == "ld" else ""
        found[space[1:]] = [
            f"{weak}{space}.{_CACHES[mnemonic]}{_HINT}{prefetch}{tail}",
            f"{weak}{space}{_L1}{_HINT}{prefetch}{tail}",
            f"{strong}{space}{_L1}{_HINT}{prefetch}{tail}",
            f"{mnemonic}{'.volatile' if '.v' in tail else '{.volatile,.mmio.relaxed.sys}'}{space}{tail}",
        ]
    if mnemonic == "ld":
        found["global"] += [
            f"ld.global.{{ca,cg,cs}}.nc{_HINT}{_PREFETCH}{tail}",
            f"ld.global.nc{_L1}{_HINT}{_PREFETCH}{tail}",
        ]
        found["const"] = [f"ld{{,.weak}}.const{tail}"]
    shared = ".{shared,shared::cta,shared::cluster}"
    found["shared"] = [f"{mnemonic}{{,.weak,.volatile}}{shared}{tail}", f"{strong}{shared}{tail}"]
    found["local"] = [f"{mnemonic}{{,.weak,.volatile}}.local{tail}"]
    return found


def _wide_spellings(mnemonic: str, tail: str) -> dict[str, list[str]]:
    """The same for 256-bit vectors, which lie in global memory."""
    cached = f"{_L1}{_L2}{_HINT}{_PREFETCH if mnemonic == 'ld' else ''}{tail}"
    heads = (f"{mnemonic}{{,.weak}}", f"{_STRONG[mnemonic]}.{_SCOPES}")
    found = [*(f"{head}{{,.global}}{cached}" for head in heads), f"{mnemonic}.volatile{{,.global}}{tail}"]
    return {"global": found + [f"ld.global.nc{cached}"] * (mnemonic == "ld")}


def _register(pattern: str, signature: str, isa: str, run) -> None:
    """With a cache policy there is one more operand."""
    family(pattern.replace(_HINT, ""), signature, isa)(run)
    if _HINT in pattern:
        family(pattern.replace(_HINT, ".L2::cache_hint"), f"{signature},U", isa)(_without_policy(run))


_RUN = {"ld": {"": ld_generic, "const": ld_global, **_LOADS}, "st": {"": st_generic, **_STORES}}
for _types in ("b8,u8", "s8", "b16,u16", "s16", "b32,u32,s32,f32", "b64,u64,s64,f64", "b128"):
    _first = _types.split(",")[0]
    _w = WIDTHS[_first]
    for _n in (1, 2, 4, 8):
        if _w * _n > (32 if _w in (4, 8) else 16):
            continue
        _tail = f"{f'.v{_n}' if _n > 1 else ''}.{{{_types}}}"
        _star = "*" if _n > 1 or _w == 16 else ""
        _kind = "U" if _w == 16 else loaded_kind(_first)
        for _mnemonic in ("ld", "st"):
            _signature = f"{_star}{_kind}=a" if _mnemonic == "ld" else f"=a,{_star}{'U' if _w == 16 else KIND[_w]}"
            _patterns = (_wide_spellings if _w * _n == 32 else _spellings)(_mnemonic, _tail)
            for _space, _names in _patterns.items():
                for _pattern in _names:
                    _register(_pattern, _signature, _ISA[_mnemonic], _RUN[_mnemonic][_space])


# -- what atomics touch ------------------------------------------------------------------------------------------------
def place(m, cta: int, address: int, nbytes: int, where, shared: bool):
    """`nbytes` bytes that a lane reads and writes: (a view of the bytes, a function to call once they are written)."""
    if shared:
        offset = (address & OFFSET_MASK if m.cluster.size > 1 else address) - WINDOW_BASE
        if offset < 0 or offset + nbytes > m.smem.size or offset % nbytes:
            raise Hazard(f"{where}: shared offset {offset} is out of bounds or misaligned for {nbytes} bytes")
        data = m.smem.data[cta, offset : offset + nbytes]
        if not m.strict:
            return data, lambda: None
        state = m.smem.state[cta, offset : offset + nbytes]
        for code in state.tolist():
            if code not in (VALID, GENERIC, COPIED):
                raise Hazard(f"{where}: updates {m.labels.shared_at(offset)}, which may not be read: {REASONS[code]}")

        def wrote():
            m.check_overwrite(np.array([cta]), np.array([offset // 16]), where)
            state[:] = GENERIC
            m.smem.unfenced.append((1, cta * m.smem.stride + offset + np.arange(nbytes)))

        return data, wrote
    if address % nbytes:
        raise Hazard(f"{where}: global address {address:#x} is misaligned: it must be a multiple of {nbytes}")
    start, view = m.gmem.require(address, address + nbytes, where)
    written = m.gmem.written.get(start)
    if written is not None and not written[address - start : address - start + nbytes].all():
        raise Hazard(f"{where}: updates global memory although {REASONS[UNWRITTEN]}")
    return view[address - start : address - start + nbytes], lambda: None
