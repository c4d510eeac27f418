"""The `bespoke` command: each subcommand names the stages that it runs, and nothing else happens here.

Exit codes: 0 good, 1 verification failed or hazard found, 2 bad input or does not fit, 130 interrupted. `--json` puts
one document on stdout (or into a file where it takes one); everything else goes to stderr. Stages that need the CuTe
DSL are imported when a command reaches them.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from . import present
from .dsl import CompileError
from .emit import is_current, kernel_path, write_bytes, write_kernel, write_text
from .matrix import SHAPE_FORMAT, Shape, load_matrix, parse_shape, run_cases, shapes_of
from .options import kernel_spec, spec_options
from .plan import Plan, plan_kernel
from .resources import checkout_root, generated_dir
from .spec import SpecError
from .survey import survey_kernel

VERIFICATION_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
BUDGET_HEAD_DIMS = "64,128,256,512"
REJECTED_SHOWN = 12

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write, compile and verify a fused attention kernel for exactly one specification.",
)

Kernel = typer.Argument(None, metavar="[KERNEL]", help="a name in specs/ or a .toml file; or use the options below")
Json = typer.Option(False, "--json", help="one JSON document on stdout, everything else on stderr")
Backend = typer.Option("emulator", "--backend", metavar="emulator|cuda", help="where the kernel runs")
Seed = typer.Option(0, "--seed", help="of the random inputs")
Out = typer.Option(None, "--out", metavar="DIR", help="where to write; default: generated/")
Shapes = typer.Option(None, "--shape", metavar=SHAPE_FORMAT, help="repeatable; default: those of specs/matrix.toml")
Check = typer.Option(False, "--check", help="write nothing; exit 1 when the file is not what is emitted")
Select = typer.Option("*", "--select", metavar="GLOB", help="kernels of specs/ by name")
Jobs = typer.Option(os.cpu_count() or 1, "--jobs", min=1, help="processes")
Script = typer.Argument(..., metavar="SCRIPT", help="a CuTe DSL program, as it would run on a GPU")
Arguments = typer.Argument(None, metavar="[ARGS]...", help="the program's own")
Arch = typer.Option("sm_100a", "--arch", metavar="sm_90a|sm_100a", help="the GPU's architecture")
Accumulation = typer.Option("fast", "--accumulation", help="how tensor cores add: fast (float32), or exact (bit model)")
Fast = typer.Option(False, "--fast", help="skip the hazard checks: several times faster, the same results")
Sms = typer.Option(4, "--sms", min=1, help="multiprocessors that the GPU says it has")
Uninitialized = typer.Option(
    False, "--allow-uninitialized", help="let kernels compute on values never written, as on rows beyond the end"
)
Warnings = typer.Option(False, "--warnings", help="also say what the ISA asks for and silicon does without")
LineInfo = typer.Option(False, "--lineinfo", help="compile with line information: messages name the source line")
Trace = typer.Option(None, "--trace", metavar="FILE", help="write a timeline: .json, .json.gz (Perfetto), .svg")
TraceCtas = typer.Option(2, "--trace-ctas", min=1, help="CTAs of each launch in the timeline, from the first on")
LaunchesFile = typer.Option(None, "--json", metavar="FILE", help="write what was launched here")
Schedules = typer.Option(1, "--schedules", metavar="N", min=1, help="run each launch in N interleavings of its warps")
ScheduleSeed = typer.Option(0, "--schedule-seed", min=0, help="of the first of them that is not the deterministic one")
Exhaustively = typer.Option(False, "--exhaustive", help="prove that no interleaving of the barriers goes wrong")
OneShape = typer.Option(None, "--shape", metavar=SHAPE_FORMAT, help="of a specification's random inputs")
Two = typer.Option(2, "--jobs", min=1, help="processes")
MutantsFile = typer.Option(None, "--json", metavar="FILE", help="write every mutant and what became of it here")
WriteDocs = typer.Option(False, "--write-docs", help="bring docs/mutation.md up to date for these kernels")
Target = typer.Argument(None, metavar="[KERNEL | SCRIPT.py [ARGS]...]", help="as of verify, or as of emulate")
Group = typer.Option(None, "--group", help="repeatable: scalar, conversion, memory, warp, matrix, tma, wgmma")
Recorded = typer.Option(False, "--recorded", help="compare with the recorded answers of an H200: needs no GPU")
Record = typer.Option(None, "--record", metavar="FILE", help="write digests of the GPU's answers")
Captured = typer.Option(None, "--launches", metavar="FILE", help="execute launches of `emulate --capture` on the GPU")
CaptureFile = typer.Option(None, "--capture", metavar="FILE", help="keep every launch with its arrays, for crosscheck")
CrosscheckFile = typer.Option(None, "--json", metavar="FILE", help="write all comparisons here")
JsonFile = typer.Option(None, "--json", metavar="FILE", help="write all rows here")


def command(function: Callable[..., None] | None = None, **settings: Any) -> Callable[..., Any]:
    """Register a subcommand: errors become one message and an exit code. settings: typer's."""
    if function is None:
        return functools.partial(command, **settings)

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
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


