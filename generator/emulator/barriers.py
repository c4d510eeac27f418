"""mbarriers and named barriers of one wave (PTX ISA 9.1 §9.7.13.1, §9.7.13.15)."""

from __future__ import annotations

import numpy as np

from .errors import Hazard
from .labels import Labels

MAX_COUNT = (1 << 20) - 1


_NO_CTAS = np.empty(0, np.int64)


class Mbarriers:
    """State of every mbarrier by shared-memory offset: arrays [slot, n_cta] of phase, pending and expected
    arrivals, tx.
    """

    def __init__(self, n_cta: int, labels: Labels):
        self.n_cta, self.labels = n_cta, labels
        self.slots: dict[int, int] = {}
        self.offsets: list[int] = []
        self.everywhere: list[bool] = []  # by slot: it is live in every CTA
        self.live = np.zeros((0, n_cta), bool)
        self.phase = np.zeros((0, n_cta), np.int64)
        self.pending = np.zeros((0, n_cta), np.int64)
        self.expected = np.zeros((0, n_cta), np.int64)
        self.tx = np.zeros((0, n_cta), np.int64)
        self.races = None  # whoever wants to know of completed phases

    def slot(self, offset: int) -> int:
        """Row of the barrier at shared offset `offset`, made on first sight."""
        found = self.slots.get(offset)
        if found is None:
            found = self.slots[offset] = len(self.offsets)
            self.offsets.append(offset)
            self.everywhere.append(False)
            for name in ("live", "phase", "pending", "expected", "tx"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros((1, self.n_cta), old.dtype)]))
        return found

    def at(self, ctas: np.ndarray) -> np.ndarray | slice:
        """The index of these CTAs, ascending: that of all of them is a slice, which NumPy is quicker with."""
        return slice(None) if len(ctas) == self.n_cta else ctas

    def require_live(self, slot: int, ctas: np.ndarray, where: str) -> None:
        if not self.everywhere[slot] and np.count_nonzero(self.live[slot, ctas]) < len(ctas):
            cta = int(ctas[np.argmin(self.live[slot, ctas])])
            raise Hazard(f"{where}: CTA {cta} uses the {self.name(slot)} before mbarrier.init (or after inval)")

    def init(self, offset: int, ctas: np.ndarray, count: int, where: str) -> None:
        if not 1 <= count <= MAX_COUNT:
            raise Hazard(f"{where}: mbarrier.init with count {count}, outside 1 to {MAX_COUNT}")
        slot = self.slot(offset)
        if self.live[slot, ctas].any():
            raise Hazard(f"{where}: mbarrier.init of the live {self.name(slot)}: invalidate it first (mbarrier.inval)")
        self.live[slot, ctas] = True
        self.everywhere[slot] = bool(self.live[slot].all())
        self.phase[slot, ctas] = 0
        self.pending[slot, ctas] = self.expected[slot, ctas] = count
        self.tx[slot, ctas] = 0

    def invalidate(self, slot: int, ctas: np.ndarray) -> None:
        self.live[slot, ctas] = False
        self.everywhere[slot] = False

    def arrive(self, slot: int, ctas: np.ndarray, counts, where: str) -> np.ndarray:
        """Pending count goes down by `counts`; returns the CTAs whose phase completed."""
        self.require_live(slot, ctas, where)
        at = self.at(ctas)
        left = self.pending[slot, at] - counts
        self.pending[slot, at] = left
        if np.minimum.reduce(left) < 0:
            cta = int(ctas[np.argmin(self.pending[slot, ctas])])
            raise Hazard(
                f"{where}: CTA {cta}: arrival overflow on the {self.name(slot)}: "
                f"{self.expected[slot, cta] - self.pending[slot, cta]} arrivals in phase "
                f"{self.phase[slot, cta]}, which expects {self.expected[slot, cta]}"
            )
        return self.settle(slot, ctas, where)

    def drop(self, slot: int, ctas: np.ndarray, counts, where: str) -> None:
        """The phases after this one expect `counts` fewer arrivals."""
        self.require_live(slot, ctas, where)
        self.expected[slot, ctas] -= counts
        if (self.expected[slot, ctas] < 0).any():
            raise Hazard(f"{where}: arrive_drop takes the expected count of the {self.name(slot)} below zero")

    def add_tx(self, slot: int, ctas: np.ndarray, nbytes, where: str) -> None:
        self.require_live(slot, ctas, where)
        at = self.at(ctas)
        now = self.tx[slot, at] + nbytes
        self.tx[slot, at] = now
        if np.maximum.reduce(np.abs(now)) > MAX_COUNT:
            raise Hazard(f"{where}: transaction count beyond ±{MAX_COUNT} on the {self.name(slot)}")

    def complete_tx(self, slot: int, ctas: np.ndarray, nbytes, where: str) -> np.ndarray:
        """Bytes arrived; returns the CTAs whose phase completed."""
        self.add_tx(slot, ctas, -np.asarray(nbytes), where)
        return self.settle(slot, ctas, where)

    def settle(self, slot: int, ctas: np.ndarray, where: str) -> np.ndarray:
        at = self.at(ctas)
        open_still = self.pending[slot, at] | self.tx[slot, at]
        if np.count_nonzero(open_still) == len(ctas):
            return _NO_CTAS
        done = ctas[open_still == 0]
        if len(done):
            at = self.at(done)
            self.phase[slot, at] += 1
            self.pending[slot, at] = self.expected[slot, at]
            if self.races:
                self.races.completed(slot, done, where)
        return done

    def check_exit(self) -> None:
        """Copies may not have signalled more bytes than were expected: some wait ended, or would end, too early."""
        left = np.argwhere(self.live & (self.tx < 0))
        if len(left):
            slot, cta = (int(i) for i in left[0])
            raise Hazard(
                f"CTA {cta} exits, and copies have signalled {-int(self.tx[slot, cta])} bytes more than were expected "
                f"on the {self.name(slot)}: make expect_tx and the copies agree (one lane issues a copy)"
            )

    def name(self, slot: int) -> str:
        return f"mbarrier at {self.labels.shared_at(self.offsets[slot])}"

    def describe(self, slot: int, cta: int) -> str:
        return (
            f"{self.name(slot)}: phase {self.phase[slot, cta]}, "
            f"{self.pending[slot, cta]} of {self.expected[slot, cta]} arrivals and {self.tx[slot, cta]} bytes missing"
        )


