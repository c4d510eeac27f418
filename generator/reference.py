"""Attention in NumPy: the oracle in float64, and a model of the rounding that a 16-bit kernel cannot avoid.

Both take Q [B, Sq, Hq, D], K [B, Skv, Hkv, D], V [B, Skv, Hkv, Dv] and work a head at a time. Query head h reads KV
head h // (Hq / Hkv). Who sees what is a `Seen`, by definition and as a whole matrix, where a kernel has arithmetic on
tiles. A row that sees no key gives O = 0, m = -inf and LSE = -inf, or LSE = its sink.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOG2_E = np.float32(1.4426950408889634)


@dataclass(frozen=True)
class Seen:
    """What hides keys, and what joins the softmax besides them.

    causal, left, right: of the first source, aligned at the bottom right against the batch entry's own length: row i
    stands at key i + length - Sq. seqlens, seqlens2: keys of each source that exist, [B]. k2, v2, limit2: a second
    source, [B, Skv2, Hkv, ...], and how many of its keys a row sees, [B, Sq]. sink: a logit a query head, [Hq].
    rows: the Q in hand holds only these rows, [n], of so many `queries`: a sample of a longer call.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    seqlens: Any = None
    k2: Any = None
    v2: Any = None
    seqlens2: Any = None
    limit2: Any = None
    sink: Any = None
    rows: Any = None
    queries: int | None = None

    def first(self, b: int, queries: int, keys: int) -> np.ndarray:
        """[Sq, Skv], true where a row of batch entry b sees a key of the first source."""
        length = keys if self.seqlens is None else int(self.seqlens[b])
        rows = np.arange(queries) if self.rows is None else np.asarray(self.rows)
        distance = np.arange(keys)[None, :] - (rows[:, None] + length - (self.queries or queries))
        seen = np.broadcast_to(np.arange(keys) < length, (queries, keys))
        if self.causal:
            seen = seen & (distance <= 0)
        if self.left is not None:
            seen = seen & (distance >= -self.left)
        if self.right is not None:
            seen = seen & (distance <= self.right)
        return seen

    def second(self, b: int, queries: int) -> np.ndarray:
        """[Sq, Skv2], the same of the second source."""
        keys = self.k2.shape[1]
        length = keys if self.seqlens2 is None else int(self.seqlens2[b])
        limit = np.full(queries, keys) if self.limit2 is None else np.asarray(self.limit2[b])
        return np.arange(keys)[None, :] < np.minimum(limit, length)[:, None]


@dataclass(frozen=True)
class Attention:
    """o [B, Sq, Hq, Dv]: normalized, or sum of exp(s - m) v; lse, m (row maxima of the scaled scores) [B, Hq, Sq]."""

    o: np.ndarray
    lse: np.ndarray
    m: np.ndarray

    def merged(self) -> np.ndarray:
        """An un-normalized o as attention, o * exp(m - LSE), in float64; 0 where a row sees no key."""
        return normalize(self.o, self.lse, self.m)


def normalize(o: np.ndarray, lse: np.ndarray, m: np.ndarray) -> np.ndarray:
    """o * exp(m - lse) in float64, [B, Sq, Hq, Dv]; rows with m = -inf get weight 0."""
    lse, m = lse.astype(np.float64), m.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        weight = np.where(np.isneginf(m), 0.0, np.exp(m - lse))
        return o.astype(np.float64) * weight.transpose(0, 2, 1)[..., None]