@command
@spec_options
def budget(fields: dict[str, Any], as_json: bool = Json) -> None:
    """What each kv_stage and P staging needs of shared memory and TMEM. --head-dim takes a list here."""
    wanted = fields.pop("head_dim", BUDGET_HEAD_DIMS)
    dims = [int(word) if word.isdecimal() else word for word in str(wanted).split(",")]
    rows = [row for dim in dims for row in survey_kernel(kernel_spec(None, {**fields, "head_dim": dim}))]
    if as_json:
        print(present.document(present.budget_document(rows)))
        return
    present.console().print(present.budget_table(rows))
    for note in present.overflow_notes(rows):
        present.console().print(note, markup=False, soft_wrap=True)


@command
@spec_options
def plan(fields: dict[str, Any], kernel: str | None = Kernel, as_json: bool = Json) -> None:
    """The chosen plan, its budget, and why the other candidates were not taken."""
    chosen = plan_kernel(kernel_spec(kernel, fields))
    if as_json:
        print(present.document(present.plan_document(chosen)))
        return
    screen = present.console()
    screen.print(f"{chosen.kernel_name}: {chosen.tiling}", markup=False)
    for table in (*present.plan_tables(chosen), present.rejected_table(chosen, REJECTED_SHOWN)):
        screen.print(table)


@command
@spec_options
def generate(
    fields: dict[str, Any],
    kernel: str | None = Kernel,
    out: Path | None = Out,
    check: bool = Check,
) -> None:
    """Write the kernel's source file."""
    chosen = plan_kernel(kernel_spec(kernel, fields))
    folder = out or generated_dir()
    if check and not is_current(chosen, folder):
        present.say(f"{kernel_path(chosen, folder)} is not what is emitted now; run the command without --check")
        raise typer.Exit(VERIFICATION_FAILED)
    print(kernel_path(chosen, folder) if check else write_kernel(chosen, folder))


@command
@spec_options
def compile(fields: dict[str, Any], kernel: str | None = Kernel, out: Path | None = Out, as_json: bool = Json) -> None:
    """Compile to PTX and cubin with no GPU, and compare with the budget. --out gets both files and the source."""
    chosen = plan_kernel(kernel_spec(kernel, fields))
    folder = out or generated_dir()
    binary = _compiled(chosen, write_kernel(chosen, folder))
    facts = present.binary_document(binary)
    if out is not None:
        path = kernel_path(chosen, out)
        facts["ptx"] = str(write_text(path.with_suffix(".ptx"), binary.ptx))
        facts["cubin"] = str(write_bytes(path.with_suffix(".cubin"), binary.cubin))
    if as_json:
        print(present.document(facts))
    else:
        present.console().print(present.binary_table(chosen, binary))