class NamedBarriers:
    """The 16 barriers of each CTA: threads arrived, threads expected [16, n_cta].

    `votes` counts the true and the false predicates of bar.red in this phase, `outcome` those of the last one, int64
    [2, 16, n_cta].
    """

    def __init__(self, n_cta: int):
        self.n_cta = n_cta
        self.voted = False  # some bar.red has been executed
        self.arrived = np.zeros((16, n_cta), np.int64)
        self.expected = np.zeros((16, n_cta), np.int64)
        self.votes = np.zeros((2, 16, n_cta), np.int64)
        self.outcome = np.zeros((2, 16, n_cta), np.int64)

    def arrive(self, barrier: int, ctas: np.ndarray, threads: np.ndarray, expected: int, where: str) -> np.ndarray:
        """`threads` more threads arrive in each CTA; returns the CTAs where the barrier completed (and was reset)."""
        if not 0 <= barrier < 16:
            raise Hazard(f"{where}: named barrier {barrier}, outside 0 to 15")
        if expected % 32 or expected <= 0:
            raise Hazard(
                f"{where}: named barrier {barrier} with {expected} threads: the count must be a positive multiple of 32"
            )
        at = slice(None) if len(ctas) == self.n_cta else ctas
        before = self.arrived[barrier, at]
        other = (self.expected[barrier, at] != expected) & (before != 0)
        if np.count_nonzero(other):
            raise Hazard(
                f"{where}: named barrier {barrier} is used with {expected} threads while others use it "
                f"with {self.expected[barrier, at][other][0]}"
            )
        self.expected[barrier, at] = expected
        now = before + threads
        self.arrived[barrier, at] = now
        most = np.maximum.reduce(now)
        if most > expected:
            raise Hazard(f"{where}: named barrier {barrier}: {most} threads arrived where {expected} are expected")
        if most < expected:
            return _NO_CTAS
        done = ctas[now == expected]
        self.arrived[barrier, done] = 0
        if self.voted:
            self.outcome[:, barrier, done] = self.votes[:, barrier, done]
            self.votes[:, barrier, done] = 0
        return done
