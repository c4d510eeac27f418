"""What was measured to be the fastest plan, by head dims and mask: tuned.json, which `bespoke tune` writes.

The planner takes it for a specification of these head dims and this kind of mask, whatever else that asks for, as long
as it fits; where nothing was measured it goes by its model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from .spec import KernelSpec


@dataclass(frozen=True)
class Winner:
    """The fastest tile of those measured. tflops: by number of tokens; device and date of the measurement."""

    arch: str
    head_dim: int
    head_dim_v: int
    mask: str  # "full" or "causal"
    tile_m: int
    tile_n: int
    turns: bool
    lazy: bool
    tflops: dict[str, float]
    device: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.arch, self.head_dim, self.head_dim_v, self.mask)


@cache
def _winners() -> dict[tuple[Any, ...], Winner]:
    text = resources.files(__package__).joinpath("tuned.json").read_text()
    found = [Winner(**record) for record in json.loads(text)]
    by_key = {item.key: item for item in found}
    if len(by_key) != len(found):
        raise ValueError("tuned.json has two winners for one key")
    return by_key


def mask_kind(spec: KernelSpec) -> str:
    """ "causal" where the keys that a query sees depend on where it is, else "full"."""
    windowed = spec.causal or spec.window_left is not None or spec.window_right is not None
    return "causal" if windowed else "full"


def winner(spec: KernelSpec) -> Winner | None:
    """The fastest plan that was measured for such a specification; None when there is none."""
    return _winners().get((spec.arch, spec.head_dim, spec.v_dim, mask_kind(spec)))
