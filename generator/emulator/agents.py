"""Asynchronous work of one wave: the copy engine and the tensor core's FIFO, each completing as late as it may.

Entries stand in issue order. Nothing completes before it must: only when no warp can run does `advance` complete, in
every CTA, the first entry that signals an mbarrier some warp of that CTA waits for. MMAs issued by one CTA run in issue
order, whatever their accumulators (seen in FlashAttention-4, which relies on it).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class CtaSets:
    """Sets of CTAs as bits of an int, and back to index arrays; both directions are remembered."""

    def __init__(self):
        self._arrays: dict[int, np.ndarray] = {}

    def bits(self, ctas: np.ndarray) -> int:
        """Index array, ascending → bits."""
        found = 0
        for cta in ctas.tolist():
            found |= 1 << cta
        self._arrays.setdefault(found, ctas)
        return found

    def array(self, bits: int) -> np.ndarray:
        """Bits → index array, ascending."""
        found = self._arrays.get(bits)
        if found is None:
            found = self._arrays[bits] = np.array([i for i in range(bits.bit_length()) if bits >> i & 1])
        return found


class Entry:
    """One asynchronous operation of several CTAs, each set of them a CtaSets int.

    `remaining`: where it is not complete; `signals`: mbarrier slot → CTAs where completing it signals that mbarrier;
    `complete(bits)` takes effect there; `fifo` marks tensor-core work, which completes in issue order.
    """

    __slots__ = ("remaining", "signals", "complete", "fifo")

    def __init__(self, ctas: int, signals: dict[int, int], complete: Callable[[int], None], fifo: bool):
        self.remaining, self.signals, self.complete, self.fifo = ctas, signals, complete, fifo


class AsyncQueue:
    """Everything asynchronous that has been issued and is not complete."""

    def __init__(self, machine):
        self.machine = machine
        self.sets = CtaSets()
        self.entries: list[Entry] = []

    def add(self, ctas: int, signals: dict[int, int], complete: Callable[[int], None], fifo: bool = False) -> None:
        self.entries.append(Entry(ctas, signals, complete, fifo))

    def advance(self) -> bool:
        """Complete one entry a CTA; False when nothing is left to complete."""
        if not self.entries:
            return False
        wanted, whole = self._wanted(), self.machine.cluster.expand  # clusters advance as a whole
        done = 0
        for position, entry in enumerate(self.entries):
            awaited = 0
            for slot, ctas in entry.signals.items():
                awaited |= ctas & wanted.get(slot, 0)
            if awaited & ~done:
                done |= whole(self._complete(position, entry.remaining & whole(awaited & ~done)))
        for position, entry in enumerate(
            self.entries
        ):  # CTAs where nobody waits for an entry of theirs: the oldest one
            if entry.remaining & ~done:
                done |= whole(self._complete(position, entry.remaining & ~done))
        self.entries = [entry for entry in self.entries if entry.remaining]
        return True

    def complete_all(self) -> None:
        """Everything takes effect, in issue order; of the tensor core's work, what a commit follows: the products
        between two commits are added up together, whatever the schedule.
        """
        last = max((i for i, entry in enumerate(self.entries) if entry.fifo and entry.signals), default=-1)
        for position, entry in enumerate(self.entries):
            if not entry.fifo or position == last:
                self._complete(position, entry.remaining)
        self.entries = [entry for entry in self.entries if entry.remaining]

    def complete_some(self, position: int, chance: Callable[[], bool]) -> None:
        """One entry takes effect in those of its clusters that `chance` picks, and tensor-core work before it."""
        entry = self.entries[position]
        if entry.fifo and not entry.signals:
            return
        chosen = sum(part for part in self.machine.cluster.split(entry.remaining) if chance())
        self._complete(position, chosen)
        self.entries = [entry for entry in self.entries if entry.remaining]

    def _wanted(self) -> dict[int, int]:
        """mbarrier slot → CTAs where a sleeping warp waits for it."""
        m = self.machine
        asleep = (m.pc != len(m.program.blocks)) & ~m.barred & (m.stalled == m.pc)
        warps, ctas = np.nonzero(asleep)
        wanted: dict[int, int] = {}
        for slot, cta in set(zip(m.wait_slot[warps, ctas].tolist(), ctas.tolist(), strict=True)):
            wanted[slot] = wanted.get(slot, 0) | 1 << cta
        return {slot: m.cluster.expand(ctas) for slot, ctas in wanted.items()}  # a peer may have to signal

    def _complete(self, position: int, chosen: int) -> int:
        """Complete an entry in `chosen` CTAs, and tensor-core work before it if it is such work; returns `chosen`."""
        if chosen:
            last = self.entries[position]
            for entry in self.entries[: position + 1] if last.fifo else (last,):
                now = entry.remaining & self.machine.cluster.expand(chosen)
                if now and entry.fifo == last.fifo:
                    entry.remaining &= ~now
                    entry.complete(now)
        return chosen

    def drain(self) -> None:
        """Every warp has exited: what is left completes in issue order."""
        for entry in self.entries:
            if entry.remaining:
                left, entry.remaining = entry.remaining, 0
                entry.complete(left)
        self.entries = []
