"""reference.py against definitions written out element by element, and the size of its rounding model's error."""

import math

import ml_dtypes
import numpy as np
import pytest

from generator.reference import Seen, attention, merge, normalize, rounding_model
from generator.verify import random_inputs, relative_error

SHAPES = [(1, 1, 1, 1, 1), (2, 4, 2, 5, 7), (1, 3, 1, 7, 5), (1, 2, 2, 4, 4)]


def by_definition(q, k, v, scale, causal):
    """O and LSE, a row, a key and a column at a time."""
    batch, queries, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    o = np.zeros((batch, queries, heads, v.shape[3]))
    lse = np.full((batch, heads, queries), -np.inf)
    for b, h, i in np.ndindex(batch, heads, queries):
        seen = [j for j in range(keys) if not causal or j <= i + keys - queries]
        kv = h // group
        weights = {j: math.exp(scale * math.fsum(q[b, i, h].astype(float) * k[b, j, kv].astype(float))) for j in seen}
        if seen:
            total = math.fsum(weights.values())
            lse[b, h, i] = math.log(total)
            o[b, i, h] = sum(weights[j] * v[b, j, kv].astype(float) for j in seen) / total
    return o, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_its_definition(shape, causal):
    q, k, v = random_inputs("bf16", shape, 16, 32, seed=3)
    o, lse = by_definition(q, k, v, 0.25, causal)
    result = attention(q, k, v, 0.25, causal)
    np.testing.assert_allclose(result.o, o, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(result.lse, lse, rtol=1e-12, atol=1e-13)


def test_rows_that_see_no_key():
    """Five keys, seven queries, aligned at the bottom right: rows 0 and 1 see nothing, row 2 sees key 0 only."""
    q, k, v = random_inputs("fp16", (1, 1, 1, 7, 5), 16, 16, seed=0)
    for result in (attention(q, k, v, 0.25, True), rounding_model(q, k, v, 0.25, 2, True)):
        assert not result.o[0, :2].any()
        assert np.isneginf(result.lse[0, 0, :2]).all()
        assert np.isneginf(result.m[0, 0, :2]).all()
        assert np.isfinite(result.lse[0, 0, 2:]).all()
        np.testing.assert_allclose(result.o[0, 2, 0].astype(float), v[0, 0, 0].astype(float), rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_unnormalized_outputs_make_the_attention(causal):
    q, k, v = random_inputs("bf16", (2, 2, 1, 9, 6), 16, 16, seed=1)
    exact = attention(q, k, v, 0.3, causal)
    parts = attention(q, k, v, 0.3, causal, unnormalized=True)
    np.testing.assert_allclose(parts.merged(), exact.o, rtol=1e-12, atol=1e-14)
    seen = np.isfinite(parts.m)
    scores = np.einsum("bihd,bjd->bhij", q.astype(float), k[:, :, 0].astype(float)) * 0.3
    if not causal:
        np.testing.assert_allclose(parts.m, scores.max(axis=-1))
    assert (parts.m[seen] <= parts.lse[seen]).all()


def by_definition_with_sources(q, sources, masks, sink, scale):
    """O and LSE where masks[s](b, i, j) says whether row i sees key j of source s, and exp(sink) joins the sum."""
    batch, queries, heads, _ = q.shape
    o = np.zeros((batch, queries, heads, sources[0][1].shape[3]))
    lse = np.zeros((batch, heads, queries))
    for b, h, i in np.ndindex(batch, heads, queries):
        total = math.exp(sink[h])
        for (k, v), mask in zip(sources, masks, strict=True):
            kv = h // (heads // k.shape[2])
            for j in (j for j in range(k.shape[1]) if mask(b, i, j)):
                weight = math.exp(scale * math.fsum(q[b, i, h].astype(float) * k[b, j, kv].astype(float)))
                total += weight
                o[b, i, h] += weight * v[b, j, kv].astype(float)
        o[b, i, h] /= total
        lse[b, h, i] = math.log(total)
    return o, lse


def everything():
    """Two sources with every mask and a sink, and the same written as predicates."""
    q, k, v = random_inputs("bf16", (2, 2, 1, 6, 9), 16, 16, seed=4)
    _, k2, v2 = random_inputs("bf16", (2, 2, 1, 6, 5), 16, 16, seed=5)
    lengths, lengths2, limits = [9, 3], [4, 0], np.array([[0, 1, 2, 3, 4, 9], [3, 0, 5, 1, 2, 2]])
    sink = np.array([0.3, -1.0])
    seen = Seen(False, 3, 1, lengths, k2, v2, lengths2, limits, sink)
    masks = (
        lambda b, i, j: j < lengths[b] and -3 <= j - (i + lengths[b] - 6) <= 1,
        lambda b, i, j: j < min(lengths2[b], limits[b, i]),
    )
    return q, ((k, v), (k2, v2)), seen, masks, sink


def test_windows_lengths_sources_and_sinks_are_their_definition():
    q, ((k, v), (k2, v2)), seen, masks, sink = everything()
    o, lse = by_definition_with_sources(q, ((k, v), (k2, v2)), masks, sink, 0.25)
    result = attention(q, k, v, 0.25, seen=seen)
    np.testing.assert_allclose(result.o, o, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(result.lse, lse, rtol=1e-12, atol=1e-13)
    model = rounding_model(*(x.astype(np.float32) for x in (q, k, v)), 0.25, 4, seen=seen)
    assert relative_error(model.o.astype(float), o) < 5e-7 and np.abs(model.lse - lse).max() < 2e-6
    parts = attention(q, k, v, 0.25, seen=seen, unnormalized=True)
    np.testing.assert_allclose(parts.merged(), o, rtol=1e-12, atol=1e-14)


def test_two_launches_merge_into_the_joint_attention():
    q, ((k, v), (k2, v2)), seen, _, sink = everything()
    whole = attention(q, k, v, 0.25, seen=seen)
    first = attention(q, k, v, 0.25, unnormalized=True, seen=Seen(False, 3, 1, seen.seqlens))
    hidden = np.minimum(seen.limit2, np.array(seen.seqlens2)[:, None])
    second = attention(q, k2, v2, 0.25, unnormalized=True, seen=Seen(k2=k2, v2=v2, seqlens=[0, 0], limit2=hidden))
    o, lse = merge((first, second), sink)
    np.testing.assert_allclose(o, whole.o, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-12)


def test_partial_results_merge():
    """Two halves of the keys, merged by their LSE, are the whole: what the un-normalized form is for."""
    q, k, v = random_inputs("bf16", (1, 1, 1, 6, 8), 16, 16, seed=2)
    whole = attention(q, k, v, 0.25)
    halves = [attention(q, k[:, part], v[:, part], 0.25, unnormalized=True) for part in (slice(0, 4), slice(4, 8))]
    lse = np.logaddexp(halves[0].lse, halves[1].lse)
    merged = sum(normalize(half.o, lse, half.m) for half in halves)
    np.testing.assert_allclose(merged, whole.o, rtol=1e-12)
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "low", "high"), [("bf16", 1.5e-3, 3e-3), ("fp16", 1.8e-4, 4e-4)])
def test_rounding_model_errs_by_the_format(dtype, low, high):
    """Rounding O alone gives about 2^-9 / sqrt(3) x 1.4 in bf16, an eighth of it in fp16."""
    q, k, v = random_inputs(dtype, (1, 2, 2, 130, 300), 64, 64, seed=0)
    exact = attention(q, k, v, 0.125, True)
    model = rounding_model(q, k, v, 0.125, 128, True)
    assert low < relative_error(model.o.astype(float), exact.o) < high
    assert np.abs(model.lse - exact.lse).max() < 2e-6


def test_rounding_model_without_rounding_is_exact_to_float32():
    q, k, v = (x.astype(np.float32) for x in random_inputs("bf16", (1, 2, 1, 33, 70), 32, 32, seed=0))
    exact = attention(q, k, v, 0.2)
    for tile_n in (16, 64, 128):
        model = rounding_model(q, k, v, 0.2, tile_n)
        assert relative_error(model.o.astype(float), exact.o) < 5e-7


def test_rounding_model_rounds_p_against_a_reference_that_stays():
    """One row, two tiles of one key: the second score is 1 above the first, so against it P is exp(-1) and 1, and
    against the first one 1 and exp(1), which bf16 rounds to 2.71875.
    """
    q, k, v = (np.array(x, ml_dtypes.bfloat16).reshape(1, -1, 1, 1) for x in ([1], [0, 1], [0, 1]))
    follows = rounding_model(q, k, v, 1.0, 1, unnormalized=True)
    stays = rounding_model(q, k, v, 1.0, 1, unnormalized=True, skip_log2=8.0)
    moves = rounding_model(q, k, v, 8.0, 1, unnormalized=True, skip_log2=8.0)  # by 8 log2(e) = 11.5
    assert (follows.o.item(), follows.m.item()) == (1, 1)
    assert (stays.o.item(), stays.m.item()) == (2.71875, 0)
    assert (moves.o.item(), moves.m.item()) == (1, 8)
    for model in (follows, stays):
        np.testing.assert_allclose(model.lse, np.log(1 + np.e), rtol=1e-6)


def test_rounding_model_keeps_more_in_an_unnormalized_output():
    q, k, v = random_inputs("bf16", (1, 1, 1, 64, 256), 64, 64, seed=0)
    exact = attention(q, k, v, 0.125)
    normalized = rounding_model(q, k, v, 0.125, 128)
    unnormalized = rounding_model(q, k, v, 0.125, 128, unnormalized=True)
    assert normalized.o.dtype == np.dtype(ml_dtypes.bfloat16) or normalized.o.dtype == np.float32
    assert relative_error(unnormalized.merged(), exact.o) < relative_error(normalized.o.astype(float), exact.o)


def test_random_inputs_are_the_same_everywhere():
    first, second = (random_inputs("bf16", (1, 1, 1, 2, 3), 16, 16, seed=5) for _ in range(2))
    assert all((a.view(np.uint16) == b.view(np.uint16)).all() for a, b in zip(first, second, strict=True))
    assert [x.shape for x in first] == [(1, 2, 1, 16), (1, 3, 1, 16), (1, 3, 1, 16)]
    assert (
        first[0].ravel()[:3].astype(float).tolist()
        != random_inputs("bf16", (1, 1, 1, 2, 3), 16, 16, 6)[0].ravel()[:3].astype(float).tolist()
    )
