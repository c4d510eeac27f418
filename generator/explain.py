"""Every strategy for a specification, side by side: what it needs, what it costs, and why it was not taken.

`bespoke plan --explain` and, for head dims that whole tiles do not reach, `bespoke budget` print it. The figures are
those that the planner chooses by (cost.py); a strategy that does not fit is shown by its closest candidate, with what
overflows and what would cure it, one that the template does not have for the specification with the reason alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arch import ARCHS, Arch
from .budget import Budget, Tiling
from .chunks import budget_of
from .cost import Cost, cost_of
from .plan import (
    CHUNKED,
    WHOLE_TILES,
    DoesNotFit,
    NotImplementedYet,
    candidates,
    check_implemented,
    plan_kernel,
    ranking,
)
from .spec import KernelSpec

STRATEGIES = {"sm_100a": (*WHOLE_TILES, *CHUNKED), "sm_90a": ("warpgroups", "columns")}
SAYS = {
    "tiles": "whole K and V tiles, rings of their own",
    "two_tiles": "as tiles, two query tiles in flight, a warpgroup corrects O",
    "two_ctas": "CTA pair (cta_group::2), a query tile and half of K and V each",
    "chunks": "K and V in chunks through one ring, Q resident",
    "passes": "as chunks, O's columns in two passes, scores recomputed",
    "pair": "CTA pair (cta_group::2): half of K, V and of the rows each",
    "warpgroups": "consumer warpgroups of 64 query rows, S, P and O in registers; whole K and V tiles in rings",
    "columns": "one warpgroup for scores, two with half of O's columns each; K in chunks and V in slices through rings",
}
SHARED_SAYS = {
    "tiles": "whole K tiles through one ring, V a part of them",
    "chunks": "K in chunks through one ring, V a part of them, Q resident; two K tiles in it, for QK goes ahead of PV",
    "pair": "CTA pair (cta_group::2): half of K, V and of the rows each; V is loaded a second time, for one descriptor "
    "serves both CTAs: at one address PV wants the same keys in both, QK other keys in each",
    "columns": "a warpgroup for scores, two with half of O's columns each; K in chunks through a ring, V part of them",
}


@dataclass(frozen=True)
class Explained:
    """One strategy. tiling, budget, cost: of its best candidate, or of its closest when none fits; None when the
    template does not have it for this specification.

    status: "chosen", "costs ... times as much", what overflows or why it is refused; remedy: what to set to get it, or
    what would cure it.
    """

    strategy: str
    spec: KernelSpec
    tiling: Tiling | None
    budget: Budget | None
    cost: Cost | None
    status: str
    remedy: str

    @property
    def says(self) -> str:
        """What the strategy is, of this specification."""
        within = self.spec.kv_shared and not (self.budget and self.budget.bytes_of("sV"))
        shared = SHARED_SAYS.get(self.strategy) if within else None
        return shared or SAYS[self.strategy]

    @property
    def instruction(self) -> str:
        """The MMA instruction that the cost counts."""
        return "tcgen05.mma" if ARCHS[self.spec.arch].tmem_columns else "wgmma"

    @property
    def chosen(self) -> bool:
        return self.status == "chosen"

    @property
    def refused(self) -> bool:
        return self.budget is None


def explain_kernel(spec: KernelSpec) -> list[Explained]:
    """Explained of each strategy of the architecture, in the order of the vocabulary. Raises NotImplementedYet where
    there is only one and it lacks what is asked for.
    """
    arch = ARCHS[spec.arch]
    if len(STRATEGIES[spec.arch]) == 1:
        check_implemented(spec)
    try:
        chosen = plan_kernel(spec)
    except (DoesNotFit, NotImplementedYet):
        chosen = None
    best = cost_of(spec, arch, chosen.tiling) if chosen else None
    return [_explained(spec, arch, name, chosen.tiling if chosen else None, best) for name in STRATEGIES[spec.arch]]


def _explained(spec: KernelSpec, arch: Arch, name: str, chosen: Tiling | None, best: Cost | None) -> Explained:
    rows = {"tile_m": "auto"} if name == "pair" or spec.tile_m == 64 else {}
    only = spec.model_copy(update={"strategy": name, **rows})
    try:
        check_implemented(only)
    except (DoesNotFit, NotImplementedYet) as error:
        return Explained(name, only, None, None, None, f"refused: {error.field} {error.limit}", error.remedy)
    tried = [(tiling, budget_of(only, arch, tiling)) for tiling in candidates(only, arch)]
    fitting = [(tiling, budget) for tiling, budget in tried if budget.fits]
    if not fitting:
        if not tried:
            only = only.model_copy(update={"p_staging": "auto", "tile_n": "auto"})
            tried = [(tiling, budget_of(only, arch, tiling)) for tiling in candidates(only, arch)]
        tiling, budget = min(tried, key=lambda pair: (len(pair[1].overflows), *(o.over for o in pair[1].overflows)))
        status = "; ".join(map(str, budget.overflows)) or "not with these options"
        remedies = dict.fromkeys(over.remedy for over in budget.overflows)
        return Explained(name, only, tiling, budget, cost_of(only, arch, tiling), status, "; ".join(remedies))
    rank = ranking(only, arch)
    tiling, budget = min(fitting, key=lambda pair: rank(pair[0]))
    cost = cost_of(only, arch, tiling)
    if tiling == chosen:
        return Explained(name, only, tiling, budget, cost, "chosen", "")
    status = f"costs {cost.score / best.score:.2f} times as much" if best else "fits"
    return Explained(name, only, tiling, budget, cost, status, f"strategy = {name} asks for it")
