"""Normalized in the kernel against un-normalized and divided outside: the division costs no accuracy.

Both kernels run on the same inputs. What the un-normalized one gives is divided in float64 and rounded to the inputs'
dtype: nothing better can be had from its sums. The normalized kernel multiplies by a float32 reciprocal in registers on
O's only way out of tensor memory, so it must round to the same bits nearly everywhere, and err as much against float64.
`python tests/test_normalization.py` prints the table of docs/features.md.
"""

from functools import cache

import numpy as np
import pytest

import generator
from generator.arrays import DTYPES
from generator.reference import attention, normalize
from generator.verify import random_inputs, relative_error

SHAPE = (1, 2, 2, 150, 300)
SHARE_OF_ULPS = 2e-3  # elements that may round the other way: float32's error beside a bf16 or fp16 step


def plain(q, k, v):
    pass


def large_logits(q, k, v):
    """Scores of several hundred: one key has all the weight of most rows."""
    q[:] = (q.astype(np.float32) * 40).astype(q.dtype)


def one_huge_value(q, k, v):
    v[0, 7] = 3e4


def one_huge_key(q, k, v):
    k[0, 133] = (k[0, 133].astype(np.float32) * 300).astype(k.dtype)


def tiny_values(q, k, v):
    v[:] = (v.astype(np.float32) * 1e-3).astype(v.dtype)


def equal_scores(q, k, v):
    """Uniform weights: total is the number of keys."""
    q[:] = 0


def falling_maximum(q, k, v):
    """The largest score stands in the first tile, by far: later tiles add next to nothing."""
    k[:, :4] = (k[:, :4].astype(np.float32) * 30).astype(k.dtype)


def rising_maximum(q, k, v):
    """Scores grow with the key: O is rescaled at every tile."""
    k[:] = (np.arange(k.shape[1])[None, :, None, None] / 100 * q[0, 0, 0].astype(np.float32)).astype(k.dtype)


INPUTS = (plain, large_logits, one_huge_value, one_huge_key, tiny_values, equal_scores, falling_maximum, rising_maximum)


@cache
def kernels(dtype, strategy):
    fields = {"head_dim": 64, "dtype": dtype, "causal": True, "window_left": 200, "strategy": strategy}
    return [generator.build(output=output, **fields) for output in ("normalized", "unnormalized")]


def compare(change, dtype, strategy="tiles"):
    """(error of the normalized kernel, of the quotient outside, share of elements that differ, most ulps apart)."""
    q, k, v = random_inputs(dtype, SHAPE, 64, 64, seed=0)
    change(q, k, v)
    inside, outside = kernels(dtype, strategy)
    o, lse = inside(q, k, v)
    sums, sums_lse, m = outside(q, k, v)
    np.testing.assert_allclose(lse, sums_lse, rtol=3e-7, atol=1e-6)  # one may be contracted to an fma
    quotient = normalize(sums, sums_lse, m).astype(DTYPES[dtype])
    seen = generator.tiles.seen_of(inside.spec, {})
    exact = attention(q, k, v, 64**-0.5, seen=seen).o
    bits, others = (x.view(np.int16).astype(np.int32) for x in (o, quotient))
    apart = np.abs(bits - others)
    apart[(o == 0) & (quotient == 0)] = 0
    errors = [relative_error(x.astype(np.float64), exact) for x in (o, quotient)]
    return *errors, float(np.mean(apart > 0)), int(apart.max())


@pytest.mark.parametrize(
    "dtype, strategy",
    [("bf16", "tiles"), ("fp16", "tiles"), pytest.param("bf16", "two_tiles", marks=pytest.mark.sweep)],
)
@pytest.mark.parametrize("change", INPUTS, ids=lambda change: change.__name__)
def test_division_in_the_kernel_costs_no_accuracy(change, dtype, strategy):
    inside, outside, differ, ulps = compare(change, dtype, strategy)
    assert inside <= outside * 1.001 + 1e-7
    assert differ <= SHARE_OF_ULPS
    assert ulps <= 1


def test_rows_with_one_key_are_its_value():
    """P is 1 and the reciprocal of 1 is 1: O is V to the bit."""
    for dtype in ("bf16", "fp16"):
        q, k, v = random_inputs(dtype, (1, 1, 1, 130, 130), 64, 64, seed=1)
        o, _ = generator.build(head_dim=64, dtype=dtype, causal=True, window_left=0)(q, k, v)
        assert o.tobytes() == v.tobytes()


if __name__ == "__main__":
    print(
        "| inputs | dtype | in the kernel | divided outside | elements that differ | ulps |\n|---|---|---|---|---|---|"
    )
    for change in INPUTS:
        for dtype in ("bf16", "fp16"):
            inside, outside, differ, ulps = compare(change, dtype)
            name = change.__name__.replace("_", " ")
            print(f"| {name} | {dtype} | {inside:.6e} | {outside:.6e} | {100 * differ:.3f} % | {ulps} |")
