"""The `bespoke` command: each subcommand names the stages that it runs, and nothing else happens here.

Exit codes: 0 good, 1 verification failed or hazard found, 2 bad input or does not fit, 130 interrupted. `--json` puts
one document on stdout (or into a file where it takes one); everything else goes to stderr. Stages that need the CuTe
DSL are imported when a command reaches them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from . import emulation, measurement, present  # noqa: F401  (emulation and measurement register their subcommands)
from .command import (
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
    app,
    command,
    compiled,
    proof_of,
    say_proofs,
    tracer_of,
)
from .emit import is_current, kernel_path, require_writable, write_bytes, write_kernel, write_text
from .explain import explain_kernel
from .matrix import SHAPE_FORMAT, Shape, load_matrix, parse_shape, run_cases, shapes_of
from .options import kernel_spec, listed_specs, spec_options
from .pages import write_pages
from .plan import Plan, plan_kernel
from .resources import checkout_root, generated_dir
from .spec import SpecError
from .survey import has_table, survey_kernel

BUDGET_HEAD_DIMS = "64,128,256,512"
REJECTED_SHOWN = 12

Kernel = typer.Argument(None, metavar="[KERNEL]", help="a name in specs/ or a .toml file; or use the options below")
Json = typer.Option(False, "--json", help="one JSON document on stdout, everything else on stderr")
Backend = typer.Option("emulator", "--backend", metavar="emulator|cuda", help="where the kernel runs")
Out = typer.Option(None, "--out", metavar="DIR", help="where to write; default: generated/")
DocsOut = typer.Option(None, "--out", metavar="DIR", help="where to write; default: docs/plans/")
Shapes = typer.Option(None, "--shape", metavar=SHAPE_FORMAT, help="repeatable; default: those of specs/matrix.toml")
Explain = typer.Option(False, "--explain", help="first, every strategy: its budget, its cost, why it was not taken")
Check = typer.Option(False, "--check", help="write nothing; exit 1 when the file is not what is emitted")
Select = typer.Option("*", "--select", metavar="GLOB", help="kernels of specs/ by name")
Jobs = typer.Option(os.cpu_count() or 1, "--jobs", min=1, help="processes")
JsonFile = typer.Option(None, "--json", metavar="FILE", help="write all rows here")


@command
@spec_options
def budget(fields: dict[str, Any], as_json: bool = Json) -> None:
    """What each kv_stage and P staging needs of shared memory and TMEM. --head-dim takes a list here."""
    specs = listed_specs(None, fields, BUDGET_HEAD_DIMS)
    whole = [row for spec in specs if has_table(spec) for row in survey_kernel(spec)]
    wide = [row for spec in specs if not has_table(spec) for row in explain_kernel(spec)]
    if as_json:
        print(present.document([*present.budget_document(whole), *present.strategy_document(wide)]))
        return
    if whole:
        present.console().print(present.budget_table(whole))
    _show_overflows(present.overflow_notes(whole))
    if wide:
        present.console().print(present.strategy_table(wide))
    _show_overflows(present.strategy_notes(wide))


def _show_overflows(notes: list[str]) -> None:
    for note in notes:
        present.console().print(note, markup=False, soft_wrap=True)


@command
@spec_options
def plan(fields: dict[str, Any], kernel: str | None = Kernel, explain: bool = Explain, as_json: bool = Json) -> None:
    """The chosen plan, its budget, and why the other candidates were not taken."""
    spec = kernel_spec(kernel, fields)
    compared = explain_kernel(spec) if explain else []
    screen = present.console()
    if explain and not as_json:
        screen.print(present.strategy_table(compared, f"{spec.name}: every strategy, bytes and columns of one CTA"))
        if not all(row.refused for row in compared):
            screen.print(present.cost_table(compared))
        _show_overflows(present.strategy_notes(compared))
    chosen = plan_kernel(spec)
    if as_json:
        more = {"strategies": present.strategy_document(compared)} if explain else {}
        print(present.document(present.plan_document(chosen) | more))
        return
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
    binary = compiled(chosen, write_kernel(chosen, folder))
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
    sms: int = Sms,
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
    tracer = tracer_of(trace, trace_ctas)
    binary = compiled(chosen, None, lineinfo or tracer is not None)

    proof = proof_of(exhaustive)

    def prepare(gpu: Any, outputs: Any) -> None:
        gpu.schedules, gpu.schedule_seed = schedules, schedule_seed
        gpu.observers += proof

    rows = _verified(chosen, binary, shapes, backend, seed, strict=not fast, trace=tracer, sms=sms, prepare=prepare)
    say_proofs(proof)
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
    if has_table(chosen.spec):
        screen.print(present.budget_table(survey_kernel(chosen.spec)))
    else:
        screen.print(present.strategy_table(explain_kernel(chosen.spec)))
    with present.stage("generate"):
        source = write_kernel(chosen, generated_dir())
    binary = compiled(chosen, source)
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
    if json_file is not None:
        require_writable(json_file)
    finished = present.track(run_cases(cases, backend, jobs), len(cases), "matrix", present.row_summary)
    rows = sorted(finished, key=lambda row: (row["kernel"], row["shape"]))
    if json_file is not None:
        write_text(json_file, present.document(rows) + "\n")
    present.console().print(present.report_table(rows))
    _exit_if_failed(rows)


@command
def docs(out: Path | None = DocsOut, check: bool = Check) -> None:
    """Write docs/plans: a page a strategy, with maps of shared and tensor memory and the barrier protocol."""
    folder = out or checkout_root() / "docs" / "plans"
    stale = []
    if not check:
        require_writable(folder / "index.md")
    for name, text in write_pages().items():
        if check and (not (folder / name).is_file() or (folder / name).read_text() != text):
            stale.append(str(folder / name))
        elif not check:
            print(write_text(folder / name, text))
    if stale:
        present.say(f"not what is written now, run `bespoke docs`: {', '.join(stale)}")
        raise typer.Exit(VERIFICATION_FAILED)


def _shapes(chosen: Plan, texts: list[str] | None) -> list[Shape]:
    if not texts:
        return shapes_of(chosen.spec)
    return [parse_shape(text, chosen.spec) for text in texts]


def _verified(
    chosen: Plan, binary: Any, shapes: list[Shape], backend: str, seed: int, **options: Any
) -> list[dict[str, Any]]:
    from .verify import verify_kernel

    results = (verify_kernel(binary, shape, backend=backend, seed=seed, **options).as_dict() for shape in shapes)
    return list(present.track(results, len(shapes), "verify", present.row_summary))


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
