"""Runs the warps of a wave to their exit: which batch is next, how far it goes on by itself, and when nothing moves.

Warps that stand at the same block run as one batch, across CTAs; those whose lanes stand at different blocks run in a
batch of their own, with a mask. A schedule chooses the block (see `schedule`).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import Deadlock
from .libraries import find_library
from .schedule import TURN
from .warps import Warps

PATIENCE = 2048  # after so many steps in which nothing noticeable happened, asynchronous work completes
NOBODY_READY, EVERYBODY_EXITED = -1, -2  # answers of scheduler.c
IDLE_LIMIT = 500_000 // PATIENCE * PATIENCE  # steps of that kind, with nothing asynchronous left, that make a hang


class _Warps(ctypes.Structure):
    """`warps_t` of scheduler.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pc", "stalled", "barred", "diverged", "last_run", "chosen")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("end", "turn", "lowest", "apart")),
    ]


@lru_cache(maxsize=1)
def _choose_block() -> Any:
    library = ctypes.PyDLL(str(find_library("_scheduler")))
    library.choose_block.argtypes, library.choose_block.restype = [ctypes.c_void_p], ctypes.c_int32
    return library.choose_block


class Scheduler:
    """The scheduler of one Machine."""

    def __init__(self, machine: Any):
        self.machine = m = machine
        self.end = len(m.program.blocks)
        self.chosen = np.zeros(m.pc.shape, bool)
        arrays = (m.pc, m.stalled, m.barred, m.diverged, m.last_run, self.chosen)
        self._view = _Warps(*(array.ctypes.data for array in arrays), m.pc.size, self.end)
        self._address = ctypes.addressof(self._view)
        self._choose = _choose_block()
        self._batches: dict[bytes, Warps] = {}

    def run(self) -> None:
        """Raises Deadlock when nothing can run, and what the blocks raise."""
        m, schedule = self.machine, self.machine.schedule
        schedule.start(m)
        while (block := self._next(schedule)) != EVERYBODY_EXITED:
            if block == NOBODY_READY:
                if not m.queue.advance() and not m.settle_clusters():
                    raise Deadlock(m.report_deadlock())
                continue
            m.steps += 1
            self._watch_progress(block)
            lowest = self._view.lowest
            batches = self._batches_of(block)
            m.steady = True
            for ws in batches:
                self._step(block, ws)
            if len(batches) == 1 and schedule.gathers:
                self._follow(batches[0], lowest)
            if schedule.delays != "late":
                schedule.after_step(m)

    def _next(self, schedule: Any) -> int:
        """The block to run, the warps that run it in `self.chosen`; or NOBODY_READY, or EVERYBODY_EXITED."""
        m, view = self.machine, self._view
        view.turn = (m.steps + 1) % TURN == 0
        block = self._choose(self._address)
        if block >= 0 and not schedule.gathers:
            block, self.chosen[...] = schedule.choose(m, self._ready())
            view.apart = np.count_nonzero(self.chosen & m.diverged)
        return block

    def _ready(self) -> np.ndarray:
        m = self.machine
        return (m.pc != self.end) & ~m.barred & (m.stalled != m.pc)

    def _step(self, block: int, ws: Warps) -> None:
        """Run a block for warps that stand at it."""
        m, program = self.machine, self.machine.program
        m.current = block
        if program.blocks[block].waits:
            m.stalled[ws.index] = -1
        m.executed[block] += ws.count
        m.last_run[ws.index] = m.steps
        m.together = -1
        hot = program.functions if program.hot is None or ws.mask is not None else program.hot.functions
        hot[block](m, ws)

    def _follow(self, ws: Warps, lowest: int) -> None:
        """The batch goes on while the schedule would choose it and nobody else: at the lowest block of all, the others
        being at `lowest` at best."""
        m = self.machine
        blocks = m.program.blocks
        while m.steady and 0 <= m.together < lowest and (m.steps + 1) % TURN:
            block = m.together
            if blocks[block].waits and np.count_nonzero(m.stalled[ws.index] == block):
                return
            m.steps += 1
            self._watch_progress(block)
            self._step(block, ws)

    def arm(self, ws: Warps, skip: np.ndarray) -> Warps | None:
        """The lanes of a batch that do not skip; None if some warp has none that does, and runs on as a whole."""
        key = "arm", skip.shape, skip.tobytes()
        if key not in ws.known:
            lanes = ~ws.full(skip).reshape(-1, 32)
            some = lanes.any(axis=1)
            arm = None
            if not lanes.all(axis=1).any():
                warps, ctas = ws.flat_pairs()
                arm = Warps(warps[some], ctas[some])
                arm.mask, arm.is_arm = lanes[some].reshape(arm.shape), True
            ws.known[key] = arm
        return ws.known[key]

    def run_arm(self, ws: Warps, arm: Warps, block: int, target: int) -> None:
        """Some lanes of a batch run a block that the others skip, and meet them at `target`."""
        m = self.machine
        m.current = block
        m.executed[block] += arm.count
        if m.program.blocks[block].acts:
            m.idle = 0
        m.program.functions[block](m, arm)
        m.pc[ws.index] = m.together = target

    def _watch_progress(self, block: int) -> None:
        """Asynchronous work completes when blocks run for long without effect; nothing of it left, that is a hang."""
        m = self.machine
        m.idle = 0 if m.program.blocks[block].acts else m.idle + 1
        if m.idle and m.idle % PATIENCE == 0 and not m.queue.advance() and m.idle >= IDLE_LIMIT:
            warp, cta = (int(i) for i in np.argwhere(m.pc == block)[0])
            first, last = m.program.lines_of(block)
            raise Deadlock(
                f"endless loop: {m.idle} blocks ran and none stored, signalled or ended anything, and nothing "
                f"asynchronous is under way; CTA {m.name_cta(cta)}, warp {warp} is at PTX lines {first} to {last}"
            )

    def _batches_of(self, block: int) -> list[Warps]:
        """Those of the chosen warps that have not diverged, and the others."""
        m, chosen = self.machine, self.chosen
        if not self._view.apart:
            return [self._batch(chosen)]
        split = chosen & m.diverged
        found = [self._batch(converged)] if (converged := chosen & ~split).any() else []
        ws = Warps(*np.nonzero(split))
        ws.mask = m.lane_pc[ws.index] == block
        return [*found, ws]

    def _batch(self, chosen: np.ndarray) -> Warps:
        key = chosen.tobytes()
        ws = self._batches.get(key)
        if ws is None:
            ws = self._batches[key] = Warps(*np.nonzero(chosen))
        return ws
