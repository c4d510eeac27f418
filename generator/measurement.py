"""Subcommands that measure on a GPU: kernels beside their peers, and candidates of a plan beside each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import present
from .command import VERIFICATION_FAILED, Seed, command
from .emit import require_writable, write_text
from .matrix import SHAPE_FORMAT, parse_shape
from .options import listed_specs, spec_options
from .plan import Plan, plan_kernel
from .resources import tuned_path
from .tuned import merged, read_winners, spelled

if TYPE_CHECKING:
    from .bench import Figure, Row
    from .tune import Case, Result

BENCH_HEAD_DIMS = "64,128,256"

Kernel = typer.Argument(None, metavar="[KERNEL]", help="a name in specs/ or a .toml file; or use the options below")
Shapes = typer.Option(
    None, "--shape", metavar=SHAPE_FORMAT, help="repeatable; default: hidden size 2048, 4 x 4096 and 1 x 16384 tokens"
)
Peers = typer.Option("all", "--peers", metavar="all|none|NAMES", help="fa4,cudnn,flex,ffpa,frost,efficient")
BenchReps = typer.Option(20, "--reps", min=1, help="repetitions, every other one in the opposite order")
TuneReps = typer.Option(8, "--reps", min=1, help="repetitions, every other one in the opposite order")
Jobs = typer.Option(os.cpu_count() or 1, "--jobs", min=1, help="processes that compile")
RowsFile = typer.Option(None, "--json", metavar="FILE", help="write everything that was measured here")
PlotDir = typer.Option(None, "--plot", metavar="DIR", help="write pictures here, PNG and SVG; needs matplotlib")
HeadDims = typer.Option(None, "--head-dim", metavar="LIST", help="such as 64,128,192/128; default: 16 to 256 by 16")
Masks = typer.Option("full,causal", "--mask", metavar="LIST", help="full, causal")
Graph = typer.Option(False, "--graph", help="time launches in CUDA graphs: for kernels shorter than their calls")
Candidates = typer.Option(4, "--candidates", min=1, help="tiles of each case, each with every schedule")
BudgetSeconds = typer.Option(None, "--budget-seconds", min=1.0, help="begin no case after this time")
TunedFile = typer.Option(None, "--out", metavar="FILE", help="a tuned.json; default: the one that the planner reads")


@command
@spec_options
def bench(
    fields: dict[str, Any],
    kernel: str | None = Kernel,
    shape: list[str] | None = Shapes,
    peers: str = Peers,
    reps: int = BenchReps,
    seed: int = Seed,
    jobs: int = Jobs,
    json_file: Path | None = RowsFile,
    plot: Path | None = PlotDir,
    graph: bool = Graph,
) -> None:
    """Time the kernel beside its peers on the GPU, all of them checked. Exit code 1 when ours is wrong.

    --head-dim takes a list here. The architecture is the GPU's unless KERNEL or --arch says otherwise.
    """
    from .bench import bench_case, default_shapes, device_copy, gemm_roof, kernel_of, machine, require_gpu
    from .compile import compile_kernel
    from .peers import chosen_peers, versions
    from .plot import plot_names, require_matplotlib, write_plots
    from .timing import CudaClock, GraphClock

    asked = chosen_peers(peers)
    plans = [plan_kernel(spec) for spec in listed_specs(kernel, _with_arch(kernel, fields), _head_dims(kernel))]
    shapes = [[parse_shape(text, plan.spec) for text in shape or ()] or default_shapes(plan.spec) for plan in plans]
    require_gpu(plans[0].spec.arch)
    if plot is not None:
        require_matplotlib()
    for file in [json_file, *((plot / name for name in plot_names()) if plot else ())]:
        if file is not None:
            require_writable(file)

    _compile(plans, jobs)
    kernels = [kernel_of(compile_kernel(plan)) for plan in plans]
    roof, clock = gemm_roof(), GraphClock() if graph else CudaClock()
    copy = device_copy() if any(plan.spec.split_kv for plan in plans) else None
    cases = [(plan, own, case) for plan, own, found in zip(plans, kernels, shapes, strict=True) for case in found]
    measured = (
        bench_case(
            *(plan, own, case, asked, roof, clock), reps=reps, seed=seed, copy=copy if plan.spec.split_kv else None
        )
        for plan, own, case in cases
    )
    rows = list(present.track(measured, len(cases), "bench", bench_summary))

    if json_file is not None:
        facts = machine() | {"versions": versions(asked), "reps": reps, "seed": seed, "graph": graph}
        write_text(json_file, present.document(facts | {"rows": [row.as_dict() for row in rows]}) + "\n")
    if plot is not None:
        for path in write_plots(rows, plot):
            present.say(str(path))
    screen = present.console()
    screen.print(present.plain_table(*bench_cells(rows)))
    for note in bench_notes(rows):
        screen.print(note, markup=False, soft_wrap=True)
    if any(row.ours.status == "wrong" for row in rows):
        raise typer.Exit(VERIFICATION_FAILED)


@command
def tune(
    head_dim: str | None = HeadDims,
    mask: str = Masks,
    candidates: int = Candidates,
    reps: int = TuneReps,
    seed: int = Seed,
    jobs: int = Jobs,
    budget_seconds: float | None = BudgetSeconds,
    out: Path | None = TunedFile,
    json_file: Path | None = RowsFile,
) -> None:
    """Time the planner's best tiles for sm_90a on the GPU, and keep the fastest in tuned.json.

    Exit code 1 when one is wrong. The file is written after every case. Records of other head dims and masks stay.
    A FILE that is not there yet begins as the planner's table.
    """
    from .bench import kernel_of, machine, require_gpu
    from .builds import compile_plans
    from .compile import compile_kernel
    from .timing import CudaClock
    from .tune import ARCH, HEAD_DIMS, Deadline, compiled_cases, parse_head_dims, parse_masks, tune_cases, tuning_cases

    dims = parse_head_dims(head_dim) if head_dim else [(dim, dim) for dim in HEAD_DIMS]
    cases = tuning_cases(dims, parse_masks(mask), candidates)
    require_gpu(ARCH)
    target = out or tuned_path()
    known = read_winners(target if target.is_file() else tuned_path())
    for file in (target, json_file):
        if file is not None:
            require_writable(file)

    deadline, plans = Deadline(budget_seconds), [plan for case in cases for plan in case.plans]
    builds = compile_plans(plans, jobs)
    with closing(present.track(builds, len(plans), "compile", lambda build: str(plans[build[0]].tiling))) as shown:
        ready, left = compiled_cases(cases, shown, deadline)
    builds.close()  # what the deadline cut off is not compiled while others are timed
    facts, results, winners = machine(), [], []
    measured = tune_cases(
        ready, lambda plan: kernel_of(compile_kernel(plan)), CudaClock(), deadline, reps=reps, seed=seed
    )
    for result in present.track(measured, len(ready), "tune", tune_summary):
        results.append(result)
        if found := result.winner(facts["device"], facts["date"]):
            winners.append(found)
            write_text(target, spelled(merged(known.values(), winners)))
    left += [case for case, _ in ready[len(results) :]]

    if json_file is not None:
        cut = [str(case) for case in left]
        document = facts | {"reps": reps, "seed": seed, "left_out": cut, "cases": [item.as_dict() for item in results]}
        write_text(json_file, present.document(document) + "\n")
    screen = present.console()
    screen.print(present.plain_table(*tune_cells(results)))
    for note in tune_notes(results, left, budget_seconds):
        screen.print(note, markup=False, soft_wrap=True)
    many = "winner" if len(winners) == 1 else "winners"
    outcome = f"{len(winners)} {many} in {target}" if winners else f"nothing was timed, {target} is as it was"
    screen.print(outcome, markup=False, soft_wrap=True)
    if any(item.wrong for result in results for item in result.candidates):
        raise typer.Exit(VERIFICATION_FAILED)


def _with_arch(kernel: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The GPU's architecture where nobody names one. Raises RunError where there is no GPU."""
    from .bench import NO_GPU
    from .launch import device_arch

    return fields if kernel or "arch" in fields else {**fields, "arch": device_arch(0, NO_GPU)}


