"""The same PTX on a GPU and in the emulator, on the same inputs, compared bit by bit."""

from __future__ import annotations

from .cases import GROUPS, cases_of
from .compare import Row, compare
from .device import DeviceError
from .launches import Capture, from_bytes, to_bytes
from .recording import Recording, load_recording, replay
from .report import HEADER, lines_of, markdown
from .runner import Outcome, crosscheck, crosscheck_launches

__all__ = [
    "GROUPS",
    "HEADER",
    "Capture",
    "DeviceError",
    "Outcome",
    "Recording",
    "Row",
    "cases_of",
    "compare",
    "crosscheck",
    "crosscheck_launches",
    "from_bytes",
    "lines_of",
    "load_recording",
    "markdown",
    "replay",
    "to_bytes",
]
