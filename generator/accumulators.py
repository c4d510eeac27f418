"""Where S, P and O of a candidate lie and what they take there: TMEM columns of a CTA, or registers of a thread.

On sm_90a they are fragments in the registers of warpgroups, of which setmaxnreg gives each role so many; on sm_100a
regions of tensor memory, of which tcgen05.alloc hands out powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arch import ARCHS
from .budget import Budget, Tiling
from .columns import OUTPUT_OTHERS, half_width, score_fragments, score_others
from .spec import KernelSpec
from .warpgroups import OTHER_REGISTERS, fragment_registers

NAMES = ("S", "P", "O")


@dataclass(frozen=True)
class Held:
    """Registers of a thread of one role. parts: of each fragment; other: of the rest, an estimate; limit: given."""

    role: str
    parts: dict[str, int]
    other: int
    limit: int

    @property
    def used(self) -> int:
        return sum(self.parts.values()) + self.other


def held_by_roles(spec: KernelSpec, tiling: Tiling, budget: Budget) -> list[Held]:
    """The roles that hold fragments in registers; none on sm_100a."""
    if tiling.strategy == "warpgroups":
        given = budget.role("consumer").registers
        return [Held("consumer", fragment_registers(spec, tiling), OTHER_REGISTERS, given)]
    if tiling.strategy == "columns":
        scores, output = (budget.role(name).registers for name in ("scores", "output"))
        fragments = score_fragments(spec, ARCHS[spec.arch], tiling)
        half = {"O": half_width(spec) // 2}
        return [Held("scores", fragments, score_others(tiling), scores), Held("output", half, OUTPUT_OTHERS, output)]
    return []


@dataclass(frozen=True)
class Accumulators:
    """unit: "TMEM" (columns of a CTA) or "registers" (of a thread). parts: of S, P and O, of every query tile.

    other, used, limit: the rest and the sum of the thread that has the least to spare, and what it is given; in TMEM
    nothing, the columns used, and those allocated.
    """

    unit: str
    parts: dict[str, int]
    other: int
    used: int
    limit: int

    def fields(self, budget: Budget) -> dict[str, Any]:
        """For programs: tmem, tmem_used, ... or registers, registers_used, registers_limit."""
        if self.unit == "TMEM":
            names = ("tmem_used", "tmem_columns", "tmem_limit")
            return {"tmem": self.parts, **{name: getattr(budget, name) for name in names}}
        held = {**self.parts, "other": self.other}
        return {"registers": held, "registers_used": self.used, "registers_limit": self.limit}


def accumulators(spec: KernelSpec, tiling: Tiling, budget: Budget) -> Accumulators:
    """Of a candidate with this budget."""
    if roles := held_by_roles(spec, tiling, budget):
        fullest = min(roles, key=lambda held: held.limit - held.used)
        parts = {name: held.parts[name] for name in NAMES for held in roles if name in held.parts}
        return Accumulators("registers", parts, fullest.other, fullest.used, fullest.limit)
    columns = {name: budget.columns_of(name) for name in NAMES}
    return Accumulators("TMEM", columns, 0, budget.tmem_used, budget.tmem_columns)
