"""Sampled rows are those of the whole reference, and an error anywhere in them shows."""

import ml_dtypes
import numpy as np
import pytest

from generator.reference import attention
from generator.sample import HEADS, ROWS, take_sample
from generator.spec import load_spec
from generator.tiles import seen_of
from generator.verify import random_operands

CASES = (
    {"head_dim": 16},
    {"head_dim": 16, "causal": True, "q_heads_per_kv": 2},
    {"head_dim": 32, "head_dim_v": 16, "window_left": 20, "window_right": 7, "sink": True},
    {"head_dim": 16, "causal": True, "seqlens": True, "sink": True},
    {"head_dim": 16, "kv_sources": 2, "limit2": True, "seqlens": True},
    {"head_dim": 32, "head_dim_v": 16, "kv_shared": True, "dtype": "fp16"},
)


def case(fields, shape=(3, 4, 4, 90, 131, 40)):
    spec = load_spec(fields)
    shape = (shape[0], shape[1], shape[2] // spec.q_heads_per_kv, *shape[3:])
    operands = random_operands(spec, shape, seed=1)
    if spec.seqlens:  # NaN past a length is verify's, not a benchmark's
        operands = {name: np.nan_to_num(x) if name in ("k", "k2") else x for name, x in operands.items()}
    k = operands["k"]
    v = operands.get("v", k[..., : spec.v_dim])
    exact = attention(operands["q"], k, v, spec.head_dim**-0.5, seen=seen_of(spec, operands))
    return spec, operands, exact


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_sample_is_the_reference_of_its_rows(fields):
    spec, operands, exact = case(fields)
    sample = take_sample(spec, operands)
    assert len(sample.heads) == HEADS and len(sample.rows) == ROWS
    assert {0, 1, 88, 89} <= set(sample.rows) and sample.heads[:2] == ((0, 0), (2, 3))
    for i, (b, h) in enumerate(sample.heads):
        np.testing.assert_allclose(sample.o[i], exact.o[b, list(sample.rows), h], atol=1e-12)
        np.testing.assert_allclose(sample.lse[i], exact.lse[b, h, list(sample.rows)], atol=1e-12)
    assert sample.o_error(exact.o) < 1e-12 and sample.lse_error(exact.lse) < 1e-12


def test_torch_tensors_give_the_same_sample():
    torch = pytest.importorskip("torch")
    spec, operands, exact = case(CASES[3])
    tensors = {}
    for name, array in operands.items():
        bits = array.dtype == np.dtype(ml_dtypes.bfloat16)
        tensor = torch.from_numpy(array.view(np.int16) if bits else array)
        tensors[name] = tensor.view(torch.bfloat16) if bits else tensor
    ours, theirs = take_sample(spec, operands), take_sample(spec, tensors)
    np.testing.assert_array_equal(ours.o, theirs.o)
    assert theirs.o_error(torch.from_numpy(exact.o)) < 1e-12


def test_unnormalized_output_is_compared_as_attention():
    spec, operands, exact = case({"head_dim": 16, "output": "unnormalized"})
    sample = take_sample(spec, operands)
    weight = np.exp(exact.lse - exact.m).transpose(0, 2, 1)[..., None]
    assert sample.o_error(exact.o * weight, exact.lse, exact.m) < 1e-12
    assert sample.o_error(exact.o * weight) > 1


def test_errors_show():
    spec, operands, exact = case(CASES[3])
    sample = take_sample(spec, operands)
    b, h = sample.heads[0]
    wrong = exact.o.copy()
    wrong[b, sample.rows[5], h] += 1
    assert sample.o_error(wrong) > 0.01
    wrong[b, sample.rows[5], h] = np.nan
    assert not sample.o_error(wrong) <= 1
    lse = exact.lse.copy()
    lse[b, h, sample.rows[5]] = -np.inf
    assert sample.lse_error(lse) == np.inf


def test_few_rows_and_heads_are_all_of_them():
    spec, operands, exact = case({"head_dim": 16}, (1, 1, 1, 1, 5))
    sample = take_sample(spec, operands)
    assert sample.heads == ((0, 0),) and sample.rows == (0,)
    np.testing.assert_allclose(sample.o[0], exact.o[0, :, 0], atol=1e-12)
