"""How the command shows things: tables and progress for people, documents for programs.

Tables go to stdout, or to stderr when stdout carries a JSON document; progress and messages always go to stderr.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .accumulators import NAMES, Accumulators, accumulators, held_by_roles
from .arch import ARCHS
from .explain import Explained
from .layout import Plan
from .mask import TileCounts
from .survey import Row

if TYPE_CHECKING:
    from .emulator import LaunchReport

TABLE_WIDTH = 240  # columns of the widest table; a narrower terminal wraps its lines rather than losing cells
SMEM_BUFFERS = ("sQ", "sK", "sV", "sP", "sO", "barriers")
OPCODES_SHOWN = 3
KERNEL_NAME_SHOWN = 40

Item = TypeVar("Item")


def console(to_stderr: bool = False, for_tables: bool | None = None) -> Console:
    """stdout (or stderr) as rich sees it: colors and bars on a terminal, plain text otherwise."""
    screen = Console(stderr=to_stderr, highlight=False)
    if for_tables or (for_tables is None and not to_stderr):
        screen.width = max(screen.width, TABLE_WIDTH)
    return screen


def say(text: str) -> None:
    """A message for people, on stderr."""
    console(to_stderr=True).print(escape(text), soft_wrap=True)


def fail(error: BaseException) -> None:
    """An error for people, on stderr."""
    console(to_stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)


def document(value: Any) -> str:
    """The one JSON document of a --json run."""
    return json.dumps(value, indent=2, default=str)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A long step: a spinner on a terminal (a line otherwise), then one line with its time, on stderr."""
    screen = console(to_stderr=True)
    start = time.perf_counter()
    if screen.is_terminal:
        with screen.status(name):
            yield
    else:
        screen.print(f"{name} ...")
        yield
    screen.print(f"{name:<10} {time.perf_counter() - start:8.3f} s")


def track(items: Iterable[Item], total: int, name: str, describe: Callable[[Item], str]) -> Iterator[Item]:
    """Pass items on while showing progress: a bar on a terminal, a line an item otherwise, on stderr."""
    screen = console(to_stderr=True)
    if not screen.is_terminal:
        for count, item in enumerate(items, 1):
            screen.print(f"{name} {count}/{total} {describe(item)}", markup=False, soft_wrap=True)
            yield item
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(name, total=total)
        for item in items:
            progress.update(task, advance=1, description=f"{name} {describe(item)}")
            yield item


