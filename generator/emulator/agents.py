"""Asynchronous work of one wave: the copy engine and the tensor core's FIFO, each completing as late as it may.

Entries stand in issue order. Nothing completes before it must: only when no warp can run does `advance` complete, in
every CTA, the first entry that signals an mbarrier some warp of that CTA waits for. MMAs issued by one CTA run in issue
order, whatever their accumulators (seen in FlashAttention-4, which relies on it).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Entry:
    """One asynchronous operation of several CTAs.

    `slots` int [n_cta]: the mbarrier slot it signals on completion, -1 for none; `remaining` bool [n_cta];
    `complete(ctas)` takes effect in those CTAs; `fifo` marks tensor-core work, which completes in issue order.
    """

    __slots__ = ("remaining", "slots", "complete", "fifo", "line")

    def __init__(
        self, n_cta: int, ctas: np.ndarray, slots, complete: Callable[[np.ndarray], None], fifo: bool, line: int
    ):
        self.remaining = np.zeros(n_cta, bool)
        self.remaining[ctas] = True
        self.slots = np.full(n_cta, -1, np.int64)
        self.slots[ctas] = slots
        self.complete, self.fifo, self.line = complete, fifo, line


class AsyncQueue:
    """Everything asynchronous that has been issued and is not complete."""

    def __init__(self, machine):
        self.machine = machine
        self.entries: list[Entry] = []

    def add(
        self, ctas: np.ndarray, slots, complete: Callable[[np.ndarray], None], line: int, fifo: bool = False
    ) -> None:
        self.entries.append(Entry(self.machine.n_cta, ctas, slots, complete, fifo, line))

    def advance(self) -> bool:
        """Complete one entry a CTA; False when nothing is left to complete."""
        if not self.entries:
            return False
        wanted = self._wanted_slots()
        progressed = self._complete_where(
            lambda entry: wanted[entry.slots, np.arange(len(entry.slots))] & (entry.slots >= 0), None
        )
        if not progressed.all():  # CTAs where nobody waits for an entry of theirs: their oldest one
            self._complete_where(lambda entry: ~progressed, progressed)
        self.entries = [e for e in self.entries if e.remaining.any()]
        return True

    def _wanted_slots(self) -> np.ndarray:
        """bool [slot + 1, n_cta]: some sleeping warp of the CTA waits for that mbarrier."""
        m = self.machine
        wanted = np.zeros((len(m.mbarriers.offsets) + 1, m.n_cta), bool)
        asleep = (m.pc != len(m.program.blocks)) & ~m.barred & (m.stalled == m.pc)
        warps, ctas = np.nonzero(asleep)
        wanted[m.wait_slot[warps, ctas], ctas] = True
        return wanted

    def _complete_where(self, condition, done: np.ndarray | None) -> np.ndarray:
        done = np.zeros(self.machine.n_cta, bool) if done is None else done.copy()
        for position, entry in enumerate(self.entries):
            chosen = entry.remaining & ~done & condition(entry)
            if not chosen.any():
                continue
            if entry.fifo:
                self._complete_fifo(position, chosen)
            else:
                entry.remaining &= ~chosen
                entry.complete(np.nonzero(chosen)[0])
            done |= chosen
        return done

    def _complete_fifo(self, position: int, chosen: np.ndarray) -> None:
        """Complete tensor-core work up to and including `position`; runs of MMAs go together so that they can be
        fused.
        """
        for entry in self.entries[: position + 1]:
            if entry.fifo:
                now = entry.remaining & chosen
                if now.any():
                    entry.remaining &= ~now
                    entry.complete(np.nonzero(now)[0])

    def drain(self) -> None:
        """Every warp has exited: what is left completes in issue order."""
        for entry in self.entries:
            if entry.remaining.any():
                left = np.nonzero(entry.remaining)[0]
                entry.remaining[:] = False
                entry.complete(left)
        self.entries = []
