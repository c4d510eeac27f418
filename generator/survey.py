"""The budget table: what every kv_stage and P staging would need at a head_dim, and what overflows where nothing fits.

`bespoke budget` prints it, and for head dims that whole tiles do not reach what each strategy needs (explain.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .arch import ARCHS, Arch
from .budget import Budget, Overflow, Tiling, compute_budget
from .plan import (
    KV_STAGES_AUTO,
    TILE_NS,
    NotImplementedYet,
    candidates,
    check_implemented,
    preference,
    strategies,
)
from .spec import KernelSpec


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


def survey_kernel(spec: KernelSpec) -> list[Row]:
    """A Row of whole tiles for every P staging and kv_stage that the specification leaves open, in that order.

    Raises NotImplementedYet for an architecture that has no budget yet.
    """
    arch = ARCHS[spec.arch]
    missing = _missing(spec)
    asked, spec = spec, spec.model_copy(update={"strategy": "tiles"})
    stagings = arch.p_stagings if spec.p_staging == "auto" else (spec.p_staging,)
    depths = range(1, KV_STAGES_AUTO + 1) if spec.kv_stage == "auto" else (spec.kv_stage,)
    open_rows = [
        _row(spec.model_copy(update={"p_staging": staging, "kv_stage": depth}), arch, missing)
        for staging in stagings
        for depth in depths
    ]
    fitting = [row for row in open_rows if not row.overflows]
    best = min(fitting, key=lambda row: preference(row.tiling), default=None)
    taken = strategies(asked) == ("tiles",) and not missing
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
    tried = sorted(candidates(spec, arch), key=preference)
    for tiling in tried:
        budget = compute_budget(spec, arch, tiling)
        if budget.fits:
            return Row(spec, tiling, budget, False, missing, ())
    tile_n = TILE_NS[0] if spec.tile_n == "auto" else spec.tile_n
    plain = Tiling(arch.mma_m, tile_n, spec.kv_stage, spec.p_staging, False, spec.v_dim)
    budget = compute_budget(spec, arch, plain)
    overflows = tuple(_with_remedy(over, spec, arch, tried) for over in budget.overflows)
    return Row(spec, plain, budget, False, missing, overflows)


def _with_remedy(over: Overflow, spec: KernelSpec, arch: Arch, tried: list[Tiling]) -> Overflow:
    """The overflow with what this search knows: a candidate that cures it, or that none does."""
    for tiling in tried:
        others = compute_budget(spec, arch, tiling).overflows
        if all(other.resource != over.resource for other in others):
            return replace(over, remedy=f"would fit with {tiling}")
    return replace(over, remedy=f"no tile_n helps; {over.remedy}")
