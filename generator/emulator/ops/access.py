"""Loads and stores with cache qualifiers, generic addresses and 256-bit vectors; atomics (PTX ISA 9.1 §9.7.9.8,
§9.7.9.11, §9.7.13.5, §9.7.13.7). A generic address below 2^32 lies in the shared or the local window, one in the
parameter window names a kernel parameter, any other lies in global memory.
"""

from __future__ import annotations

import numpy as np

from ..cluster import OFFSET_MASK
from ..errors import Hazard, UnsupportedInstruction
from ..formats import decode, encode, pack16
from ..memory import GENERIC, LOCAL_BASE, PARAM_BASE, REASONS, UINT, UNWRITTEN, VALID, WINDOW_BASE
from ..table import TABLE, effect, expand
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


def _more(patterns: list[str], signature: str, isa: str, f) -> None:
    """Register what `ops.memory` has not registered yet: it holds the plain forms."""
    names = [name for pattern in patterns for name in expand(pattern) if name not in TABLE]
    hinted = [name for name in names if ".L2::cache_hint" in name]
    if hinted:
        effect(" ".join(hinted), f"{signature},U", isa)(_without_policy(f))
    plain = [name for name in names if ".L2::cache_hint" not in name]
    if plain:
        effect(" ".join(plain), signature, isa)(f)


_L1 = "{,.L1::evict_normal,.L1::evict_unchanged,.L1::evict_first,.L1::evict_last,.L1::no_allocate}"
_L2 = "{,.L2::evict_last,.L2::evict_normal,.L2::evict_first}"
_HINT = "{,.L2::cache_hint}"
_LD = [f"ld.{{weak,volatile,relaxed.{s},acquire.{s}}}" for s in ("cta", "cluster", "gpu", "sys")]
_ST = [f"st.{{weak,volatile,relaxed.{s},release.{s}}}" for s in ("cta", "cluster", "gpu", "sys")]


def _vectors():
    for kind, width in WIDTHS.items():
        for count in (1, 2, 4, 8):
            if width * count <= (32 if width >= 4 else 16):
                yield kind, width, count, f".v{count}" if count > 1 else ""


for _t, _w, _n, _v in _vectors():
    _star = "*" if _n > 1 else ""
    _load, _store = f"{_star}{loaded_kind(_t)}=a", f"=a,{_star}{KIND[_w]}"
    for _space, _ld, _st in (
        ("", ld_generic, st_generic),
        (".shared", ld_shared, st_shared),
        (".shared::cta", ld_shared, st_shared),
        (".global", ld_global, st_global),
    ):
        if _w * _n > 16 and _space != ".global":
            continue
        _ends = [f"ld{_space}{_v}.{_t}"] + [f"{h}{_space}{_v}.{_t}" for h in _LD]
        if "shared" not in _space:
            _ends += [f"ld{_space}.{{ca,cg,cs,lu,cv}}{_v}.{_t}"]
        if _space == ".global":
            _ends += [
                f"ld.global{{,.nc}}{_L1}{_L2}{_HINT}{_v}.{_t}",
                f"ld.global{{,.nc}}{_L1}{_HINT}.L2::{{64B,128B,256B}}{_v}.{_t}",
                f"ld.global{{,.ca,.cg,.cs}}.nc{_HINT}{_v}.{_t}",
            ]
        _more(list(dict.fromkeys(n for p in _ends for n in expand(p))), _load, "9.7.9.8", _ld)
        _ends = [f"st{_space}{_v}.{_t}"] + [f"{h}{_space}{_v}.{_t}" for h in _ST]
        if "shared" not in _space:
            _ends += [f"st{_space}.{{wb,cg,cs,wt}}{_v}.{_t}"]
        if _space == ".global":
            _ends += [f"st.global{_L1}{_L2}{_HINT}{_v}.{_t}"]
        _more(list(dict.fromkeys(n for p in _ends for n in expand(p))), _store, "9.7.9.11", _st)


# -- atomics -----------------------------------------------------------------------------------------------------------
def place(m, cta: int, address: int, nbytes: int, where, shared: bool):
    """`nbytes` bytes that a lane reads and writes: (a view of the bytes, a function to call once they are written)."""
    if shared:
        offset = (address & OFFSET_MASK) - WINDOW_BASE
        if m.cluster.size > 1 and m.cluster.rank(cta) != address >> 24 and address >> 24:
            raise UnsupportedInstruction(f"{where}: an atomic on another CTA's shared memory is not supported yet")
        if offset < 0 or offset + nbytes > m.smem.size or offset % nbytes:
            raise Hazard(f"{where}: shared offset {offset} is out of bounds or misaligned for {nbytes} bytes")
        data = m.smem.data[cta, offset : offset + nbytes]
        if not m.strict:
            return data, lambda: None
        state = m.smem.state[cta, offset : offset + nbytes]
        for code in state.tolist():
            if code not in (VALID, GENERIC):
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


def _pairwise(form):
    def add(x, y, _):
        low, high = (
            encode(form, decode(form, np.uint16(int(x) >> s & 0xFFFF)) + decode(form, np.uint16(int(y) >> s & 0xFFFF)))
            for s in (0, 16)
        )
        return pack16(np.uint16(high), np.uint16(low))

    return add


def _single(form):
    return lambda x, y, _: np.uint16(encode(form, decode(form, x) + decode(form, y)))


