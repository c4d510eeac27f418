"""What is cross-checked, by group."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from . import alu, matrix, memory, tma, warp, wgmma

GROUPS = {
    "scalar": alu.scalar_cases,
    "conversion": alu.conversion_cases,
    "memory": memory.cases,
    "warp": warp.cases,
    "matrix": matrix.cases,
    "tma": tma.cases,
    "wgmma": wgmma.cases,
}


def cases_of(group: str, seed: int = 0) -> Iterator[Case]:
    """The cases of one group on random inputs of this seed."""
    return GROUPS[group](seed)
