"""Atomics and reductions on global, shared and distributed shared memory (PTX ISA 9.1 §9.7.13.5, §9.7.13.7)."""

from __future__ import annotations

import numpy as np

from ..cluster import OFFSET_MASK
from ..formats import decode, encode, flush, hardware_nan, pack16
from ..memory import LOCAL_BASE, WINDOW_BASE
from ..table import family
from .access import place
from .memory import owners

U16, U32 = np.uint16, np.uint32


# -- what they compute, value by value: (old, operand, third operand) → new --------------------------------------------
def _single(form: str, combine):
    return lambda x, y, _: encode(form, combine(decode(form, x), decode(form, y))).astype(U16)


def _pair(form: str, combine):
    one = _single(form, combine)

    def run(x, y, _):
        low, high = (one((x >> U32(shift)).astype(U16), (y >> U32(shift)).astype(U16), None) for shift in (0, 16))
        return pack16(high, low)

    return run


def _add_flushed(x, y, _):
    """Additions of float32 in global memory flush subnormal inputs and results (§9.7.13.5); a NaN is the hardware's."""
    return hardware_nan(np.asarray(flush(flush(x) + flush(y)))).view(np.float32)


INTEGER = {
    "add": lambda x, y, _: x + y,
    "min": lambda x, y, _: np.minimum(x, y),
    "max": lambda x, y, _: np.maximum(x, y),
    "and": lambda x, y, _: x & y,
    "or": lambda x, y, _: x | y,
    "xor": lambda x, y, _: x ^ y,
    "exch": lambda x, y, _: y,
    "cas": lambda x, y, z: np.where(x == y, z, x),
    "inc": lambda x, y, _: np.where(x >= y, x.dtype.type(0), x + x.dtype.type(1)),
    "dec": lambda x, y, _: np.where((x == 0) | (x > y), y, x - x.dtype.type(1)),
}
HALF = {"add": np.add, "min": np.fmin, "max": np.fmax}
DTYPES = {"u32": "u4", "s32": "i4", "b32": "u4", "f32": "f4", "u64": "u8", "s64": "i8", "b64": "u8", "f64": "f8"}
DTYPES |= {"b16": "u2", "f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
LETTER = {2: "h", 4: "u", 8: "U"}


def combiner(operation: str, kind: str, shared: bool):
    """The function of an operation on a type: of scalars or arrays."""
    if kind in ("f16", "bf16"):
        return _single(kind, HALF[operation])
    if kind in ("f16x2", "bf16x2"):
        return _pair(kind.removesuffix("x2"), HALF[operation])
    return _add_flushed if kind == "f32" and not shared else INTEGER[operation]


# -- lanes, one after the other ----------------------------------------------------------------------------------------
def _places(m, ws, active, instr, address, space: str):
    """(row of the batch, lane, address, CTA, whether shared) of each lane that runs, in the order of their numbers."""
    on = np.ones((*ws.lead, 32), bool) if active is None else ws.full(active)
    addresses = ws.full(np.asarray(address).astype(np.uint64))
    shared = on if space == "shared" else on & (space == "") & (addresses < np.uint64(LOCAL_BASE))
    ctas = ws.full(owners(m, ws, shared, instr, addresses) if shared.any() else ws.cta)
    rows, lanes = np.nonzero(on.reshape(-1, 32))
    columns = (a.reshape(-1, 32)[rows, lanes].tolist() for a in (addresses, ctas, shared))
    return on, zip(rows.tolist(), lanes.tolist(), *columns, strict=True)


def _order(m, ws, on, instr, address, space: str, nbytes: int) -> None:
    """Atomics on shared memory for the clocks: they do not race with one another, and may order what is around them."""
    addresses = ws.full(np.asarray(address).astype(np.uint64))
    shared = on & (space != "global") & (addresses < np.uint64(LOCAL_BASE))
    if m.races and shared.any():
        offsets = (addresses.astype(np.int64) & OFFSET_MASK) - WINDOW_BASE
        ctas = owners(m, ws, shared, instr, addresses)
        m.races.access(ws, shared, instr, offsets, nbytes, True, ctas, sync=True)


def _atomic(space: str, operation: str, kind: str, returns: bool, vector: int = 1):
    """Read, combine, write: one lane after the other."""
    dtype = np.dtype(DTYPES[kind])
    functions = {shared: combiner(operation, kind, shared) for shared in (True, False)}

    def run(m, ws, active, instr, address, b, c=None):
        on, places = _places(m, ws, active, instr, address, space)
        where = m.where(ws, instr, on, address)
        flat = lambda v: np.ascontiguousarray(ws.full(v)).reshape(-1, 32).view(dtype)  # noqa: E731
        values = [flat(v) for v in (b if vector > 1 else (b,))]
        third = None if c is None else flat(c)
        old = [np.zeros(values[0].shape, dtype) for _ in values]
        for row, lane, at, cta, shared in places:
            target, wrote = place(m, cta, at, dtype.itemsize * vector, where, shared)
            cells = target.view(dtype)
            for i, value in enumerate(values):
                old[i][row, lane] = cells[i]
                cells[i] = functions[shared](cells[i], value[row, lane], None if third is None else third[row, lane])
            wrote()
        _order(m, ws, on, instr, address, space, dtype.itemsize * vector)
        if not returns:
            return None
        unsigned = [o.view(f"u{dtype.itemsize}").reshape(*ws.lead, 32) for o in old]
        return tuple(unsigned) if vector > 1 else unsigned[0]

    return run


def _wide(space: str, operation: str):
    """exch and cas of 128 bits, as pairs of 64-bit halves."""

    def run(m, ws, active, instr, address, b, c=None):
        on, places = _places(m, ws, active, instr, address, space)
        where = m.where(ws, instr, on, address)
        halves = lambda v: np.stack([ws.full(h).reshape(-1, 32) for h in v], axis=-1)  # noqa: E731
        first, second = halves(b), None if c is None else halves(c)
        old = np.zeros(first.shape, np.uint64)
        for row, lane, at, cta, shared in places:
            target, wrote = place(m, cta, at, 16, where, shared)
            cells = target.view(np.uint64)
            old[row, lane] = cells
            if operation == "exch":
                cells[:] = first[row, lane]
            elif (cells == first[row, lane]).all():
                cells[:] = second[row, lane]
            wrote()
        _order(m, ws, on, instr, address, space, 16)
        return tuple(old[..., i].reshape(*ws.lead, 32) for i in (0, 1))

    return run


# -- the spellings (those that ptxas 13.5 takes) -----------------------------------------------------------------------
_SCOPES = "{,.cta,.cluster,.gpu,.sys}"
_HEADS = {
    "atom": f"atom{{,.relaxed,.acquire,.release,.acq_rel}}{_SCOPES}",
    "red": f"red{{,.relaxed,.release}}{_SCOPES}",
}
_ISA = {"atom": "9.7.13.5", "red": "9.7.13.7"}
_SPACES = {"": "", ".global": "global", ".{shared,shared::cta,shared::cluster}": "shared"}
SCALARS = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64")),
    **dict.fromkeys(("and", "or", "xor", "exch"), ("b32", "b64")),
    **dict.fromkeys(("inc", "dec"), ("u32",)),
    "add.noftz": ("f16", "bf16", "f16x2", "bf16x2"),
    "cas": ("b16", "b32", "b64"),
}
_VECTORS = [("add", 2, "f32"), ("add", 4, "f32")]
_VECTORS += [(f"{o}.noftz", n, k) for o in HALF for n in (2, 4, 8) for k in ("f16", "bf16")]
_VECTORS += [(f"{o}.noftz", n, k) for o in HALF for n in (2, 4) for k in ("f16x2", "bf16x2")]


