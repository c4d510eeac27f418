"""A recording → a timeline: what every warp, tensor core, copy engine and barrier does when, on the clock's model.

Every warp repeats what it did. A step begins when its warp, and the unit that it needs, are free; a wait ends when the
phase that it waited for in the emulated run is complete on this clock. See clock.py for the figures.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Any

from .clock import CONSTANTS, ISSUE, MEMORY
from .phases import Run, Steps
from .record import Effect, Key, Recording

QUANTUM = 32  # cycles after which a warp lets another one of its sub-partition issue
SHORT = 8  # cycles of a stretch that slips in between those of other warps
SHORTEST = 4  # cycles of ordinary instructions that are shown
GAP = 8  # cycles between two slices of one name that become one

WARP, TENSOR, COPY, BARRIER = "warp", "tensor core", "copy", "mbarrier"


@dataclass
class Slice:
    """Something that takes from `start` to `end`, in cycles, on one track."""

    track: int
    name: str
    start: float
    end: float
    kind: str  # run, wait, issue, tmem, mma, copy, phase
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Track:
    """A row of the timeline; its slices follow one another."""

    cta: int
    kind: str
    name: str
    slices: list[Slice] = field(default_factory=list)
    role: str = ""  # of a warp
    instructions: int = 0  # that a warp executed


@dataclass
class Flow:
    """What completes at `start` on one track releases the wait that ends at `end` on another; `waited`: it slept."""

    source: int
    start: float
    target: int
    end: float
    waited: bool


@dataclass
class Timeline:
    """One launch. `pending`: arrivals that each barrier's track still waits for, as (cycle, arrivals, bytes)."""

    recording: Recording
    tracks: list[Track]
    flows: list[Flow]
    pending: dict[int, list[tuple[float, int, int]]]
    end: float
    unresolved: int  # waits that the replay had to release, or that the run never passed
    busy: dict[int, dict[str, float]]  # CTA → cycles of its tensor core and copy engine


class _Warp:
    def __init__(self, cta: int, number: int, track: int, steps: list[Run | Effect]):
        self.cta, self.number, self.track, self.steps = cta, number, track, steps
        self.at, self.left, self.begun = 0, 0.0, 0.0
        self.waits_since = 0.0
        self.group: list[tuple[float, float]] = []  # bulk stores not committed: (source read, complete)
        self.groups: list[tuple[float, float]] = []


