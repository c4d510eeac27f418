"""KV tiles of a launch: visited, by the kernel's arithmetic (mask.py); needed, by the definition of who sees what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .mask import TileCounts, kv_span, kv_span2
from .plan import Plan
from .reference import Seen
from .spec import KernelSpec


def seen_of(spec: KernelSpec, operands: Mapping[str, Any]) -> Seen:
    """Who sees what in a call of the kernel with these arrays, by name."""
    rows = {name: operands[name] for name in ("seqlens", "seqlens2", "limit2", "sink") if name in operands}
    if "k2" in operands:
        k2 = operands["k2"]
        rows |= {"k2": k2, "v2": operands.get("v2", k2[..., : spec.v_dim])}
    return Seen(spec.causal, spec.window_left, spec.window_right, **rows)


def count_tiles(plan: Plan, operands: Mapping[str, Any]) -> TileCounts:
    """Over all CTAs of the launch that the kernel makes for these arrays."""
    visited = needed = total = 0
    batch, queries, heads, _ = operands["q"].shape
    seen, ctas = seen_of(plan.spec, operands), heads // plan.heads_per_tile  # a batch entry and tile of tokens
    for b in range(batch):
        for tokens in _token_tiles(queries, plan.tokens):
            for keys, span, mask in _sources(plan, operands, seen, b, tokens):
                visited += ctas * span.tiles
                blocks = range(0, keys, plan.tile_n)
                total += ctas * len(blocks)
                needed += ctas * sum(bool(mask[:, first : first + plan.tile_n].any()) for first in blocks)
    return TileCounts(visited, needed, total)


def _token_tiles(queries: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, queries)) for first in range(0, queries, size))


def _sources(plan: Plan, operands: Mapping[str, Any], seen: Seen, b: int, tokens: range) -> Iterator[tuple]:
    """(keys, the span by the kernel's arithmetic, who sees what of these tokens) of each source."""
    queries, keys = operands["q"].shape[1], operands["k"].shape[1]
    length = int(operands["seqlens"][b]) if "seqlens" in operands else keys
    rows = slice(tokens.start, tokens.stop)
    yield keys, kv_span(plan.mask, tokens, queries, length, plan.tile_n), seen.first(b, queries, keys)[rows]
    if seen.k2 is not None:
        keys2 = seen.k2.shape[1]
        length = int(operands["seqlens2"][b]) if "seqlens2" in operands else keys2
        limits = np.full(queries, keys2) if seen.limit2 is None else seen.limit2[b]
        span = kv_span2([int(limit) for limit in limits[rows]], length, plan.tile_n)
        yield keys2, span, seen.second(b, queries)[rows]
