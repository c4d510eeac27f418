"""Warp-wide primitives: elect, vote, shuffle, register reallocation (PTX ISA 9.1 §9.7.9.6, §9.7.13)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import Hazard
from ..table import effect
from ..warps import LANES

FULL_MASK = np.uint32(0xFFFFFFFF)


_FIRST_LANE = LANES == 0
_FIRST_LANE.flags.writeable = False


def _names_all(mask) -> bool:
    return mask == FULL_MASK if isinstance(mask, np.generic) else bool((mask == FULL_MASK).all())


def _member(ws, active, mask):
    """Lanes that run and are named by the member mask."""
    if active is None and _names_all(mask):
        return np.True_
    named = ((np.asarray(mask) >> LANES) & np.uint32(1)).astype(bool)
    return named if active is None else named & active


@effect("elect.sync", "u,p=u", "9.7.13.12")
def elect_sync(m, ws, active, instr, mask):
    """Lane choice is not documented; the lowest named lane is taken."""
    if active is None and _names_all(mask):
        return np.uint32(0), _FIRST_LANE
    member = ws.full(_member(ws, active, mask))
    leader = np.argmax(member, axis=-1)[..., None]
    return leader.astype(np.uint32), (leader == LANES) & member


def _check_converged(m, ws, active, instr):
    if active is not None:
        partial = ws.full(active).any(axis=-1) & ~ws.full(active).all(axis=-1)
        if partial.any():
            raise Hazard(
                f"{m.where(ws, instr, active)}: {instr.opcode} is executed by part of a warp: all 32 lanes "
                "must converge on it"
            )


@effect("vote.sync.ballot.b32", "u=p,u", "9.7.13.9")
def vote_ballot(m, ws, active, instr, predicate, mask):
    bits = np.where(ws.full(predicate) & _member(ws, active, mask), np.uint32(1) << LANES, np.uint32(0))
    return np.bitwise_or.reduce(bits, axis=-1, keepdims=True)


@effect("vote.sync.any.pred", "p=p,u", "9.7.13.9")
def vote_any(m, ws, active, instr, predicate, mask):
    return (ws.full(predicate) & _member(ws, active, mask)).any(axis=-1, keepdims=True)


@effect("vote.sync.all.pred", "p=p,u", "9.7.13.9")
def vote_all(m, ws, active, instr, predicate, mask):
    return (ws.full(predicate) | ~_member(ws, active, mask)).all(axis=-1, keepdims=True)


@effect("vote.sync.uni.pred", "p=p,u", "9.7.13.9")
def vote_uni(m, ws, active, instr, predicate, mask):
    return vote_all(m, ws, active, instr, predicate, mask) | ~vote_any(m, ws, active, instr, predicate, mask)


def _shuffle(source_lane, valid):
    """shfl.sync: `source_lane(b, low)` picks the lane, `valid(j, high)` says whether it lies in the segment."""

    def shfl(m, ws, active, instr, a, b, c, mask):
        _check_converged(m, ws, active, instr)
        fixed = isinstance(b, np.generic) and isinstance(c, np.generic)
        source, inside = fixed_sources(int(b), int(c)) if fixed else sources(np.asarray(b), np.asarray(c))
        values = ws.full(a)
        same = source.ndim == 1  # every warp takes the same lanes
        return values[..., source] if same else np.take_along_axis(values, ws.full(source), axis=-1), inside

    def sources(b, c):
        """The lane that each lane reads, and whether it lies in its segment."""
        segment, clamp = (c >> np.uint32(8)) & np.uint32(31), c & np.uint32(31)
        high = ((LANES & segment) | (clamp & ~segment)).astype(np.int64)
        low = (LANES & segment).astype(np.int64)
        j = source_lane((b & np.uint32(31)).astype(np.int64), low, segment.astype(np.int64))
        inside = valid(j, high)
        return np.where(inside, j, LANES), inside

    @lru_cache(maxsize=256)
    def fixed_sources(b: int, c: int):
        found = sources(np.asarray(b, np.uint32), np.asarray(c, np.uint32))
        for array in found:
            array.flags.writeable = False
        return found

    return shfl


_MODES = {
    "idx": (lambda b, low, segment: low | (b & ~segment), lambda j, high: j <= high),
    "bfly": (lambda b, low, segment: LANES.astype(np.int64) ^ b, lambda j, high: j <= high),
    "down": (lambda b, low, segment: LANES.astype(np.int64) + b, lambda j, high: j <= high),
    "up": (lambda b, low, segment: LANES.astype(np.int64) - b, lambda j, high: j >= high),
}
for _mode, _functions in _MODES.items():
    effect(f"shfl.sync.{_mode}.b32", "u,?p=u,u,u,u", "9.7.9.6")(_shuffle(*_functions))


@effect("setmaxnreg.{inc,dec}.sync.aligned.u32", "=k", "9.7.19.5")
def setmaxnreg(m, ws, active, instr, count):
    if not 24 <= count <= 256 or count % 8:
        raise Hazard(f"{m.where(ws, instr)}: setmaxnreg {count}: the count must be a multiple of 8 from 24 to 256")
    if m.pool:
        m.pool.set(ws, active, instr, count)


@effect("griddepcontrol.{wait,launch_dependents}", "=", "9.7.13.13")
def griddepcontrol(m, ws, active, instr):
    """Launches run one after the other."""


@effect("activemask.b32", "u=", "9.7.9.9")
def activemask(m, ws, active, instr):
    lanes = np.ones((*ws.lead, 32), bool) if active is None else ws.full(active)
    return np.bitwise_or.reduce(np.where(lanes, np.uint32(1) << LANES, np.uint32(0)), axis=-1, keepdims=True)


# operation, value that a lane outside the member mask contributes
_REDUCE = {
    "add": (np.add, lambda dtype: dtype(0)),
    "min": (np.minimum, lambda dtype: np.iinfo(dtype).max),
    "max": (np.maximum, lambda dtype: np.iinfo(dtype).min),
    "and": (np.bitwise_and, lambda dtype: np.iinfo(dtype).max),
    "or": (np.bitwise_or, lambda dtype: dtype(0)),
    "xor": (np.bitwise_xor, lambda dtype: dtype(0)),
}


@effect("redux.sync.{add,min,max}.{u32,s32} redux.sync.{and,or,xor}.b32", "u=u,u", "9.7.13.10")
def redux(m, ws, active, instr, value, mask):
    _check_converged(m, ws, active, instr)
    _, _, name, kind = instr.opcode.split(".")
    dtype = np.int32 if kind == "s32" else np.uint32
    operation, outside = _REDUCE[name]
    members = np.where(_member(ws, active, mask), ws.full(value).view(dtype), dtype(outside(dtype)))
    return operation.reduce(members, axis=-1, keepdims=True, dtype=dtype).view(np.uint32)


@effect("redux.sync.{min,max}{,.abs}{,.NaN}.f32", "u=f,u", "9.7.13.10")
def redux_f32(m, ws, active, instr, value, mask):
    """-0 is below +0; NaN is dropped or, with .NaN, wins."""
    _check_converged(m, ws, active, instr)
    value = ws.full(value)
    bits = (np.abs(value) if ".abs" in instr.opcode else value).view(np.uint32)
    negative, nan = bits >> np.uint32(31) != 0, np.isnan(value)
    rank = np.where(negative, ~bits, bits | np.uint32(0x80000000)).astype(np.int64)  # orders floats as integers
    member = _member(ws, active, mask)
    counted = member & ~nan
    largest = "max" in instr.opcode
    rank = np.where(counted, rank, -1 if largest else 1 << 32)
    best = (np.max if largest else np.min)(rank, axis=-1, keepdims=True)
    found = (best & 0xFFFFFFFF).astype(np.uint32)
    result = np.where(found >> np.uint32(31) != 0, found & np.uint32(0x7FFFFFFF), ~found)
    lost = ~counted.any(axis=-1, keepdims=True)
    if ".NaN" in instr.opcode:
        lost = lost | (member & nan).any(axis=-1, keepdims=True)
    return np.where(lost, np.uint32(0x7FFFFFFF), result)


def _matches(ws, active, value, mask):
    """bool [..., lane, other lane]: both are members and hold the same value."""
    member = ws.full(_member(ws, active, mask))
    value = ws.full(value)
    return (value[..., :, None] == value[..., None, :]) & member[..., None, :] & member[..., :, None]


@effect("match.any.sync.b32", "u=u,u", "9.7.13.11")
@effect("match.any.sync.b64", "u=U,u", "9.7.13.11")
def match_any(m, ws, active, instr, value, mask):
    same = _matches(ws, active, value, mask)
    return np.bitwise_or.reduce(np.where(same, np.uint32(1) << LANES, np.uint32(0)), axis=-1)


@effect("match.all.sync.b32", "u,?p=u,u", "9.7.13.11")
@effect("match.all.sync.b64", "u,?p=U,u", "9.7.13.11")
def match_all(m, ws, active, instr, value, mask):
    """The member mask and true where all members hold one value, else zero and false."""
    member = ws.full(_member(ws, active, mask))
    same = (_matches(ws, active, value, mask) | ~member[..., None, :]).all(axis=-1) & member
    return np.where(same, ws.full(np.asarray(mask).astype(np.uint32)), np.uint32(0)), same


@effect("nanosleep.u32", "=u", "9.7.19.2")
@effect("pmevent{,.mask}", "=k", "9.7.19.3")
def pause(m, ws, active, instr, operand):
    """Time is not modelled."""


@effect("trap", "=", "9.7.19.4")
@effect("brkpt", "=", "9.7.19.1")
def trap(m, ws, active, instr):
    what = f"the kernel executes {instr.opcode}"
    if "brx.idx" in instr.text:
        what = "the index of brx.idx lies outside of its table"
    raise Hazard(f"{m.where(ws, instr, True if active is None else active)}: {what}")
