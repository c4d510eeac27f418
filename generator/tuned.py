"""What was measured to be the fastest plan, by head dims and mask: tuned.json, which `bespoke tune` writes, one record
a line.

The planner takes it for a specification of these head dims and this kind of mask, whatever else that asks for, as long
as it fits; where nothing was measured it goes by its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .resources import tuned_path
from .spec import KernelSpec, SpecError


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
    beside_pv: bool
    v_keys: int  # of strategy columns; 0 where V is in whole tiles
    tflops: dict[str, float]
    device: str
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.arch, self.head_dim, self.head_dim_v, self.mask)


@cache
def _winners() -> dict[tuple[Any, ...], Winner]:
    return read_winners(tuned_path())


def read_winners(path: Path) -> dict[tuple[Any, ...], Winner]:
    """The winners of a tuned.json by their keys. Raises SpecError when it cannot be read, is no such file, or has two
    winners for one key.
    """
    try:
        found = [Winner(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise SpecError("tuned.json", path, f"cannot be read: {error.strerror}", "name another file") from None
    except (ValueError, TypeError) as error:
        raise SpecError("tuned.json", path, f"is not a list of winners: {error}", "name another file") from None
    by_key = {item.key: item for item in found}
    if len(by_key) != len(found):
        raise SpecError("tuned.json", path, "has two winners for one key", "remove one of them")
    return by_key


def merged(known: Iterable[Winner], measured: Iterable[Winner]) -> list[Winner]:
    """Both, where a key has two the measured one, in order of the keys."""
    by_key = {item.key: item for item in (*known, *measured)}
    return [by_key[key] for key in sorted(by_key)]


def spelled(winners: Iterable[Winner]) -> str:
    """The text of a tuned.json: a record a line."""
    return "[\n" + ",\n".join(f" {json.dumps(asdict(item))}" for item in winners) + "\n]\n"


def mask_kind(spec: KernelSpec) -> str:
    """ "causal" where the keys that a query sees depend on where it is, else "full"."""
    windowed = spec.causal or spec.window_left is not None or spec.window_right is not None
    return "causal" if windowed else "full"


def winner(spec: KernelSpec) -> Winner | None:
    """The fastest plan that was measured for such a specification; None when there is none."""
    return _winners().get((spec.arch, spec.head_dim, spec.v_dim, mask_kind(spec)))
