"""Which keys a query sees, and which KV tiles a CTA therefore visits: templates/_mask.py.j2 in Python.

A query token sees an interval [first, end) of each source's keys. Source 1 is aligned at the bottom right against the
batch entry's own KV length L: token t stands at key t + L - Sq; causal ends at it, window_left keys before it and
window_right keys after it are seen (both masks hold where both are given). Source 2 shows every token its first keys:
L2 of them, or fewer with limit2. Bounds never fall from a token to the next in source 1, so a tile of tokens sees the
keys from its first token's `first` to its last token's `end`.

A CTA visits the tiles of source 1 that every row sees whole, then those that need a mask, then those of source 2 that
need one, then the whole ones: the i-th tile of a source is start + i, wrapped at `stop`. With two query tiles it loads
what one of them sees, in order, and each visits its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .spec import KernelSpec


@dataclass(frozen=True)
class Mask:
    """What of a specification decides who sees what. right: keys after the diagonal, None for all."""

    left: int | None
    right: int | None
    lengths: bool
    sources: int
    limits: bool

    @property
    def windowed(self) -> bool:
        """Tokens see intervals that move with them."""
        return self.left is not None or self.right is not None

    @property
    def first_can_be_empty(self) -> bool:
        """A token can see no key of source 1."""
        return self.right is not None or self.lengths

    @property
    def second_can_be_empty(self) -> bool:
        """A token can see no key of source 2, or there is none."""
        return self.sources == 1 or self.lengths or self.limits

    @property
    def can_be_empty(self) -> bool:
        """A token, and a whole tile of them, can see no key at all."""
        return self.first_can_be_empty and self.second_can_be_empty

    @property
    def rows_differ(self) -> bool:
        """A tile that one row sees can be hidden from another."""
        return self.windowed or self.limits


def mask_of(spec: KernelSpec) -> Mask:
    right = 0 if spec.causal else spec.window_right
    return Mask(spec.window_left, right, spec.seqlens, spec.kv_sources, spec.limit2)


class Span(NamedTuple):
    """KV tiles of one source that a CTA visits: how many, how many of them every row sees whole, where it starts, where
    it wraps, and the key that the first of all tiles begins with.
    """

    tiles: int
    whole: int
    start: int
    stop: int
    origin: int = 0

    @property
    def begin(self) -> int:
        """The first of them from the left."""
        return self.stop - self.tiles

    def tile(self, i: int) -> int:
        """The i-th tile that is visited."""
        tile = self.start + i
        return tile if tile < self.stop else tile - self.tiles


def seen_keys(mask: Mask, token: int, queries: int, length: int) -> tuple[int, int]:
    """[first, end) of source 1 that a token sees; empty when end is 0."""
    diagonal = token + length - queries
    first = 0 if mask.left is None else max(diagonal - mask.left, 0)
    end = length if mask.right is None else max(min(diagonal + 1 + mask.right, length), 0)
    return first, end


def kv_span(mask: Mask, tokens: range, queries: int, length: int, tile_n: int, moves: bool = False) -> Span:
    """Of source 1, for a CTA with these tokens (all below `queries`). moves: its tiles begin where it begins to see."""
    first, end_of_first = seen_keys(mask, tokens[0], queries, length)
    first_of_last, end = seen_keys(mask, tokens[-1], queries, length)
    origin = first if moves else 0
    begin, stop = (first - origin) // tile_n, -(-(end - origin) // tile_n)
    start = -(-(first_of_last - origin) // tile_n)
    whole = max((end_of_first - origin) // tile_n - start, 0)
    return Span(max(stop - begin, 0), whole, start, stop, origin)


def kv_span2(limits: Sequence[int], length: int, tile_n: int) -> Span:
    """Of source 2, for a CTA whose tokens have these limits: its masked tiles, then those that every row sees whole."""
    seen = [min(max(limit, 0), length) for limit in limits]
    stop, start = -(-max(seen) // tile_n), min(seen) // tile_n
    return Span(stop, start, start, stop)


def loaded_tiles(spans: Sequence[Span]) -> int:
    """KV tiles of one source that a CTA loads for query tiles that visit these: from the first to the last of any."""
    seen = [span for span in spans if span.tiles]
    return max(span.stop for span in seen) - min(span.begin for span in seen) if seen else 0


class TileCounts(NamedTuple):
    """KV tiles over all query tiles of a launch: visited, seen by some row of the query tile, and in the tensors; and
    loaded, over all CTAs: two query tiles of one share what both visit.
    """

    visited: int
    needed: int
    all: int
    loaded: int

    def __str__(self) -> str:
        text = f"{self.visited}/{self.needed}/{self.all}"
        return text if self.loaded == self.visited else f"{text}, {self.loaded} loaded"
