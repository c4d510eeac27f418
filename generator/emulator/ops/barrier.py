"""Named barriers and the cluster barrier (PTX ISA 9.1 §9.7.13.1 to §9.7.13.3)."""

from __future__ import annotations

import numpy as np

from ..errors import Hazard, UnsupportedInstruction
from ..table import effect
from ..warps import LANES


def _barrier(blocking):
    def bar(m, ws, active, instr, barrier, count=None):
        exists = ws.warp * 32 + LANES < m.threads  # the last warp may lack lanes; the barrier counts it as a whole
        if active is not None and (exists & ~active).any():
            raise Hazard(
                f"{m.where(ws, instr, active)}: an aligned barrier is executed by part of a warp; make all "
                "lanes converge on it"
            )
        ids, counts = np.unique(np.asarray(barrier)), None if count is None else np.unique(np.asarray(count))
        if len(ids) != 1 or (counts is not None and len(counts) != 1):
            return _bar_each(
                m, ws, instr, ws.full(barrier)[..., 0], None if count is None else ws.full(count)[..., 0], blocking
            )
        m.bar(ws, int(ids[0]), None if counts is None else int(counts[0]), instr, blocking)
        return None

    return bar


def _bar_each(m, ws, instr, barriers, counts, blocking):
    """Warps of one batch at different named barriers."""
    from ..warps import Warps

    warps, ctas = ws.flat_pairs()
    flat_ids = np.broadcast_to(barriers, ws.lead).reshape(-1)
    for barrier in np.unique(flat_ids):
        here = flat_ids == barrier
        count = None if counts is None else int(np.broadcast_to(counts, ws.lead).reshape(-1)[here][0])
        m.bar(Warps(warps[here], ctas[here]), int(barrier), count, instr, blocking)


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
    _whole_warps(m, ws, active, instr)
    m.cluster_arrive(ws, instr)


@effect("barrier.cluster.wait{,.acquire}{,.aligned}", "=", "9.7.13.3", ends_block=True)
def cluster_wait(m, ws, active, instr):
    _whole_warps(m, ws, active, instr)
    m.cluster_wait(ws, instr)


def _whole_warps(m, ws, active, instr) -> None:
    if active is not None:
        raise UnsupportedInstruction(f"{m.where(ws, instr, active)}: the cluster barrier in part of a warp")