def merge(parts: Sequence[Any], sink: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all the keys of un-normalized parts (with o, lse, m each), as (O, LSE) in float64.

    With LSE = log(sum of exp(LSE_i), and of exp(sink)), O = sum of O_i exp(m_i - LSE). Parts must be without sinks.
    """
    lses = [part.lse.astype(np.float64) for part in parts]
    if sink is not None:
        lses.append(np.broadcast_to(np.asarray(sink, np.float64)[None, :, None], lses[0].shape))
    lse = lses[0]
    for other in lses[1:]:
        lse = np.logaddexp(lse, other)
    return sum(normalize(part.o, lse, part.m) for part in parts), lse


def attention(
    q: Any, k: Any, v: Any, scale: float, causal: bool = False, unnormalized: bool = False, seen: Seen | None = None
) -> Attention:
    """The exact answer for the given inputs: everything in float64. seen: wins over causal."""
    seen = seen or Seen(causal)
    result = _empty(q, v, np.float64)
    for b, h, qh, sources in _heads(q, k, v, seen):
        scores = [_masked(qh.astype(np.float64) @ kh.astype(np.float64).T * scale, mask) for kh, _, mask in sources]
        scores = np.concatenate(scores, axis=1)
        m, shift = _reference(scores.max(axis=1))
        p = np.exp(scores - shift[:, None])
        o = p @ np.concatenate([vh for _, vh, _ in sources]).astype(np.float64)
        _finish(result, b, h, o, p.sum(axis=1), m, seen, unnormalized)
    return result


def rounding_model(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    tile_n: int,
    causal: bool = False,
    unnormalized: bool = False,
    seen: Seen | None = None,
    skip_log2: float = 0.0,
) -> Attention:
    """What a kernel in float32 gives that must round P, and a normalized O, to the inputs' dtype, and nothing else.

    KV tiles of tile_n keys, source after source: P is rounded after the exponential against the row maximum so far, as
    the online softmax does; its sum is not rounded. Exponentials, products and sums are float32. skip_log2: by how many
    factors of 2 the maximum must have moved before exponentials are taken against it, see Plan.skip_log2.
    """
    seen = seen or Seen(causal)
    result = _empty(q, v, np.float32)
    element = q.dtype
    for b, h, qh, sources in _heads(q, k, v, seen):
        qh = qh.astype(np.float32)
        m = np.full(len(qh), -np.inf, np.float32)
        total = np.zeros(len(qh), np.float32)
        o = np.zeros((len(qh), v.shape[3]), np.float32)
        for k_tile, v_tile, mask in _tiles(sources, tile_n):
            scores = _masked(qh @ k_tile.astype(np.float32).T * np.float32(scale), mask)
            peak = np.maximum(m, scores.max(axis=1))
            with np.errstate(invalid="ignore"):  # -inf - -inf: nothing seen yet
                m_new, shift = _reference(np.where(peak - m <= np.float32(skip_log2 * np.log(2)), m, peak))
            kept = np.exp(m - shift)
            p = np.exp(scores - shift[:, None])
            total = total * kept + p.sum(axis=1)
            o = o * kept[:, None] + p.astype(element).astype(np.float32) @ v_tile.astype(np.float32)
            m = m_new
        _finish(result, b, h, o, total, m, seen, unnormalized)
        if not unnormalized:
            result.o[b, :, h] = result.o[b, :, h].astype(element)
    return result


def _finish(
    result: Attention, b: int, h: int, o: np.ndarray, total: np.ndarray, m: np.ndarray, seen: Seen, unnormalized: bool
) -> None:
    """O, LSE and m of a head from sums against m: the sink joins the denominator against the larger of m and itself."""
    top, kept = m, m.dtype.type(1)
    if seen.sink is not None:
        sink = m.dtype.type(seen.sink[h])
        top, shift = _reference(np.maximum(m, sink))
        kept = np.exp(m - shift)
        total = total * kept + np.exp(sink - shift)
    result.o[b, :, h] = o if unnormalized else o * (kept / np.where(total > 0, total, 1))[:, None]
    with np.errstate(divide="ignore"):
        result.lse[b, h] = top + np.log(total)
    result.m[b, h] = m


def _empty(q: Any, v: Any, dtype: Any) -> Attention:
    batch, queries, heads, _ = q.shape
    rows = (batch, heads, queries)
    return Attention(np.empty((batch, queries, heads, v.shape[3]), dtype), np.empty(rows, dtype), np.empty(rows, dtype))


def _heads(q: Any, k: Any, v: Any, seen: Seen) -> Iterator[tuple[int, int, Any, list[tuple[Any, Any, np.ndarray]]]]:
    """(b, h, Q of the head, [(K, V, who sees what) of each source])."""
    group, queries = q.shape[2] // k.shape[2], q.shape[1]
    for b in range(q.shape[0]):
        masks = [seen.first(b, queries, k.shape[1])] + ([] if seen.k2 is None else [seen.second(b, queries)])
        for h in range(q.shape[2]):
            heads = [(x[b, :, h // group], y[b, :, h // group]) for x, y in ((k, v), (seen.k2, seen.v2))[: len(masks)]]
            yield b, h, q[b, :, h], [(*head, mask) for head, mask in zip(heads, masks, strict=True)]


def _tiles(sources: list[tuple[Any, Any, np.ndarray]], tile_n: int) -> Iterator[tuple[Any, Any, np.ndarray]]:
    for k, v, mask in sources:
        for tile in (slice(first, first + tile_n) for first in range(0, len(k), tile_n)):
            yield k[tile], v[tile], mask[:, tile]


def _masked(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, scores, scores.dtype.type(-np.inf))


def _reference(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row maximum, and what to subtract: 0 in a row that has seen no key, for -inf - -inf is NaN."""
    return m, np.where(np.isneginf(m), m.dtype.type(0), m)
