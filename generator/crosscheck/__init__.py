"""The same PTX on a GPU and in the emulator, on the same inputs, compared bit by bit."""

from __future__ import annotations

from .cases import GROUPS, cases_of
from .compare import Row, compare
from .device import DeviceError
from .recording import Recording, load_recording, replay
from .report import HEADER, lines_of
from .runner import Outcome, crosscheck

__all__ = [
    "GROUPS",
    "HEADER",
    "DeviceError",
    "Outcome",
    "Recording",
    "Row",
    "cases_of",
    "compare",
    "crosscheck",
    "lines_of",
    "load_recording",
    "replay",
]
