"""What a kernel exercises, as factors with few values: the rows that specs/ covers pair by pair.

A design is its own factors and kernels: TILES of those with whole tiles of K and V, and in wide_features.py WIDE of
those with K and V in chunks.

`python -m generator.features` (and `generator.wide_features`) says which specifications would complete the cover of
specs/, and which can go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .covering import cover, prune
from .layout import WHOLE_TILES
from .plan import plan_kernel
from .spec import KernelSpec, SpecError, load_spec, spec_names

Row = dict[str, Any]


@dataclass(frozen=True)
class Design:
    """factors: name -> values; impossible: pair of them -> why no specification has it; features: the row of a
    specification; specification: one of exactly that row, None when there is none; strategies: of the kernels in specs/
    to which it applies, as a Tiling calls them.
    """

    factors: dict[str, tuple[Any, ...]]
    impossible: dict[tuple[str, Any, str, Any], str]
    features: Callable[[KernelSpec], Row]
    specification: Callable[[Row], KernelSpec | None]
    strategies: tuple[str, ...]

    def names(self) -> list[str]:
        """The kernels in specs/ to which the factors apply."""
        return [name for name in spec_names() if plan_kernel(load_spec(name)).tiling.strategy in self.strategies]


FACTORS: dict[str, tuple[Any, ...]] = {
    "head_dim": (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256),
    "V": ("as wide", "narrower", "wider"),
    "heads": ("one", "packed", "apart"),  # of a group: none, in one tile, a tile each
    "P in": ("tmem", "smem"),
    "causal": (False, True),
    "left": (False, True),
    "right": (False, True),
    "lengths": (False, True),
    "sink": (False, True),
    "sources": ("one", "two", "two, limits"),
    "shared": (False, True),
    "output": ("normalized", "unnormalized"),
    "dtype": ("bf16", "fp16"),
    "lse": (True, False),
    "one kv stage": (False, True),
    "narrow tile": (False, True),
    "schedule": WHOLE_TILES,
}

IMPOSSIBLE = {  # pair -> why no specification has it
    ("head_dim", 16, "V", "narrower"): "16 columns are the least",
    ("head_dim", 256, "V", "wider"): "one MMA instruction writes 256 columns of O at most",
    ("V", "wider", "shared", True): "V is a prefix of K's columns",
    ("P in", "smem", "schedule", "two_tiles"): "with two query tiles P lies over S",
    ("P in", "smem", "schedule", "two_ctas"): "with two CTAs P lies over S",
    ("shared", True, "schedule", "two_ctas"): "each CTA holds half of K's keys, but half of V's columns",
    ("shared", True, "one kv stage", True): "QK of the next tile is issued before PV of this one",
    ("output", "unnormalized", "lse", False): "without LSE partial results do not merge",
}


def features(spec: KernelSpec) -> Row:
    """The row of a specification, as its plan decided it."""
    plan = plan_kernel(spec)
    difference = spec.v_dim - spec.head_dim
    return {
        "head_dim": spec.head_dim,
        "V": "as wide" if difference == 0 else "narrower" if difference < 0 else "wider",
        "heads": "one" if spec.q_heads_per_kv == 1 else "packed" if plan.packed else "apart",
        "P in": plan.p_staging,
        "causal": spec.causal,
        "left": spec.window_left is not None,
        "right": spec.window_right is not None,
        "lengths": spec.seqlens,
        "sink": spec.sink,
        "sources": "one" if spec.kv_sources == 1 else "two, limits" if spec.limit2 else "two",
        "shared": spec.kv_shared,
        "output": spec.output,
        "dtype": spec.dtype,
        "lse": spec.lse,
        "one kv stage": plan.kv_stages == 1,
        "narrow tile": plan.tile_n < 64,
        "schedule": plan.tiling.strategy,
    }


def specification(row: Row) -> KernelSpec | None:
    """A specification of exactly these features; None when there is none."""
    d = row["head_dim"]
    fields = {
        "head_dim": d,
        "head_dim_v": {"as wide": d, "narrower": max(16, d * 2 // 3 // 16 * 16), "wider": min(256, d + 32)}[row["V"]],
        "dtype": row["dtype"],
        "causal": row["causal"],
        "seqlens": row["lengths"],
        "sink": row["sink"],
        "kv_sources": 1 if row["sources"] == "one" else 2,
        "limit2": row["sources"] == "two, limits",
        "kv_shared": row["shared"],
        "output": row["output"],
        "lse": row["lse"],
        "strategy": row["schedule"],
        "q_heads_per_kv": {"one": 1, "packed": 2 if row["sink"] else 4, "apart": 3}[row["heads"]],
        "window_left": (0 if row["sink"] and d < 64 else d + 3) if row["left"] else None,
        "window_right": (5 if row["lengths"] else 40) if row["right"] else None,
        "p_staging": "smem" if row["P in"] == "smem" else "auto",
        "kv_stage": 1 if row["one kv stage"] else "auto",
        "tile_n": 32 if row["narrow tile"] else "auto",
    }
    try:
        spec = load_spec(fields)
        if features(spec) != row:
            return None
        auto = spec.model_copy(update={"strategy": "auto"})  # where the planner takes it by itself
        return auto if plan_kernel(auto).tiling == plan_kernel(spec).tiling else spec
    except SpecError:
        return None


TILES = Design(FACTORS, IMPOSSIBLE, features, specification, WHOLE_TILES)


def completed(design: Design, kept: set[str]) -> tuple[list[str], list[KernelSpec], list[tuple]]:
    """(names that stay, specifications to add, pairs that no specification has); those in `kept` stay anyhow."""
    factors, specification = design.factors, design.specification
    rows = {name: design.features(load_spec(name)) for name in design.names()}
    added, impossible = cover(factors, rows.values(), lambda row: specification(row) is not None, design.impossible)
    by_row = [*rows.values(), *added]
    stay = prune(factors, by_row, lambda row: any(row is rows[name] for name in kept & set(rows)))
    left = [name for name, row in rows.items() if any(row is other for other in stay)]
    return left, [specification(row) for row in added if any(row is other for other in stay)], impossible


def tell(design: Design) -> None:
    """Print which specifications would complete the cover, and which can go."""
    stay, add, impossible = completed(design, set())
    for name in sorted(set(design.names()) - set(stay)):
        print(f"its pairs meet elsewhere: {name}")
    for spec in add:
        print(f"would add pairs: {spec.name}")
    for pair in impossible:
        print(f"no specification: {pair}")


if __name__ == "__main__":
    tell(TILES)