@command
@spec_options
def verify(
    fields: dict[str, Any],
    kernel: str | None = Kernel,
    shape: list[str] | None = Shapes,
    backend: str = Backend,
    seed: int = Seed,
    lineinfo: bool = LineInfo,
    fast: bool = Fast,
    trace: Path | None = Trace,
    trace_ctas: int = TraceCtas,
    schedules: int = Schedules,
    schedule_seed: int = ScheduleSeed,
    exhaustive: bool = Exhaustively,
    as_json: bool = Json,
) -> None:
    """Run the kernel on random inputs and compare with NumPy. Exit code 1 when a shape fails."""
    if (schedules > 1 or exhaustive) and backend != "emulator":
        raise typer.BadParameter("a GPU schedules its warps itself", param_hint="--schedules, --exhaustive")
    chosen = plan_kernel(kernel_spec(kernel, fields))
    shapes = _shapes(chosen, shape)

    if trace is not None and backend != "emulator":
        raise SpecError("--trace", trace, f"only the emulator is traced, not {backend}", "leave --backend out")
    tracer = _tracer(trace, trace_ctas)
    binary = _compiled(chosen, None, lineinfo or tracer is not None)

    proof = _proof(exhaustive)

    def prepare(gpu: Any, outputs: Any) -> None:
        gpu.schedules, gpu.schedule_seed = schedules, schedule_seed
        gpu.observers += proof

    rows = _verified(chosen, binary, shapes, backend, seed, strict=not fast, trace=tracer, prepare=prepare)
    _say_proofs(proof)
    if as_json:
        print(present.document(rows))
    else:
        present.console().print(present.report_table(rows))
    _exit_if_failed(rows)


@command
@spec_options
def make(fields: dict[str, Any], kernel: str | None = Kernel) -> None:
    """Plan, generate, compile and verify: from a specification to a verified kernel."""
    screen = present.console()
    with present.stage("plan"):
        chosen = plan_kernel(kernel_spec(kernel, fields))
    screen.print(present.budget_table(survey_kernel(chosen.spec)))
    with present.stage("generate"):
        source = write_kernel(chosen, generated_dir())
    binary = _compiled(chosen, source)
    screen.print(present.binary_table(chosen, binary))
    with present.stage("verify"):
        rows = _verified(chosen, binary, shapes_of(chosen.spec), "emulator", 0)
    screen.print(present.report_table(rows))
    _exit_if_failed(rows)
    screen.print(f"{chosen.kernel_name}: verified on {len(rows)} shapes; {source}", markup=False, soft_wrap=True)


@command
def matrix(
    select: str = Select,
    backend: str = Backend,
    jobs: int = Jobs,
    json_file: Path | None = JsonFile,
) -> None:
    """Verify every kernel of specs/ on every shape of specs/matrix.toml."""
    cases = load_matrix(select)
    finished = present.track(run_cases(cases, backend, jobs), len(cases), "matrix", present.row_summary)
    rows = sorted(finished, key=lambda row: (row["kernel"], row["shape"]))
    if json_file is not None:
        write_text(json_file, present.document(rows) + "\n")
    present.console().print(present.report_table(rows))
    _exit_if_failed(rows)


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

    tracer = _tracer(trace, trace_ctas)
    options = {"strict": not fast, "accumulation": accumulation, "trace": tracer}
    options |= {"allow_uninitialized": allow_uninitialized, "warnings": warnings}
    options |= {"schedules": schedules, "schedule_seed": schedule_seed}
    proof = _proof(exhaustive)
    kept = _capture(capture)
    options["prepare"] = lambda gpu: gpu.observers.extend([*proof, *kept])
    run = run_script(script, arguments or [], arch, sms, lineinfo=lineinfo or tracer is not None, **options)
    _say_proofs(proof)
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
    write_docs: bool = WriteDocs,
) -> None:
    """Break every synchronization instruction of a kernel, one at a time, and see whether the emulator notices.

    Exit code 1 when a mutant is missed.
    """
    from . import mutate as mutation

    words = target or []
    step = present.counted("mutants", lambda outcome: f"line {outcome.line} {outcome.kind}: {outcome.result}")
    if words and words[0].endswith(".py"):
        arch = fields.get("arch", "sm_100a")
        outcomes, run = mutation.mutate_script(Path(words[0]), words[1:], arch, sms, jobs=jobs, done=step)
        if run.error is not None:
            present.say(run.message)
            raise typer.Exit(BAD_INPUT)
    else:
        chosen = plan_kernel(kernel_spec(words[0] if words else None, fields))
        binary = _compiled(chosen, None)
        extents = parse_shape(shape, chosen.spec.q_heads_per_kv) if shape else mutation.shape_for(binary)
        outcomes = mutation.mutate_kernel(binary, extents, seed=seed, jobs=jobs, done=step)
    present.console().print(present.mutation_table(mutation.tally(outcomes), mutation.RESULTS))
    if json_file is not None:
        write_text(json_file, present.document([vars(outcome) for outcome in outcomes]) + "\n")
    if write_docs:
        present.say(f"wrote {mutation.write_docs(outcomes, (checkout_root() or Path.cwd()) / 'docs')}")
    missed = [outcome for outcome in outcomes if outcome.result == "missed"]
    for outcome in missed:
        present.say(f"missed: {outcome.kernel} PTX line {outcome.line}, {outcome.kind} ({outcome.opcode})")
    if missed:
        raise typer.Exit(VERIFICATION_FAILED)


