"""Named barriers and the cluster barrier (PTX ISA 9.1 §9.7.13.1 to §9.7.13.3)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import Hazard, UnsupportedInstruction
from ..table import RESULT, effect
from ..warps import LANES, Warps, common


def _barrier(blocking):
    def bar(m, ws, active, instr, barrier, count=None):
        # the last warp may lack lanes; the barrier counts it as a whole
        if active is not None and ((ws.warp * 32 + LANES < m.threads) & ~active).any():
            raise Hazard(
                f"{m.where(ws, instr, active)}: an aligned barrier is executed by part of a warp; make all "
                "lanes converge on it"
            )
        one, threads = common(barrier), None if count is None else common(count)
        if one is None or (threads is None and count is not None):
            return _bar_each(
                m, ws, instr, ws.full(barrier)[..., 0], None if count is None else ws.full(count)[..., 0], blocking
            )
        m.bar(ws, one, threads, instr, blocking)
        return None

    return bar


def _bar_each(m, ws, instr, barriers, counts, blocking):
    """Warps of one batch at different named barriers."""
    key = "barriers", barriers.tobytes(), None if counts is None else counts.tobytes()
    if key not in ws.known:
        ws.known[key] = list(_parts(ws, barriers.reshape(-1), None if counts is None else counts.reshape(-1)))
    for part, barrier, count in ws.known[key]:
        m.bar(part, barrier, count, instr, blocking)


def _parts(ws, barriers, counts) -> Iterator[tuple[Warps, int, int | None]]:
    """The warps at each barrier, its number, and the count that they give."""
    warps, ctas = ws.flat_pairs()
    for barrier in np.unique(barriers):
        here = barriers == barrier
        yield Warps(warps[here], ctas[here]), int(barrier), None if counts is None else int(counts[here][0])


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
    """Without .aligned, lanes of a warp may arrive apart."""
    m.cluster_arrive(ws, _lanes_here(m, ws, active, instr), instr)


@effect("barrier.cluster.wait{,.acquire}{,.aligned}", "=", "9.7.13.3", ends_block=True)
def cluster_wait(m, ws, active, instr):
    lanes = _lanes_here(m, ws, active, instr)
    elsewhere = ~ws.full(lanes) & ~m.exited()[ws.index]
    if elsewhere.any():
        raise UnsupportedInstruction(
            f"{m.where(ws, instr, elsewhere)}: barrier.cluster.wait in part of a warp whose other lanes go on: make "
            "them converge on it"
        )
    m.cluster_wait(ws, lanes, instr)


def _lanes_here(m, ws, active, instr):
    lanes = np.True_ if active is None else active
    if ".aligned" in instr.opcode and (~ws.full(lanes) & ~m.exited()[ws.index]).any():
        raise Hazard(f"{m.where(ws, instr, lanes)}: an aligned barrier is executed by part of a warp")
    return lanes


# -- bar.red: the reading half follows when the barrier has completed, see BodyParser ----------------------------------


def bar_red(m, ws, active, instr, barrier, count, predicate):
    """Counts the predicates of the threads that arrive, and waits. A `count` of zero stands for every thread."""
    warps, ctas = ws.flat_pairs()
    exists = ws.full((ws.warp * 32 + LANES < m.threads) & np.True_)
    lanes = exists if active is None else exists & ws.full(active)
    true = (ws.full(predicate) & lanes).reshape(-1, 32).sum(axis=1)
    false = lanes.reshape(-1, 32).sum(axis=1) - true
    for barriers in np.unique(ws.full(barrier)[..., 0]):
        here = np.broadcast_to(ws.full(barrier)[..., 0] == barriers, ws.lead).reshape(-1)
        m.named.voted = True
        np.add.at(m.named.votes[0, int(barriers) & 15], ctas[here], true[here])
        np.add.at(m.named.votes[1, int(barriers) & 15], ctas[here], false[here])
    everyone = np.all(np.asarray(count) == 0)
    _barrier(True)(m, ws, active, instr, barrier, None if everyone else count)


def bar_red_result(m, ws, active, instr, barrier):
    """What the completed barrier counted."""
    barrier = np.asarray(barrier).astype(np.int64) & 15
    true, false = (ws.full(m.named.outcome[side, barrier, ws.cta]) for side in (0, 1))
    if ".popc" in instr.opcode:
        return true.astype(np.uint32)
    return false == 0 if ".and" in instr.opcode else true > 0


for _head in ("bar{,.cta}.red.", "barrier{,.cta}.red."):
    for _kind, _letter in (("popc{,.aligned}.u32", "u"), ("and{,.aligned}.pred", "p"), ("or{,.aligned}.pred", "p")):
        _names = _head + (_kind if _head[3] == "r" else _kind.replace("{,.aligned}", ""))
        effect(_names, "=u,u,p", "9.7.13.1", ends_block=True)(bar_red)
        effect(f"{_names}{RESULT}", f"{_letter}=u", "9.7.13.1")(bar_red_result)
