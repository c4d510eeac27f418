"""What a kernel of sm_90a exercises: features.py for the strategy warpgroups.

`python -m generator.hopper_features` says which specifications would complete the cover of specs/, and which can go.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from .arch import ARCHS
from .features import Design, Row, tell
from .plan import deepest_kv_stage, plan_kernel
from .spec import KernelSpec, SpecError, load_spec

FACTORS: dict[str, tuple[Any, ...]] = {
    "head_dim": (16, 64, 96, 128, 160, 192, 256),  # swizzle spans of 32, 64 and 128 bytes
    "V": ("as wide", "narrower", "wider"),
    "consumers": (1, 2, 3, 4),
    "heads": ("one", "packed", "apart"),  # of a group: none, in one tile, a tile each
    "schedule": ("plain", "turns", "lazy"),  # windows may have both
    "softmax": ("beside PV", "after PV"),
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
    "sO over sQ": (False, True),
    "split": (False, True),
}

IMPOSSIBLE = {  # pair -> why no specification has it
    ("head_dim", 16, "V", "narrower"): "16 columns are the least",
    ("head_dim", 256, "V", "wider"): "one wgmma writes 256 columns of O at most",
    ("V", "wider", "shared", True): "V is a prefix of K's columns",
    ("V", "wider", "sO over sQ", True): "sO is larger than sQ",
    ("consumers", 1, "schedule", "turns"): "nobody to take turns with",
    ("consumers", 1, "softmax", "after PV"): "nobody to multiply meanwhile",
    **{("consumers", 4, "schedule", x): "their registers do not hold an O so wide" for x in ("plain", "lazy")},
    **{("schedule", x, "softmax", "after PV"): "after PV consumers take turns" for x in ("plain", "lazy")},
    **{("head_dim", d, "softmax", "after PV"): "K and V are wide" for d in (160, 192, 256)},
    ("shared", True, "one kv stage", True): "QK of the next tile is issued before PV of this one",
    ("output", "unnormalized", "lse", False): "without LSE partial results do not merge",
    ("output", "unnormalized", "sO over sQ", True): "float32 O goes from registers to global memory",
    ("sO over sQ", True, "split", True): "partial results are float32, from registers to global memory",
}
LAZY_COLUMNS = 144  # of O: those whose rescaling is asked for first


def features(spec: KernelSpec) -> Row:
    """The row of a specification, as its plan decided it."""
    plan = plan_kernel(spec)
    difference = spec.v_dim - spec.head_dim
    return {
        "head_dim": spec.head_dim,
        "V": "as wide" if difference == 0 else "narrower" if difference < 0 else "wider",
        "consumers": plan.consumers,
        "heads": "one" if spec.q_heads_per_kv == 1 else "packed" if plan.packed else "apart",
        "schedule": ", ".join([*["turns"] * plan.takes_turns, *["lazy"] * plan.lazy]) or "plain",
        "softmax": "beside PV" if plan.beside_pv else "after PV",
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
        "sO over sQ": plan.o_over_q,
        "split": spec.split_kv,
    }


@cache
def _specification(items: tuple[tuple[str, Any], ...]) -> KernelSpec | None:
    row = dict(items)
    for fields in _fields(row):
        try:
            spec = load_spec(fields)
            if features(spec) == row:
                return spec
        except SpecError:
            continue
    return None


def specification(row: Row) -> KernelSpec | None:
    """A specification of exactly these features; None when there is none."""
    return _specification(tuple((name, row[name]) for name in FACTORS))


def _fields(row: Row) -> Iterator[dict[str, Any]]:
    """Fields that may have these features: what the planner chooses by itself is left out where it can be."""
    d, lazy = row["head_dim"], row["schedule"] == "lazy"
    narrower = d * 2 // 3 // 16 * 16
    if lazy:
        narrower = max(narrower, min(d - 16, LAZY_COLUMNS))
    elif row["consumers"] == 4:
        narrower = min(narrower, 64)
    elif d > 160:
        narrower = min(narrower, 128)
    fields = {
        "arch": "sm_90a",
        "head_dim": d,
        "head_dim_v": {
            "as wide": d,
            "narrower": max(16, narrower),
            "wider": min(256, max(d + 32, LAZY_COLUMNS) if lazy else d + 32),
        }[row["V"]],
        "dtype": row["dtype"],
        "causal": row["causal"],
        "seqlens": row["lengths"],
        "sink": row["sink"],
        "kv_sources": 1 if row["sources"] == "one" else 2,
        "limit2": row["sources"] == "two, limits",
        "kv_shared": row["shared"],
        "output": row["output"],
        "lse": row["lse"],
        "split_kv": row["split"],
        "q_heads_per_kv": {"one": 1, "packed": 2 if row["sink"] else 4, "apart": 3}[row["heads"]],
        "window_left": (0 if row["sink"] and d < 64 else d + 3) if row["left"] else None,
        "window_right": (5 if row["lengths"] else 40) if row["right"] else None,
    }
    tiles = ("auto", *((48, 32) if row["narrow tile"] else (64, 80, 112, 176, 224)))
    for tile_m, tile_n in product(("auto", 64 * row["consumers"]), tiles):
        asked = fields | {"tile_m": tile_m, "tile_n": tile_n}
        yield asked | {"kv_stage": 1 if row["one kv stage"] else "auto"}
        if row["sO over sQ"]:
            yield asked | {"kv_stage": _deepest(asked)}


def _deepest(fields: dict[str, Any]) -> int:
    """The deepest ring that fits: the one most likely to leave no room for sO beside sQ."""
    spec = load_spec(fields)
    return deepest_kv_stage(spec, ARCHS[spec.arch]) or 2


WARPGROUPS = Design(FACTORS, IMPOSSIBLE, features, specification, ("warpgroups",))

if __name__ == "__main__":
    tell(WARPGROUPS)
