"""Subcommands around the emulator: run any CuTe DSL program, break a kernel's synchronization, compare with a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from . import present
from .command import (
    BAD_INPUT,
    VERIFICATION_FAILED,
    Exhaustively,
    Fast,
    LineInfo,
    Schedules,
    ScheduleSeed,
    Seed,
    Sms,
    Trace,
    TraceCtas,
    command,
    compiled,
    proof_of,
    say_proofs,
    tracer_of,
)
from .emit import require_writable, write_bytes, write_text
from .matrix import SHAPE_FORMAT, parse_shape
from .options import kernel_spec, spec_options
from .plan import plan_kernel
from .resources import checkout_root
from .spec import SpecError

Script = typer.Argument(..., metavar="SCRIPT", help="a CuTe DSL program, as it would run on a GPU")
Arguments = typer.Argument(None, metavar="[ARGS]...", help="the program's own")
Arch = typer.Option("sm_100a", "--arch", metavar="sm_90a|sm_100a", help="the GPU's architecture")
Accumulation = typer.Option("fast", "--accumulation", help="how tensor cores add: fast (float32), or exact (bit model)")
Uninitialized = typer.Option(
    False, "--allow-uninitialized", help="let kernels compute on values never written, as on rows beyond the end"
)
Warnings = typer.Option(False, "--warnings", help="also say what the ISA asks for and silicon does without")
LaunchesFile = typer.Option(None, "--json", metavar="FILE", help="write what was launched here")
OneShape = typer.Option(None, "--shape", metavar=SHAPE_FORMAT, help="of a specification's random inputs")
Two = typer.Option(2, "--jobs", min=1, help="processes")
MutantsFile = typer.Option(None, "--json", metavar="FILE", help="write every mutant and what became of it here")
TableTitle = typer.Option(None, "--title", help="the kernel's name in the table, if it is not the program's")
WriteDocs = typer.Option(False, "--write-docs", help="bring docs/mutation.md up to date for these kernels")
Target = typer.Argument(None, metavar="[KERNEL | SCRIPT.py [ARGS]...]", help="as of verify, or as of emulate")
Group = typer.Option(None, "--group", help="repeatable: scalar, conversion, memory, warp, matrix, tma, wgmma")
Recorded = typer.Option(False, "--recorded", help="compare with an H200's recorded answers, exact accumulation, no GPU")
Record = typer.Option(None, "--record", metavar="FILE", help="write digests of the GPU's answers")
Captured = typer.Option(None, "--launches", metavar="FILE", help="execute launches of `emulate --capture` on the GPU")
CaptureFile = typer.Option(None, "--capture", metavar="FILE", help="keep every launch with its arrays, for crosscheck")
Markdown = typer.Option(None, "--markdown", metavar="FILE", help="write the tables of docs/crosscheck.md here")
CrosscheckFile = typer.Option(None, "--json", metavar="FILE", help="write all comparisons here")
REPLAYED = ("same", "different", "failed", "refused", "unknown")


@command(context_settings={"allow_interspersed_args": False})
def emulate(
    script: Path = Script,
    arguments: list[str] | None = Arguments,
    arch: str = Arch,
    sms: int = Sms,
    lineinfo: bool = LineInfo,
    accumulation: str = Accumulation,
    fast: bool = Fast,
    allow_uninitialized: bool = Uninitialized,
    warnings: bool = Warnings,
    trace: Path | None = Trace,
    trace_ctas: int = TraceCtas,
    schedules: int = Schedules,
    schedule_seed: int = ScheduleSeed,
    exhaustive: bool = Exhaustively,
    capture: Path | None = CaptureFile,
    json_file: Path | None = LaunchesFile,
) -> None:
    """Run a CuTe DSL program on the emulator, NumPy or CPU torch arrays standing for device tensors.

    Exit code 1 when a hazard is found or the program fails, 2 when it needs what the emulator does not have.
    """
    from .emulator.script import run_script

    for file in filter(None, (capture, json_file)):
        require_writable(file)
    tracer = tracer_of(trace, trace_ctas)
    options = {"strict": not fast, "accumulation": accumulation, "trace": tracer}
    options |= {"allow_uninitialized": allow_uninitialized, "warnings": warnings}
    options |= {"schedules": schedules, "schedule_seed": schedule_seed}
    proof = proof_of(exhaustive)
    kept = _capture(capture)
    options["prepare"] = lambda gpu: gpu.observers.extend([*proof, *kept])
    run = run_script(script, arguments or [], arch, sms, lineinfo=lineinfo or tracer is not None, **options)
    say_proofs(proof)
    if run.launches:
        present.console(to_stderr=True, for_tables=True).print(present.launches_table(run.launches))
    for warning in dict.fromkeys(text for launch in run.launches for text in launch.warnings):
        present.say(f"warning: {warning}")
    for message in [run.message] if run.error is not None else run.hazards:
        present.say(message)
    if capture is not None:
        from .crosscheck import to_bytes

        write_bytes(capture, to_bytes(kept[0].launches))
    code = 0 if run.passed else BAD_INPUT if run.beyond_emulator else VERIFICATION_FAILED
    if json_file is not None:
        facts = {"script": str(script), "arch": arch, "exit_code": code, "error": run.message or None}
        launches = present.launches_document(run.launches)
        write_text(json_file, present.document(facts | {"launches": launches}) + "\n")
    if code:
        raise typer.Exit(code)


@command
@spec_options
def mutate(
    fields: dict[str, Any],
    target: list[str] | None = Target,
    sms: int = Sms,
    shape: str | None = OneShape,
    seed: int = Seed,
    jobs: int = Two,
    json_file: Path | None = MutantsFile,
    title: str | None = TableTitle,
    write_docs: bool = WriteDocs,
) -> None:
    """Break every synchronization instruction of a kernel, one at a time, and see whether the emulator notices.

    Exit code 1 when a mutant is missed.
    """
    from . import mutate as mutation

    words, folder = target or [], (checkout_root() or Path.cwd()) / "docs"
    for file in filter(None, (json_file, folder / "mutation.md" if write_docs else None)):
        require_writable(file)
    step = present.counted("mutants", lambda outcome: f"line {outcome.line} {outcome.kind}: {outcome.result}")
    if words and words[0].endswith(".py"):
        arch = fields.get("arch", "sm_100a")
        outcomes, run = mutation.mutate_script(Path(words[0]), words[1:], arch, sms, jobs=jobs, done=step)
        if run.error is not None:
            present.say(run.message)
            raise typer.Exit(BAD_INPUT)
    else:
        chosen = plan_kernel(kernel_spec(words[0] if words else None, fields))
        extents = parse_shape(shape, chosen.spec) if shape else None
        binary = compiled(chosen, None)
        extents = extents or mutation.shape_for(binary)
        outcomes = mutation.mutate_kernel(binary, extents, seed=seed, jobs=jobs, done=step)
    if title is not None and len({outcome.kernel for outcome in outcomes}) == 1:
        outcomes = [mutation.named(outcome, title) for outcome in outcomes]
    present.console().print(present.mutation_table(mutation.tally(outcomes), mutation.RESULTS))
    if json_file is not None:
        write_text(json_file, present.document([vars(outcome) for outcome in outcomes]) + "\n")
    if write_docs:
        present.say(f"wrote {mutation.write_docs(outcomes, folder, mutation.command())}")
    missed = [outcome for outcome in outcomes if outcome.result == "missed"]
    for outcome in missed:
        present.say(f"missed: {outcome.kernel} PTX line {outcome.line}, {outcome.kind} ({outcome.opcode})")
    if missed:
        raise typer.Exit(VERIFICATION_FAILED)


@command
def crosscheck(
    group: list[str] | None = Group,
    seed: int = Seed,
    accumulation: str = Accumulation,
    recorded: bool = Recorded,
    record: Path | None = Record,
    launches: Path | None = Captured,
    markdown: Path | None = Markdown,
    json_file: Path | None = CrosscheckFile,
) -> None:
    """Run the same PTX on the GPU of this machine and in the emulator, and compare what comes out bit by bit.

    Exit code 1 when anything differs by more than its rule allows.
    """
    from . import crosscheck as check
    from .emulator.accumulate import MODES

    if accumulation not in MODES:
        raise SpecError("accumulation", accumulation, f"one of {', '.join(MODES)}", "leave it out for fast")
    if launches is not None:
        _replay_launches(check, launches)
        return
    for file in filter(None, (record, markdown, json_file)):
        require_writable(file)
    unknown = [name for name in group or () if name not in check.GROUPS]
    if unknown:
        raise SpecError("group", unknown[0], f"one of {', '.join(check.GROUPS)}", "leave it out for all")
    cases = [case for name in group or check.GROUPS for case in check.cases_of(name, seed)]
    if recorded:
        _replayed(check, cases)
        return
    recording, groups = check.Recording("", 0), dict.fromkeys(case.group for case in cases)

    def progress(case: Any, row: Any, silicon: Any) -> None:
        recording.add(case, silicon)
        if groups.pop(case.group, 0) is None:
            present.say(f"{case.group} …")

    outcome = check.crosscheck(cases, progress, accumulation=accumulation)
    present.say(f"{outcome.device} ({outcome.target}), driver {outcome.driver}")
    present.console().print(present.plain_table(check.HEADER, [line.cells() for line in check.lines_of(outcome)]))
    for case, message in outcome.failed:
        present.say(f"{case.group}: {case.name}: failed {message}")
    for row in outcome.rows:
        if not row.good:
            present.say(f"{row.group}: {row.name}: {row.differ} of {row.values} values differ; {row.example}")
    if record is not None:
        recording.device, recording.driver = outcome.device, outcome.driver
        recording.refused = {f"{case.group}/{case.name}" for case in outcome.refused}
        write_text(record, recording.text())
    if markdown is not None:
        write_text(markdown, check.markdown([(f"Accumulation `{accumulation}`", outcome)]))
    if json_file is not None:
        write_text(json_file, present.document([vars(row) | {"rule": vars(row.rule)} for row in outcome.rows]) + "\n")
    if not outcome.good:
        raise typer.Exit(VERIFICATION_FAILED)


def _capture(file: Path | None) -> list[Any]:
    if file is None:
        return []
    from .crosscheck import Capture

    return [Capture()]


def _replay_launches(check: Any, file: Path) -> None:
    """Captured launches on the GPU: a row an array that was written."""
    try:
        captured = check.from_bytes(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError("launches", str(file), f"cannot be read: {error}", "write one: emulate --capture") from None
    found = check.crosscheck_launches(captured)
    kinds = list(found[0].relative) if found else []
    header = ("kernel", "array", "bytes", "bytes that differ", *(f"relative, as {kind}" for kind in kinds))
    rows = [
        [d.kernel[:40], d.array, str(d.nbytes), str(d.differ), *(f"{d.relative[kind]:.1e}" for kind in kinds)]
        for d in found
    ]
    present.console().print(present.plain_table(header, rows))


def _replayed(check: Any, cases: list[Any]) -> None:
    """The emulator against what a GPU was recorded to answer."""
    recording = check.load_recording()
    tally: dict[str, dict[str, int]] = {}
    for found in check.replay(cases, recording):
        kind = found.result if found.result in REPLAYED else "failed"
        counts = tally.setdefault(found.group, dict.fromkeys(REPLAYED, 0))
        counts[kind] += 1
        if kind in ("different", "failed"):
            present.say(f"{found.group}: {found.name}: {found.result}")
    present.say(f"recorded on {recording.device}, driver {recording.driver}")
    rows = [[name, *map(str, counts.values())] for name, counts in tally.items()]
    present.console().print(present.plain_table(("group", *REPLAYED), rows))
    if any(counts["different"] or counts["failed"] for counts in tally.values()):
        raise typer.Exit(VERIFICATION_FAILED)
