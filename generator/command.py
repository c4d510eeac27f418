"""What the subcommands of `bespoke` share: how one is registered, how errors end it, options and stages.

Exit codes: 0 good, 1 verification failed or hazard found, 2 bad input or does not fit, 130 interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
import typer.core

from . import present
from .dsl import CompileError
from .layout import Plan
from .spec import SpecError

VERIFICATION_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Subcommands(typer.core.TyperGroup):
    """In --help, what makes a kernel comes before what surrounds the emulator."""

    LAST = ("emulate", "mutate", "crosscheck")

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name in self.LAST)


app = typer.Typer(
    cls=Subcommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write, compile and verify a fused attention kernel for exactly one specification.",
)

Seed = typer.Option(0, "--seed", help="of the random inputs")
Fast = typer.Option(False, "--fast", help="skip the hazard checks: several times faster, the same results")
LineInfo = typer.Option(False, "--lineinfo", help="compile with line information: messages name the source line")
Trace = typer.Option(None, "--trace", metavar="FILE", help="write a timeline: .json, .json.gz (Perfetto), .svg")
TraceCtas = typer.Option(2, "--trace-ctas", min=1, help="CTAs of each launch in the timeline, from the first on")
Sms = typer.Option(4, "--sms", min=1, help="multiprocessors of the emulated GPU")
Schedules = typer.Option(1, "--schedules", metavar="N", min=1, help="run each launch in N interleavings of its warps")
ScheduleSeed = typer.Option(0, "--schedule-seed", min=0, help="of the first of them that is not the deterministic one")
Exhaustively = typer.Option(False, "--exhaustive", help="prove that no interleaving of the barriers goes wrong")


def command(function: Callable[..., None] | None = None, **settings: Any) -> Callable[..., Any]:
    """Register a subcommand: errors become one message and an exit code. settings: typer's."""
    if function is None:
        return functools.partial(command, **settings)

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            from .emulator.interrupt import end_workers

            end_workers()
            present.say("interrupted; no half-written file is left")
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except _expected_errors() as error:
            present.fail(error)
            raise typer.Exit(BAD_INPUT) from None

    return app.command(**settings)(guarded)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors that are told without a traceback. Python asks for them only when there is an error."""
    from .crosscheck import DeviceError
    from .emulator import EmulatorError
    from .run import RunError

    return (SpecError, CompileError, RunError, EmulatorError, DeviceError)


def compiled(chosen: Plan, source: Path | None, lineinfo: bool = False) -> Any:
    from .compile import compile_kernel
    from .emulator.interrupt import interrupt_held_back

    with present.stage("compile"), interrupt_held_back():
        return compile_kernel(chosen, source, lineinfo=lineinfo)


def proof_of(wanted: bool) -> list[Any]:
    from .emulator.exhaustive import Exhaustive

    return [Exhaustive()] if wanted else []


def say_proofs(proof: list[Any]) -> None:
    for text in dict.fromkeys(text for one in proof for text in one.proofs):
        present.say(text)


def tracer_of(path: Path | None, ctas: int) -> Any:
    from .emulator import Tracer

    return None if path is None else Tracer(path, ctas)
