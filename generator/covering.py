"""Covering designs: few rows in which every pair of values of two factors meets. Deterministic and plain greedy.

A row is a dict, factor -> value. Which rows there can be is the caller's to say (`allowed`), so that a pair counts as
impossible only when no completion of it that was tried is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Factors = Mapping[str, Sequence[Any]]
Row = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs_of(row: Mapping[str, Any], factors: Factors) -> set[Pair]:
    """The pairs that meet in a row, of the factors that there are."""
    return {(a, row[a], b, row[b]) for a, b in combinations(factors, 2)}


def all_pairs(factors: Factors) -> list[Pair]:
    return [(a, x, b, y) for a, b in combinations(factors, 2) for x, y in product(factors[a], factors[b])]


def cover(
    factors: Factors,
    rows: Iterable[Row],
    allowed: Callable[[Row], bool],
    forbidden: Container[Pair] = (),
    orders: int = 16,
    tries: int = 32,
) -> tuple[list[Row], list[Pair]]:
    """(rows to add so that every pair meets but the forbidden ones, pairs for which no allowed row was found).

    For each pair that is missing, rows are grown around it, factor by factor in `orders` orders with the value that
    meets the most missing pairs, then changed a value at a time, `tries` times at most. The allowed row with the most
    missing pairs is taken.
    """
    wanted = all_pairs(factors)
    met = {pair for row in rows for pair in pairs_of(row, factors)}
    added: list[Row] = []
    impossible: list[Pair] = []
    for pair in wanted:
        if pair in met or pair in forbidden:
            continue
        missing = {other for other in wanted if other not in met}
        grown = [row for turn in range(orders) for row in _grown(factors, pair, missing, forbidden, turn, tries)]
        grown = [row for row in grown if not any(other in forbidden for other in pairs_of(row, factors))]
        grown.sort(key=lambda row: -len(pairs_of(row, factors) & missing))  # stable: the first of equals
        row = next((row for row in grown if allowed(row)), None)
        if row is None:
            impossible.append(pair)
            continue
        added.append(row)
        met |= pairs_of(row, factors)
    return added, impossible


def prune(factors: Factors, rows: Sequence[Row], kept: Callable[[Row], bool]) -> list[Row]:
    """The rows without those, from the last on, whose pairs all meet elsewhere; rows that are `kept` stay."""
    remaining = list(rows)
    for row in reversed(rows):
        others = [other for other in remaining if other is not row]
        elsewhere = {pair for other in others for pair in pairs_of(other, factors)}
        if not kept(row) and pairs_of(row, factors) <= elsewhere:
            remaining = others
    return remaining


def _grown(
    factors: Factors, pair: Pair, missing: set[Pair], forbidden: Container[Pair], turn: int, tries: int
) -> Iterable[Row]:
    """Rows with the pair in them: the greedy one, then the same with one value after another moved on."""
    a, x, b, y = pair
    row = {a: x, b: y}
    others = [name for name in factors if name not in row]
    others = others[turn % len(others) :] + others[: turn % len(others)]
    for name in others:
        gains = {}
        for value in factors[name]:
            pairs = list(_with(factors, row, name, value))
            if not any(other in forbidden for other in pairs):
                gains[value] = sum(other in missing for other in pairs)
        if not gains:
            return
        row[name] = max(gains, key=gains.get)
    yield dict(row)
    for step in range(tries):
        name = others[-1 - step % len(others)]
        values = factors[name]
        row[name] = values[(values.index(row[name]) + 1) % len(values)]
        yield dict(row)


def _with(factors: Factors, row: Row, name: str, value: Any) -> Iterable[Pair]:
    """The pairs that a value makes with those of a row that is not complete."""
    order = list(factors)
    for other, theirs in row.items():
        first = order.index(name) < order.index(other)
        yield (name, value, other, theirs) if first else (other, theirs, name, value)
