"""Which buffers may share bytes or columns: lifetimes as events of a kernel, and who orders them.

The events of one CTA and what orders each before the next, for a launch of TILES KV tiles:

    load Q -> QK j             q_full
    load K j -> QK j           k_full or ring_full         load V j -> PV j   v_full or ring_full
    QK j -> read S j           s_full                      read S j -> QK j + 1   s_empty
    read S j -> write P j      one thread's program
    write P j -> PV j          p_full
    QK j + 1 -> PV j           MMAs of one thread run in order, and so PV j -> QK j + 2
    PV j -> write P j + 1      o_full
    PV last -> stage O         o_full
    stage O -> store O         a fence and the warp's program

With S and P of two KV tiles (`scores` = 2), S and P of tile j lie where those of j + 2 do, read S j is before QK j + 2
only, and another warpgroup rescales O, so that PV j is not before write P j + 1.

A ring's buffer holds one chunk after another: the next is loaded once the last reader of the one before is complete.
Readers are not in the order of the loads where a chunk of K is V's too: `fewest_buffers`.

Two buffers may overlap only if, tile by tile, every use of one is ordered before every use of the other. What is not
ordered by a chain of these is taken to happen at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

TILES = 4  # of KV in the model: a tile, its neighbours, and one that is neither

Event = tuple[str, int]  # what happens, and to which KV tile (0 for what happens once)
Use = tuple[str, tuple[Event, ...]]  # "S of tile 1", and the events that touch it


class Overlap(ValueError):
    """Two buffers were to share memory although both are alive at once. The message says what nothing orders."""


def uses(name: str) -> tuple[Use, ...]:
    """The uses of a buffer or TMEM region by its name in a Budget; KeyError for one that the model does not know. sK is
    taken to be V too, as with kv_shared: PV reads it last.
    """
    tiles = range(TILES)
    once: dict[str, tuple[Event, ...]] = {
        "sQ": (("load Q", 0), *(("QK", j) for j in tiles)),
        "sO": (("stage O", 0), ("store O", 0)),
        "O": (*(("write P", j) for j in tiles), *(("PV", j) for j in tiles), ("stage O", 0)),
        "sK": tuple((what, j) for j in tiles for what in ("load K", "QK", "PV")),
        "sV": tuple((what, j) for j in tiles for what in ("load V", "PV")),
        "ring": tuple((what, j) for j in tiles for what in ("load K", "QK", "load V", "PV")),
        "peaks": (*(("write P", j) for j in tiles), ("stage O", 0)),
    }
    each = {"S": ("QK", "read S"), "P": ("write P", "PV"), "sP": ("write P", "PV")}
    if name in once:
        return ((name, once[name]),)
    return tuple((f"{name} of tile {j}", tuple((what, j) for what in each[name])) for j in tiles)


class Order(NamedTuple):
    """qk_first: the MMA warp issues QK of a tile before PV of the one before it, as in the table; else after it.
    scores: KV tiles whose S and P have places of their own.
    """

    qk_first: bool = True
    scores: int = 1


def check_overlaps(pairs: Iterable[tuple[str, str]], qk_first: bool = True, scores: int = 1) -> None:
    """Raise Overlap for the first pair of buffers, by name, that are alive at once; of S and P, those in one place.

    qk_first, scores: see Order.
    """
    order = Order(qk_first, scores)
    for one, other in pairs:
        for i, first in enumerate(uses(one)):
            for j, second in enumerate(uses(other)):
                together = {one, other} != {"S", "P"} or i % scores == j % scores
                if together and not (_before(first, second, order) or _before(second, first, order)):
                    raise Overlap(_why(one, other, first, second, order))


@cache
def fewest_buffers(rest: int, kept: int) -> int:
    """The shallowest ring through which K tiles can go of which QK alone reads the first `rest` chunks, and PV, after
    QK, the last `kept`: with fewer buffers the load of some chunk waits for a reader that waits for that load.
    """
    depth = 1
    while _waits_for_itself(rest, kept, depth):
        depth += 1
    return depth


def _waits_for_itself(rest: int, kept: int, depth: int) -> bool:
    """Whether what the load warp and the MMA warp do, each in its order, goes round in a circle: TILES tiles, chunk by
    chunk through a ring of that many buffers, QK of a tile before PV of the one before it.
    """
    size = rest + kept
    qk = [[("QK", i) for i in range(j * size, j * size + size)] for j in range(TILES)]
    pv = [[("PV", i) for i in range(j * size + rest, j * size + size)] for j in range(TILES)]
    mmas = qk[0] + [event for j in range(1, TILES) for event in qk[j] + pv[j - 1]] + pv[-1]
    loads = [("load", i) for i in range(TILES * size)]
    follows = [*zip(loads, loads[1:], strict=False), *zip(mmas, mmas[1:], strict=False)]
    for i in range(TILES * size):
        follows.append((("load", i), ("QK", i)))
        if i + depth < TILES * size:  # the last reader frees the buffer
            follows.append((("QK" if i % size < rest else "PV", i), ("load", i + depth)))
    before: dict[Event, set[Event]] = {}
    for first, second in follows:
        before.setdefault(second, set()).add(first)
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return True
    return False


def _before(first: Use, second: Use, order: Order) -> bool:
    return all(a != b and b in _after(a, order) for a in first[1] for b in second[1])


def _why(one: str, other: str, first: Use, second: Use, order: Order) -> str:
    """The two events whose order is missing, in the direction in which fewer are."""
    found = [
        ([(a, b) for a in x[1] for b in y[1] if a == b or b not in _after(a, order)], x, y)
        for x, y in ((first, second), (second, first))
    ]
    missing, x, y = min(found, key=lambda item: len(item[0]))
    a, b = missing[0]
    return f"{one} cannot lie over {other}: nothing orders {_spell(a)} ({x[0]}) before {_spell(b)} ({y[0]})"


def _spell(event: Event) -> str:
    what, tile = event
    return f"{what} {tile}" if what in ("QK", "PV", "read S", "write P", "load K", "load V") else what


@cache
def _after(event: Event, order: Order) -> frozenset[Event]:
    """Every event that is ordered after this one."""
    following = [b for a, b in _edges(order) if a == event]
    return frozenset(following).union(*(_after(b, order) for b in following))


def _edges(order: Order) -> Iterator[tuple[Event, Event]]:
    last = TILES - 1
    for j in range(TILES):
        yield ("load Q", 0), ("QK", j)
        yield ("load K", j), ("QK", j)
        yield ("load V", j), ("PV", j)
        yield ("QK", j), ("read S", j)
        yield ("read S", j), ("write P", j)
        yield ("write P", j), ("PV", j)
        if j < last:
            yield (("QK", j + 1), ("PV", j)) if order.qk_first else (("PV", j), ("QK", j + 1))
        if j < last and order.scores == 1:
            yield ("read S", j), ("QK", j + 1)
            yield ("PV", j), ("write P", j + 1)
        if j < last - 1:
            yield ("PV", j), ("QK", j + 2)
    yield ("PV", last), ("stage O", 0)
    yield ("stage O", 0), ("store O", 0)