def _table(*columns: str, title: str | None = None, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    return table


def budget_table(rows: Iterable[Row]) -> Table:
    """One line a head_dim, strategy, P staging and kv_stage of one architecture: bytes of shared memory, columns of
    TMEM or registers of a consumer thread, status.
    """
    rows = list(rows)
    smem = (*SMEM_BUFFERS, "total", "limit")
    heads = ("head_dim", "strategy", "P in", "kv_stage", "tile", *smem, *_held_heads(rows), "status")
    table = _table(*heads, left=("strategy", "P in", "status"))
    for row in rows:
        budget = row.budget
        color = "red" if row.overflows else "yellow" if row.missing else "green"
        table.add_row(
            *_head_cells(row),
            *(_smem_cell(row, name) for name in SMEM_BUFFERS),
            *(str(number) for number in (budget.smem_total, budget.smem_limit)),
            *_held_cells(accumulators(row.spec, row.tiling, budget)),
            f"[{color}]{escape(row.status)}[/]",
            style="bold" if row.chosen else None,
        )
    return table


def _head_cells(row: Row) -> tuple[str, ...]:
    spec, tiling = row.spec, row.tiling
    dims = str(spec.head_dim) if spec.v_dim == spec.head_dim else f"{spec.head_dim}/{spec.v_dim}"
    return (dims, tiling.strategy, tiling.p_staging.upper(), str(tiling.kv_stages), f"{tiling.tile_m}x{tiling.tile_n}")


def _smem_cell(row: Row | Explained, name: str) -> str:
    if name == "sV" and row.budget.bytes_of("sK") and not row.budget.bytes_of(name):
        return "in sK"
    return "in sQ" if name == "sO" and row.tiling.o_over_q else str(row.budget.bytes_of(name))


def _held_heads(rows: Sequence[Row | Explained]) -> tuple[str, ...]:
    if rows and not ARCHS[rows[0].spec.arch].tmem_columns:
        return (*(f"reg {name}" for name in NAMES), "other", "sum", "of")
    return (*(f"TMEM {name}" for name in NAMES), "sum", "alloc")


def _held_cells(held: Accumulators) -> list[str]:
    other = [held.other] if held.unit == "registers" else []
    return [str(number) for number in (*held.parts.values(), *other, held.used, held.limit)]


def overflow_notes(rows: Iterable[Row]) -> list[str]:
    """What overflows and what would fit, once a head_dim, strategy and P staging: for its shallowest row."""
    notes, seen = [], set()
    for row in rows:
        key = (row.spec.head_dim, row.spec.v_dim, row.tiling.strategy, row.tiling.p_staging)
        if not row.overflows or key in seen:
            continue
        seen.add(key)
        notes.append(f"head_dim {row.spec.head_dim}, {row.tiling}:")
        notes += [line for over in row.overflows for line in (f"  {over}", f"    remedy: {over.remedy}")]
        if row.missing:
            notes.append(f"  {row.missing}")
    return notes


def strategy_table(rows: Iterable[Explained], title: str | None = None) -> Table:
    """One line a strategy: what it needs of one CTA, what a KV tile costs it, and why it was not taken."""
    rows = list(rows)
    smem, shown = ("sQ", "sK", "sV", "ring", "sP", "sO"), [name for name in _held_heads(rows) if name != "alloc"]
    heads = ("head_dim", "strategy", "tile", "P in", *smem, "total", *shown, "SM cycles", "status")
    table = _table(*heads, title=title, left=("strategy", "P in", "status"))
    for row in rows:
        budget, tiling, spec = row.budget, row.tiling, row.spec
        dims = str(spec.head_dim) if spec.v_dim == spec.head_dim else f"{spec.head_dim}/{spec.v_dim}"
        if row.refused:
            table.add_row(dims, row.strategy, *[""] * (len(heads) - 3), "[red]refused: see below[/]")
            continue
        color = "green" if row.chosen else "yellow" if budget.fits else "red"
        table.add_row(
            *(dims, row.strategy, f"{tiling.tile_m}x{tiling.tile_n}", tiling.p_staging.upper()),
            *(_smem_cell(row, name) for name in smem),
            str(budget.smem_total),
            *_held_cells(accumulators(spec, tiling, budget))[: len(shown)],
            f"{row.cost.score:.0f}",
            f"[{color}]{escape(row.status if budget.fits else 'does not fit: see below')}[/]",
            style="bold" if row.chosen else None,
        )
    return table


def cost_table(rows: Iterable[Explained]) -> Table:
    """One line a strategy, none for a refused one: what a KV tile costs a CTA, in MMAs, bytes and cycles."""
    units = ("tensor core", "smem", "L2", "MUFU")
    rows = [row for row in rows if not row.refused]
    counts = (" or ".join(dict.fromkeys(row.instruction for row in rows)), "L2 bytes", "MMA reads", "smem writes")
    heads = ("strategy", "a tile", *counts, *(f"{name} cycles" for name in units), "limiter")
    title = f"a KV tile of one CTA, counted; rates a cycle and SM: {rows[0].cost.rates}"
    table = _table(*heads, title=title, left=("strategy", "a tile", "limiter"))
    for row in rows:
        cost = row.cost
        numbers = (cost.mma_instructions, cost.load_bytes, cost.mma_read_bytes, cost.write_bytes)
        cycles = (f"{cost.cycles[name]:.0f}" for name in units)
        passes = f", {cost.passes} passes" if cost.passes > 1 else ""
        table.add_row(
            row.strategy,
            f"{cost.rows}x{cost.keys}{passes}",
            *map(str, numbers),
            *cycles,
            cost.limiter,
        )
    return table


def strategy_notes(rows: Iterable[Explained]) -> list[str]:
    """What each strategy is, and of those not taken why and what to do."""
    notes = []
    for row in rows:
        notes.append(f"{row.strategy}: {row.says}")
        notes.append(f"  {row.status}" if row.refused else f"  {row.tiling}: {row.status}")
        notes += [f"    remedy: {row.remedy}"] if row.remedy and not row.chosen else []
    return notes


def strategy_document(rows: Iterable[Explained]) -> list[dict[str, Any]]:
    """The strategies for programs; one that is refused has no figures."""
    return [
        {
            "arch": row.spec.arch,
            "head_dim": row.spec.head_dim,
            "head_dim_v": row.spec.v_dim,
            **({} if row.refused else _figures(row)),
            "strategy": row.strategy,
            "fits": not row.refused and row.budget.fits,
            "chosen": row.chosen,
            "status": row.status,
            "remedy": row.remedy,
        }
        for row in rows
    ]


def _held_fields(row: Row | Explained, by_region: bool = False) -> dict[str, Any]:
    """What S, P and O take, by name, or by region of every query tile."""
    fields = accumulators(row.spec, row.tiling, row.budget).fields(row.budget)
    if by_region and "tmem" in fields:
        fields["tmem"] = {region.name: region.columns for region in row.budget.regions}
    return fields


def _figures(row: Explained) -> dict[str, Any]:
    """cost holds a KV tile's counts of one CTA, cycles a resource, and the score."""
    budget, cost = row.budget, row.cost
    return {
        **asdict(row.tiling),
        "smem": {buffer.name: budget.bytes_of(buffer.name) for buffer in budget.buffers},
        "smem_total": budget.smem_total,
        "smem_limit": budget.smem_limit,
        **_held_fields(row, by_region=True),
        "cost": {
            **asdict(cost),
            "cycles": cost.cycles,
            "limiter": cost.limiter,
            "sm_cycles_128x128": cost.score,
        },
    }


def budget_document(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The table for programs. smem and tmem hold bytes and columns by name, registers those of a consumer thread, in
    place of tmem, on sm_90a; overflows the reasons and remedies.
    """
    return [
        {
            "arch": row.spec.arch,
            "head_dim": row.spec.head_dim,
            "head_dim_v": row.spec.v_dim,
            **asdict(row.tiling),
            "smem": {name: row.budget.bytes_of(name) for name in SMEM_BUFFERS},
            "smem_total": row.budget.smem_total,
            "smem_limit": row.budget.smem_limit,
            **_held_fields(row),
            "fits": not row.overflows,
            "implemented": not row.missing,
            "chosen": row.chosen,
            "status": row.status,
            "overflows": [{**asdict(over), "over": over.over} for over in row.overflows],
        }
        for row in rows
    ]


def plan_tables(plan: Plan) -> list[Table]:
    """The plan's budget: shared memory, TMEM or a consumer's registers, mbarriers, warps and, where they take turns,
    named barriers.
    """
    budget, arch, named = plan.budget, plan.arch, len(plan.budget.named_barriers)
    smem = _table(
        *("buffer", "offset", "bytes", "stages", "holds"),
        title=f"shared memory: {budget.smem_total} of {budget.smem_limit} bytes",
        left=("buffer", "holds"),
    )
    for item in budget.buffers:
        smem.add_row(item.name, str(item.offset), str(item.bytes), str(item.stages), item.reason)
    warps = _table(
        *("role", "warps", "registers", "why"),
        title=f"{budget.threads} of {arch.threads_per_cta} threads, {named} of {arch.named_barriers} named barriers",
        left=("role", "why"),
    )
    for role in budget.roles:
        warps.add_row(role.name, str(role.warps), str(role.registers), role.reason)
    barriers = _table(
        *("barrier", "stages", "arrivals", "completes a phase"),
        title="mbarriers",
        left=("barrier", "completes a phase"),
    )
    for barrier in budget.mbarriers:
        barriers.add_row(barrier.name, str(barrier.stages), str(barrier.arrivals), barrier.reason)
    return [smem, *_held_tables(plan), barriers, *([_named_table(plan)] if named > 1 else []), warps]


def _held_tables(plan: Plan) -> list[Table]:
    """Registers of the roles that hold fragments, a table each, or the regions of tensor memory."""
    budget, tables = plan.budget, []
    rows, keys = plan.arch.mma_m, plan.tile_n
    for held in held_by_roles(plan.spec, plan.tiling, budget):
        title = f"registers of a thread, {held.role}: {held.used} of {held.limit}"
        table = _table("what", "registers", "holds", title=title, left=("what", "holds"))
        for name, count in held.parts.items():
            columns = keys if name in "SP" else 4 * count if name == "Q" else 2 * count
            kind = "float32" if name in "SO" else "of 16 bits, two a register"
            table.add_row(name, str(count), f"{rows} x {columns} {kind}, over 128 threads")
        table.add_row("other", str(held.other), "addresses, descriptors, loop state, rows' statistics; an estimate")
        tables.append(table)
    if tables:
        return tables
    table = _table(
        *("region", "column", "columns", "holds"),
        title=f"TMEM: {budget.tmem_used} of {budget.tmem_limit} columns, {budget.tmem_columns} allocated",
        left=("region", "holds"),
    )
    for region in budget.regions:
        table.add_row(region.name, str(region.column), str(region.columns), region.reason)
    return [table]


def _named_table(plan: Plan) -> Table:
    table = _table("id", "name", "threads", "why", title="named barriers", left=("name", "why"))
    for barrier in plan.budget.named_barriers:
        table.add_row(str(barrier.id), barrier.name, str(barrier.threads), barrier.reason)
    return table


def rejected_table(plan: Plan, limit: int) -> Table:
    """The first candidates that were not taken, by the planner's order, and why."""
    title = f"not taken: {len(plan.rejected)} candidates"
    if len(plan.rejected) > limit:
        title += f", {limit} shown (--json has all)"
    table = _table("candidate", "why", "remedy", title=title, left=("candidate", "why", "remedy"))
    for item in plan.rejected[:limit]:
        table.add_row(str(item.candidate), item.reason, item.remedy)
    return table


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    layouts = {
        name: {**asdict(layout), "box": layout.box, "bytes": layout.bytes} for name, layout in plan.layouts.items()
    }
    return {
        "kernel": plan.kernel_name,
        "digest": plan.spec.digest,
        "spec": plan.spec.model_dump(),
        "tiling": asdict(plan.tiling),
        "budget": {**asdict(plan.budget), "fits": plan.budget.fits},
        "layouts": layouts,
        "rejected": [
            {"candidate": asdict(item.candidate), "reason": item.reason, "remedy": item.remedy}
            for item in plan.rejected
        ],
    }


def counted(name: str, describe: Callable[[Item], str]) -> Callable[[Item], None]:
    """A function to call with items as they come: a line each on stderr, none on a terminal but the last."""
    screen, count = console(to_stderr=True), itertools.count(1)

    def show(item: Item) -> None:
        end = "\r" if screen.is_terminal else "\n"
        screen.print(
            f"{name} {next(count)} {describe(item)}"[: screen.width - 1], markup=False, end=end, soft_wrap=True
        )

    return show


def mutation_table(tally: Mapping[str, Counter[str]], results: Sequence[str]) -> Table:
    """Kinds of mutants and how many came to which result."""
    table = _table("mutants of", "all", *results, left=("mutants of",))
    for kind, counts in tally.items():
        missed = [f"[red]{counts[r]}[/]" if r == "missed" and counts[r] else str(counts[r] or "-") for r in results]
        table.add_row(escape(kind), str(counts.total()), *missed)
    total = sum(tally.values(), Counter())
    table.add_section()
    table.add_row("all", str(total.total()), *(str(total[r]) for r in results))
    return table


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows of text under a header; the first column is left-aligned."""
    table = _table(*header, left=header[:1])
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def report_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Verification rows: kernel, shape, errors, KV tiles (visited/needed/all), hazards, verdict."""
    named, errors = ("kernel", "shape", "backend"), ("cos", "rel_err", "max_abs_err", "lse_err")
    table = _table(*named, *errors, "KV tiles", "hazards", "s", "verdict", left=named)
    for row in rows:
        verdict = "[green]passed[/]" if row["passed"] else "[red]FAILED[/]"
        errors = (_number(row[key], "7.2e") for key in ("rel_err", "max_abs_err", "lse_max_abs_err"))
        tiles = str(TileCounts(**row["tiles"])) if row["tiles"] else "-"
        cells = (_number(row["cos"], ".7f"), *errors, tiles, str(row["hazards"]), _number(row["seconds"], ".2f"))
        table.add_row(row["kernel"], row["shape"], row["backend"], *cells, verdict)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row_summary(row: dict[str, Any]) -> str:
    """A verification row in a line."""
    errors = f"rel_err {_number(row['rel_err'], '.2e')}"
    return f"{row['kernel']} [{row['shape']}] {errors} {'passed' if row['passed'] else 'FAILED'}"


def binary_document(binary: Any) -> dict[str, Any]:
    """What was compiled, for programs. Bytes and columns a CTA, registers and spill bytes a thread."""
    names = ("kernel_name", "smem_bytes", "tmem_columns", "threads", "registers", "spills", "seconds", "cached")
    facts = {name: getattr(binary, name) for name in names}
    return {"kernel": binary.spec.name, **facts, "cubin_bytes": len(binary.cubin), "source": str(binary.source_path)}


def binary_table(plan: Plan, binary: Any) -> Table:
    """The compiled kernel beside its plan."""
    budget = plan.budget
    how = "from the cache" if binary.cached else f"{binary.seconds:.2f} s"
    table = _table("", "planned", "compiled", title=f"compiled: {len(binary.cubin)} bytes of cubin, {how}", left=("",))
    registers = max(role.registers for role in budget.roles)
    tmem = [("TMEM columns", str(budget.tmem_columns), binary.tmem_columns)] if budget.tmem_limit else []
    for name, planned, actual in (
        ("dynamic shared memory, bytes", str(budget.smem_total), binary.smem_bytes),
        *tmem,
        ("threads", str(budget.threads), binary.threads),
        ("registers a thread", f"about {registers}", binary.registers),
        ("spilled bytes a thread", "0", binary.spills),
    ):
        table.add_row(name, planned, str(actual))
    return table


def launches_table(launches: Iterable[LaunchReport]) -> Table:
    """One line a launch of an emulated program."""
    heads = ("kernel", "grid", "block", "cluster", "smem", "TMEM", "warp-instructions", "seconds", "most executed")
    table = _table(*heads, "hazards", left=("kernel", "most executed"))
    for launch in launches:
        extents = ("x".join(map(str, extent)) for extent in (launch.grid, launch.block, launch.cluster))
        numbers = (launch.smem_bytes, launch.tmem_columns, launch.warp_instructions)
        most = ", ".join(f"{name} {times}" for name, times in launch.opcodes.most_common(OPCODES_SHOWN))
        hazards = f"[red]{len(launch.hazards)}[/]" if launch.hazards else "0"
        name = escape(_short_name(launch.kernel))
        table.add_row(name, *extents, *map(str, numbers), f"{launch.seconds:.3f}", most, hazards)
    return table


def _short_name(kernel: str) -> str:
    """The DSL's name of a kernel without its prefix and the argument types that it appends."""
    name = kernel.removeprefix("kernel_cutlass_")
    return name if len(name) <= KERNEL_NAME_SHOWN else name[: KERNEL_NAME_SHOWN - 3] + "..."


def launches_document(launches: Iterable[LaunchReport]) -> list[dict[str, Any]]:
    return [asdict(launch) | {"opcodes": dict(launch.opcodes.most_common())} for launch in launches]