def _without_policy(f):
    return lambda m, ws, active, instr, *operands: f(m, ws, active, instr, *operands[:-1])


def _register(mnemonic: str, space: str, operation: str, kind: str, vector: int = 1) -> None:
    run = _atomic(_SPACES[space], operation.split(".")[0], kind, mnemonic == "atom", vector)
    letter = ("*" if vector > 1 else "") + LETTER[np.dtype(DTYPES[kind]).itemsize]
    dest, sources = letter if mnemonic == "atom" else "", "a" + f",{letter}" * (2 if operation == "cas" else 1)
    head, tail = f"{_HEADS[mnemonic]}{space}.{operation}", f"{f'.v{vector}' if vector > 1 else ''}.{kind}"
    family(head + tail, f"{dest}={sources}", _ISA[mnemonic])(run)
    if "shared" not in space and operation != "cas":
        family(f"{head}.L2::cache_hint{tail}", f"{dest}={sources},U", _ISA[mnemonic])(_without_policy(run))


for _mnemonic in _HEADS:
    for _space in _SPACES:
        for _operation, _kinds in SCALARS.items():
            if _mnemonic == "atom" or _operation not in ("exch", "cas"):
                for _kind in _kinds:
                    _register(_mnemonic, _space, _operation, _kind)
        if "shared" not in _space:
            for _operation, _n, _kind in _VECTORS:
                _register(_mnemonic, _space, _operation, _kind, _n)
for _space, _name in _SPACES.items():
    family(f"{_HEADS['atom']}{_space}.exch.b128", "*U=a,*U", "9.7.13.5")(_wide(_name, "exch"))
    family(f"{_HEADS['atom']}{_space}.cas.b128", "*U=a,*U,*U", "9.7.13.5")(_wide(_name, "cas"))
