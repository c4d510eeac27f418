"""What the ISA asks for and silicon is known to tolerate: warnings, looked for only where somebody wants them.

    checker = Formal(); case.run(program=checker.program(kernel)); checker.warnings

- tcgen05.fence::before_thread_sync between a warp's tcgen05.ld or st and its signal to other warps, and
  tcgen05.fence::after_thread_sync between a wait for somebody's tcgen05 work and the warp's own (§9.7.16.6.4)
- a fence (fence.mbarrier_init, fence.proxy.async) between mbarrier.init and the asynchronous proxy's use (§9.7.13.4)
- one lane that initializes an mbarrier, not a warp's lanes alike (§9.7.13.15.9)
- bar.warp.sync between shared-memory stores or loads of a warp's lanes and the signal that one gives for all, and
  between one lane's wait for its bulk store and other lanes' stores to what that has read (§9.7.13.2)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .ops.memory import shared_offsets
from .ops.tma import _lanes
from .syntax import Kernel
from .table import Entry
from .translate import Program, Translator

Warp = tuple[int, int]  # CTA, warp
STORES = ("st.shared", "stmatrix")
BULK_STORES = tuple(f"cp.async.bulk.tensor.{rank}d.global" for rank in range(1, 6)) + ("cp.async.bulk.global",)
LOADS = tuple(f"cp.async.bulk.tensor.{rank}d.shared" for rank in range(1, 6)) + ("cp.async.bulk.shared",)
TENSOR_WORK = ("tcgen05.ld", "tcgen05.st", "tcgen05.mma", "tcgen05.cp", "tcgen05.dealloc")


class Formal:
    """Collects `warnings`: (PTX line, text), one a line and kind. Waves are not told apart: for small launches."""

    def __init__(self):
        self.warnings: dict[tuple[int, str], str] = {}
        self.touched: set[Warp] = set()  # a tcgen05.ld or st since the warp's last fence::before
        self.ever: set[Warp] = set()  # any tcgen05.ld or st
        self.learned: dict[Warp, int] = {}  # line of a wait for somebody's tcgen05 work, until fence::after
        self.carrying: set[tuple[int, int]] = set()  # mbarriers (CTA, offset) that signal tcgen05 work
        self.fresh: dict[tuple[int, int], Warp] = {}  # initialized and not fenced since: by whom
        self.stored: dict[Warp, np.ndarray] = {}  # lanes that stored to shared memory since bar.warp.sync
        self.loaded: dict[Warp, np.ndarray] = {}  # the same of loads
        self.reading: dict[
            Warp, list[tuple[int, tuple]]
        ] = {}  # lane and bulk store, to the first barrier after its end

    def program(self, kernel: Kernel) -> Program:
        """The kernel, translated so that it tells this checker."""
        return Translator(kernel, wrap=self._wrap).translate()

    def _wrap(self, entry: Entry) -> Callable:
        look = None if entry.pure else next((f for prefix, f in self._looks() if entry.name.startswith(prefix)), None)
        if look is None:
            return entry.run

        def watched(m, ws, active, instr, *operands):
            result = entry.run(m, ws, active, instr, *operands)
            look(m, ws, active, instr, operands, result)
            return result

        return watched

    def _looks(self):
        yield from ((prefix, self._bulk_load) for prefix in LOADS)
        yield from ((prefix, self._bulk_store) for prefix in BULK_STORES)
        yield from ((prefix, self._store) for prefix in STORES)
        yield "ld.shared", self._load
        yield "tcgen05.fence", self._fence
        yield "tcgen05.commit", self._commit
        yield from ((prefix, self._tensor_work) for prefix in TENSOR_WORK)
        yield "mbarrier.init", self._init
        yield "mbarrier.arrive", self._arrive
        yield from ((f"mbarrier.{wait}", self._wait) for wait in ("try_wait", "test_wait"))
        yield from ((prefix, self._proxy_fence) for prefix in ("fence.mbarrier_init", "fence.proxy.async"))
        yield "bar.warp.sync", self._warp_barrier
        yield from (
            (f"{bar}{kind}", self._barrier) for bar in ("bar.", "barrier.") for kind in ("sync", "cta", "arrive")
        )
        yield "barrier.cluster.arrive", self._cluster_arrive
        yield "barrier.cluster.wait", self._cluster_wait

    def _warn(self, instr, text: str) -> None:
        self.warnings.setdefault((instr.line, text.split(":")[0]), f"PTX line {instr.line} ({instr.opcode}): {text}")

    @staticmethod
    def _warps(m, ws, active) -> dict[Warp, np.ndarray]:
        """Lanes of each warp that run."""
        warps, ctas, lanes, _ = _lanes(m, ws, active, ())
        found: dict[Warp, np.ndarray] = {}
        for warp, cta, lane in zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True):
            found.setdefault((cta, warp), np.zeros(32, bool))[lane] = True
        return found

    @staticmethod
    def _places(m, ws, active, instr, address) -> list[tuple[Warp, tuple[int, int]]]:
        offsets = shared_offsets(m, ws, active, instr, address, 8)
        warps, ctas, _, (named, places) = _lanes(m, ws, active, (address, offsets))
        targets = m.cluster.target(ctas, named, m.where(ws, instr))
        rows = zip(warps.tolist(), ctas.tolist(), targets.tolist(), places.tolist(), strict=True)
        return list(dict.fromkeys(((cta, warp), (target, place)) for warp, cta, target, place in rows))

    # -- tcgen05.fence -------------------------------------------------------------------------------------------------
    def _tensor_work(self, m, ws, active, instr, operands, _) -> None:
        accesses = instr.opcode.startswith(("tcgen05.ld", "tcgen05.st"))
        for warp in self._warps(m, ws, active):
            if warp in self.learned:
                line = self.learned[warp]
                self._warn(instr, f"no tcgen05.fence::after_thread_sync: since the wait at PTX line {line}")
            if accesses:
                self.touched.add(warp)
                self.ever.add(warp)

    def _fence(self, m, ws, active, instr, operands, _) -> None:
        for warp in self._warps(m, ws, active):
            if "before" in instr.opcode:
                self.touched.discard(warp)
            else:
                self.learned.pop(warp, None)

    def _leave(self, instr, warp: Warp) -> None:
        if warp in self.touched:
            self._warn(instr, "no tcgen05.fence::before_thread_sync: since the warp's tcgen05.ld or st")

    def _commit(self, m, ws, active, instr, operands, _) -> None:
        for warp, place in self._places(m, ws, active, instr, operands[0]):
            self.carrying.add(place)
            self._visible(instr, warp, place)

    def _arrive(self, m, ws, active, instr, operands, _) -> None:
        for warp, place in self._places(m, ws, active, instr, operands[0]):
            self._leave(instr, warp)
            if warp in self.ever:
                self.carrying.add(place)
        self._lanes_apart(m, ws, active, instr)

    def _wait(self, m, ws, active, instr, operands, done) -> None:
        if not np.any(done):
            return
        offsets = shared_offsets(m, ws, active, instr, operands[0], 8)
        warps, ctas, _, (places, passed) = _lanes(m, ws, active, (offsets, done))
        for warp, cta, place, good in zip(*(x.tolist() for x in (warps, ctas, places, passed)), strict=True):
            if good and (cta, place) in self.carrying and m.mbarriers.phase[m.mbarriers.slot(place), cta]:
                self.learned[cta, warp] = instr.line

    def _barrier(self, m, ws, active, instr, operands, _) -> None:
        for warp in self._warps(m, ws, active):
            self._leave(instr, warp)
            if "arrive" in instr.opcode:  # each lane hands on what it did, and learns nothing of the others
                continue
            self._in_step(m, warp)
            self._learns(instr, warp)

    def _learns(self, instr, warp: Warp) -> None:
        if self.ever:
            self.learned[warp] = instr.line

    def _cluster_arrive(self, m, ws, active, instr, operands, _) -> None:
        for warp in self._warps(m, ws, active):
            self._leave(instr, warp)

    def _cluster_wait(self, m, ws, active, instr, operands, _) -> None:
        for warp in self._warps(m, ws, active):
            self._learns(instr, warp)

    # -- mbarrier.init and the asynchronous proxy ----------------------------------------------------------------------
    def _init(self, m, ws, active, instr, operands, _) -> None:
        for warp, place in self._places(m, ws, active, instr, operands[0]):
            self.fresh[place] = warp
        offsets = shared_offsets(m, ws, active, instr, operands[0], 8)
        warps, ctas, _, (places,) = _lanes(m, ws, active, (offsets,))
        rows = list(zip(warps.tolist(), ctas.tolist(), places.tolist(), strict=True))
        if len(set(rows)) < len(rows):
            self._warn(instr, "several lanes initialize one mbarrier: elect one")

    def _proxy_fence(self, m, ws, active, instr, operands, _) -> None:
        here = self._warps(m, ws, active)
        self.fresh = {place: warp for place, warp in self.fresh.items() if warp not in here}

    def _visible(self, instr, warp: Warp, place: tuple[int, int]) -> None:
        if place in self.fresh:
            self._warn(instr, "no fence.mbarrier_init: nor fence.proxy.async since the mbarrier was initialized")

    def _bulk_load(self, m, ws, active, instr, operands, _) -> None:
        tensor = ".tensor." in instr.opcode
        for warp, place in self._places(m, ws, active, instr, operands[2 if tensor else 3]):
            self._visible(instr, warp, place)

    # -- lanes of a warp -----------------------------------------------------------------------------------------------
    def _store(self, m, ws, active, instr, operands, _) -> None:
        for warp, lanes in self._warps(m, ws, active).items():
            self.stored[warp] = self.stored.get(warp, np.zeros(32, bool)) | lanes
        if instr.opcode.startswith("st.shared") and any(self.reading.values()):
            self._overwrite(m, ws, active, instr, operands[0])

    def _load(self, m, ws, active, instr, operands, _) -> None:
        for warp, lanes in self._warps(m, ws, active).items():
            self.loaded[warp] = self.loaded.get(warp, np.zeros(32, bool)) | lanes

    def _overwrite(self, m, ws, active, instr, address) -> None:
        """A lane stores to what another lane's bulk store has read, and only that lane waited for it."""
        offsets = shared_offsets(m, ws, active, instr, address, 1)
        warps, ctas, lanes, (places,) = _lanes(m, ws, active, (offsets,))
        for (cta, warp), reads in self.reading.items():
            mine = (warps == warp) & (ctas == cta)
            for lane, job in reads if mine.any() else ():
                others = places[mine & (lanes != lane)]
                if self._is_over(m, (cta, warp), lane, job) and np.isin(others // 16, job[2]).any():
                    self._warn(instr, "no bar.warp.sync: since another lane's wait for the bulk store that reads this")

    @staticmethod
    def _is_over(m, warp: Warp, lane: int, job: tuple) -> bool:
        groups = m.bulk.get((warp[1], warp[0], lane), ())
        return not any(job is other for group in groups for other in group)

    def _in_step(self, m, warp: Warp) -> None:
        """The lanes of a warp know what each of them did, and waited for."""
        self.stored.pop(warp, None)
        self.loaded.pop(warp, None)
        self.reading[warp] = [read for read in self.reading.get(warp, ()) if not self._is_over(m, warp, *read)]

    def _warp_barrier(self, m, ws, active, instr, operands, _) -> None:
        for warp in self._warps(m, ws, active):
            self._in_step(m, warp)

    def _bulk_store(self, m, ws, active, instr, operands, _) -> None:
        self._lanes_apart(m, ws, active, instr)
        for (cta, warp), lanes in self._warps(m, ws, active).items():
            for lane in np.nonzero(lanes)[0].tolist():
                for job in m.bulk.get((warp, cta, lane), [[]])[-1][-1:]:  # none where it copies no bytes
                    self.reading.setdefault((cta, warp), []).append((lane, job))

    def _lanes_apart(self, m, ws, active, instr) -> None:
        for warp, lanes in self._warps(m, ws, active).items():
            if (self.stored.get(warp, lanes) & ~lanes).any():
                self._warn(instr, "no bar.warp.sync: other lanes stored to shared memory since the warp's last one")
            elif (self.loaded.get(warp, lanes) & ~lanes).any():
                self._warn(instr, "no bar.warp.sync: other lanes loaded from shared memory since the warp's last one")
