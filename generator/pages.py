"""docs/plans: a page a strategy, written from a Plan: what it is, its budget and cost, its maps, its barrier protocol.

`bespoke docs` writes them; a test holds the committed ones to what is written now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .accumulators import accumulators
from .arch import SM90A, SM100A
from .cost import cost_of
from .emit import budget_lines, command_options
from .explain import Explained, explain_kernel
from .maps import smem_map, tmem_map
from .plan import CHUNKED, Plan, plan_kernel
from .protocol import protocol
from .spec import load_spec

PAGES = {  # strategy -> the specification that its page shows, and what the strategy is
    "tiles": (
        {"head_dim": 128},
        "K and V come in whole tiles, each through a ring of its own; one `tcgen05.mma` writes all columns of O a step "
        "of K. What head_dim 16 to 256 is built with.",
    ),
    "two_tiles": (
        {"head_dim": 128, "strategy": "two_tiles"},
        "Whole tiles, and two query tiles a CTA: while the softmax warps of one turn S into P, the tensor core "
        "multiplies for the other, with the same K and V. A third warpgroup rescales O, where a row's maximum moved "
        "by more than 2^8, and stores it. Part of the exponentials is a cubic on the FMA units. P lies over S: PV of "
        "a tile is issued before QK of the next, and MMAs of one thread run in order. The kernel is persistent: as "
        "many CTAs as run at once work on one pair of query tiles after another, and O of one leaves while the next "
        "is begun. Under a causal mask the tiles that see most are taken first, and every other turn goes through "
        "the CTAs backwards.",
    ),
    "two_ctas": (
        {"head_dim": 256, "strategy": "two_ctas"},
        "Whole tiles, and a cluster of two CTAs that multiply as one (`cta_group::2`, M = 256): each has 128 query "
        "rows of its own, with S of two KV tiles and all of O in its tensor memory, and holds half of K's keys and "
        "half of V's columns, so that K and V are read from L2 once for 256 rows. QK of a KV tile runs while the one "
        "before is turned into P, over its S; a second warpgroup rescales O, where a row's maximum moved by more than "
        "2^8, and stores it. The kernel is persistent: as many CTAs as run at once work on one query tile after "
        "another, and O of one leaves while the next is begun. Under a causal mask the tiles that see most are taken "
        "first, and every other turn goes through the CTAs backwards.",
    ),
    "chunks": (
        {"head_dim": 320},
        "K and V come in chunks through one ring of equal buffers: one holds some columns of a K tile or some keys "
        "of a group of V's columns. Q stays in shared memory. O's columns are written in groups of at most 256, one "
        "`tcgen05.mma` wide each; S, P and all of O fit tensor memory up to head_dim_v 320 with tiles of 128 keys, and "
        "to 480 with fewer.",
    ),
    "shared": (
        {"head_dim": 384, "kv_shared": True},
        "As chunks, where V is K's first columns (`kv_shared`): the ring holds chunks of K alone, and QK reads them "
        "K-major, PV MN-major. Each is loaded once, which is half of the bytes where V is as wide as K. PV, not QK, "
        "releases those that V has, and as QK of a tile is issued before PV of the one before, those of two tiles are "
        "in the ring at once. What V no longer takes goes to more keys a tile, for which Q is read less often.",
    ),
    "passes": (
        {"head_dim": 512, "strategy": "passes"},
        "As chunks, but a CTA computes half of O's columns only: two neighbouring CTAs share a tile of queries, each "
        "with scores of its own. QK is multiplied twice and K is loaded twice; in exchange nothing is exchanged.",
    ),
    "pair": (
        {"head_dim": 512},
        "A cluster of two CTAs multiplies as one (`cta_group::2`, M = 128): each CTA holds 64 rows of Q, P and the "
        "accumulators, half of K's keys and half of V's columns. The product's left half lies in lanes 0 to 63 and its "
        "right half in the same columns of lanes 64 to 127 (layout B), so O takes half as many columns and two threads "
        "share a query row: they exchange row maxima once a tile, and the sums at the end, through `peaks`.",
    ),
    "warpgroups": (
        {"arch": "sm_90a", "head_dim": 128},
        "What sm_90a (Hopper) is built with: consumer warpgroups with 64 query rows each, S, P and O in their "
        "registers, and a warp that brings Q of each, and K and V in whole tiles through rings that all of them read. "
        "A consumer issues QK of a KV tile and PV of the one before it together (`wgmma`), and turns S of the one into "
        "P, which stays where it is as the next PV's operand, while the tensor core still multiplies for the other. "
        "Where they take turns at issuing, softmax of one runs while another's MMAs do. O of a wide V is rescaled only "
        "where a row's maximum moved by more than 2^8. `setmaxnreg` moves registers from the load warp's warpgroup to "
        "the consumers; what S, P, O and the rest need of a thread's bounds the tile. The kernel is persistent: as "
        "many CTAs as run at once work on one query tile after another. The tile is the fastest that was measured "
        "(`generator/tuned.json`) or, where nothing was, the one with the fewest cycles a score by a model fitted to "
        "measurements.",
    ),
}
COUNTS = {
    "tiles": "j counts KV tiles",
    "two_tiles": "j counts KV tiles, of a query tile i those that it sees",
    "two_ctas": "j counts KV tiles, n those of all query tiles of the CTA",
    "warpgroups": "n counts the KV tiles of all query tiles of the CTA, i the consumers; a turn is a query tile",
}
REUSE = (
    "sO lies over sQ: the epilogue stages O only after `o_full` of the last PV, and by then every QK, the last reader "
    "of sQ, is complete, because MMAs of one thread complete in order. `generator/lifetime.py` holds the model; a "
    "buffer that is to lie over one that is alive at the same time is refused with the two events that nothing orders. "
    "P over S is refused where QK of the next tile is issued before PV: it writes S while PV still reads P."
)


def write_pages() -> dict[str, str]:
    """File name -> text, for docs/plans/."""
    files, chosen = {}, []
    for strategy, (fields, what) in PAGES.items():
        plan = plan_kernel(load_spec(fields))
        chosen.append((strategy, plan))
        files[f"{strategy}.md"] = _page(strategy, plan, what)
        files[f"{strategy}-smem.svg"] = smem_map(plan)
        if plan.budget.tmem_limit:
            files[f"{strategy}-tmem.svg"] = tmem_map(plan)
    files["README.md"] = _index(chosen)
    return files


def _page(strategy: str, plan: Plan, what: str) -> str:
    cost = cost_of(plan.spec, plan.arch, plan.tiling)
    cycles = (f"{name} {value:.0f}" for name, value in cost.cycles.items())
    writers = "TMA" if plan.p_staging == "register" else "TMA and softmax"
    lines = [
        f"# {strategy}: {plan.kernel_name}",
        "",
        what,
        "",
        f"Shown for `bespoke plan {command_options(plan.spec)}`: {plan.tiling}.",
        "Written by `bespoke docs`; do not edit.",
        "",
        "## Budget",
        "",
        "```",
        *budget_lines(plan.budget),
        "```",
        "",
        f"![shared memory]({strategy}-smem.svg)",
        "",
        *_accumulators(strategy, plan),
        "",
        *([REUSE, ""] if plan.o_over_q else []),
        "## Cost of a KV tile",
        "",
        f"One CTA, {cost.rows} x {cost.keys} scores: {cost.mma_instructions} `{_instruction(plan)}`, "
        f"{cost.load_bytes} bytes from L2, {cost.mma_read_bytes} bytes of shared memory read by MMAs, "
        f"{cost.write_bytes} written by {writers}, {cost.exponentials} exponentials. Cycles: {', '.join(cycles)}; so "
        f"{cost.limiter} limits, and a block of 128 x 128 scores takes {cost.score:.0f} SM cycles. Rates a cycle and "
        f"SM: {cost.rates}.",
        "",
        "## Barrier protocol",
        "",
        COUNTS.get(strategy, "j counts KV tiles, i chunks in the order of their use") + ".",
        "",
        *_table(("barrier", "stages", "arrivals a phase", "who arrives", "who waits", "phase waited for")),
        *_rows((p.barrier, p.stages, p.arrivals, p.arrives, p.waits, p.phase) for p in protocol(plan)),
        "",
    ]
    return "\n".join(lines)


def _instruction(plan: Plan) -> str:
    return "tcgen05.mma" if plan.budget.tmem_limit else "wgmma"


def _accumulators(strategy: str, plan: Plan) -> list[str]:
    """The map of tensor memory, or a table of what a consumer thread holds in registers."""
    held = accumulators(plan.spec, plan.tiling, plan.budget)
    if held.unit == "TMEM":
        return [f"![tensor memory]({strategy}-tmem.svg)"]
    columns = {"S": plan.tile_n, "P": plan.tile_n, "O": plan.spec.v_dim}
    rows = [
        (name, f"{plan.arch.mma_m} x {columns[name]}", "16 bits" if name == "P" else "float32", count)
        for name, count in held.parts.items()
    ]
    return [
        f"Registers of a consumer thread: {held.used} of {held.limit}.",
        "",
        *_table(("fragment", "of a consumer", "type", "registers a thread")),
        *_rows([*rows, ("the rest, an estimate", "", "", held.other)]),
    ]


def _index(chosen: list[tuple[str, Plan]]) -> str:
    heads = ("head_dim", "strategy", "tile", "P in", "smem bytes", "TMEM columns", "limiter", "SM cycles", "status")
    lines = [
        "# Plans",
        "",
        "How a kernel lies in shared and tensor memory, a page a strategy. Written by `bespoke docs`; do not edit.",
        "",
        *(f"- [{strategy}]({strategy}.md), shown for {plan.kernel_name}" for strategy, plan in chosen),
        "",
        "## Every head_dim with every strategy",
        "",
        f"One CTA each; SM cycles a block of 128 x 128 scores, counted at {SM100A.rates}. `bespoke plan --head-dim D",
        "--explain` has the rest. Up to 256, where one MMA writes all of O, whole tiles are taken by rule.",
        "",
        *_table(heads),
    ]
    for fields in HEAD_DIMS:
        lines += strategy_lines(fields)
    lines += [
        "",
        "## V within K (kv_shared)",
        "",
        "The same with V in K's first columns. One CTA reads both from one load. A pair cannot: a `tcgen05.mma` with",
        "`cta_group::2` takes one descriptor for both CTAs, so at one address lie the same keys in both for PV, which",
        "splits columns, and other keys in each for QK, which splits keys. A pair loads V's columns a second time.",
        "",
        *_table(heads),
    ]
    for fields in SHARED_HEAD_DIMS:
        lines += _rows(_index_row(row) for row in explain_kernel(load_spec(fields)) if row.strategy in CHUNKED)
    lines += [
        "",
        "## sm_90a",
        "",
        f"One CTA each; SM cycles counted at {SM90A.rates}. Registers are a consumer thread's: of S, P and O, and with",
        "the rest of all that it is given.",
        "",
        *_table(("head_dim", "mask", "tile", "plan", "smem bytes", "registers", "limiter", "SM cycles")),
        *_rows(_hopper_row(fields | mask) for fields in HOPPER_HEAD_DIMS for mask in ({}, {"causal": True})),
    ]
    return "\n".join([*lines, ""])


HEAD_DIMS = (
    *({"head_dim": d} for d in (64, 96, 128, 192, 256, 272, 320, 384, 448, 512)),
    {"head_dim": 576, "head_dim_v": 512},
)
SHARED_HEAD_DIMS = (
    *({"head_dim": d, "kv_shared": True} for d in (272, 320, 384, 432, 448, 512)),
    {"head_dim": 576, "head_dim_v": 512, "kv_shared": True},
)


HOPPER_HEAD_DIMS = (
    *({"arch": "sm_90a", "head_dim": d} for d in (16, 32, 64, 96, 128, 160, 192)),
    {"arch": "sm_90a", "head_dim": 192, "head_dim_v": 128},
    {"arch": "sm_90a", "head_dim": 256},
)


def _hopper_row(fields: Mapping[str, Any]) -> tuple[object, ...]:
    plan = plan_kernel(load_spec(fields))
    spec, tiling, budget = plan.spec, plan.tiling, plan.budget
    held, cost = accumulators(spec, tiling, budget), cost_of(spec, plan.arch, tiling)
    dims = spec.head_dim if spec.v_dim == spec.head_dim else f"{spec.head_dim}/{spec.v_dim}"
    how = [f"kv_stage {tiling.kv_stages}", *["turns"] * tiling.turns, *["lazy"] * tiling.lazy]
    how += [] if tiling.beside_pv else ["after PV"]
    how += ["sO over sQ"] * tiling.o_over_q
    registers = " + ".join(f"{name} {count}" for name, count in held.parts.items()) + f": {held.used} of {held.limit}"
    mask, tile = "causal" if spec.causal else "full", f"{tiling.tile_m}x{tiling.tile_n}"
    return (dims, mask, tile, ", ".join(how), budget.smem_total, registers, cost.limiter, f"{cost.score:.0f}")


def strategy_lines(fields: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: each strategy for a specification's fields."""
    return _rows(_index_row(row) for row in explain_kernel(load_spec(fields)))


def _index_row(row: Explained) -> tuple[object, ...]:
    tiling, budget, spec = row.tiling, row.budget, row.spec
    dims = spec.head_dim if spec.v_dim == spec.head_dim else f"{spec.head_dim}/{spec.v_dim}"
    if row.refused:
        return (dims, row.strategy, *[""] * 6, f"{row.status}; {row.remedy}")
    columns = " + ".join(f"{region.name} {region.columns}" for region in budget.regions)
    status = f"**{row.status}**" if row.chosen else row.status
    tile = f"{tiling.tile_m}x{tiling.tile_n}"
    numbers = (budget.smem_total, columns, row.cost.limiter, f"{row.cost.score:.0f}")
    return (dims, row.strategy, tile, tiling.p_staging, *numbers, status)


def _table(heads: tuple[str, ...]) -> list[str]:
    return [_line(heads), _line(["---"] * len(heads))]


def _rows(rows: Iterable[Iterable[object]]) -> list[str]:
    return [_line(row) for row in rows]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