class Replay:
    """Discrete events over a recording."""

    def __init__(self, recording: Recording, steps: Steps):
        self.recording = recording
        self.tracks: list[Track] = []
        self.flows: list[Flow] = []
        self.unresolved = 0
        self.free: dict[Any, float] = {}  # by unit: when it is free
        self.busy = {cta: {TENSOR: 0.0, COPY: 0.0} for cta in range(len(recording.ctas))}
        self.needed: dict[tuple, int] = {}
        self.given: dict[tuple, list[tuple[float, int]]] = {}  # (time, track) by (key, phase)
        self.done: dict[tuple, tuple[float, int]] = {}
        self.sleepers: dict[tuple, list[_Warp]] = {}
        self.changes: dict[Key, list[tuple[float, int, int]]] = {}  # (time, arrivals, bytes) of each mbarrier
        self.born: dict[Key, float] = {}
        self.heap: list[tuple[float, int, _Warp]] = []
        self.order = itertools.count()
        self.unit_tracks: dict[tuple, int] = {}
        self.batches: dict[tuple, Slice] = {}  # the latest slice of each batch of copies
        self.warps: list[_Warp] = []
        for (cta, number), _ in sorted(recording.logs.items()):
            todo = steps.of(cta, number)
            role = steps.role(todo)
            track = self._track(cta, WARP, f"warp {number} {role}".strip())
            self.tracks[track].role = role or f"warp {number}"
            self.tracks[track].instructions = sum(s.instructions if isinstance(s, Run) else 1 for s in todo)
            self.warps.append(_Warp(cta, number, track, todo))
        for warp in self.warps:
            for step in warp.steps:
                if isinstance(step, Effect):
                    for place in _contributions(step):
                        self.needed[place] = self.needed.get(place, 0) + 1

    def run(self) -> Timeline:
        for warp in self.warps:
            self._push(0.0, warp)
        while True:
            while self.heap:
                time, _, warp = heapq.heappop(self.heap)
                self._step(time, warp)
            if not self._release_someone():
                break
        end = max((s.end for t in self.tracks for s in t.slices), default=0.0)
        for sleepers in self.sleepers.values():  # the run ended before they were released
            for warp in sleepers:
                self.unresolved += 1
                step = warp.steps[warp.at]
                self._slice(warp.track, f"{self._wait_name(step)} (never)", warp.waits_since, end + 1, "wait", step)
        pending = self._barrier_tracks(end)
        return Timeline(self.recording, self.tracks, self.flows, pending, end, self.unresolved, self.busy)

    def _release_someone(self) -> bool:
        """Nothing can go on although the run did: its order of arrivals is not the one that phases assume."""
        passed = [
            (warp.waits_since, warp.cta, warp.number, place)
            for place, sleepers in self.sleepers.items()
            for warp in sleepers
            if warp.steps[warp.at].kind != "poll"
        ]
        if not passed:
            return False
        since, _, _, place = min(passed, key=lambda item: item[:3])
        self.unresolved += 1
        self._complete(place, since, -1)
        return True

    # -- tracks --------------------------------------------------------------------------------------------------------
    def _track(self, cta: int, kind: str, name: str) -> int:
        self.tracks.append(Track(cta, kind, name))
        return len(self.tracks) - 1

    def _unit_track(self, cta: int, kind: str, name: str) -> int:
        place = (cta, kind, name)
        if place not in self.unit_tracks:
            self.unit_tracks[place] = self._track(cta, kind, name)
        return self.unit_tracks[place]

    def _slice(self, track: int, name: str, start: float, end: float, kind: str, step=None, **facts: Any) -> None:
        if isinstance(step, Effect):
            facts |= {"instruction": step.instr.opcode, "PTX line": step.instr.line}
        slices = self.tracks[track].slices
        last = slices[-1] if slices else None
        if last is not None and last.name == name and last.kind == kind in ("run", "tmem") and start - last.end <= GAP:
            last.end = end
            return
        slices.append(Slice(track, name, start, end, kind, facts))

    # -- the clock -----------------------------------------------------------------------------------------------------
    def _push(self, time: float, warp: _Warp) -> None:
        heapq.heappush(self.heap, (time, next(self.order), warp))

    def _issue(self, time: float, warp: _Warp, units: dict[str, float], least: float) -> float:
        """The warp has work for some units, which takes at least so many cycles: when it is done. Little work waits for
        nobody."""
        end = time + least
        for unit, cycles in units.items():
            place = (warp.cta, unit) if unit == MEMORY else (warp.cta, warp.number % 4, unit)
            free = max(time, self.free.get(place, 0.0)) + cycles
            self.free[place] = free
            if least > SHORT:
                end = max(end, free)
        return end

    def _step(self, time: float, warp: _Warp) -> None:
        if warp.at == len(warp.steps):
            return
        step = warp.steps[warp.at]
        if isinstance(step, Run):
            self._run(time, warp, step)
            return
        start, end = time, self._issue(time, warp, {ISSUE: 1}, 1)
        handler = getattr(self, f"_do_{step.kind}")
        later = handler(warp, step, start, end)
        if later is not None:
            warp.at += 1
            self._push(later, warp)

    def _run(self, time: float, warp: _Warp, run: Run) -> None:
        if warp.left == 0:
            warp.left, warp.begun = run.cycles, time
        part = min(warp.left, QUANTUM)
        share = part / run.cycles if run.cycles else 0.0
        end = self._issue(time, warp, {unit: cycles * share for unit, cycles in run.units.items()}, part)
        warp.left = max(warp.left - QUANTUM, 0)
        if warp.left == 0:
            warp.at += 1
            if end - warp.begun >= SHORTEST:
                facts = {"instructions": run.instructions, "cycles by opcode": run.top}
                facts["PTX lines"] = f"{run.first} to {run.last}"
                self._slice(warp.track, run.name or run.top, warp.begun, end, "run", **facts)
        self._push(end, warp)

    # -- phases --------------------------------------------------------------------------------------------------------
    def _give(self, place: tuple, time: float, track: int) -> None:
        given = self.given.setdefault(place, [])
        given.append((time, track))
        if len(given) == self.needed[place]:
            self._complete(place, *max(given))

    def _complete(self, place: tuple, time: float, track: int) -> None:
        self.done.setdefault(place, (time, track))
        for warp in self.sleepers.pop(place, ()):
            step = warp.steps[warp.at]
            warp.at += 1
            self._push(self._released(warp, step, warp.waits_since, self.done[place]), warp)

    def _await(self, warp: _Warp, step: Effect, place: tuple, start: float, end: float) -> float | None:
        if place[1] < 0 or place in self.done and self.done[place][0] + CONSTANTS["signal"].value <= end:
            done = self.done.get(place)
            self._slice(warp.track, self._wait_name(step), start, end, "wait", step, phase=place[1], waited=0)
            if done is not None and done[1] >= 0:
                self.flows.append(Flow(done[1], done[0], warp.track, end, False))
            return end
        if place in self.done:
            return self._released(warp, step, start, self.done[place])
        warp.waits_since = start
        self.sleepers.setdefault(place, []).append(warp)
        return None

    def _released(self, warp: _Warp, step: Effect, since: float, done: tuple[float, int]) -> float:
        time, track = done
        end = max(time + CONSTANTS["signal"].value, since + 1)
        phase = step.facts["phase"]
        self._slice(warp.track, self._wait_name(step), since, end, "wait", step, phase=phase, waited=end - since)
        if track >= 0:
            self.flows.append(Flow(track, time, warp.track, end, True))
        return end

    def _wait_name(self, step: Effect) -> str:
        key = step.facts["key"]
        if isinstance(key, Key):
            return f"wait {self.recording.barriers[key].name}"
        if key[0] == "bar":
            return f"bar.sync {key[2]}"
        return "cluster barrier" if key[0] == "cluster" else "wgmma.wait_group"

    def _signal(self, signals, time: float, track: int) -> None:
        for signal in signals:
            if signal.phase is not None:
                self.changes.setdefault(signal.key, []).append((time, signal.count, signal.nbytes))
                self._give((signal.key, signal.phase), time, track)

    # -- effects: each returns when its warp goes on, None when it sleeps ----------------------------------------------
    def _do_init(self, warp, step, start, end):
        for key in step.facts["keys"]:
            self.born[key] = end
        self._slice(warp.track, "mbarrier.init", start, end, "issue", step)
        return end

    def _do_arrive(self, warp, step, start, end):
        names = ", ".join(dict.fromkeys(self.recording.barriers[s.key].name for s in step.facts["signals"]))
        self._slice(warp.track, f"arrive {names}", start, end, "issue", step)
        self._signal(step.facts["signals"], end, warp.track)
        return end

    def _do_wait(self, warp, step, start, end):
        return self._await(warp, step, (step.facts["key"], step.facts["phase"]), start, end)

    def _do_poll(self, warp, step, start, end):
        """A try that failed: the last thing that a stuck warp did, otherwise a look at the barrier."""
        if any(isinstance(later, Effect) for later in warp.steps[warp.at + 1 :]):
            return end
        return self._do_wait(warp, step, start, end)

    def _do_bar(self, warp, step, start, end):
        place = (step.facts["key"], step.facts["phase"])
        if not step.facts["blocks"]:
            self._slice(warp.track, "arrive at a barrier of warps", start, end, "issue", step)
            self._give(place, end, warp.track)
            return end
        warp.waits_since = start
        self.sleepers.setdefault(place, []).append(warp)
        self._give(place, end, warp.track)
        return None

    def _do_tmem(self, warp, step, start, end):
        until = end - 1 + step.facts["cycles"] / CONSTANTS["tmem"].value
        self._slice(warp.track, step.facts["name"], start, until, "tmem", step)
        return until

    def _do_load(self, warp, step, start, end):
        signals = step.facts["signals"]
        _, done, track = self._copy(warp.cta, step, end, (warp.number, *((s.key, s.phase) for s in signals)))
        self._slice(warp.track, f"issue load {step.facts['name']}", start, end, "issue", step)
        self._signal(signals, done, track)
        return end

    def _do_store(self, warp, step, start, end):
        self._slice(warp.track, f"issue store {step.facts['name']}", start, end, "issue", step)
        warp.group.append(self._copy(warp.cta, step, end, (warp.number, len(warp.groups)))[:2])
        return end

    def _do_store_commit(self, warp, step, start, end):
        if warp.group:
            warp.groups.append(tuple(max(times) for times in zip(*warp.group, strict=True)))
            warp.group = []
        return end

    def _do_store_wait(self, warp, step, start, end):
        waited = warp.groups[: max(len(warp.groups) - step.facts["pending"], 0)]
        until = max([end, *(read if step.facts["read"] else done for read, done in waited)])
        self._slice(warp.track, "wait for stores", start, until, "wait", step, waited=until - end)
        return until

    def _copy(self, cta: int, step: Effect, time: float, batch: tuple) -> tuple[float, float, int]:
        """The copy engine takes one after the other: when it has read the source, when all has arrived, on which track.

        Copies of one batch (what one barrier's phase waits for, or a group of stores) are one slice, from the first
        one's issue to the last one's end. Those that overlap stand on tracks of their own.
        """
        start = max(time, self.free.get((cta, COPY), 0.0))
        read = start + step.facts["nbytes"] / CONSTANTS["copy"].value
        done = read + CONSTANTS["latency"].value
        self.free[cta, COPY] = read
        self.busy[cta][COPY] += read - start
        batch = (cta, step.facts["name"], *batch)
        open_slice = self.batches.get(batch)
        if open_slice is not None and open_slice.end > time:
            open_slice.end = done
            open_slice.facts["bytes"] += step.facts["nbytes"]
            open_slice.facts["boxes"].append(step.facts["text"])
            return read, done, open_slice.track
        for lane in itertools.count():
            track = self._unit_track(cta, COPY, f"TMA {lane}")
            slices = self.tracks[track].slices
            if not slices or slices[-1].end <= time:
                break
        verb = step.kind
        facts = {"bytes": step.facts["nbytes"], "boxes": [step.facts["text"]], "engine starts": start}
        self._slice(track, f"{verb} {step.facts['name']}", time, done, "copy", step, **facts)
        self.batches[batch] = slices[-1]
        return read, done, track

    def _do_mma(self, warp, step, start, end):
        facts, ctas = step.facts, step.facts["ctas"]
        begin = max([end, *(self.free.get((cta, TENSOR), 0.0) for cta in ctas)])
        until = begin + facts["cycles"]
        for cta in ctas:
            self.free[cta, TENSOR] = until
            self.busy[cta][TENSOR] += facts["cycles"]
            slices = self.tracks[self._unit_track(cta, TENSOR, "tensor core")].slices
            last = slices[-1] if slices else None
            if last is not None and last.name == facts["name"] and not last.facts["committed"]:
                last.end = until
                last.facts["FLOP"] += facts["flops"]
                last.facts["instructions"] += 1
                last.facts["busy cycles"] += facts["cycles"]
            else:
                more = {"issued": end, "FLOP": facts["flops"], "instructions": 1, "busy cycles": facts["cycles"]}
                track = self._unit_track(cta, TENSOR, "tensor core")
                self._slice(track, facts["name"], begin, until, "mma", step, committed=False, **more)
        if "group" in facts:
            warp.group_end = until
        return end

    def _do_commit(self, warp, step, start, end):
        track = self._unit_track(warp.cta, TENSOR, "tensor core")
        slices = self.tracks[track].slices
        if slices:
            slices[-1].facts["committed"] = True
        names = ", ".join(self.recording.barriers[s.key].name for s in step.facts["signals"])
        self._slice(warp.track, f"commit {names}", start, end, "issue", step)
        free = self.free.get((warp.cta, TENSOR), 0.0)
        self._signal(step.facts["signals"], max(end, free), track if free >= end else warp.track)
        return end

    def _do_group(self, warp, step, start, end):
        self._slice(warp.track, "wgmma.commit_group", start, end, "issue", step)
        if step.facts["leads"]:
            track = self._unit_track(warp.cta, TENSOR, "tensor core")
            if self.tracks[track].slices:
                self.tracks[track].slices[-1].facts["committed"] = True
            until = max(getattr(warp, "group_end", end), end)
            self._give((step.facts["key"], step.facts["phase"]), until, track)
        return end

    # -- mbarriers -----------------------------------------------------------------------------------------------------
    def _barrier_tracks(self, end: float) -> dict[int, list[tuple[float, int, int]]]:
        """A track an mbarrier with a slice a phase, and what is pending over time."""
        pending = {}
        for key, barrier in sorted(self.recording.barriers.items(), key=lambda item: item[0]):
            if key not in self.changes:
                continue
            track = self._track(key.cta, BARRIER, barrier.name)
            start, phase = self.born.get(key, 0.0), 0
            while (key, phase) in self.done:
                time, _ = self.done[key, phase]
                self._slice(track, f"phase {phase}", start, max(time, start), "phase")
                start, phase = max(time, start), phase + 1
            if start < end:
                self._slice(track, f"phase {phase}, not complete", start, end, "phase")
            left, missing = barrier.first, 0
            series = [(self.born.get(key, 0.0), left, missing)]
            for time, arrivals, nbytes in sorted(self.changes[key], key=lambda change: change[0]):
                left, missing = left - arrivals, missing + nbytes
                if left <= 0 and missing <= 0:
                    left += barrier.expected
                series.append((time, left, missing))
            pending[track] = series
        return pending


def _contributions(step: Effect):
    """(key, phase) of everything that this step adds to."""
    if step.kind == "bar" or step.kind == "group" and step.facts["leads"]:
        yield step.facts["key"], step.facts["phase"]
    for signal in step.facts.get("signals", ()):
        if signal.phase is not None:
            yield signal.key, signal.phase


def replay(recording: Recording, steps: Steps) -> Timeline:
    """The recording on the model's clock."""
    return Replay(recording, steps).run()