def _head_dims(kernel: str | None) -> str | None:
    return None if kernel else BENCH_HEAD_DIMS


def _compile(plans: Sequence[Plan], jobs: int) -> None:
    """Fill the cache. What does not compile is told by who takes it from there."""
    from .builds import compile_plans

    builds = compile_plans(plans, jobs)
    for _ in present.track(builds, len(plans), "compile", lambda build: plans[build[0]].kernel_name):
        pass


# --- as text ----------------------------------------------------------------------------------------------------------


def bench_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: TFLOP/s as median (min..max), "-" and a status where there is none."""
    from .peers import PEERS

    found = {figure.name for row in rows for figure in row.peers}
    peers = [peer for peer in PEERS if peer.name in found]
    header = ["kernel", "tile", "shape", "TFLOP/s", "of roof", "roof", "rel err", *(peer.title for peer in peers)]
    copied = any(row.copy for row in rows)
    header += ["best peer", "ratio", *(["GB/s", "of copy"] if copied else [])]
    cells = []
    for row in rows:
        by_name = {figure.name: figure for figure in row.peers}
        best, tiling = row.best_peer, row.plan.tiling
        line = [row.plan.kernel_name, f"{tiling.tile_m}x{tiling.tile_n}", str(row.shape), _speed(row, row.ours)]
        line += ["-" if row.of_roof is None else f"{row.of_roof:.1%}", f"{row.roof:.0f}", f"{row.ours.o_err:.2e}"]
        line += [_speed(row, by_name.get(peer.name)) for peer in peers]
        line += [best.name if best else "-", "-" if row.ratio is None else f"{row.ratio:.3f}"]
        if copied:
            shares = f"{row.bandwidth:.0f}" if row.bandwidth else "-", f"{row.of_copy:.1%}" if row.of_copy else "-"
            line += shares
        cells.append(line)
    return header, cells


def _speed(row: Row, figure: Figure | None) -> str:
    from .bench import rate

    if figure is None:
        return "not asked"
    if figure.timing is None:
        return "WRONG" if figure.status == "wrong" else figure.status
    timing = figure.timing
    median, low, high = (rate(row.flop, time) for time in (timing.median, timing.max, timing.min))
    return f"{median:.0f} ({low:.0f}..{high:.0f})"


def bench_notes(rows: Iterable[Row]) -> list[str]:
    """Why contenders have no figure: each reason once, with the cases that it is of."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for figure in (row.ours, *row.peers):
            if figure.timing is None:
                key = (figure.name, figure.status, figure.message)
                reasons.setdefault(key, []).append(f"{row.plan.kernel_name} [{row.shape}]")
    return [
        f"{name} {status}: {message}: {cases[0]}" + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
        for (name, status, message), cases in reasons.items()
    ]


