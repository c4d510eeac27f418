"""Cluster launch control: a running CTA takes over the work of a cluster that has not started (PTX ISA 9.1 §9.7.13.17,
§9.7.13.18). The 16-byte response is opaque; here it holds the first CTA's x, y and z, and 1 where a launch was
cancelled.
"""

from __future__ import annotations

import numpy as np

from ..memory import VALID
from ..table import effect
from .memory import shared_offsets
from .tma import _begin, _lanes

RESPONSE_BYTES = 16


def _try_cancel(multicast: bool):
    def run(m, ws, active, instr, address, barrier):
        where = m.where(ws, instr, True if active is None else active)
        places = shared_offsets(m, ws, active, instr, address, RESPONSE_BYTES)
        bars = shared_offsets(m, ws, active, instr, barrier, 8)
        warps, ctas, _, rows = _lanes(m, ws, active, (places, bars))
        columns = (column.tolist() for column in (warps, ctas, *rows))
        for warp, cta, offset, bar in zip(*columns, strict=True):
            cancelled = m.waiting.popleft()[0] if m.waiting else None
            response = np.array([*(cancelled or (0, 0, 0)), cancelled is not None], np.uint32).view(np.complex128)
            reached = m.cluster.peers(cta, (1 << m.cluster.size) - 1) if multicast else [cta]
            slot, chunk = m.mbarriers.slot(bar), np.array([offset // 16])
            for peer in reached:
                m.mbarriers.require_live(slot, np.array([peer]), where)
                _begin(m, peer, chunk, where)
            if m.races:
                began = [(warp, cta, peer, peer, slot, offset, RESPONSE_BYTES) for peer in reached]
                m.races.loads(instr, began, where)

            def complete(done: int, slot=slot, chunk=chunk, reached=reached, response=response) -> None:
                for peer in reached:
                    m.smem.chunks[peer, chunk] = response
                    if m.strict:
                        m.smem.state[peer].reshape(-1, 16)[chunk] = VALID
                    m.wake(slot, m.mbarriers.complete_tx(slot, np.array([peer]), RESPONSE_BYTES, where))

            bits = m.queue.sets.bits(np.array([cta]))
            m.queue.add(bits, {slot: bits}, complete)

    return run


_NAME = "clusterlaunchcontrol.try_cancel.async{,.shared::cta}.mbarrier::complete_tx::bytes"
effect(f"{_NAME}.b128", "=a,a", "9.7.13.17")(_try_cancel(False))
effect(f"{_NAME}.multicast::cluster::all.b128", "=a,a", "9.7.13.17")(_try_cancel(True))


def _words(response) -> list[np.ndarray]:
    low, high = (np.asarray(half) for half in response)
    return [(half >> np.uint64(shift)).astype(np.uint32) for half in (low, high) for shift in (0, 32)]


@effect("clusterlaunchcontrol.query_cancel.is_canceled.pred.b128", "p=*U", "9.7.13.18")
def is_canceled(m, ws, active, instr, response):
    return _words(response)[3] == 1


@effect("clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128", "*u=*U", "9.7.13.18")
@effect("clusterlaunchcontrol.query_cancel.get_first_ctaid::{x,y,z}.b32.b128", "u=*U", "9.7.13.18")
def first_ctaid(m, ws, active, instr, response):
    """Where the request cancelled nothing the ISA leaves open what comes: all ones, which is no CTA of any grid."""
    words = _words(response)
    words = [np.where(words[3] == 1, word, np.uint32(0xFFFFFFFF)) for word in words]
    axis = instr.opcode.split("::")[-1][0]
    return words[" xyz".index(axis) - 1] if "::" in instr.opcode else (*words[:3], np.uint32(0))
