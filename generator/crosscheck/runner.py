"""Run cases on both sides and compare them.

The GPU is driven from a process of its own: a fault in one kernel leaves CUDA unusable in the process that launched it,
so the rest of the cases go on in a new one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..emulator import EmulatorError
from .case import Case
from .compare import Row, compare
from .device import Device, DeviceError
from .emulated import Emulated
from .launches import Captured, Difference, differences

MODULE_CASES = 128  # entries a module: enough to amortize loading, few enough to halve when one is refused

Outputs = dict[str, np.ndarray]


@dataclass
class Outcome:
    """What a cross-check found. `refused` by the GPU's assembler, `failed` on one side with its message."""

    device: str = ""
    target: str = ""
    driver: int = 0
    rows: list[Row] = field(default_factory=list)
    refused: list[Case] = field(default_factory=list)
    failed: list[tuple[Case, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed and all(row.good for row in self.rows)


@dataclass(frozen=True)
class Batch:
    """What the GPU did with the first cases of a list: outputs by position, those refused, where it faulted."""

    outputs: dict[int, Outputs]
    refused: list[int]
    fault: tuple[int, str] | None


def describe() -> tuple[str, str, int]:
    """Name, target and driver version of CUDA device 0. In a worker."""
    device = Device()
    return device.name, device.target, device.version


def execute(cases: Sequence[Case]) -> Batch:
    """Run cases on CUDA device 0 until one faults. In a worker."""
    device, outputs = Device(), {}
    numbers = {id(case): i for i, case in enumerate(cases)}
    loaded, refused = device.assemble(cases)
    for module, part in loaded:
        for entry, case in enumerate(part):
            try:
                outputs[numbers[id(case)]] = device.run(module, entry, case)
            except DeviceError as error:
                return Batch(outputs, [numbers[id(c)] for c in refused], (numbers[id(case)], str(error)))
    return Batch(outputs, [numbers[id(c)] for c in refused], None)


def replay_launches(launches: Sequence[Captured]) -> list[list[np.ndarray]]:
    """The arrays after each captured launch, on CUDA device 0. In a worker."""
    device = Device()
    return [device.replay(launch) for launch in launches]


class Silicon:
    """CUDA device 0 behind a worker process."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self.name, self.target, self.driver = self._call(describe)

    def _call(self, function: Callable, *arguments):
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Outputs | str | None]]:
        """Each case with its outputs, the message of its fault, or None where the assembler refuses it."""
        left = list(cases)
        while left:
            batch = self._call(execute, left)
            stop = len(left) if batch.fault is None else batch.fault[0] + 1
            for i, case in enumerate(left[:stop]):
                if i in batch.outputs:
                    yield case, batch.outputs[i]
                elif i in batch.refused:
                    yield case, None
                else:
                    yield case, batch.fault[1]
            left = left[stop:]
            if batch.fault is not None:
                self.close()


def crosscheck_launches(launches: Sequence[Captured]) -> list[Difference]:
    """Execute captured launches on CUDA device 0. Raises DeviceError."""
    silicon = Silicon()
    try:
        results = silicon._call(replay_launches, launches)
    finally:
        silicon.close()
    return [d for launch, arrays in zip(launches, results, strict=True) for d in differences(launch, arrays)]


def crosscheck(
    cases: Sequence[Case],
    progress: Callable[[Case, Row | None, Outputs], None] = lambda case, row, silicon: None,
    **settings,
) -> Outcome:
    """Run every case on CUDA device 0 and in an emulated GPU with `settings`; `progress` sees each as it is done.

    Raises DeviceError when there is no usable device. A case that fails on either side is reported, not raised.
    """
    silicon = Silicon()
    try:
        outcome = Outcome(silicon.name, silicon.target, silicon.driver)
        emulated = Emulated(silicon.target, **settings)
        for first in range(0, len(cases), MODULE_CASES):
            part = cases[first : first + MODULE_CASES]
            results = list(silicon.run(part))
            _compare_part(emulated, results, outcome, progress)
    finally:
        silicon.close()
    return outcome


def _compare_part(emulated: Emulated, results: list, outcome: Outcome, progress: Callable) -> None:
    ran = [(case, found) for case, found in results if isinstance(found, dict)]
    outcome.refused += [case for case, found in results if found is None]
    outcome.failed += [(case, f"on the GPU: {found}") for case, found in results if isinstance(found, str)]
    if not ran:
        return
    twin = emulated.load([case for case, _ in ran])
    for number, (case, found) in enumerate(ran):
        row = None
        try:
            row = compare(case, found, emulated.run(twin, number, case), emulated.rule(case))
            outcome.rows.append(row)
        except EmulatorError as error:
            outcome.failed.append((case, f"in the emulator: {error}"))
        progress(case, row, found)