def bench_summary(row: Row) -> str:
    """A row in a line."""
    ratio = "" if row.ratio is None else f", {row.ratio:.3f} of {row.best_peer.name if row.best_peer else ''}"
    return f"{row.plan.kernel_name} [{row.shape}] {_speed(row, row.ours)}{ratio}"


def tune_cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the fastest of each case, and the model's pick beside it."""
    tokens = sorted({count for result in results for item in result.timed for count in item.tflops})
    header = ["head_dim", "mask", "fastest", *(f"TFLOP/s at {count}" for count in tokens)]
    header += ["model's pick", "speed of the fastest", "timed", "not timed"]
    cells = []
    for result in results:
        spec, best, own = result.case.spec, result.best, result.of_best
        dims = str(spec.head_dim) if spec.v_dim == spec.head_dim else f"{spec.head_dim}/{spec.v_dim}"
        speeds = [f"{best.tflops[count]:.0f}" if best else "-" for count in tokens]
        line = [dims, result.case.mask, _tile(best.tiling) if best else "-", *speeds, _tile(result.case.picked)]
        counts = (len(result.timed), len(result.candidates) - len(result.timed))
        cells.append([*line, "-" if own is None else f"{own:.3f}", *map(str, counts)])
    return header, cells


def _tile(tiling: Any) -> str:
    words = [name for name, on in (("turns", tiling.turns), ("after PV", not tiling.beside_pv)) if on]
    words += [f"V by {tiling.v_keys}"] if tiling.v_keys else []
    return ", ".join([f"{tiling.tile_m}x{tiling.tile_n}", *words])


def tune_notes(results: Sequence[Result], left: Sequence[Case], budget_seconds: float | None) -> list[str]:
    """The model's standing, candidates that were not timed, and cases that the time did not suffice for."""
    from .tune import picked_of_best

    counted = sum(result.of_best is not None for result in results)
    notes = []
    if counted:
        mean = picked_of_best(results)
        notes.append(f"the model's picks reach {mean:.3f} of the fastest's speed, geometric mean of {counted} cases")
    for result in results:
        for item in result.candidates:
            if item.failure:
                verdict = "WRONG" if item.wrong else "failed"
                notes.append(f"{result.case}: {_tile(item.tiling)} {verdict}: {item.failure}")
    if left:
        limit = f"{budget_seconds:g} seconds did not suffice" if budget_seconds else "not measured"
        notes.append(f"left out, {limit}: {', '.join(map(str, left))}")
    return notes


def tune_summary(result: Result) -> str:
    """A result in a line."""
    best, own = result.best, result.of_best
    if best is None:
        return f"{result.case}: no candidate was timed"
    speeds = "/".join(f"{value:.0f}" for value in best.tflops.values())
    return f"{result.case}: {_tile(best.tiling)} {speeds} TFLOP/s" + (f", model {own:.3f}" if own else "")
