"""`--trace FILE`: launches on the model's clock, as a Chrome/Perfetto trace (JSON) or as a picture (SVG).

    with emulator.attached("sm_100a", lineinfo=True, trace="run.json.gz") as gpu: ...
    Gpu("sm_100a", trace="run.svg")

The file is written anew, whole or not at all, after every launch, one that was cut short included. JSON: the object
form of the trace-event format (ui.perfetto.dev and chrome://tracing open it):

    displayTimeUnit  "ns"
    otherData        `clock` (what the times are), `constants` (name → value, unit, source), `launches` (a summary
                     each), `truncated` (there were more than the first MAX_LAUNCHES, which are not here)
    traceEvents      M  process_name, thread_name and thread_sort_index: a process a CTA, a thread a track
                     X  slices: name, cat (run, wait, issue, tmem, mma, copy, phase), ts, dur, args
                     C  "NAME pending": arrivals and bytes that an mbarrier still waits for
                     s, f  flow arrows, from what completes to the wait that it releases

`ts` and `dur` count microseconds by the format; one cycle of the model is one nanosecond of them.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .clock import CONSTANTS, SHOWN_AS
from .errors import EmulatorError, LaunchError
from .lineinfo import line_table
from .phases import Steps
from .record import Recorder, Recording, traced_program
from .timeline import BARRIER, COPY, TENSOR, WARP, Timeline, replay
from .translate import Program

DEFAULT_CTAS = 2
MAX_LAUNCHES = 16  # launches of one run that are traced
MODEL = f"modelled cycles, not measurements; {SHOWN_AS}"
_ORDER = {WARP: 0, TENSOR: 1, COPY: 2, BARRIER: 3}
_INSIDE = 0.1  # cycles from the end of a slice at which a flow arrow is attached to it


class Tracer:
    """Traces the launches of one or several Gpus into one file.

    path: ends in .json, .json.gz or .svg. ctas: how many CTAs of each launch, the first ones, whole clusters of them.
    Raises LaunchError for another name or number, and when the file cannot be written.
    """

    def __init__(self, path: str | Path, ctas: int = DEFAULT_CTAS):
        self.path = Path(path)
        if not self.path.name.endswith((".json", ".json.gz", ".svg")):
            raise LaunchError(f"trace file {path}: its name must end in .json, .json.gz or .svg")
        if isinstance(ctas, bool) or not isinstance(ctas, int) or ctas < 1:
            raise LaunchError(f"{ctas!r} CTAs to trace: at least 1")
        self.ctas = ctas
        self.timelines: list[Timeline] = []
        self.truncated = False  # there were more launches than MAX_LAUNCHES
        self._recorder: Recorder | None = None
        self._programs: dict[tuple[str, str, bool], Program] = {}
        self._write()  # a file that cannot be written is told before anything runs

    def run(self, case, parse) -> tuple[Any, Any]:
        """Execute a LaunchCase, traced; what it returns, and what the model says of it: see `summary`."""
        if len(self.timelines) == MAX_LAUNCHES:
            if not self.truncated:
                self.truncated = True
                self._write()
            return case.run(), None
        name = (case.text, case.kernel, case.gpu.strict)
        if name not in self._programs:
            kernel = parse(case.text).kernels[case.kernel]
            self._programs[name] = traced_program(kernel, lambda: self._recorder, case.gpu.strict)
        program = self._programs[name]
        size = case.cluster[0] * case.cluster[1] * case.cluster[2]
        self._recorder = Recorder(program, case.gpu.arch, case.grid, size, self.ctas)
        try:
            result = case.run(program=program)
        except EmulatorError:
            self._add(self._recorder.finish(), case.text)
            raise
        return result, summary(self._add(self._recorder.finish(), case.text))

    def _add(self, recording: Recording, text: str) -> Timeline:
        self.timelines.append(replay(recording, Steps(recording, line_table(text))))
        self._write()
        return self.timelines[-1]

    def _write(self) -> None:
        if self.path.suffix == ".svg":
            from .picture import picture

            content = picture(self.timelines[0]) if self.timelines else "<svg xmlns='http://www.w3.org/2000/svg'/>"
        else:
            content = json.dumps(document(self.timelines, self.truncated), separators=(",", ":"))
        raw = content.encode()
        _replace(self.path, gzip.compress(raw, mtime=0) if self.path.suffix == ".gz" else raw)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError as error:
        raise LaunchError(f"trace file {path}: cannot be written: {error.strerror}") from None
    finally:
        if part is not None and os.path.exists(part):
            os.unlink(part)


def summary(timeline: Timeline) -> dict[str, Any]:
    """What the model says of the traced CTAs of a launch: cycles, and shares of them.

    cycles: to the end of the last slice. tensor_core, copy_engine: mean share of the time that a CTA's unit works.
    warps: by role, the mean share that its warps compute (`run`), use tensor memory (`tmem`) and wait (`wait`), and how
        many `instructions` all of them executed; spins on a barrier count as one.
    unresolved_waits: waits that the model could not explain, 0 for a launch that came to its end.
    """
    cycles = max(timeline.end, 1e-9)
    ctas = max(len(timeline.busy), 1)
    roles: dict[str, list[dict[str, float]]] = {}
    executed: Counter[str] = Counter()
    for track in timeline.tracks:
        if track.kind == WARP:
            shares = {kind: 0.0 for kind in ("run", "tmem", "wait")}
            for piece in track.slices:
                if piece.kind in shares:
                    shares[piece.kind] += (piece.end - piece.start) / cycles
            roles.setdefault(track.role, []).append(shares)
            executed[track.role] += track.instructions
    return {
        "cycles": round(timeline.end, 1),
        "ctas": len(timeline.recording.ctas),
        "tensor_core": round(sum(b[TENSOR] for b in timeline.busy.values()) / cycles / ctas, 4),
        "copy_engine": round(sum(b[COPY] for b in timeline.busy.values()) / cycles / ctas, 4),
        "warps": {
            role: {kind: round(sum(one[kind] for one in shares) / len(shares), 4) for kind in shares[0]}
            | {"instructions": executed[role]}
            for role, shares in roles.items()
        },
        "unresolved_waits": timeline.unresolved,
    }


def document(timelines: list[Timeline], truncated: bool = False) -> dict[str, Any]:
    """The trace as one JSON object; launches stand one after the other on the clock."""
    events: list[dict[str, Any]] = []
    launches, offset, process, flow = [], 0.0, 0, 0
    for timeline in timelines:
        recording = timeline.recording
        launches.append({"kernel": recording.kernel, "arch": recording.arch, "grid": list(recording.grid)})
        launches[-1] |= {"starts": _time(offset), **summary(timeline)}
        several = f"launch {len(launches) - 1}, " if len(timelines) > 1 else ""
        threads = {i: (process + track.cta, i) for i, track in enumerate(timeline.tracks)}
        for cta, block in enumerate(recording.ctas):
            name = f"{several}CTA {block} of {recording.kernel}"
            events.append(_named("process_name", process + cta, 0, name=name))
        for i, track in sorted(enumerate(timeline.tracks), key=lambda item: (item[1].cta, _ORDER[item[1].kind])):
            events.append(_named("thread_name", *threads[i], name=track.name))
            events.append(_named("thread_sort_index", *threads[i], sort_index=_ORDER[track.kind] * 1000 + i))
        for i, track in enumerate(timeline.tracks):
            events.extend(_slice(piece, threads[i], offset) for piece in track.slices)
        for i, series in timeline.pending.items():
            events.extend(_counters(f"{timeline.tracks[i].name} pending", threads[i][0], series, offset))
        for arrow in timeline.flows:
            flow += 1
            events.extend(_arrow(flow, threads[arrow.source], arrow.start, threads[arrow.target], arrow.end, offset))
        process += len(recording.ctas)
        offset += timeline.end
    facts = {"clock": MODEL, "constants": {name: c._asdict() for name, c in CONSTANTS.items()}, "launches": launches}
    return {"displayTimeUnit": "ns", "otherData": facts | {"truncated": truncated}, "traceEvents": events}


def _time(cycles: float) -> float:
    return round(cycles / 1000, 6)


def _named(what: str, process: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": args}


def _slice(piece, thread: tuple[int, int], offset: float) -> dict[str, Any]:
    start = _time(offset + piece.start)
    args = {k: round(v, 3) if isinstance(v, float) else v for k, v in piece.facts.items() if k != "committed"}
    event = {"ph": "X", "name": piece.name, "cat": piece.kind, "pid": thread[0], "tid": thread[1], "ts": start}
    return event | {"dur": round(_time(offset + piece.end) - start, 6), "args": args}


def _counters(name: str, process: int, series: list[tuple[float, int, int]], offset: float) -> Iterator[dict[str, Any]]:
    for time, arrivals, nbytes in series:
        args = {"arrivals": arrivals, "bytes": nbytes}
        yield {"ph": "C", "name": name, "pid": process, "ts": _time(offset + time), "args": args}


def _arrow(number: int, source: tuple[int, int], start: float, target: tuple[int, int], end: float, offset: float):
    common = {"cat": "release", "name": "releases", "id": number}
    for phase, thread, time in (("s", source, start), ("f", target, end)):
        event = common | {"ph": phase, "pid": thread[0], "tid": thread[1], "ts": _time(offset + time - _INSIDE)}
        yield event | {"bp": "e"} if phase == "f" else event
