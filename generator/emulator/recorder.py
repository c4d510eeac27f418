"""Records what each warp does to barriers while a launch runs: the raw material of `barrier_program` and `mutants`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .clocks import Clocks
from .known import Known, clocks_of
from .ops.memory import shared_offsets
from .ops.tma import _lanes, tensor_map
from .syntax import Instr, Kernel
from .table import Entry
from .touches import Touches
from .translate import Program, Translator

Place = tuple[int, int]  # an mbarrier: CTA, offset in its shared memory


class Event(NamedTuple):
    """One synchronization event of one warp.

    kind: init, arrive, expect, wait, copy (a bulk copy that will signal), commit (of tensor-core work), sync and join
    (bar.sync, bar.arrive), cluster_arrive, cluster_wait.
    places: the mbarriers concerned; count: arrivals, threads or the initial count; nbytes: of a transaction; barrier:
    number of a named barrier; parity and phase: of a wait, the phase counted from 0 (-1: before the first).
    knows: of an arrival, how many phases of each mbarrier of its CTA the warp knows to be complete (offset, phases).
    """

    kind: str
    line: int
    places: tuple[Place, ...] = ()
    count: int = 0
    nbytes: int = 0
    barrier: int = -1
    parity: int = 0
    phase: int = 0
    knows: tuple[tuple[int, int], ...] = ()


class Recorder:
    """Events by (CTA, warp) of one launch of the program that it makes; CTAs are numbered as their waves come.

    clocks: also keep what each warp knows at its events and at its end, see `knowledge`; of strict runs only.
    """

    def __init__(self, clocks: bool = False):
        self._machine, self._first = None, 0  # the wave under way, and the number of its first CTA
        self._known: dict[tuple[int, int], list[Known]] | None = defaultdict(list) if clocks else None
        self._waves: list[tuple[int, Clocks]] = []  # their first CTAs and clocks
        self.events: dict[tuple[int, int], list[Event]] = defaultdict(list)
        self.lines: set[int] = set()  # PTX lines of the instructions with effects that ran
        self.log: dict[tuple[int, int], list[Instr]] = defaultdict(list)  # those of each warp, in order
        self.whole: dict[tuple[int, int], list[bool]] = defaultdict(list)  # whether all lanes ran each of them
        self.touches = Touches()

    def program(self, kernel: Kernel) -> Program:
        """The kernel, translated so that it tells this recorder."""
        return Translator(kernel, wrap=self._wrap).translate()

    def _wrap(self, entry: Entry) -> Callable:
        if entry.pure:
            return entry.run
        look = next((look for prefix, look in _LOOKS if entry.name.startswith(prefix)), None)
        signals = "mbarrier" in entry.name and not entry.name.startswith("fence.")
        return self._watched(entry.run, look or (_unknown if signals else _nothing))

    def _watched(self, run: Callable, look: Callable) -> Callable:
        def watched(m, ws, active, instr, *operands):
            running = _running(ws, active)
            before = {} if self._known is None or m.races is None else clocks_of(m, running)
            result = run(m, ws, active, instr, *operands)
            self.lines.add(instr.line)
            first = self._first_cta(m)
            for warp, cta, whole in running:
                self.log[cta + first, warp].append(instr)
                self.whole[cta + first, warp].append(whole)
            self.touches.note(m, ws, active, instr, operands, first, self.log)
            heard = {}
            for (cta, warp), event in look(m, ws, active, instr, operands, result):
                heard[cta, warp] = event.kind != "wait"
                places = tuple((place + first, offset) for place, offset in event.places)
                self.events[cta + first, warp].append(event._replace(places=places))
            if before:
                after = clocks_of(m, running)
                for (cta, warp), as_before in heard.items():
                    clock = (before if as_before else after)[cta, warp]
                    self._known[cta + first, warp].append(Known(instr.line, clock, m.races.clocks))
            return result

        return watched

    def _first_cta(self, m) -> int:
        if m is not self._machine:
            self._first += 0 if self._machine is None else self._machine.n_cta
            self._machine = m
            if self._known is not None and m.races:
                self._waves.append((self._first, m.races.clocks))
        return self._first

    def knowledge(self, who: tuple[int, int]) -> list[Known]:
        """What a warp knew at each of its events, and at its end; empty for a run without hazard checks."""
        cta, warp = who
        waves = [(first, clocks) for first, clocks in self._waves if first <= cta]
        if not waves:
            return []
        first, clocks = waves[-1]
        return [*self._known[who], Known(0, clocks.warps[warp, cta - first], clocks)]


def _running(ws, active) -> list[tuple[int, int, bool]]:
    """(warp, CTA, whether all lanes run) of the warps that have a lane that runs."""
    warps, ctas = ws.flat_pairs()
    on = np.ones((len(warps), 32), bool) if active is None else ws.full(active).reshape(-1, 32)
    some = on.any(axis=1)
    return list(zip(*(x[some].tolist() for x in (warps, ctas, on.all(axis=1))), strict=True))


def _rows(m, ws, active, instr, address, *others, remote: bool = True):
    """(warp, CTA, mbarrier, values of `others`) of each lane that runs."""
    offsets = shared_offsets(m, ws, active, instr, address, 8)
    warps, ctas, _, (named, places, *values) = _lanes(m, ws, active, (address, offsets, *others))
    targets = m.cluster.target(ctas, named, m.where(ws, instr)) if remote else ctas
    return zip(
        *(x.tolist() for x in (warps, ctas, targets, places, *values)),
        strict=True,
    )


def _nothing(*_):
    return ()


def _unknown(m, ws, active, instr, operands, _):
    """Something about an mbarrier that is recorded by name only."""
    warps, ctas = ws.flat_pairs()
    for warp, cta in zip(warps.tolist(), ctas.tolist(), strict=True):
        yield (cta, warp), Event("unknown", instr.line)


def _init(m, ws, active, instr, operands, _):
    for warp, cta, target, offset, count in _rows(m, ws, active, instr, *operands):
        yield (cta, warp), Event("init", instr.line, ((target, offset),), int(count))


def _arrive(m, ws, active, instr, operands, _):
    address, amount = operands[0], operands[1] if len(operands) > 1 and operands[1] is not None else 1
    expects = ".expect_tx" in instr.opcode
    totals: dict[tuple, list[int]] = {}
    for warp, cta, target, offset, value in _rows(m, ws, active, instr, address, amount):
        total = totals.setdefault((cta, warp, target, offset), [0, 0])
        total[0] += 1 if expects else int(value)
        total[1] += int(value) if expects else 0
    for (cta, warp, target, offset), (count, nbytes) in totals.items():
        kind, count = ("expect", 0) if instr.opcode.startswith("mbarrier.expect_tx") else ("arrive", count)
        knows = _known_phases(m, cta, warp) if kind == "arrive" else ()
        yield (cta, warp), Event(kind, instr.line, ((target, offset),), count, nbytes, knows=knows)


def _known_phases(m, cta: int, warp: int) -> tuple[tuple[int, int], ...]:
    """How many phases of each mbarrier of its own CTA a warp knows to be complete."""
    if not m.races:
        return ()
    here = np.array([cta])
    found = []
    for offset, slot in m.mbarriers.slots.items():
        if slot < len(m.races.local) and m.races.initialized[slot, cta]:
            found.append((offset, int(m.races.known_phases(slot, here, np.array([warp]), here)[0])))
    return tuple(found)


def _copies_arrive(m, ws, active, instr, operands, _):
    for key, event in _arrive(m, ws, active, instr, operands[:1], None):
        yield key, event._replace(kind="copy")


def _wait(m, ws, active, instr, operands, done):
    passed = np.broadcast_to(done, (*ws.lead, 32))
    seen = {}
    for warp, cta, _, offset, parity, good in _rows(m, ws, active, instr, *operands[:2], passed, remote=False):
        before = seen.get((cta, warp), (offset, parity, True))
        seen[cta, warp] = offset, int(parity), before[2] and good
    for (cta, warp), (offset, parity, good) in seen.items():
        if good:
            phase = int(m.mbarriers.phase[m.mbarriers.slot(offset), cta]) - 1
            yield (cta, warp), Event("wait", instr.line, ((cta, offset),), parity=parity, phase=phase)


def _tensor_load(m, ws, active, instr, operands, _):
    _, (address, _), barrier, *rest = operands
    multicast = rest[0] if ".multicast" in instr.opcode else 0
    where = m.where(ws, instr)
    for warp, cta, target, offset, pointer, mask in _rows(m, ws, active, instr, barrier, address, multicast):
        size = tensor_map(m, int(pointer), where).box_bytes
        peers = m.cluster.peers(cta, int(mask)) if ".multicast" in instr.opcode else (target,)
        for peer in peers:
            yield (cta, warp), Event("copy", instr.line, ((peer, offset),), nbytes=size)


def _bulk_load(m, ws, active, instr, operands, _):
    _, _, size, barrier, *_ = operands
    for warp, cta, target, offset, nbytes in _rows(m, ws, active, instr, barrier, size):
        if nbytes:
            yield (cta, warp), Event("copy", instr.line, ((target, offset),), nbytes=int(nbytes))


def _commit(m, ws, active, instr, operands, _):
    address, mask = operands[0], operands[1] if len(operands) > 1 else None
    for warp, cta, target, offset, bits in _rows(m, ws, active, instr, address, 0 if mask is None else mask):
        peers = (target,) if mask is None else m.cluster.peers(cta, int(bits))
        yield (cta, warp), Event("commit", instr.line, tuple((peer, offset) for peer in peers), 1)


def _named(kind):
    def look(m, ws, active, instr, operands, _):
        barrier, count = operands[0], operands[1] if len(operands) > 1 else None
        warps, ctas = ws.flat_pairs()
        threads = m.n_warps * 32 if count is None else count
        rows = (ws.full(x).reshape(-1, 32)[:, 0].tolist() for x in (barrier, threads))
        for warp, cta, number, expected in zip(warps.tolist(), ctas.tolist(), *rows, strict=True):
            yield (cta, warp), Event(kind, instr.line, count=int(expected), barrier=int(number))

    return look


def _cluster(kind):
    def look(m, ws, active, instr, operands, _):
        warps, ctas = ws.flat_pairs()
        for warp, cta in zip(warps.tolist(), ctas.tolist(), strict=True):
            yield (cta, warp), Event(kind, instr.line)

    return look


_LOOKS = (  # the first prefix that fits
    ("mbarrier.arrive_drop", _unknown),
    ("mbarrier.arrive.noComplete", _unknown),
    ("mbarrier.init", _init),
    ("mbarrier.arrive", _arrive),
    ("mbarrier.expect_tx", _arrive),
    ("mbarrier.try_wait", _wait),
    ("mbarrier.test_wait", _wait),
    ("cp.async.mbarrier.arrive", _copies_arrive),
    *((f"cp.async.bulk.tensor.{rank}d.shared", _tensor_load) for rank in range(1, 6)),
    ("cp.async.bulk.shared", _bulk_load),
    ("tcgen05.commit", _commit),
    *(
        (f"{bar}.{way}", _named(kind))
        for bar in ("bar", "bar.cta", "barrier", "barrier.cta")
        for way, kind in (("sync", "sync"), ("arrive", "join"))
    ),
    ("barrier.cluster.arrive", _cluster("cluster_arrive")),
    ("barrier.cluster.wait", _cluster("cluster_wait")),
)