_INTEGER = {
    "add": lambda x, y, _: x + y,
    "min": lambda x, y, _: min(x, y),
    "max": lambda x, y, _: max(x, y),
    "and": lambda x, y, _: x & y,
    "or": lambda x, y, _: x | y,
    "xor": lambda x, y, _: x ^ y,
    "exch": lambda x, y, _: y,
    "cas": lambda x, y, z: z if x == y else x,
    "inc": lambda x, y, _: type(x)(0) if x >= y else x + type(x)(1),
    "dec": lambda x, y, _: y if x == 0 or x > y else x - type(x)(1),
}
_ATOMS = [  # operation, types, register letter, NumPy type, function
    *(("add", t, k, d, _INTEGER["add"]) for t, k, d in (("u32", "u", "u4"), ("s32", "u", "i4"), ("u64", "U", "u8"))),
    *(("add", t, k, d, _INTEGER["add"]) for t, k, d in (("f32", "u", "f4"), ("f64", "U", "f8"), ("s64", "U", "i8"))),
    *((o, t, k, d, _INTEGER[o]) for o in ("min", "max") for t, k, d in (("u32", "u", "u4"), ("s32", "u", "i4"))),
    *((o, t, k, d, _INTEGER[o]) for o in ("min", "max") for t, k, d in (("u64", "U", "u8"), ("s64", "U", "i8"))),
    *((o, "b32", "u", "u4", _INTEGER[o]) for o in ("and", "or", "xor", "exch")),
    *((o, "b64", "U", "u8", _INTEGER[o]) for o in ("and", "or", "xor", "exch")),
    *(("cas", t, k, d, _INTEGER["cas"]) for t, k, d in (("b16", "h", "u2"), ("b32", "u", "u4"), ("b64", "U", "u8"))),
    *((o, "u32", "u", "u4", _INTEGER[o]) for o in ("inc", "dec")),
    *(("add.noftz", f"{f}x2", "u", "u4", _pairwise(f)) for f in ("f16", "bf16")),
    *(("add.noftz", f, "h", "u2", _single(f)) for f in ("f16", "bf16")),
]  # fmt: skip


def _atomic(space: str, dtype: str, function, returns: bool, vector: int = 1):
    """Read, combine, write: one lane after the other, in the order of their numbers."""
    dtype = np.dtype(dtype)

    def run(m, ws, active, instr, address, b, c=None):
        on = np.ones((*ws.lead, 32), bool) if active is None else ws.full(active)
        where = m.where(ws, instr, on, address)
        warps, ctas = ws.flat_pairs()
        rows, lanes = np.nonzero(on.reshape(-1, 32))
        addresses = ws.full(address).reshape(-1, 32)
        items = b if vector > 1 else (b,)
        values = [np.ascontiguousarray(ws.full(v)).reshape(-1, 32).view(dtype) for v in items]
        third = None if c is None else np.ascontiguousarray(ws.full(c)).reshape(-1, 32).view(dtype)
        old = [np.zeros(addresses.shape, dtype) for _ in items]
        for row, lane in zip(rows.tolist(), lanes.tolist(), strict=True):
            at = int(addresses[row, lane])
            shared = space == "shared" or (space == "" and at < LOCAL_BASE)
            target, wrote = place(m, int(ctas[row]), at, dtype.itemsize * vector, where, shared)
            cells = target.view(dtype)
            for i, value in enumerate(values):
                old[i][row, lane] = cells[i]
                cells[i] = function(cells[i], value[row, lane], None if third is None else third[row, lane])
            wrote()
        if not returns:
            return None
        unsigned = [o.view(f"u{dtype.itemsize}").reshape(*ws.lead, 32) for o in old]
        return tuple(unsigned) if vector > 1 else unsigned[0]

    return run


_ORDERS = "{,.relaxed,.acquire,.release,.acq_rel}{,.cta,.cluster,.gpu,.sys}"
for _space in ("", ".global", ".shared", ".shared::cta"):
    _base = "shared" if "shared" in _space else _space[1:]
    for _op, _t, _k, _d, _f in _ATOMS:
        _sources = f"a,{_k},{_k}" if _op == "cas" else f"a,{_k}"
        for _hint in ("", ".L2::cache_hint") if _base != "shared" else ("",):
            _run = _atomic(_base, _d, _f, True)
            effect(f"atom{_ORDERS}{_space}.{_op}{_hint}.{_t}", f"{_k}={_sources}{_hint and ',U'}", "9.7.13.5")(
                _without_policy(_run) if _hint else _run
            )
            if _op not in ("exch", "cas"):
                _run = _atomic(_base, _d, _f, False)
                effect(f"red{_ORDERS}{_space}.{_op}{_hint}.{_t}", f"={_sources}{_hint and ',U'}", "9.7.13.7")(
                    _without_policy(_run) if _hint else _run
                )
    if _base == "global":
        for _n in (2, 4):
            _run = _atomic("global", "f4", _INTEGER["add"], True, _n)
            effect(f"atom{_ORDERS}.global.add.v{_n}.f32", "*u=a,*u", "9.7.13.5")(_run)
            _run = _atomic("global", "f4", _INTEGER["add"], False, _n)
            effect(f"red{_ORDERS}.global.add.v{_n}.f32", "=a,*u", "9.7.13.7")(_run)
            for _form in ("f16", "bf16"):
                _run = _atomic("global", "u4", _pairwise(_form), False, _n)
                effect(f"red{_ORDERS}.global.add.noftz.v{_n}.{_form}x2", "=a,*u", "9.7.13.7")(_run)
