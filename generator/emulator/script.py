"""Runs a Python program on the emulator, as `python SCRIPT ARGS` would run it on a GPU."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .attach import DEFAULT_SMS, attached
from .errors import EmulatorError, LaunchError, PtxSyntaxError, UnsupportedInstruction
from .gpu import Gpu, LaunchReport
from .host import HostError


@dataclass(frozen=True)
class ScriptRun:
    """What a program did: its launches, and the exception or exit status that ended it, if it did not end well."""

    launches: tuple[LaunchReport, ...]
    error: BaseException | None
    message: str  # of the error, for people

    @property
    def hazards(self) -> tuple[str, ...]:
        return tuple(hazard for launch in self.launches for hazard in launch.hazards)

    @property
    def beyond_emulator(self) -> bool:
        """The program may be right: it needs something that the emulator does not have."""
        kinds = (UnsupportedInstruction, PtxSyntaxError, HostError)
        return isinstance(self.error, kinds) and not isinstance(self.error, LaunchError)

    @property
    def passed(self) -> bool:
        return self.error is None and not self.hazards


def run_script(
    script: Path,
    arguments: Sequence[str] = (),
    arch: str = "sm_100a",
    sms: int = DEFAULT_SMS,
    prepare: Callable[[Gpu], None] | None = None,
    **options: Any,
) -> ScriptRun:
    """Run a file as the main program, with what it compiles attached to an emulated GPU. options: those of attached.
    prepare: called with the Gpu before the program runs.

    Raises EmulatorError when there is no such program or GPU; whatever the program itself does is in the result.
    """
    if not script.is_file():
        raise EmulatorError(f"{script}: no such program")
    launches: list[LaunchReport] = []
    try:
        with _main_program(script, arguments), attached(arch, sms=sms, **options) as gpu:
            launches = gpu.launches
            if prepare is not None:
                prepare(gpu)
            _run(script)
    except _Ended as end:
        return ScriptRun(tuple(launches), end.__cause__, _message(script, end.__cause__))
    return ScriptRun(tuple(launches), None, "")


class _Ended(Exception):
    """The program ended with its __cause__. Keeps the program's exceptions apart from those of attaching."""


def _run(script: Path) -> None:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        raise
    except SystemExit as end:
        if end.code not in (None, 0):
            raise _Ended from end
    except BaseException as error:
        raise _Ended from error


@contextmanager
def _main_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """sys.argv and sys.path as the interpreter sets them for a script."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _message(script: Path, error: BaseException) -> str:
    """An error of the program as Python shows it; one that the emulator raised as its message and where it came up."""
    if isinstance(error, SystemExit):
        return f"the program exited with {error.code!r}"
    if not isinstance(error, EmulatorError):
        shown = traceback.format_exception(type(error), error, _from_script(script, error.__traceback__))
        return "".join(shown).rstrip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_script(script, f.filename)]
    where = f"{script}:{frames[-1].lineno}: " if frames else ""
    return f"{where}{type(error).__name__}: {error}"


def _from_script(script: Path, trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames that started the program."""
    at = trace
    while at is not None and not _is_script(script, at.tb_frame.f_code.co_filename):
        at = at.tb_next
    return at


def _is_script(script: Path, filename: str) -> bool:
    return os.path.abspath(filename) == os.path.abspath(script)
