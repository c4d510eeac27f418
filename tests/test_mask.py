"""mask.py, the template's mask arithmetic in Python, against the definition; kernels' own counts against both."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import generator
from generator.mask import Mask, kv_span, kv_span2, mask_of, seen_keys
from generator.reference import Seen
from generator.run import run_observed
from generator.spec import load_spec
from generator.tiles import count_tiles
from generator.verify import random_operands

WINDOWS = st.none() | st.integers(0, 40) | st.just(1 << 30)


@settings(max_examples=300, deadline=None)
@given(
    left=WINDOWS,
    right=WINDOWS,
    queries=st.integers(1, 60),
    keys=st.integers(1, 80),
    cut=st.integers(0, 80),
    tokens=st.sampled_from([1, 4, 16]),
    tile_n=st.sampled_from([8, 16]),
)
def test_spans_are_those_of_the_definition(left, right, queries, keys, cut, tokens, tile_n):
    """Every tile that a row sees is visited once, no other is, and those without a mask are seen whole by every row."""
    length = max(keys - cut, 0)
    mask = Mask(left, right, lengths=True, sources=1, limits=False)
    seen = Seen(left=left, right=right, seqlens=[length]).first(0, queries, keys)
    for first in range(0, queries, tokens):
        rows = range(first, min(first + tokens, queries))
        span = kv_span(mask, rows, queries, length, tile_n)
        check_span(span, seen[rows.start : rows.stop], tile_n)
        for row in rows:
            low, end = seen_keys(mask, row, queries, length)
            expected = np.flatnonzero(seen[row])
            assert list(range(low, end) if end else ()) == list(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=16), st.integers(0, 80), st.sampled_from([8, 16]))
def test_spans_of_the_second_source_are_those_of_the_definition(limits, length, tile_n):
    source = SimpleNamespace(shape=(1, 80, 1, 16))
    seen = Seen(k2=source, seqlens2=[length], limit2=[limits]).second(0, len(limits))
    check_span(kv_span2(limits, length, tile_n), seen, tile_n, whole_last=True)


def check_span(span, seen, tile_n, whole_last=False):
    needed = [tile for tile in range(-(-seen.shape[1] // tile_n)) if seen[:, tile * tile_n :][:, :tile_n].any()]
    visited = [span.tile(i) for i in range(span.tiles)]
    assert sorted(visited) == needed
    assert 0 <= span.whole <= span.tiles
    for tile in visited[span.tiles - span.whole :] if whole_last else visited[: span.whole]:
        block = seen[:, tile * tile_n : (tile + 1) * tile_n]
        assert block.shape[1] == tile_n and block.all()


def test_a_mask_knows_what_can_be_empty():
    plain, causal, left = (mask_of(load_spec(head_dim=64, **f)) for f in ({}, {"causal": True}, {"window_left": 3}))
    assert not plain.can_be_empty and not plain.rows_differ
    assert causal.can_be_empty and causal.rows_differ and causal.right == 0
    assert not left.can_be_empty and left.rows_differ
    assert mask_of(load_spec(head_dim=64, seqlens=True)).can_be_empty
    assert mask_of(load_spec(head_dim=64, causal=True, window_right=7)).right == 0  # both masks hold


SHAPE = (3, 2, 2, 150, 270, 200)
COUNTED = [
    {},
    {"causal": True},
    {"seqlens": True},
    {"causal": True, "window_left": 20, "seqlens": True},
    {"window_left": 0, "window_right": 0},
    {"window_left": 1 << 30, "window_right": 1 << 30},
    {"window_right": 33, "seqlens": True},
    {"kv_sources": 2, "causal": True, "limit2": True},
    {"kv_sources": 2, "window_left": 9, "seqlens": True, "limit2": True, "q_heads_per_kv": 4},
    {"kv_sources": 2, "seqlens": True},
]


@pytest.mark.parametrize("fields", COUNTED, ids=str)
def test_kernels_execute_the_tiles_that_are_needed(fields):
    """QK of a tile is head_dim / 16 MMAs, PV tile_n / 16; a K or V tile of 16 columns is one TMA load, Q another."""
    kernel = generator.build(head_dim=16, tile_n=32, strategy="tiles", **fields)
    batch, heads, kv_heads, *lengths = SHAPE
    shape = (batch, kv_heads * kernel.spec.q_heads_per_kv, kv_heads, *lengths)
    operands = random_operands(kernel.spec, shape, seed=1)
    counts = count_tiles(kernel.plan, operands)
    assert counts.visited == counts.needed <= counts.all
    (launch,) = run_observed(kernel.binary, **operands).launches
    mmas = sum(n for name, n in launch.opcodes.items() if name.startswith("tcgen05.mma."))
    loads = sum(
        n for name, n in launch.opcodes.items() if name.startswith("cp.async.bulk.tensor.") and "mbarrier" in name
    )
    assert mmas == counts.visited * (1 + 2)
    assert 0 <= loads - 2 * counts.visited <= np.prod(launch.grid)


def test_a_window_leaves_most_tiles_alone():
    fields = {"head_dim": 64, "causal": True, "window_left": 127}
    plan = generator.plan_kernel(load_spec(strategy="tiles", **fields))
    operands = {"q": np.empty((1, 4096, 1, 64)), "k": np.empty((1, 4096, 1, 64))}
    assert count_tiles(plan, operands) == (63, 63, 1024, 63)
    pairs = generator.plan_kernel(load_spec(strategy="two_tiles", **fields))
    assert count_tiles(pairs, operands) == (63, 63, 1024, 47)
    operands["seqlens"] = np.array([0])
    plan = generator.plan_kernel(load_spec(strategy="tiles", seqlens=True, **fields))
    assert count_tiles(plan, operands) == (0, 0, 1024, 0)
