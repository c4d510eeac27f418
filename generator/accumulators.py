"""Where S, P and O of a candidate lie and what they take there: TMEM columns of a CTA, or registers of a thread.

On sm_90a they are fragments in a consumer's registers, of which setmaxnreg gives it so many; on sm_100a regions of
tensor memory, of which tcgen05.alloc hands out powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .budget import Budget, Tiling
from .spec import KernelSpec
from .warpgroups import OTHER_REGISTERS, fragment_registers

NAMES = ("S", "P", "O")


@dataclass(frozen=True)
class Accumulators:
    """unit: "TMEM" (columns of a CTA) or "registers" (of a consumer thread). parts: of S, P and O, of every query tile.

    other: what the thread holds besides, an estimate. limit: allocated columns; registers that the consumer is given.
    """

    unit: str
    parts: dict[str, int]
    other: int
    limit: int

    @property
    def used(self) -> int:
        return sum(self.parts.values()) + self.other

    def fields(self, budget: Budget) -> dict[str, Any]:
        """For programs: tmem, tmem_used, ... or registers, registers_used, registers_limit."""
        if self.unit == "TMEM":
            names = ("tmem_used", "tmem_columns", "tmem_limit")
            return {"tmem": self.parts, **{name: getattr(budget, name) for name in names}}
        held = {**self.parts, "other": self.other}
        return {"registers": held, "registers_used": self.used, "registers_limit": self.limit}


def accumulators(spec: KernelSpec, tiling: Tiling, budget: Budget) -> Accumulators:
    """Of a candidate with this budget."""
    if tiling.strategy == "warpgroups":
        held = fragment_registers(spec, tiling)
        return Accumulators("registers", held, OTHER_REGISTERS, budget.role("consumer").registers)
    columns = {name: budget.columns_of(name) for name in NAMES}
    return Accumulators("TMEM", columns, 0, budget.tmem_columns)
