"""What each traced warp did: its blocks in order, and what its instructions asked of barriers and engines.

A traced launch runs a Program of its own, in which the functions of some instructions are wrapped: the original runs,
then its operands are noted. Nothing of this exists in a launch that is not traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from . import recorders
from .cluster import OFFSET_MASK
from .memory import WINDOW_BASE
from .syntax import Instr, Kernel
from .table import Entry
from .translate import Program, Translator


class Key(NamedTuple):
    """An mbarrier from one initialization to the next: CTA of the launch, shared offset, how many came before."""

    cta: int
    offset: int
    life: int


class Signal:
    """What an arrival, a commit or a load adds to: a phase of a barrier. A load learns its phase at the end."""

    __slots__ = ("key", "phase", "count", "nbytes")

    def __init__(self, key: Key, phase: int | None, count: int = 0, nbytes: int = 0):
        self.key, self.phase, self.count, self.nbytes = key, phase, count, nbytes


class Effect(NamedTuple):
    """One instruction of one warp that something else may wait for, or that waits: what it is, and its facts."""

    instr: Instr
    kind: str
    facts: dict[str, Any]


@dataclass
class Barrier:
    """Arrivals and bytes of one mbarrier in the order in which they were asked for.

    Arrivals fill one phase after the other: none can end before it has all of its own.
    """

    key: Key
    name: str
    expected: int  # arrivals of the next phase
    phase: int = 0

    def __post_init__(self):
        self.first = self.left = self.expected
        self.expects: list[tuple[int, int]] = []  # (phase, bytes)
        self.loads: list[Signal] = []

    def arrive(self, count: int, drop: bool = False) -> Signal:
        """drop: from the next phase on, so many fewer are expected."""
        signal = Signal(self.key, self.phase, count)
        self.expected = max(self.expected - count * drop, 1)
        self.left -= count
        while self.left <= 0:
            self.phase, self.left = self.phase + 1, self.left + self.expected
        return signal

    def expect(self, nbytes: int) -> Signal:
        self.expects.append((self.phase, nbytes))
        return Signal(self.key, self.phase, 0, nbytes)

    def load(self, nbytes: int) -> Signal:
        self.loads.append(Signal(self.key, None, 0, -nbytes))
        return self.loads[-1]

    def settle(self) -> None:
        """Give each load the phase whose bytes it brings."""
        ends, total = [], 0
        for phase, nbytes in self.expects:
            total += nbytes
            ends.append((total, phase))
        at, brought = 0, 0
        for load in self.loads:
            while at < len(ends) and ends[at][0] <= brought:
                at += 1
            load.phase = ends[at][1] if at < len(ends) else None
            brought -= load.nbytes


@dataclass
class Recording:
    """One launch, as far as it got: the traced CTAs by number in the launch, and what each of their warps did."""

    program: Program
    arch: str
    kernel: str
    grid: tuple[int, int, int]
    ctas: list[tuple[int, int, int]]  # block indices
    cluster: int
    logs: dict[tuple[int, int], list[int | Effect]]  # (CTA, warp) → block numbers, each followed by its effects
    barriers: dict[Key, Barrier]


class Recorder:
    """Notes what the first `limit` CTAs of a launch do, whole clusters of them."""

    def __init__(self, program: Program, arch: str, grid: tuple[int, int, int], cluster: int, limit: int):
        limit = -(-limit // cluster) * cluster
        self.recording = Recording(program, arch, program.kernel.name, grid, [], cluster, {}, {})
        self.limit, self.machine = limit, None
        self.first = self.next = 0  # CTAs of earlier waves; those and the present wave's
        self.traced = 0  # CTAs of this wave that are traced, from its first on
        self.batches: dict[Any, list[list]] = {}
        self.lives: dict[tuple[int, int], Key] = {}
        self.bar_state: dict[tuple[int, int], tuple[int, int]] = {}  # (CTA, barrier) → generation, threads arrived
        self.counters: dict[tuple, int] = {}

    # -- which warps ---------------------------------------------------------------------------------------------------
    def _begin_wave(self, m) -> None:
        self.machine, self.first = m, self.next
        self.next += m.n_cta
        self.traced = min(max(self.limit - self.first, 0), m.n_cta)
        self.batches = {}
        for cta in range(self.traced):
            self.recording.ctas.append(tuple(int(i) for i in m.block_ids[cta]))
            for warp in range(m.n_warps):
                self.recording.logs[self.first + cta, warp] = []

    def enter(self, block: int, m, ws) -> None:
        """A batch of warps begins a block."""
        if m is not self.machine:
            self._begin_wave(m)
        logs = self.batches.get(ws)
        if logs is None:
            warps, ctas = ws.flat_pairs()
            pairs = zip(warps.tolist(), ctas.tolist(), strict=True)
            logs = [self.recording.logs[self.first + c, w] for w, c in pairs if c < self.traced]
            if ws.mask is None:  # kept by the machine, so that its identity lasts
                self.batches[ws] = logs
        for log in logs:
            log.append(block)

    def warps(self, ws, active, *arrays) -> Iterator[tuple[int, int, np.ndarray, list[np.ndarray]]]:
        """Each traced warp with a lane that runs: warp, CTA of the wave, its lanes, the arrays' values there."""
        warps, ctas = ws.flat_pairs()
        on = None if active is None else ws.full(active).reshape(-1, 32)
        flat = [ws.full(a).reshape(-1, 32) for a in arrays]
        for row, (warp, cta) in enumerate(zip(warps.tolist(), ctas.tolist(), strict=True)):
            if cta < self.traced:
                lanes = np.arange(32) if on is None else np.nonzero(on[row])[0]
                if len(lanes):
                    yield warp, cta, lanes, [values[row][lanes] for values in flat]

    def log(self, cta: int, warp: int) -> list[int | Effect]:
        return self.recording.logs[self.first + cta, warp]

    def add(self, cta: int, warp: int, instr: Instr, kind: str, **facts: Any) -> None:
        self.log(cta, warp).append(Effect(instr, kind, facts))

    def count(self, *key, by: int = 1) -> int:
        """How often this was counted before."""
        found = self.counters.get(key, 0)
        self.counters[key] = found + by
        return found

    # -- places --------------------------------------------------------------------------------------------------------
    def shared_name(self, offset: int) -> str:
        return _label(self.machine.labels.shared, offset) or f"shared {offset:#x}"

    def barrier_name(self, offset: int) -> str:
        return _label(self.machine.labels.shared, offset) or f"mbarrier {offset:#x}"

    def column_name(self, column: int) -> str:
        return _label(self.machine.labels.columns, column) or f"TMEM {column}"

    def global_name(self, address: int) -> str:
        for start, nbytes, name, _ in self.machine.gmem.regions:
            if start <= address < start + nbytes:
                return name
        return f"{address:#x}"

    def target(self, cta: int, address: int) -> tuple[int, int]:
        """CTA of the wave and shared offset that a shared::cluster address names."""
        size = self.machine.cluster.size
        named = cta if size == 1 else cta - cta % size + (int(address) >> 24)
        return named, (int(address) & OFFSET_MASK) - WINDOW_BASE

    def new_barrier(self, cta: int, offset: int, expected: int) -> Barrier:
        place = (self.first + cta, offset)
        before = self.lives.get(place)
        key = Key(*place, 0 if before is None else before.life + 1)
        self.lives[place] = key
        found = self.recording.barriers[key] = Barrier(key, self.barrier_name(offset), max(expected, 1))
        return found

    def barrier(self, cta: int, offset: int) -> Barrier:
        key = self.lives.get((self.first + cta, offset))
        if key is None:
            m = self.machine
            return self.new_barrier(cta, offset, int(m.mbarriers.expected[m.mbarriers.slot(offset), cta]))
        return self.recording.barriers[key]

    def finish(self) -> Recording:
        for barrier in self.recording.barriers.values():
            barrier.settle()
        return self.recording


def _label(places: list[tuple[int, int, str]], at: int) -> str:
    return "/".join(name for first, count, name in places if first <= at < first + count)


def _noting(run: Callable, note: Callable, recorder: Callable[[], Recorder]) -> Callable:
    def noted(m, ws, active, instr, *operands):
        result = run(m, ws, active, instr, *operands)
        note(recorder(), m, ws, active, instr, operands, result)
        return result

    return noted


def traced_program(kernel: Kernel, recorder: Callable[[], Recorder], strict: bool) -> Program:
    """A kernel's program that tells `recorder()` what its warps do. strict: see Gpu."""

    def wrap(entry: Entry) -> Callable:
        note = recorders.of(entry.name)
        return entry.run if note is None else _noting(entry.run, note, recorder)

    program = Translator(kernel, strict, wrap).translate()

    def entering(block: int, run: Callable) -> Callable:
        def entered(m, ws):
            recorder().enter(block, m, ws)
            run(m, ws)

        return entered

    return replace(program, functions=[entering(i, run) for i, run in enumerate(program.functions)], hot=None)
