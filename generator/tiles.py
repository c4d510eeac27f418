"""KV tiles of a launch: visited and loaded, by the kernel's arithmetic (mask.py); needed, by the definition of who sees
what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .layout import Plan
from .mask import Span, TileCounts, kv_span, kv_span2, loaded_tiles
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
    visited = needed = total = loaded = 0
    batch, queries, heads, _ = operands["q"].shape
    seen, ctas = seen_of(plan.spec, operands), heads // plan.heads_per_tile  # a batch entry and tile of tokens
    for b in range(batch):
        masks = [seen.first(b, queries, operands["k"].shape[1])]
        masks += [] if seen.k2 is None else [seen.second(b, queries)]
        tiles = list(_token_tiles(queries, plan.tokens))
        spans = [list(_spans(plan, operands, b, tokens)) for tokens in tiles]
        for tokens, own in zip(tiles, spans, strict=True):
            rows = slice(tokens.start, tokens.stop)
            for mask, span in zip(masks, own, strict=True):
                visited += ctas * span.tiles
                blocks = range(span.origin, mask.shape[1], plan.tile_n)
                total += ctas * -(-mask.shape[1] // plan.tile_n)
                needed += ctas * sum(bool(mask[rows, first : first + plan.tile_n].any()) for first in blocks)
        for first in range(0, len(spans), plan.query_tiles):
            of_a_cta = spans[first : first + plan.query_tiles]
            loaded += ctas * sum(loaded_tiles(source) for source in zip(*of_a_cta, strict=True))
    return TileCounts(visited, needed, total, loaded)


def _token_tiles(queries: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, queries)) for first in range(0, queries, size))


def _spans(plan: Plan, operands: Mapping[str, Any], b: int, tokens: range) -> Iterator[Span]:
    """Of each source, by the kernel's arithmetic."""
    queries, keys = operands["q"].shape[1], operands["k"].shape[1]
    length = int(operands["seqlens"][b]) if "seqlens" in operands else keys
    yield kv_span(plan.mask, tokens, queries, length, plan.tile_n, plan.tiles_move)
    if "k2" in operands:
        keys = operands["k2"].shape[1]
        length = int(operands["seqlens2"][b]) if "seqlens2" in operands else keys
        limits = [int(operands["limit2"][b, t]) for t in tokens] if "limit2" in operands else [keys]
        yield kv_span2(limits, length, plan.tile_n)
