"""The budget table: what every kv_stage and P staging would need at a head_dim, and what overflows where nothing fits.

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

# By architecture: the strategy of which the table is, where it can keep P, and how deep its rings are searched.
TABLES = {
    "sm_100a": ("tiles", ("tmem", "smem"), KV_STAGES_AUTO),
    "sm_90a": ("warpgroups", ("register",), WARPGROUP_STAGES_AUTO),
}


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
    """Whether its candidates are those of one strategy, which survey_kernel tells apart by P staging and kv_stage."""
    return strategies(spec) == (TABLES[spec.arch][0],)


def survey_kernel(spec: KernelSpec) -> list[Row]:
    """A Row of whole tiles for every P staging and kv_stage that the specification leaves open, in that order.

    Raises NotImplementedYet for a P staging that is another architecture's.
    """
    arch = ARCHS[spec.arch]
    missing = _missing(spec)
    strategy, stagings, most = TABLES[spec.arch]
    asked, spec = spec, spec.model_copy(update={"strategy": strategy})
    stagings = stagings if spec.p_staging == "auto" else (spec.p_staging,)
    depths = range(1, most + 1) if spec.kv_stage == "auto" else (spec.kv_stage,)
    open_rows = [
        _row(spec.model_copy(update={"p_staging": staging, "kv_stage": depth}), arch, missing)
        for staging in stagings
        for depth in depths
    ]
    fitting = [row for row in open_rows if not row.overflows]
    rank = ranking(spec, arch)
    best = min(fitting, key=lambda row: rank(row.tiling), default=None)
    taken = strategies(asked) == (strategy,) and not missing
    return [replace(row, spec=asked, chosen=row is best and taken) for row in open_rows]


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
    return Tiling(arch.mma_m, tile_n, spec.kv_stage, spec.p_staging, False, spec.v_dim)


def _with_remedy(over: Overflow, spec: KernelSpec, arch: Arch, tried: list[Tiling]) -> Overflow:
    """The overflow with what this search knows: a candidate that cures it, or that none does."""
    for tiling in tried:
        others = budget_of(spec, arch, tiling).overflows
        if all(other.resource != over.resource for other in others):
            return replace(over, remedy=f"would fit with {tiling}")
    return replace(over, remedy=f"no tile_n helps; {over.remedy}")
