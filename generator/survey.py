"""The budget table: what every strategy with whole K and V tiles, P staging and kv_stage would need at a head_dim, and
what overflows where nothing fits.

`bespoke budget` prints it, and for head dims that whole tiles do not reach what each strategy needs (explain.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .arch import ARCHS, Arch
from .budget import Budget, Overflow, Tiling
from .chunks import budget_of
from .plan import (
    KV_STAGES_AUTO,
    TILE_NS,
    NotImplementedYet,
    candidates,
    check_implemented,
    ranking,
    strategies,
)
from .spec import KernelSpec
from .warpgroups import KV_STAGES_AUTO as WARPGROUP_STAGES_AUTO

# By strategy: where it can keep P. By architecture: the strategy of a table whose specification has none of these, and
# how deep rings are searched.
STAGINGS = {
    "tiles": ("tmem", "smem"),
    "two_tiles": ("tmem",),
    "two_ctas": ("tmem",),
    "warpgroups": ("register",),
}
TABLES = {"sm_100a": ("tiles", KV_STAGES_AUTO), "sm_90a": ("warpgroups", WARPGROUP_STAGES_AUTO)}


@dataclass(frozen=True)
class Row:
    """One line of the table. tiling is the best that fits, or the plain one (widest tile, no reuse) when none does.

    chosen: the planner takes this one. missing: why the kernel cannot be built although it may fit ("" when it can).
    overflows: of the plain tiling, each with the remedy that the search found.
    """

    spec: KernelSpec
    tiling: Tiling
    budget: Budget
    chosen: bool
    missing: str
    overflows: tuple[Overflow, ...]

    @property
    def status(self) -> str:
        if self.overflows:
            return ", ".join(f"{over.resource} over by {over.over} {over.unit}" for over in self.overflows)
        return self.missing or ("fits, chosen" if self.chosen else "fits")


def has_table(spec: KernelSpec) -> bool:
    """Whether its candidates are whole K and V tiles, which survey_kernel tells apart by strategy, P staging and
    kv_stage.
    """
    return set(strategies(spec)) <= set(STAGINGS)


def survey_kernel(spec: KernelSpec) -> list[Row]:
    """A Row of whole tiles for every strategy, P staging and kv_stage that the specification leaves open, so ordered.

    Raises NotImplementedYet for a P staging that is another architecture's.
    """
    arch = ARCHS[spec.arch]
    missing = _missing(spec)
    usual, most = TABLES[spec.arch]
    open_rows = [
        _row(spec.model_copy(update={"strategy": name, "p_staging": staging, "kv_stage": depth}), arch, missing)
        for name in ([name for name in STAGINGS if name in strategies(spec)] or [usual])
        for staging in (STAGINGS[name] if spec.p_staging == "auto" else (spec.p_staging,))
        for depth in (range(1, most + 1) if spec.kv_stage == "auto" else (spec.kv_stage,))
    ]
    rank = ranking(spec if has_table(spec) else spec.model_copy(update={"strategy": usual}), arch)
    fitting = [row for row in open_rows if not row.overflows]
    best = min(fitting, key=lambda row: rank(row.tiling), default=None)
    taken = has_table(spec) and not missing
    return [replace(row, spec=spec, chosen=row is best and taken) for row in open_rows]


def _missing(spec: KernelSpec) -> str:
    try:
        check_implemented(spec)
    except NotImplementedYet as error:
        if error.field in ("arch", "p_staging"):
            raise
        return f"{error.field}: {error.limit}"
    return ""


def _row(spec: KernelSpec, arch: Arch, missing: str) -> Row:
    tried = sorted(candidates(spec, arch), key=ranking(spec, arch))
    for tiling in tried:
        budget = budget_of(spec, arch, tiling)
        if budget.fits:
            return Row(spec, tiling, budget, False, missing, ())
    plain = _plain(spec, arch, tried)
    budget = budget_of(spec, arch, plain)
    overflows = tuple(_with_remedy(over, spec, arch, tried) for over in budget.overflows)
    return Row(spec, plain, budget, False, missing, overflows)


def _plain(spec: KernelSpec, arch: Arch, tried: list[Tiling]) -> Tiling:
    """What a row shows where no candidate fits: the widest tile without reuse; on sm_90a, that which needs least."""
    if spec.strategy == "warpgroups":
        return min(tried, key=lambda tiling: sum(over.over for over in budget_of(spec, arch, tiling).overflows))
    tile_n = TILE_NS[0] if spec.tile_n == "auto" else spec.tile_n
    return Tiling(arch.mma_m, tile_n, spec.kv_stage, spec.p_staging, False, spec.v_dim, spec.strategy)


def _with_remedy(over: Overflow, spec: KernelSpec, arch: Arch, tried: list[Tiling]) -> Overflow:
    """The overflow with what this search knows: a candidate that cures it, or that none does."""
    for tiling in tried:
        others = budget_of(spec, arch, tiling).overflows
        if all(other.resource != over.resource for other in others):
            return replace(over, remedy=f"would fit with {tiling}")
    return replace(over, remedy=f"no tile_n helps; {over.remedy}")
