"""Some rows of some heads of a call, and their attention in float64: outputs too large to be compared whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import is_torch
from .reference import attention, normalize
from .spec import KernelSpec
from .tiles import seen_of
from .verify import relative_error

HEADS = 3  # (batch entry, head) pairs: the first, the last and one between
ROWS = 32  # of each: the first two, the last two and others


@dataclass(frozen=True)
class Sample:
    """heads: (batch entry, query head); rows: of Q; o [heads, rows, Dv] and lse [heads, rows]: exact."""

    heads: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    o: np.ndarray
    lse: np.ndarray

    def o_error(self, o: Any, lse: Any = None, m: Any = None) -> float:
        """Relative L2 error of O [B, Sq, Hq, Dv] over the sample; with m, O is un-normalized: see reference.normalize.
        NaN where O has one.
        """
        taken = np.stack([host(o[b, list(self.rows), h]) for b, h in self.heads])
        if m is not None:
            lse, m = (self._of_rows(rows)[None] for rows in (lse, m))
            taken = normalize(taken.transpose(1, 0, 2)[None], lse, m)[0].transpose(1, 0, 2)
        return relative_error(taken, self.o)

    def lse_error(self, lse: Any) -> float:
        """Largest absolute error of LSE [B, Hq, Sq]; infinite where only one of it and the exact one is."""
        taken = self._of_rows(lse)
        with np.errstate(invalid="ignore"):  # -inf - -inf, of rows that see no key
            return float(np.max(np.where(taken == self.lse, 0.0, np.abs(taken - self.lse))))

    def _of_rows(self, lse: Any) -> np.ndarray:
        return np.stack([host(lse[b, h])[list(self.rows)] for b, h in self.heads])


def host(array: Any) -> np.ndarray:
    """A NumPy array, or a PyTorch tensor from any device, as NumPy: floating point as float64."""
    if is_torch(array):
        array = (array.detach().double() if array.is_floating_point() else array).cpu().numpy()
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)


def take_sample(spec: KernelSpec, operands: Mapping[str, Any], seed: int = 0) -> Sample:
    """A Sample of a call with these arrays, by name, see signature.inputs; the same for the same seed and shape."""
    batch, queries, heads, _ = operands["q"].shape
    rng = np.random.default_rng([seed, batch, queries, heads])
    between = (int(rng.integers(batch)), int(rng.integers(heads)))
    places = tuple(dict.fromkeys([(0, 0), (batch - 1, heads - 1), between]))[:HEADS]
    edges = [row for row in (0, 1, queries - 2, queries - 1) if 0 <= row < queries]
    others = rng.permutation(queries)[:ROWS].tolist()
    rows = tuple(sorted(list(dict.fromkeys([*edges, *others]))[:ROWS]))
    exact = [_exact(spec, operands, b, h, rows) for b, h in places]
    return Sample(places, rows, np.stack([o for o, _ in exact]), np.stack([lse for _, lse in exact]))


def _exact(
    spec: KernelSpec, operands: Mapping[str, Any], b: int, h: int, rows: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """O [rows, Dv] and LSE [rows] of one head, in float64."""
    q = operands["q"]
    kv_head = h // (q.shape[2] // operands["k"].shape[2])
    one = {"q": host(q[b, list(rows), h])[None, :, None]}
    for name in ("k", "v", "k2", "v2"):
        if name in operands:
            one[name] = host(operands[name][b, :, kv_head])[None, :, None]
    for name in ("seqlens", "seqlens2", "limit2"):
        if name in operands:
            one[name] = host(operands[name][b])[None]
    if "limit2" in one:
        one["limit2"] = one["limit2"][:, list(rows)]
    if "sink" in operands:
        one["sink"] = host(operands["sink"])[h : h + 1]
    v = one.get("v", one["k"][..., : spec.v_dim])
    seen = replace(seen_of(spec, one), rows=rows, queries=q.shape[1])
    exact = attention(one["q"], one["k"], v, spec.head_dim**-0.5, seen=seen)
    return exact.o[0, :, 0], exact.lse[0, 0]
