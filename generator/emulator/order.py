"""What orders the warps of a wave: mbarriers, named barriers, the cluster barrier, fences: clocks that are handed on.

An arrival publishes the clock of its warp to the mbarrier; the phase that it completes carries the join of all of them,
and a wait that succeeds on it learns that. An mbarrier is a component itself: its time is the number of phases that
completed, so that what a TMA load writes is known to whoever knows the phase that the load completes.
Sources: PTX ISA 9.1 §8 (memory consistency model), §9.7.13.1, §9.7.13.3, §9.7.13.4, §9.7.13.15.
"""

from __future__ import annotations

import numpy as np

from .clocks import LINE_SHIFT, ONE, Clocks
from .cluster import CLUSTER_BARRIER, OFFSET_MASK
from .errors import Hazard
from .memory import WINDOW_BASE

NEVER = -2  # phase that a warp that never waited for an mbarrier passed last; -1 is the one before the first


class Order:
    """Happens-before through barriers; `Races` adds the memory."""

    def __init__(self, machine):
        self.machine = machine
        n_warps, n_cta = machine.n_warps, machine.n_cta
        self.advice = None  # an Advice, if warnings are wanted
        self.memory_only = False  # nothing is asked of phases and rounds of barriers, only of accesses
        self.clocks = clocks = Clocks(n_warps, n_cta, machine.cluster.size)
        self.named = clocks.array(16, n_cta)
        self.named_done = clocks.array(16, n_cta)  # published by all arrivals of each barrier's last round
        self.cluster_pending = clocks.array(n_cta // machine.cluster.size)
        self.cluster_done = clocks.array(n_cta // machine.cluster.size)
        self.fenced = clocks.array(n_warps, n_cta)  # what a relaxed arrive publishes: as of the warp's last fence
        self.acquirable = clocks.array(n_warps, n_cta)  # what a warp's next fence makes known: from relaxed reads
        self.cells: dict[tuple[int, int], np.ndarray] = {}  # (CTA, shared offset) → what strong writes published
        self.pending = clocks.array(16, n_cta)  # by mbarrier slot: published by the arrivals so far
        self.done = clocks.array(16, n_cta)  # as of the last completed phase
        self.local = np.zeros(16, np.int64)  # component of each slot
        self.initialized = np.zeros((16, n_cta), np.int64)  # epoch of mbarrier.init
        self.passed = np.full((16, n_warps, n_cta), NEVER)  # phase that each warp last saw complete
        self.passed_at = np.zeros((16, n_warps, n_cta), np.int64)  # epoch of that
        self.earlier = np.zeros((16, n_cta), np.int64)  # time of the mbarrier's component at its last mbarrier.init
        self.count = np.zeros((16, n_cta), np.int64)  # and now: that, and the phases completed since
        self.committed = clocks.array(n_warps, n_cta)  # phases that each warp's commits have completed

    # -- helpers -------------------------------------------------------------------------------------------------------
    @staticmethod
    def chosen(ws, active) -> tuple[np.ndarray, np.ndarray]:
        """Warp and CTA of the warps that have a lane in `active`."""
        warps, ctas = ws.flat_pairs()
        if active is None:
            return warps, ctas
        some = ws.full(active).reshape(-1, 32).any(axis=1)
        return warps[some], ctas[some]

    def publish(self, target: np.ndarray, to, warps, ctas, source: np.ndarray | None = None) -> None:
        """The clocks of these warps enter `target[to]` (`to`: a row for each warp)."""
        rows = (self.clocks.warps if source is None else source)[warps, ctas]
        for warp in np.unique(warps):
            mine = warps == warp
            where = to[mine]
            if len(np.unique(where)) == len(where):
                target[where] = np.maximum(target[where], rows[mine])
            else:
                np.maximum.at(target, where, rows[mine])

    def line(self, line: int) -> str:
        """ "PTX line 12 (st.shared.b32)"."""
        return f"PTX line {line} ({self.machine.program.opcode_at(line)})"

    def _grow(self, slot: int) -> None:
        while slot >= len(self.local):
            for array in (self.pending, self.done):
                array.a = np.concatenate([array.a, np.ones_like(array.a)])
            for name in ("local", "initialized", "passed", "passed_at", "earlier", "count"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.full_like(old, NEVER if name == "passed" else 0)]))

    def slot_component(self, slot: int, ctas: np.ndarray) -> np.ndarray:
        return self.local[slot] * self.clocks.size + self.clocks.rank[ctas]

    # -- mbarriers -----------------------------------------------------------------------------------------------------
    def mbarrier_init(self, ws, active, instr, slot: int, ctas: np.ndarray, where) -> None:
        warps, here = self.chosen(ws, active)
        warp = warps[np.searchsorted(here, ctas)] if (np.diff(here) > 0).all() else warps[0]
        warp = np.broadcast_to(warp, ctas.shape)
        self._grow(slot)
        if (self.initialized[slot, ctas] != 0).any():
            self._check_unused(slot, warp, ctas, where)
        self.earlier[slot, ctas] = self.count[slot, ctas] + (self.initialized[slot, ctas] != 0)
        self.local[slot] = self.clocks.component("mbarrier", slot)
        agent = self.clocks.agent("init")
        self.initialized[slot, ctas] = agent.epoch(warp, ctas, instr.line)
        agent.tick(warp, ctas)
        agent.known(warp, ctas, agent.time[warp, ctas])
        for array in (self.pending, self.done):
            array.a[slot, ctas] = 1
        self.passed[slot][:, ctas] = NEVER
        if self.advice:
            self.advice.initialized(slot, instr.line)

    def mbarrier_inval(self, ws, active, slot: int, ctas: np.ndarray, where) -> None:
        warps, here = self.chosen(ws, active)
        self._check_unused(slot, np.broadcast_to(warps[0], ctas.shape), ctas, where)

    def _check_unused(self, slot: int, warps, ctas, where) -> None:
        """Arrivals on and waits for an mbarrier that ends must be known to be over."""
        clocks, name = self.clocks, self.machine.mbarriers.name(slot)
        late = ~self._knows_arrivals(self.pending, slot, warps, ctas)
        passed = self.passed_at[slot][:, ctas]
        late |= (clocks.behind(passed, clocks.base[warps, ctas][None]) & (self.passed[slot][:, ctas] != NEVER)).any(0)
        if late.any():
            raise Hazard(
                f"{where}: ends the life of the {name} while others may still arrive on it or wait for it: let all of "
                "them pass a barrier first"
            )

    def check_initialized(self, slot: int, to: np.ndarray, warps, ctas, where) -> None:
        """A warp uses an mbarrier of CTA `to[i]`: its initialization must be known to it."""
        clocks = self.clocks
        init = self.initialized[slot, to]
        bad = clocks.behind(init, clocks.base[warps, ctas])
        if bad.any():
            at = int(np.argmax(bad))
            epoch = int(init[at])
            _, warp, _ = clocks.kind_of(epoch & 0xFFF)
            raise Hazard(
                f"{where}: uses the {self.machine.mbarriers.name(slot)}, which warp {warp} initializes at "
                f"{self.line(epoch >> LINE_SHIFT & 0xFFFFF)} with nothing that orders the two: insert a barrier "
                "(bar.sync, in a cluster barrier.cluster) after the initialization, for all warps that use it"
            )

    def arrivals(self, ws, active, instr, address, publish: bool = True, also: str | None = None) -> None:
        """Lanes use the mbarriers at `address`, and publish what they know, with their work of kind `also`."""
        m = self.machine
        where = m.where(ws, instr, True if active is None else active)
        offsets = (np.asarray(address).astype(np.int64) & OFFSET_MASK) - WINDOW_BASE
        warps, ctas = self.chosen(ws, active)
        if m.cluster.size == 1 and np.min(offsets) == np.max(offsets):
            uses = [(int(offsets.flat[0]), ctas, warps, ctas)]
        else:
            on = np.ones((ws.count, 32), bool) if active is None else ws.full(active).reshape(-1, 32)
            row, lane = np.nonzero(on)
            every = [x[row] for x in ws.flat_pairs()]
            to = m.cluster.target(every[1], ws.full(address).reshape(-1, 32)[row, lane], where)
            found = np.unique(np.stack([ws.full(offsets).reshape(-1, 32)[row, lane], to, *every]), axis=1)
            uses = [(offset, *found[1:, found[0] == offset]) for offset in np.unique(found[0]).tolist()]
        source = self.fenced.a if ".relaxed" in instr.opcode else None
        for offset, to, from_warps, from_ctas in uses:
            slot = m.mbarriers.slot(offset)
            self._grow(slot)
            self.check_initialized(slot, to, from_warps, from_ctas, where)
            if self.advice and (to != from_ctas).any():
                self.advice.used_by_others(slot, f"another CTA uses at PTX line {instr.line}")
            if publish:
                self._check_turn(slot, to, from_warps, from_ctas, where)
                self.publish(self.pending.a[slot], to, from_warps, from_ctas, source)
                if also:
                    agent = self.clocks.agent(also)
                    component, until = agent.components(from_warps, from_ctas), agent.time[from_warps, from_ctas]
                    pending = self.pending.a[slot]
                    for row in (0, 1):
                        pending[to, row, component] = np.maximum(pending[to, row, component], until)
        if publish:
            self.clocks.tick(warps, ctas)
            if self.advice:
                self.advice.released(warps, ctas, instr)

    def _check_turn(self, slot: int, to: np.ndarray, warps, ctas, where) -> None:
        """An arrival counts for the phase under way on an mbarrier of CTA `to[i]`: the warp must know that the phase
        before is complete, or in another order the arrival counts for that one, in somebody else's place.
        """
        phase = self.machine.mbarriers.phase[slot, to]
        if self.memory_only or not phase.any():
            return
        clocks = self.clocks
        known = self.known_phases(slot, to, warps, ctas)
        early = phase > known
        if not early.any():
            return
        early &= ~self._knows_arrivals(self.done, slot, warps, ctas, to)
        if early.any():
            at = int(np.argmax(early))
            warp, cta = int(warps[at]), int(ctas[at])
            behind = self.done.a[slot, to[at], 0] > clocks.warps[warp, cta, 0]
            kinds = (clocks.kind_of(c) for c in np.nonzero(behind)[0].tolist() if c // clocks.size < len(clocks.kinds))
            others = [f"warp {number}" for kind, number, _ in kinds if kind == "warp" and number != warp]
            raise Hazard(
                f"{where}: warp {warp} arrives for phase {int(phase[at])} of the {self.machine.mbarriers.name(slot)}, "
                f"of which it knows that {int(known[at])} phases completed: nothing says that "
                f"{', '.join(others) or 'what completed the phase before'} came first, so this can count for phase "
                f"{int(phase[at]) - 1} instead and complete it too early; let warp {warp} wait for that phase (or for "
                "a signal given after it) before it arrives"
            )

    def known_phases(self, slot: int, to: np.ndarray, warps, ctas) -> np.ndarray:
        """How many phases of an mbarrier of CTA `to[i]` each warp knows to be complete."""
        known_at = self.clocks.base[warps, ctas] + self.slot_component(slot, to)
        return np.maximum(self.clocks.flat[known_at] // ONE - 1 - self.earlier[slot, to], 0)

    def lend(self, slot: int, to: list[int], clocks: np.ndarray) -> None:
        """Something asynchronous arrives in these CTAs with the clock [2, components] of its issue."""
        for cta in to:
            self.pending.a[slot, cta] = np.maximum(self.pending.a[slot, cta], self.clocks.fit(clocks))

    def phase_epoch(self, slot: int, cta: int, line: int) -> int:
        """Epoch of what a load that completes the current phase of this mbarrier writes."""
        time = int(self.earlier[slot, cta]) + int(self.machine.mbarriers.phase[slot, cta]) + 1
        return time * ONE | int(self.slot_component(slot, cta)) | line << LINE_SHIFT

    def completed(self, slot: int, ctas: np.ndarray, where) -> None:
        """A phase completed in these CTAs."""
        clocks, phase = self.clocks, self.machine.mbarriers.phase[slot, ctas]
        component = self.slot_component(slot, ctas)
        self.count[slot, ctas] = self.earlier[slot, ctas] + phase
        until = (self.count[slot, ctas] + 1) * ONE
        pending = self.pending.a[slot]
        for row in (0, 1):
            pending[ctas, row, component] = until
        self.done.a[slot, ctas] = pending[ctas]
        waited = self.passed[slot][:, ctas] == phase - 2  # waits of the phase before this one
        if waited.any() and not self.memory_only:
            own = clocks.own[:, ctas]
            known = pending[ctas[None], 0, own]
            bad = waited & (self.passed_at[slot][:, ctas] >= known)
            if bad.any():
                warp, at = (int(i) for i in np.argwhere(bad)[0])
                self._passed_twice(slot, int(ctas[at]), warp, int(phase[at]) - 1, where)

    def _passed_twice(self, slot: int, cta: int, warp: int, phase: int, where) -> None:
        line = int(self.passed_at[slot, warp, cta]) >> LINE_SHIFT & 0xFFFFF
        m = self.machine
        raise Hazard(
            f"{where}: completes phase {phase} of the {m.mbarriers.name(slot)} although nothing says that warp {warp} "
            f"of CTA {m.name_cta(cta)} is through its wait for phase {phase - 1} ({self.line(line)}): the phase can "
            f"have been passed twice when it looks, and the warp waits for ever or one phase too far; let warp {warp} "
            "signal (mbarrier.arrive) after that wait, and whoever completes the next phase wait for it"
        )

    def waited(self, ws, active, instr, slots, done: np.ndarray, parity) -> None:
        """Warps test mbarriers (`slots`: one, or one a warp of the batch); those in `done` pass."""
        warps, ctas = ws.flat_pairs()
        lanes = np.broadcast_to(done, (*ws.lead, np.shape(done)[-1] if np.ndim(done) else 1))
        if active is not None:
            lanes = lanes & active
        passing = lanes.reshape(len(warps), -1).any(axis=1)
        slots = np.broadcast_to(slots, ws.lead).reshape(-1)
        parities = ws.full(parity)[..., 0].reshape(-1)
        if active is None:
            here = slice(None)
        else:
            here = ws.full(active).reshape(-1, 32).any(axis=1)
            parities = np.where(ws.full(active), ws.full(parity), 0).max(axis=-1).reshape(-1)
        first = int(slots[0])
        for slot in [first] if (slots == first).all() else np.unique(slots).tolist():
            mine = slots == slot
            mine &= np.ones(len(mine), bool) if active is None else here
            if mine.any():
                self._wait(ws, instr, slot, warps[mine], ctas[mine], passing[mine], parities[mine])

    def _wait(self, ws, instr, slot: int, warps, ctas, passing, parity) -> None:
        clocks, m = self.clocks, self.machine
        where = m.where(ws, instr)
        self.check_initialized(slot, ctas, warps, ctas, where)
        phase = m.mbarriers.phase[slot, ctas]
        known = self.known_phases(slot, ctas, warps, ctas)
        late = phase > known + ((parity & 1) == (known & 1))
        late &= not self.memory_only
        if late.any():
            known = np.where(self._knows_arrivals(self.done, slot, warps, ctas), phase, known)
            late = phase > known + ((parity & 1) == (known & 1))
        if late.any():
            at = int(np.argmax(late))
            raise Hazard(
                f"{m.at(instr, int(warps[at]), int(ctas[at]))}: waits for parity {int(parity[at])} of the "
                f"{m.mbarriers.name(slot)}, of which this warp knows that {int(known[at])} phases completed, while "
                f"{int(phase[at])} have: the phase that it waits for can have been passed twice; let it learn of every "
                "phase (wait for each in turn), or let whoever completes a phase wait until it has"
            )
        if not passing.any():
            return
        warps, ctas, phase = warps[passing], ctas[passing], phase[passing]
        self.passed[slot, warps, ctas] = phase - 1
        self.passed_at[slot, warps, ctas] = clocks.epoch(warps, ctas, instr.line)
        learned = self.done.a[slot, ctas]
        if ".relaxed" in instr.opcode:  # known from the warp's next fence on
            self.acquirable.a[warps, ctas] = np.maximum(self.acquirable.a[warps, ctas], learned)
        else:
            clocks.join(warps, ctas, learned)
        if self.advice:
            self.advice.acquires(warps, ctas, instr.line)

    def _knows_arrivals(self, published, slot: int, warps, ctas, to=None) -> np.ndarray:
        """bool: which warps know every arrival that went into `published` (self.done or self.pending), on the mbarriers
        of CTAs `to`: their own by default.
        """
        to = ctas if to is None else to
        arrived = published.a[slot, to, 0].copy()
        arrived[np.arange(len(to)), self.slot_component(slot, to)] = 0
        return (arrived <= self.clocks.warps[warps, ctas, 0]).all(axis=-1)

    # -- tcgen05.commit ------------------------------------------------------------------------------------------------
    def commit(self, warps, ctas) -> np.ndarray:
        """tcgen05.commit: the clocks [n, 2, components] that it will hand to its mbarrier."""
        agent, clocks = self.clocks.agent("mma"), self.clocks
        component = agent.components(warps, ctas)
        agent.tick(warps, ctas)
        snapshot = clocks.warps[warps, ctas]
        for row in (0, 1):
            snapshot[np.arange(len(warps)), row, component] = agent.time[warps, ctas]
        clocks.tick(warps, ctas)
        return snapshot

    def commit_arrives(self, slot: int, to: list[int], warp: int, cta: int, clocks: np.ndarray) -> None:
        """A commit of this warp is about to arrive on the mbarriers of CTAs `to`, with the clocks of `commit`.

        The commits of a warp arrive in order: who learns of this one knows the phases that earlier ones completed.
        """
        self.lend(slot, to, np.maximum(self.clocks.fit(clocks), self.committed.a[warp, cta]))
        for target in to:
            bars = self.machine.mbarriers
            if bars.expected[slot, target] == 1 and bars.tx[slot, target] == 0:  # it alone completes the phase
                component = int(self.slot_component(slot, np.int64(target)))
                count = int(self.earlier[slot, target] + bars.phase[slot, target]) + 1
                self.committed.a[warp, cta, :, component] = (count + 1) * ONE

    def commit_uses(self, slot: int, targets: dict[int, list[int]], warps, ctas, where) -> None:
        """The mbarriers of a commit, of CTAs `targets[issuing CTA]`, must be initialized, and the warp know it."""
        for warp, cta in zip(warps.tolist(), ctas.tolist(), strict=True):
            to = np.array(targets[cta])
            if self.advice:
                self.advice.used_by_others(slot, f"a tcgen05.commit signals at PTX line {where.instr.line}")
            self.check_initialized(slot, to, np.full(len(to), warp), np.full(len(to), cta), where)

    # -- named barriers and the cluster barrier ------------------------------------------------------------------------
    def bar_arrive(self, ws, barrier: int, instr) -> None:
        warps, ctas = ws.flat_pairs()
        if self.advice:
            self.advice.released(warps, ctas, instr)
        apart = (self.named_done.a[barrier, ctas, 0] > self.clocks.warps[warps, ctas, 0]).any(axis=-1)
        if apart.any() and not self.memory_only:
            self._named_too_early(barrier, int(warps[np.argmax(apart)]), int(ctas[np.argmax(apart)]), instr)
        self.publish(self.named.a[barrier], ctas, warps, ctas)
        self.clocks.tick(warps, ctas)

    def bar_done(self, barrier: int, ctas: np.ndarray) -> None:
        """The barrier completes in these CTAs; called while its warps are still marked as barred."""
        m = self.machine
        warps, at = np.nonzero((m.barred & (m.barred_on == barrier))[:, ctas])
        self.clocks.join(warps, ctas[at], self.named.a[barrier, ctas[at]])
        if self.advice:
            self.advice.acquires(warps, ctas[at], m.barred_line[warps, ctas[at]])
        self.named_done.a[barrier, ctas] = self.named.a[barrier, ctas]
        self.named.a[barrier, ctas] = 1

    def _named_too_early(self, barrier: int, warp: int, cta: int, instr) -> None:
        clocks = self.clocks
        behind = np.nonzero(self.named_done.a[barrier, cta, 0] > clocks.warps[warp, cta, 0])[0].tolist()
        kinds = (clocks.kind_of(c) for c in behind if c // clocks.size < len(clocks.kinds))
        others = ", ".join(f"warp {number}" for kind, number, _ in kinds if kind == "warp" and number != warp)
        raise Hazard(
            f"{self.machine.at(instr, warp, cta)}: comes to named barrier {barrier} although nothing says that the "
            f"round before, of {others or 'other warps'}, is complete: this can count for that one; let warp {warp} "
            "wait at that round (bar.sync, not bar.arrive), or for a signal given after it, or use another barrier"
        )

    def cluster_arrive(self, ws, instr) -> None:
        warps, ctas = ws.flat_pairs()
        if self.advice:
            self.advice.released(warps, ctas, instr)
        source = self.fenced.a if ".relaxed" in instr.opcode else None
        self.publish(self.cluster_pending.a, ctas // self.clocks.size, warps, ctas, source)
        self.clocks.tick(warps, ctas)

    def cluster_done_in(self, ctas: np.ndarray) -> None:
        """The cluster barrier completes in these CTAs; called while its warps are still marked as barred."""
        m, clusters = self.machine, np.unique(ctas // self.clocks.size)
        self.cluster_done.a[clusters] = self.cluster_pending.a[clusters]
        self.cluster_pending.a[clusters] = 1
        warps, at = np.nonzero((m.barred & (m.barred_on == CLUSTER_BARRIER))[:, ctas])
        self.cluster_wait(warps, ctas[at], m.barred_line[warps, ctas[at]])

    def cluster_wait(self, warps, ctas, line) -> None:
        """These warps are through a barrier.cluster.wait, at a PTX line (one, or one a warp)."""
        if self.advice:
            self.advice.acquires(warps, ctas, line)
        self.clocks.join(warps, ctas, self.cluster_done.a[ctas // self.clocks.size])

    # -- fences --------------------------------------------------------------------------------------------------------
    def fence_proxy(self, ws, active) -> None:
        """What these warps know of ordinary accesses, the asynchronous proxy may know from now on."""
        warps, ctas = self.chosen(ws, active)
        clocks = self.clocks
        rows = clocks.warps[warps, ctas]
        np.maximum(rows[:, 1], rows[:, 0], out=rows[:, 1])
        clocks.warps[warps, ctas] = rows

    def fence(self, ws, active, instr) -> None:
        """A relaxed arrive that follows publishes what the warp did before this."""
        warps, ctas = self.chosen(ws, active)
        if self.advice and ("mbarrier_init" in instr.opcode or ".cta" not in instr.opcode):
            self.advice.fenced_inits()
        if "mbarrier_init" not in instr.opcode:
            self.clocks.join(warps, ctas, self.acquirable.a[warps, ctas])
            self.fenced.a[warps, ctas] = self.clocks.warps[warps, ctas]
            self.clocks.tick(warps, ctas)
            return
        component = self.clocks.agent("init").components(warps, ctas)
        for row in (0, 1):
            self.fenced.a[warps, ctas, row, component] = self.clocks.warps[warps, ctas, row, component]

    # -- strong accesses to shared memory ------------------------------------------------------------------------------
    def through_cells(self, instr, warps, owns, ctas, offsets, write: bool, atomic: bool) -> None:
        """A release (or a fence before a relaxed write) publishes through a cell to whoever acquires what it wrote."""
        parts, clocks = set(instr.opcode.split(".")), self.clocks
        acquires, releases = parts & {"acquire", "acq_rel"}, parts & {"release", "acq_rel"}
        every = {tuple(r) for r in np.stack([np.ravel(x) for x in (warps, owns, ctas, offsets)], axis=1).tolist()}
        for warp, own, cta, offset in sorted(every):
            kept = self.cells.get((cta, offset))
            if kept is not None and (atomic or not write):
                target = clocks.warps if acquires else self.acquirable.a
                target[warp, own] = np.maximum(target[warp, own], clocks.fit(kept))
            if write:
                published = (clocks.warps if releases else self.fenced.a)[warp, own]
                before = clocks.fit(kept) if kept is not None and atomic else 1
                self.cells[cta, offset] = np.maximum(published, before)
        if releases:
            pairs = np.array(sorted({(warp, own) for warp, own, _, _ in every})).T
            clocks.tick(*pairs)
