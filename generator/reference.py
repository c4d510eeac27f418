"""Attention in NumPy: the oracle in float64, and a model of the rounding that a 16-bit kernel cannot avoid.

Both take Q [B, Sq, Hq, D], K [B, Skv, Hkv, D], V [B, Skv, Hkv, Dv] and work a head at a time. Query head h reads KV
head h // (Hq / Hkv). Causal masking is aligned at the bottom right: row i sees keys j <= i + Skv - Sq. A row that sees
no key gives O = 0, LSE = -inf and m = -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


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
    """o * exp(m - lse) in float64, [B, Sq, Hq, Dv]; rows with lse = m = -inf get weight 0."""
    lse, m = lse.astype(np.float64), m.astype(np.float64)
    empty = np.isneginf(lse) & np.isneginf(m)
    with np.errstate(invalid="ignore", over="ignore"):
        weight = np.where(empty, 0.0, np.exp(m - lse))
        return o.astype(np.float64) * weight.transpose(0, 2, 1)[..., None]


def attention(q: Any, k: Any, v: Any, scale: float, causal: bool = False, unnormalized: bool = False) -> Attention:
    """The exact answer for the given inputs: everything in float64."""
    result = _empty(q, v, np.float64)
    for b, h, heads in _heads(q, k, v):
        qh, kh, vh = (head.astype(np.float64) for head in heads)
        scores = _masked(qh @ kh.T * scale, 0, len(kh), causal)
        m, shift = _reference(scores.max(axis=1))
        p = np.exp(scores - shift[:, None])
        total = p.sum(axis=1)
        o = p @ vh
        result.o[b, :, h] = o if unnormalized else o / np.where(total > 0, total, 1)[:, None]
        result.lse[b, h] = m + _log(total)
        result.m[b, h] = m
    return result


def rounding_model(
    q: Any, k: Any, v: Any, scale: float, tile_n: int, causal: bool = False, unnormalized: bool = False
) -> Attention:
    """What a kernel in float32 gives that must round P, and a normalized O, to the inputs' dtype, and nothing else.

    KV tiles of tile_n keys: P is rounded after the exponential against the row maximum so far, as the online softmax
    does; its sum is not rounded. Exponentials, products and sums are float32.
    """
    result = _empty(q, v, np.float32)
    element = q.dtype
    for b, h, heads in _heads(q, k, v):
        qh, kh, vh = (head.astype(np.float32) for head in heads)
        m = np.full(len(qh), -np.inf, np.float32)
        total = np.zeros(len(qh), np.float32)
        o = np.zeros((len(qh), vh.shape[1]), np.float32)
        for first in range(0, len(kh), tile_n):
            tile = slice(first, first + tile_n)
            scores = _masked(qh @ kh[tile].T * np.float32(scale), first, len(kh), causal)
            m_new, shift = _reference(np.maximum(m, scores.max(axis=1)))
            kept = np.exp(m - shift)
            p = np.exp(scores - shift[:, None])
            total = total * kept + p.sum(axis=1)
            o = o * kept[:, None] + p.astype(element).astype(np.float32) @ vh[tile]
            m = m_new
        if not unnormalized:
            o = (o / np.where(total > 0, total, 1)[:, None]).astype(element)
        result.o[b, :, h] = o
        result.lse[b, h] = m + _log(total)
        result.m[b, h] = m
    return result


def _empty(q: Any, v: Any, dtype: Any) -> Attention:
    batch, queries, heads, _ = q.shape
    rows = (batch, heads, queries)
    return Attention(np.empty((batch, queries, heads, v.shape[3]), dtype), np.empty(rows, dtype), np.empty(rows, dtype))


def _heads(q: Any, k: Any, v: Any) -> Iterator[tuple[int, int, tuple[Any, Any, Any]]]:
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            yield b, h, (q[b, :, h], k[b, :, h // group], v[b, :, h // group])


def _masked(scores: np.ndarray, first: int, keys: int, causal: bool) -> np.ndarray:
    """Scores of the keys from `first` on, of `keys` in all; -inf above the diagonal."""
    if not causal:
        return scores
    queries, columns = scores.shape
    row, column = np.arange(queries)[:, None], first + np.arange(columns)[None, :]
    return np.where(column <= row + keys - queries, scores, scores.dtype.type(-np.inf))


def _reference(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row maximum, and what to subtract: 0 in a row that has seen no key, for -inf - -inf is NaN."""
    return m, np.where(np.isneginf(m), m.dtype.type(0), m)


def _log(total: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(total)
