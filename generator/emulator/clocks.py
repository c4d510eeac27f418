"""Vector clocks of one wave: who is known to have happened before whom.

A clock has one entry a component. Components are the warps, the asynchronous work of each warp by kind, and the
mbarriers. An access is remembered as an epoch: one component and its time then, with the PTX line. An epoch happened
before a warp's present iff the warp's clock has passed it (FastTrack, Flanagan and Freund, PLDI 2009).

Component numbers are unique in a cluster: local number · cluster size + rank. Everything is an array over the CTAs of
the wave.

    epoch    int64: time << 33 | PTX line << 13 | strong << 12 | component; 0 means never
    clock    int64 [2, components]: the smallest epoch that is still unknown of each component, (time + 1) << 33
             or 1 where nothing is known. Row 0 is happens-before itself; row 1 the same with a fence.proxy.async
             between, which is what the asynchronous proxy can see of ordinary accesses.
"""

from __future__ import annotations

import numpy as np

ONE = 1 << 33  # a tick of time
LINE_SHIFT, LINE_MASK = 13, (1 << 20) - 1
STRONG = 1 << 12  # a volatile, relaxed, acquire, release or atomic access
COMPONENT = (1 << 12) - 1
KINDS = ("warp", "ld", "st", "mma", "bulk", "cp", "wgmma", "init", "mbarrier")
GENERIC_KINDS = ("warp", "cp")  # they access shared memory through the generic proxy


class ClockArray:
    """Clocks [..., 2, components] that grow with the number of components."""

    __slots__ = ("a",)

    def __init__(self, a: np.ndarray):
        self.a = a


class Clocks:
    """The clocks of all warps, and the components they are made of.

    Args:
        n_warps: warps a CTA.
        n_cta: CTAs of the wave.
        size: CTAs a cluster.
    """

    def __init__(self, n_warps: int, n_cta: int, size: int):
        self.n_warps, self.n_cta, self.size = n_warps, n_cta, size
        self.rank = np.arange(n_cta) % size
        self.kinds: list[tuple[str, int]] = [("warp", warp) for warp in range(n_warps)]
        self._found = {kind: local for local, kind in enumerate(self.kinds)}
        self.capacity = (n_warps + 24) * size
        self._arrays: list[ClockArray] = []
        self._warps = self.array(n_warps, n_cta)
        self.own = np.arange(n_warps)[:, None] * size + self.rank  # component of each warp
        self.agents: dict[str, Agents] = {}
        self._lay_out()
        self.flat[self.base + self.own] = 2 * ONE

    def array(self, *lead: int) -> ClockArray:
        made = ClockArray(np.ones((*lead, 2, self.capacity), np.int64))
        self._arrays.append(made)
        return made

    def _lay_out(self) -> None:
        """Views and indices that depend on the number of components."""
        self.warps = self._warps.a
        self.flat = self.warps.reshape(-1)
        self.base = np.arange(self.n_warps * self.n_cta).reshape(self.n_warps, self.n_cta) * (2 * self.capacity)
        self.own_at = self.base + self.own
        component = np.arange(self.capacity)
        generic = [kind in GENERIC_KINDS for kind, _ in self.kinds]
        generic += [False] * (self.capacity // self.size - len(generic) + 1)
        # where an access through the asynchronous proxy looks a component up
        self.by_proxy = component + self.capacity * np.array(generic)[component // self.size]

    def component(self, kind: str, number: int) -> int:
        """Local number of a component, made on first sight."""
        found = self._found.get((kind, number))
        if found is None:
            found = self._found[kind, number] = len(self.kinds)
            self.kinds.append((kind, number))
            if len(self.kinds) * self.size > self.capacity:
                if 2 * self.capacity > COMPONENT:
                    raise OverflowError(f"more than {COMPONENT} components of a clock")
                self.capacity *= 2
                for array in self._arrays:
                    array.a = self.fit(array.a)
            self._lay_out()
        return found

    def fit(self, clocks: np.ndarray) -> np.ndarray:
        """Clocks of an earlier time, with as many components as there are now."""
        missing = self.capacity - clocks.shape[-1]
        if not missing:
            return clocks
        return np.concatenate([clocks, np.ones((*clocks.shape[:-1], missing), np.int64)], axis=-1)

    def kind_of(self, component: int) -> tuple[str, int, int]:
        """(kind, its number, rank) of a component."""
        return (*self.kinds[component // self.size], component % self.size)

    def agent(self, kind: str) -> Agents:
        found = self.agents.get(kind)
        if found is None:
            found = self.agents[kind] = Agents(self, kind)
        return found

    # -- what warps do with their clocks -------------------------------------------------------------------------------
    def epoch(self, warps, ctas, line: int) -> np.ndarray:
        """Epoch of an access by these warps now."""
        return self.flat[self.own_at[warps, ctas]] - ONE | self.own[warps, ctas] | (line & LINE_MASK) << LINE_SHIFT

    def tick(self, warps, ctas) -> None:
        """After a release: what follows is later than what was published."""
        self.flat[self.own_at[warps, ctas]] += ONE

    def join(self, warps, ctas, clocks: np.ndarray) -> None:
        """These warps learn what `clocks` (broadcastable to [..., 2, components]) know; no warp twice."""
        self.warps[warps, ctas] = np.maximum(self.warps[warps, ctas], clocks)

    def behind(self, epochs: np.ndarray, base, by_proxy: bool = False) -> np.ndarray:
        """bool: which epochs the warps at `base` (from `self.base`, broadcastable) do not know to be past."""
        component = epochs & COMPONENT
        return epochs >= self.flat[base + (self.by_proxy[component] if by_proxy else component)]


class Agents:
    """Asynchronous work of one kind, one component a warp: its time is not known to others until a wait raises it."""

    def __init__(self, clocks: Clocks, kind: str):
        self.clocks, self.kind = clocks, kind
        self.local = np.full(clocks.n_warps, -1)
        self.time = np.full((clocks.n_warps, clocks.n_cta), ONE)  # of the next piece of work

    def components(self, warps, ctas) -> np.ndarray:
        """Component of each (warp, CTA)."""
        local = self.local[warps]
        if (local < 0).any():
            for warp in np.unique(np.broadcast_to(warps, local.shape)[local < 0]).tolist():
                self.local[warp] = self.clocks.component(self.kind, warp)
            local = self.local[warps]
        return local * self.clocks.size + self.clocks.rank[ctas]

    def epoch(self, warps, ctas, line: int) -> np.ndarray:
        """Epoch of work that is issued now."""
        return self.time[warps, ctas] | self.components(warps, ctas) | (line & LINE_MASK) << LINE_SHIFT

    def tick(self, warps, ctas) -> None:
        self.time[warps, ctas] += ONE

    def known(self, warps, ctas, until: np.ndarray) -> None:
        """The warps' own clocks now cover their work before time `until`."""
        at = self.clocks.base[warps, ctas] + self.components(warps, ctas)
        self.clocks.flat[at] = np.maximum(self.clocks.flat[at], until)
        self.clocks.flat[at + self.clocks.capacity] = self.clocks.flat[at]
