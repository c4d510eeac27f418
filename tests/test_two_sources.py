"""Two KV sources in one launch: against two launches that are merged, and where one of the sources has nothing."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import generator
from generator.reference import attention, merge
from generator.tiles import count_tiles, seen_of
from generator.verify import COS_MIN, LSE_ABS_MAX, cosine, random_operands, relative_error

SHAPE = (2, 4, 2, 150, 200, 90)
FIELDS = {"head_dim": 32, "q_heads_per_kv": 2, "causal": True, "window_left": 40, "seqlens": True}


def normal_operands(spec):
    """random_operands whose K and V are normal throughout, so that their lengths can be changed."""
    operands = random_operands(spec, SHAPE, seed=3)
    rng = np.random.default_rng(0)
    for name in ("k", "v", "k2", "v2"):
        operands[name][:] = rng.standard_normal(operands[name].shape)
    return operands


def parts_of(operands):
    """Both sources apart, each by the un-normalized kernel of its own mask; the second one's limits as a kernel of two
    sources whose first has no keys.
    """
    first = generator.build(output="unnormalized", strategy="tiles", **FIELDS)
    q, k, v, k2, v2 = (operands[name] for name in ("q", "k", "v", "k2", "v2"))
    yield first(q, k, v, seqlens=operands["seqlens"])
    if "limit2" in operands:
        limited = generator.build(output="unnormalized", kv_sources=2, limit2=True, strategy="tiles", **FIELDS)
        rows = {name: operands[name] for name in ("seqlens2", "limit2")}
        yield limited(q, k, v, k2, v2, seqlens=np.zeros_like(operands["seqlens"]), **rows)
        return
    plain = generator.build(head_dim=32, q_heads_per_kv=2, seqlens=True, output="unnormalized", strategy="tiles")
    yield plain(q, k2, v2, seqlens=operands["seqlens2"])


KEPT = (("two_tiles", True, True),)  # in the default run: all there is
CASES = [
    pytest.param(*case, marks=[pytest.mark.sweep] * (case not in KEPT))
    for case in product(("tiles", "two_tiles"), (False, True), (False, True))
]


@pytest.mark.parametrize("strategy, sink, limit2", CASES)
def test_one_launch_agrees_with_two_that_are_merged(strategy, sink, limit2):
    fused = generator.build(kv_sources=2, sink=sink, limit2=limit2, strategy=strategy, **FIELDS)
    operands = normal_operands(fused.spec)
    operands["seqlens2"][:] = 90, 33
    o, lse = fused(**operands)
    parts = [SimpleNamespace(o=part[0], lse=part[1], m=part[2]) for part in parts_of(operands)]
    merged_o, merged_lse = merge(parts, operands.get("sink"))
    exact = attention(*(operands[n] for n in "qkv"), 32**-0.5, seen=seen_of(fused.spec, operands))
    assert cosine(o.astype(float), merged_o) >= COS_MIN
    assert cosine(merged_o, exact.o) >= COS_MIN and cosine(o.astype(float), exact.o) >= COS_MIN
    assert relative_error(o.astype(float), merged_o) < 4e-3
    bound = 1e-5 if strategy == "tiles" else LSE_ABS_MAX  # two query tiles: part of the exponentials by a polynomial
    np.testing.assert_allclose(lse, merged_lse, atol=bound)
    np.testing.assert_allclose(lse, exact.lse, atol=bound)


@pytest.mark.parametrize("lengths, lengths2", [((0, 0), (90, 1)), ((200, 3), (0, 0)), ((0, 0), (0, 0))], ids=str)
def test_a_source_without_keys_is_as_if_it_were_not_there(lengths, lengths2):
    fused = generator.build(kv_sources=2, sink=True, strategy="tiles", **FIELDS)
    operands = normal_operands(fused.spec)
    operands["seqlens"][:], operands["seqlens2"][:] = lengths, lengths2
    o, lse = fused(**operands)
    exact = attention(*(operands[n] for n in "qkv"), 32**-0.5, seen=seen_of(fused.spec, operands))
    np.testing.assert_allclose(o.astype(float), exact.o, atol=3e-2)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-5)
    if not any((*lengths, *lengths2)):
        assert not o.any()
        np.testing.assert_allclose(lse, np.broadcast_to(operands["sink"][None, :, None], lse.shape), rtol=1e-6)


def test_tiles_of_both_sources_are_the_needed_ones():
    plan = generator.plan_kernel(generator.load_spec(kv_sources=2, limit2=True, tile_n=16, **FIELDS))
    operands = random_operands(plan.spec, SHAPE, seed=0)
    counts = count_tiles(plan, operands)
    assert counts.visited == counts.needed < counts.all
