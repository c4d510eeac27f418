"""Lanes of a warp that do not know of one another: what one lane's signal hands on without bar.warp.sync.

To the clocks (`clocks`) a warp is one agent. Run with the program of a `LanesApart`, a signal or an asynchronous
operation of some lanes hands on, and sees, of the warp's own accesses to shared memory only those before its last
bar.warp.sync (or bar.sync) if other lanes have made any since. So an access that only a missing bar.warp.sync would
order is a Hazard then (PTX ISA 9.1 §9.7.13.2). Lanes are not told apart further: what such a lane itself did since is
not handed on either. Phases of barriers are not judged: they ask where a warp stands, not what its lanes did.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .clocks import ONE
from .syntax import Kernel
from .table import Entry
from .translate import Program, Translator

WARP_BARRIERS = ("bar.warp.sync", "bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync")
ACCESSES = ("ld.shared", "st.shared", "ld.volatile.shared", "st.volatile.shared", "ldmatrix", "stmatrix", "ld.", "st.")
SIGNALS = (
    *("mbarrier.arrive", "mbarrier.expect_tx", "cp.async.bulk.", "cp.reduce.async.bulk."),
    *("tcgen05.mma", "tcgen05.commit", "tcgen05.cp", "tcgen05.shift"),
)


class LanesApart:
    """Makes the program, and keeps for each warp of the wave under way: the lanes that have accessed shared memory
    since its last barrier, and its own time then.
    """

    def __init__(self):
        self._machine = None
        self.lanes = self.common = np.zeros((0, 0), np.int64)

    def program(self, kernel: Kernel) -> Program:
        """The kernel, translated so that it tells this checker."""
        return Translator(kernel, wrap=self._wrap).translate()

    def _wrap(self, entry: Entry) -> Callable:
        if entry.pure:
            return entry.run
        kinds = ((WARP_BARRIERS, self._barrier), (SIGNALS, self._signal), (ACCESSES, self._access))
        look = next((look for prefixes, look in kinds if entry.name.startswith(prefixes)), None)
        return entry.run if look is None else look(entry.run)

    def _wave(self, m) -> None:
        if m is not self._machine:
            self._machine = m
            m.races.memory_only = True
            self.lanes = np.zeros((m.n_warps, m.n_cta), np.int64)
            self.common = np.zeros((m.n_warps, m.n_cta), np.int64)

    @staticmethod
    def _running(ws, active) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Warp, CTA and lanes (as bits) of each warp that has a lane that runs."""
        warps, ctas = ws.flat_pairs()
        on = np.ones((len(warps), 32), bool) if active is None else ws.full(active).reshape(-1, 32)
        bits = on @ (1 << np.arange(32, dtype=np.int64))
        return warps[bits != 0], ctas[bits != 0], bits[bits != 0]

    def _access(self, run: Callable) -> Callable:
        def watched(m, ws, active, instr, *operands):
            self._wave(m)
            warps, ctas, bits = self._running(ws, active)
            self.lanes[warps, ctas] |= bits
            return run(m, ws, active, instr, *operands)

        return watched

    def _barrier(self, run: Callable) -> Callable:
        def watched(m, ws, active, instr, *operands):
            self._wave(m)
            result = run(m, ws, active, instr, *operands)
            clocks = m.races.clocks
            warps, ctas, bits = self._running(ws, active)
            whole = bits == (1 << 32) - 1
            if instr.opcode.startswith("bar.warp"):
                whole &= (ws.full(operands[0]) == 0xFFFFFFFF).reshape(-1, 32).all(axis=1)[: len(whole)]
                clocks.tick(warps, ctas)
            warps, ctas = warps[whole], ctas[whole]
            self.lanes[warps, ctas] = 0
            self.common[warps, ctas] = clocks.flat[clocks.own_at[warps, ctas]] - ONE
            return result

        return watched

    def _signal(self, run: Callable) -> Callable:
        def watched(m, ws, active, instr, *operands):
            self._wave(m)
            clocks = m.races.clocks
            warps, ctas, bits = self._running(ws, active)
            apart = self.lanes[warps, ctas] & ~bits != 0
            warps, ctas = warps[apart], ctas[apart]
            kept = [clocks.flat[at] for at in _rows(clocks, warps, ctas)]
            shown = [np.minimum(row, self.common[warps, ctas]) for row in kept]
            for at, row in zip(_rows(clocks, warps, ctas), shown, strict=True):
                clocks.flat[at] = row
            result = run(m, ws, active, instr, *operands)
            for at, row, before in zip(_rows(clocks, warps, ctas), kept, shown, strict=True):
                clocks.flat[at] = row + (clocks.flat[at] - before)
            return result

        return watched


def _rows(clocks, warps, ctas) -> tuple[np.ndarray, np.ndarray]:
    """Where the clocks of these warps hold their own time: as it is, and as the asynchronous proxy sees it."""
    at = clocks.own_at[warps, ctas]
    return at, at + clocks.capacity
