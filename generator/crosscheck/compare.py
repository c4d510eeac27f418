"""Two results of one case: how many values differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .case import Case, Rule

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}


@dataclass(frozen=True)
class Row:
    """The comparison of one case. `differ` of `values` have other bits; `payloads` of these are NaN on both sides.

    `error` is the largest difference in units of the bound that the rule names (1 is at the bound), 0 where bits must
    agree; `good` says whether the rule is met; `example` shows the worst value.
    """

    group: str
    name: str
    values: int
    differ: int
    payloads: int
    worst: float
    good: bool
    rule: Rule
    example: str = ""


def _bits(array: np.ndarray, kind: str = "bits") -> np.ndarray:
    """The bits of each value: a packed register of a 16-bit kind holds two."""
    width = array.dtype.itemsize if kind == "bits" else min(array.dtype.itemsize, np.dtype(FLOATS[kind]).itemsize)
    return np.ascontiguousarray(array).reshape(-1).view(f"u{width}")


def compare(
    case: Case, silicon: dict[str, np.ndarray], emulated: dict[str, np.ndarray], rule: Rule | None = None
) -> Row:
    """Compare the outputs of one case, by `rule` or the case's own."""
    rule = rule or case.rule
    values = differ = payloads = 0
    worst, good, example = 0.0, True, ""
    for name, expected in silicon.items():
        a, b = _bits(expected, rule.kind), _bits(emulated[name], rule.kind)
        other = a != b
        values, differ = values + a.size, differ + int(other.sum())
        if not other.any():
            continue
        bad, here, both_nan = _outside(rule, a, b)
        payloads += int((both_nan & other).sum())
        worst = max(worst, here)
        if (bad & other).any() and not example:
            good = False
            at = int(np.argmax(bad & other))
            example = f"{name}[{at}]: silicon {a[at]:#x}, emulator {b[at]:#x}" + _inputs(case, at)
    return Row(case.group, case.name, values, differ, payloads, worst, good, rule, example)


def _outside(rule: Rule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Which values break the rule, the largest error in units of its bound, and which are NaN on both sides."""
    kind = rule.kind
    none = np.zeros(a.shape, bool)
    if kind == "bits":
        return a != b, 0.0, none
    dtype = np.dtype(FLOATS[kind])
    if dtype.itemsize != a.dtype.itemsize:
        return a != b, 0.0, none
    with np.errstate(all="ignore"):
        x, y = a.view(dtype).astype(np.float64), b.view(dtype).astype(np.float64)
        both_nan = np.isnan(x) & np.isnan(y)
        if rule.relative == rule.absolute == 0:
            return (a != b) & ~(both_nan & rule.any_nan), 0.0, both_nan
        finite = np.isfinite(x) & np.isfinite(y)
        smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # below it an error is counted from there
        bound = np.maximum(rule.relative * np.maximum(np.abs(x), smallest), rule.absolute)
        error = np.where(finite, np.abs(x - y) / bound, np.where(a == b, 0, np.inf))
        error[both_nan] = 0
    finite_worst = error[np.isfinite(error)]
    return error > 1, float(finite_worst.max(initial=0)), both_nan


def _inputs(case: Case, at: int) -> str:
    """The inputs at the same place, for elementwise cases."""
    inputs = [a for a in case.arguments if not getattr(a, "output", True)]
    kind = case.rule.kind
    texts = [f"{a.name} {_bits(a.value, kind)[at]:#x}" for a in inputs if at < _bits(a.value, kind).size]
    return f" for {', '.join(texts)}" if texts else ""
