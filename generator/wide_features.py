"""What a kernel with K and V in chunks exercises: features.py for the strategies chunks, passes and pair.

`python -m generator.wide_features` says which specifications would complete the cover of specs/, and which can go.
"""

from __future__ import annotations

from typing import Any

from .features import Design, Row, tell
from .plan import plan_kernel
from .spec import KernelSpec, SpecError, load_spec

FACTORS: dict[str, tuple[Any, ...]] = {
    "head_dim": (272, 320, 384, 448, 512, 576),
    "strategy": ("chunks", "passes", "pair"),
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
    "narrow tile": (False, True),
}

IMPOSSIBLE = {  # pair -> why no specification has it
    ("head_dim", 576, "V", "as wide"): "576 columns of Q and K come with 512 of V",
    ("head_dim", 576, "V", "wider"): "576 columns of Q and K come with 512 of V",
    ("head_dim", 512, "V", "wider"): "V has 512 columns at most",
    ("head_dim", 576, "strategy", "chunks"): "128 rows of 512 columns of O take all of tensor memory",
    ("strategy", "pair", "P in", "tmem"): "64 rows a CTA lie in both halves of the lanes, as PV's A they cannot",
    ("V", "wider", "shared", True): "V is a prefix of K's columns",
    ("output", "unnormalized", "lse", False): "without LSE partial results do not merge",
}


def features(spec: KernelSpec) -> Row:
    """The row of a specification, as its plan decided it."""
    plan = plan_kernel(spec)
    difference = spec.v_dim - spec.head_dim
    return {
        "head_dim": spec.head_dim,
        "strategy": "passes" if plan.passes > 1 else plan.tiling.strategy,
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
        "narrow tile": plan.tile_n < 64,
    }


def specification(row: Row) -> KernelSpec | None:
    """A specification of exactly these features; None when there is none."""
    d = row["head_dim"]
    narrower = 512 if d == 576 else d * 2 // 3 // 16 * 16
    fields = {
        "head_dim": d,
        "head_dim_v": {"as wide": d, "narrower": narrower, "wider": min(512, d + 48)}[row["V"]],
        "dtype": row["dtype"],
        "causal": row["causal"],
        "seqlens": row["lengths"],
        "sink": row["sink"],
        "kv_sources": 1 if row["sources"] == "one" else 2,
        "limit2": row["sources"] == "two, limits",
        "kv_shared": row["shared"],
        "output": row["output"],
        "lse": row["lse"],
        "strategy": row["strategy"],
        "q_heads_per_kv": {"one": 1, "packed": 8 if row["sink"] else 4, "apart": 3}[row["heads"]],
        "window_left": (0 if row["sink"] and d < 384 else d - 300) if row["left"] else None,
        "window_right": (5 if row["lengths"] else 40) if row["right"] else None,
        "p_staging": row["P in"] if row["strategy"] != "pair" else "auto",
        "tile_n": 32 if row["narrow tile"] else "auto",
    }
    for auto in ({"strategy": "auto", "p_staging": "auto"}, {"strategy": "auto"}, {"p_staging": "auto"}, {}):
        try:
            spec = load_spec(fields | auto)  # what the planner chooses by itself is not spelled
            if features(spec) == row:
                return spec
        except SpecError:
            continue
    return None


WIDE = Design(FACTORS, IMPOSSIBLE, features, specification, ("chunks", "pair"))

if __name__ == "__main__":
    tell(WIDE)
