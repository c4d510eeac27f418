"""docs/plans: a page a strategy, written from a Plan: what it is, its budget and cost, its maps, its barrier protocol.

`bespoke docs` writes them; a test holds the committed ones to what is written now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .arch import SM100A
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
}
COUNTS = {
    "tiles": "",
    "two_tiles": ", of a query tile i those that it sees",
    "two_ctas": ", n those of all query tiles of the CTA",
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
        files[f"{strategy}-smem.svg"], files[f"{strategy}-tmem.svg"] = smem_map(plan), tmem_map(plan)
    files["README.md"] = _index(chosen)
    return files


def _page(strategy: str, plan: Plan, what: str) -> str:
    cost = cost_of(plan.spec, plan.arch, plan.tiling)
    cycles = (f"{name} {value:.0f}" for name, value in cost.cycles.items())
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
        f"![tensor memory]({strategy}-tmem.svg)",
        "",
        *([REUSE, ""] if plan.o_over_q else []),
        "## Cost of a KV tile",
        "",
        f"One CTA, {cost.rows} x {cost.keys} scores: {cost.mma_instructions} `tcgen05.mma`, {cost.load_bytes} bytes "
        f"from L2, {cost.mma_read_bytes} bytes of shared memory read by MMAs, {cost.write_bytes} written by TMA and "
        f"softmax, {cost.exponentials} exponentials. Cycles: {', '.join(cycles)}; so {cost.limiter} limits, and "
        f"a block of 128 x 128 scores takes {cost.score:.0f} SM cycles. Rates a cycle and SM: {cost.rates}.",
        "",
        "## Barrier protocol",
        "",
        "j counts KV tiles" + COUNTS.get(strategy, ", i chunks in the order of their use") + ".",
        "",
        *_table(("barrier", "stages", "arrivals a phase", "who arrives", "who waits", "phase waited for")),
        *_rows((p.barrier, p.stages, p.arrivals, p.arrives, p.waits, p.phase) for p in protocol(plan)),
        "",
    ]
    return "\n".join(lines)


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
    return "\n".join([*lines, ""])


HEAD_DIMS = (
    *({"head_dim": d} for d in (64, 96, 128, 192, 256, 272, 320, 384, 448, 512)),
    {"head_dim": 576, "head_dim_v": 512},
)
SHARED_HEAD_DIMS = (
    *({"head_dim": d, "kv_shared": True} for d in (272, 320, 384, 432, 448, 512)),
    {"head_dim": 576, "head_dim_v": 512, "kv_shared": True},
)


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