def _capture(file: Path | None) -> list[Any]:
    if file is None:
        return []
    from .crosscheck import Capture

    return [Capture()]


@command
def crosscheck(
    group: list[str] | None = Group,
    seed: int = Seed,
    accumulation: str = Accumulation,
    recorded: bool = Recorded,
    record: Path | None = Record,
    launches: Path | None = Captured,
    json_file: Path | None = CrosscheckFile,
) -> None:
    """Run the same PTX on the GPU of this machine and in the emulator, and compare what comes out bit by bit.

    Exit code 1 when anything differs by more than its rule allows.
    """
    from . import crosscheck as check

    if launches is not None:
        _replay_launches(check, launches)
        return
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
        write_text(record, recording.text())
    if json_file is not None:
        write_text(json_file, present.document([vars(row) | {"rule": vars(row.rule)} for row in outcome.rows]) + "\n")
    if not outcome.good:
        raise typer.Exit(VERIFICATION_FAILED)


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
        kind = found.result if found.result in ("same", "different", "unknown") else "failed"
        counts = tally.setdefault(found.group, dict.fromkeys(("same", "different", "failed", "unknown"), 0))
        counts[kind] += 1
        if kind in ("different", "failed"):
            present.say(f"{found.group}: {found.name}: {found.result}")
    present.say(f"recorded on {recording.device}, driver {recording.driver}")
    header = ("group", "same", "different", "failed", "not recorded")
    rows = [[name, *map(str, counts.values())] for name, counts in tally.items()]
    present.console().print(present.plain_table(header, rows))
    if any(counts["different"] or counts["failed"] for counts in tally.values()):
        raise typer.Exit(VERIFICATION_FAILED)


def _compiled(chosen: Plan, source: Path | None, lineinfo: bool = False) -> Any:
    from .compile import compile_kernel

    with present.stage("compile"), _interrupt_held_back():
        return compile_kernel(chosen, source, lineinfo=lineinfo)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Deliver the first Ctrl-C when the block is done: one that meets the DSL's native code aborts the process."""
    held = []

    def hold(*_: object) -> None:
        held.append(True)
        signal.signal(signal.SIGINT, before)  # a second one is not held back

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def _shapes(chosen: Plan, texts: list[str] | None) -> list[Shape]:
    if not texts:
        return shapes_of(chosen.spec)
    return [parse_shape(text, chosen.spec.q_heads_per_kv) for text in texts]


def _verified(
    chosen: Plan, binary: Any, shapes: list[Shape], backend: str, seed: int, **options: Any
) -> list[dict[str, Any]]:
    from .verify import verify_kernel

    results = (verify_kernel(binary, shape, backend=backend, seed=seed, **options).as_dict() for shape in shapes)
    return list(present.track(results, len(shapes), "verify", present.row_summary))


def _proof(wanted: bool) -> list[Any]:
    from .emulator.exhaustive import Exhaustive

    return [Exhaustive()] if wanted else []


def _say_proofs(proof: list[Any]) -> None:
    for text in dict.fromkeys(text for one in proof for text in one.proofs):
        present.say(text)


def _tracer(path: Path | None, ctas: int) -> Any:
    from .emulator import Tracer

    return None if path is None else Tracer(path, ctas)


def _exit_if_failed(rows: list[dict[str, Any]]) -> None:
    failed = [row for row in rows if not row["passed"]]
    if failed:
        present.say(f"{len(failed)} of {len(rows)} verifications failed")
        for row in failed:
            present.say("\n".join([f"{row['kernel']} [{row['shape']}]", *(f"    {why}" for why in row["failures"])]))
        raise typer.Exit(VERIFICATION_FAILED)


def main() -> None:
    """Entry point of the `bespoke` command."""
    app(prog_name="bespoke")
