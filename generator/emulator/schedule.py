"""Which warps run next, and when asynchronous work completes: the deterministic schedule, and adversarial ones by seed.

A schedule is any order that the program allows. `Schedule` is the fast one that every run starts with: warps gather at
their blocks, asynchronous work is as late as it can be. `Adversary(seed)` looks for trouble: random priorities with
change points (probabilistic concurrency testing, Burckhardt et al., ASPLOS 2010), one role starved or far ahead of all
others, random steps; asynchronous work as early or as late as possible, or at random, tensor-core work in issue order;
CTAs side by side or one after the other, and in any order.
"""

from __future__ import annotations

import numpy as np

TURN = 64  # every so many steps the warp that has waited longest goes first
STARVE = 256  # steps for which an adversary may keep a ready warp waiting: somebody may poll for what it will do
CHANGE = 0.03  # probability that a step changes priorities
COMPLETE = 0.3  # probability that a step is followed by the completion of an asynchronous operation

STYLES = ("priorities", "starved", "ahead", "random")
DELAYS = ("late", "early", "random")


class Schedule:
    """The deterministic schedule: the lowest block at which a warp is ready, so that warps gather; now and then the
    longest waiting warp's, since a loop that polls memory is always ready and would never end without turns for the
    others. scheduler.c chooses so.
    """

    seed: int | None = None
    delays = "late"
    gathers = True  # it chooses the lowest block, but for turns

    def order(self, clusters: list) -> list:
        """The order in which clusters of CTAs start."""
        return clusters

    def start(self, machine) -> None:
        """A wave begins."""

    def after_step(self, machine) -> None:
        """A block has run: asynchronous work may complete now."""


def longest_waiting(machine, ready: np.ndarray) -> int:
    """Flat index of the ready warp that ran longest ago."""
    return int(np.argmin(np.where(ready, machine.last_run, np.iinfo(np.int64).max)))


class Adversary(Schedule):
    """One interleaving a seed; twelve seeds in a row combine every style with every delay."""

    gathers = False

    def __init__(self, seed: int):
        self.seed = seed
        self.style, self.delays = STYLES[seed % len(STYLES)], DELAYS[seed % len(DELAYS)]
        self.rng = np.random.default_rng([seed, 20])
        self.apart = bool(self.rng.integers(2))  # CTAs have priorities of their own

    def order(self, clusters: list) -> list:
        return [clusters[i] for i in self.rng.permutation(len(clusters))]

    def start(self, machine) -> None:
        shape = (machine.n_warps, machine.n_cta)
        self.priority = np.zeros(shape, np.int64)
        if self.style == "priorities":
            columns = machine.n_cta if self.apart else 1
            self.priority += self.rng.permutation(machine.n_warps * columns).reshape(-1, columns)
        elif self.style in ("starved", "ahead"):
            role = self._role(machine)
            self.priority[role] = -1 if self.style == "starved" else 1
            if self.apart:
                self.priority += 4 * self.rng.permutation(machine.n_cta)

    def _role(self, machine) -> slice:
        """A warp, or the warpgroup that it belongs to."""
        warp = int(self.rng.integers(machine.n_warps))
        return slice(warp, warp + 1) if self.rng.integers(2) else slice(warp // 4 * 4, warp // 4 * 4 + 4)

    def choose(self, machine, ready: np.ndarray) -> tuple[int, np.ndarray]:
        """The block to run, and bool [warps, CTAs] of the warps, among `ready`, that run it."""
        waiting = longest_waiting(machine, ready)
        if machine.steps - machine.last_run.reshape(-1)[waiting] > STARVE:
            return self._alone(machine, waiting)
        if self.style == "random":
            at = int(self.rng.choice(np.flatnonzero(ready)))
            if self.rng.integers(2):
                return self._alone(machine, at)
            block = int(machine.pc.reshape(-1)[at])
            return block, ready & (machine.pc == block)
        first = ready & (self.priority == self.priority[ready].max())
        block = int(machine.pc[first].min())
        chosen = first & (machine.pc == block)
        if self.style == "priorities" and self.rng.random() < CHANGE:
            self.priority[chosen] = self.priority.min() - 1  # a change point: who runs now falls behind everybody
        return block, chosen

    @staticmethod
    def _alone(machine, at: int) -> tuple[int, np.ndarray]:
        chosen = np.zeros(machine.pc.shape, bool)
        chosen.reshape(-1)[at] = True
        return int(machine.pc.reshape(-1)[at]), chosen

    def after_step(self, machine) -> None:
        entries = machine.queue.entries
        if not entries or self.delays == "late":
            return
        if self.delays == "early":
            machine.queue.complete_all()
        elif self.rng.random() < COMPLETE:
            machine.queue.complete_some(int(self.rng.integers(len(entries))), lambda: bool(self.rng.integers(2)))
