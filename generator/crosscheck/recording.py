"""What a GPU answered, kept as digests: a machine without one can still hold the emulator to it.

A recording has, by case, a digest of everything that went in and one of everything that came out. Only cases whose
results must be the same bits are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from ..emulator import EmulatorError
from .case import Array, Case, Rule
from .compare import FLOATS
from .emulated import Emulated

RECORDING = "h200.json"
PART = 64  # cases a module


@dataclass
class Recording:
    """Digests of one device's results. `cases`: "group/name" → (digest of the inputs, digest of the outputs).
    `refused`: "group/name" of what its assembler does not take.
    """

    device: str
    driver: int
    cases: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def add(self, case: Case, outputs: dict[str, np.ndarray]) -> None:
        if is_exact(case.rule):
            self.cases[key(case)] = (digest_inputs(case), digest_outputs(outputs, case.rule))

    def text(self) -> str:
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(pair)}" for name, pair in sorted(self.cases.items()))
        head = f'"device": {json.dumps(self.device)},\n"driver": {self.driver},\n'
        head += f'"refused": {json.dumps(sorted(self.refused), indent=0)},\n'
        return "{\n" + head + '"cases": {\n' + rows + "\n}\n}\n"


@dataclass(frozen=True)
class Replay:
    """The emulator against a recording, one case: `result` is "same", "different", "refused" (by the device's
    assembler), "unknown" (the recording has other inputs, or lacks the case), or the emulator's message.
    """

    group: str
    name: str
    result: str


def is_exact(rule: Rule) -> bool:
    return rule.relative == rule.absolute == 0


def key(case: Case) -> str:
    return f"{case.group}/{case.name}"


def digest_inputs(case: Case) -> str:
    parts: list[Any] = [case.body, case.grid, case.block, case.cluster, case.smem_bytes]
    for argument in case.arguments:
        known = {k: v for k, v in vars(argument).items() if k != "value"}
        parts += [known, argument.value.tobytes() if isinstance(argument, Array) else b""]
    return _digest(repr(parts).encode())


def digest_outputs(outputs: dict[str, np.ndarray], rule: Rule) -> str:
    """Of the bits; a NaN whose payload does not matter counts as one of zeros."""
    hashed = []
    for name, array in sorted(outputs.items()):
        value = np.ascontiguousarray(array)
        if rule.any_nan:
            value = value.view(FLOATS[rule.kind]).copy()
            value[np.isnan(value)] = np.nan
        hashed.append(name.encode() + value.tobytes())
    return _digest(b"|".join(hashed))


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def load_recording() -> Recording:
    """The recording that Bespoke comes with."""
    found = json.loads((files(__package__) / RECORDING).read_text())
    cases = {name: tuple(pair) for name, pair in found["cases"].items()}
    return Recording(found["device"], found["driver"], cases, set(found["refused"]))


def replay(cases: Sequence[Case], recording: Recording, **settings: Any) -> Iterator[Replay]:
    """Run the cases in an emulated GPU with `settings` ("exact" accumulation: others cannot give the same bits)."""
    emulated = Emulated("sm_90a", **{"accumulation": "exact", **settings})
    for first in range(0, len(cases), PART):
        part, known = [], {}
        for case in cases[first : first + PART]:
            pair = recording.cases.get(key(case))
            if key(case) in recording.refused:
                yield Replay(case.group, case.name, "refused")
            elif pair is None or pair[0] != digest_inputs(case):
                yield Replay(case.group, case.name, "unknown")
            else:
                part.append(case)
                known[case.name] = pair[1]
        loaded = emulated.load(part) if part else None
        for number, case in enumerate(part):
            try:
                same = digest_outputs(emulated.run(loaded, number, case), case.rule) == known[case.name]
                yield Replay(case.group, case.name, "same" if same else "different")
            except EmulatorError as error:
                yield Replay(case.group, case.name, str(error))
