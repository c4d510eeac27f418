"""verify.py: good outputs pass, and each way of being wrong fails with the figure and the bound that it missed."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import generator
from generator import verify
from generator.arrays import CallError, Output, output_layout, view_of
from generator.emulator.errors import Deadlock, Hazard, UnsupportedInstruction
from generator.reference import rounding_model
from generator.run import Run
from generator.spec import load_spec
from generator.verify import compare, judge, judge_writes, random_inputs, verify_kernel

SHAPE = (1, 2, 1, 40, 30)  # causal: rows 0 to 9 see no key


def case(**fields):
    """A stand-in for a Binary, inputs, and outputs that the rounding model filled."""
    spec = load_spec(head_dim=32, q_heads_per_kv=2, causal=True, **fields)
    q, k, v = random_inputs(spec.dtype, SHAPE, 32, 32, seed=0)
    outputs = [Output(*layout) for layout in output_layout(spec, view_of("q", q))]
    model = rounding_model(q, k, v, 32**-0.5, 16, True, spec.unnormalized)
    for output in outputs:
        output.array[:] = getattr(model, output.name)
    return SimpleNamespace(spec=spec, tile_n=16, skip_log2=0.0), {"q": q, "k": k, "v": v}, outputs


def failures(binary, inputs, outputs):
    return judge(compare(binary, inputs, outputs)) + judge_writes(outputs)


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "fp16"}, {"output": "unnormalized"}, {"output": "unnormalized", "dtype": "fp16"}], ids=str
)
def test_the_model_itself_passes(fields):
    binary, inputs, outputs = case(**fields)
    figures = compare(binary, inputs, outputs)
    assert failures(binary, inputs, outputs) == []
    assert figures.rel_err == figures.rel_err_model > 1e-5
    assert figures.rel_err_bound == 2 * figures.rel_err_model
    assert figures.cos > 0.99999
    assert figures.lse_max_abs_err < 1e-6
    assert 0 < figures.max_abs_err < 0.02


def test_one_percent_is_too_much():
    binary, inputs, outputs = case()
    outputs[0].array[:] = outputs[0].array.astype(float) * 1.01
    (failure,) = failures(binary, inputs, outputs)
    assert failure.startswith("rel_err 1.0")
    assert "of the rounding model" in failure


def test_one_wrong_row_is_seen():
    binary, inputs, outputs = case()
    outputs[0].array[0, 25, 1] = outputs[0].array[0, 24, 1]
    messages = failures(binary, inputs, outputs)
    assert [message.split()[0] for message in messages] == ["rel_err", "cos"]
    assert messages[1].endswith("< 0.99999")


def test_nan_misses_every_bound():
    binary, inputs, outputs = case()
    outputs[0].array[0, 0, 0, 0] = np.nan
    outputs[1].array[0, 1, 39] = np.nan
    messages = failures(binary, inputs, outputs)
    assert [message.split()[:2] for message in messages] == [
        ["rel_err", "nan"],
        ["cos", "nan"],
        ["lse_max_abs_err", "nan"],
    ]


def test_lse_error_has_its_own_bound():
    binary, inputs, outputs = case()
    outputs[1].array[0, 1, 20] += 2e-4
    (failure,) = failures(binary, inputs, outputs)
    assert failure.startswith("lse_max_abs_err 2.00")
    assert failure.endswith("> 0.0001")


@pytest.mark.parametrize("row", [0, 20])
def test_infinite_lse_must_be_exactly_where_no_key_is_seen(row):
    binary, inputs, outputs = case()
    outputs[1].array[0, 1, row] = -30.0 if row == 0 else -np.inf
    assert failures(binary, inputs, outputs) == ["lse: 1 rows are -inf in one of kernel and reference only"]


def test_lse_is_not_judged_when_the_kernel_has_none():
    binary, inputs, outputs = case(lse=False)
    assert compare(binary, inputs, outputs).lse_max_abs_err is None
    assert failures(binary, inputs, outputs) == []


def test_m_must_belong_to_o_and_lse():
    binary, inputs, outputs = case(output="unnormalized")
    outputs[2].array[0, 0, 30] += 0.5  # no longer what the exponentials were taken against
    assert [message.split()[0] for message in failures(binary, inputs, outputs)][:1] == ["rel_err"]


def test_another_reference_is_as_good():
    """m need not be the row maximum, as long as O was taken against it."""
    binary, inputs, outputs = case(output="unnormalized")
    outputs[2].array[:] -= 1
    outputs[0].array[:] *= math.e
    assert failures(binary, inputs, outputs) == []


@pytest.mark.parametrize(("row", "value"), [(0, 0.0), (20, -np.inf), (20, np.inf), (20, 50.0)])
def test_impossible_m_is_named(row, value):
    binary, inputs, outputs = case(output="unnormalized")
    outputs[2].array[0, 1, row] = value
    assert "m: 1 rows are not finite, above LSE, or not -inf where no key is seen" in failures(binary, inputs, outputs)


def test_unwritten_and_outside_elements_are_counted():
    binary, inputs, outputs = case()
    fresh = Output("lse", (1, 2, 40), "float32")
    fresh.array[0, 0] = outputs[1].array[0, 0]
    fresh.storage[3] = 0
    messages = failures(binary, inputs, [outputs[0], fresh])
    assert "lse: 40 of 80 elements were not written" in messages
    assert "lse: 1 elements outside of it were written" in messages


def test_one_key_allows_no_more_than_float32():
    """With one key P is 1 and O is V: the model is exact, so the bound is float32's own error."""
    spec = load_spec(head_dim=32)
    q, k, v = random_inputs("bf16", (1, 1, 1, 3, 1), 32, 32, seed=0)
    outputs = [Output(*layout) for layout in output_layout(spec, view_of("q", q))]
    outputs[0].array[:] = np.broadcast_to(v, (1, 3, 1, 32))
    outputs[1].array[:] = np.einsum("bihd,bjhd->bhi", q.astype(float), k.astype(float)) * 32**-0.5
    binary = SimpleNamespace(spec=spec, tile_n=128, skip_log2=0.0)
    assert failures(binary, {"q": q, "k": k, "v": v}, outputs) == []
    outputs[0].array[0, 0, 0, 0] *= 1.01
    (failure,) = failures(binary, {"q": q, "k": k, "v": v}, outputs)
    assert failure.endswith("> 9.537e-07 (float32)")


def test_figures_of_zero_tensors():
    zero, one = np.zeros(4), np.ones(4)
    assert (verify.cosine(zero, zero), verify.cosine(one, zero), verify.cosine(one, 2 * one)) == (1.0, 0.0, 1.0)
    assert (verify.relative_error(zero, zero), verify.relative_error(one, zero)) == (0.0, math.inf)
    assert verify.relative_error(1.5 * one, one) == 0.5


# --- whole verifications ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel():
    return generator.build(head_dim=32, q_heads_per_kv=2, causal=True)


def test_a_kernel_is_verified(kernel):
    report = verify_kernel(kernel.binary, (2, 2, 1, 130, 129), seed=4)
    assert report.passed, str(report)
    row = report.as_dict()
    assert list(row)[:10] == [
        "kernel",
        "shape",
        "backend",
        "cos",
        "rel_err",
        "max_abs_err",
        "lse_max_abs_err",
        "hazards",
        "seconds",
        "passed",
    ]
    assert (row["kernel"], row["shape"], row["backend"]) == ("fmha_sm100_d32_gqa2_causal", "2,2,1,130,129", "emulator")
    assert row["cos"] > 0.99999 and row["rel_err"] <= row["rel_err_bound"] and row["lse_max_abs_err"] <= 1e-4
    assert (row["hazards"], row["passed"], row["failures"], row["seed"]) == (0, True, [], 4)
    assert str(report).endswith("on emulator, seed 4: passed")


@pytest.mark.parametrize(
    ("error", "hazards"), [(Hazard("bytes of sV"), 1), (Deadlock("warp 4"), 1), (UnsupportedInstruction("foo"), 0)]
)
def test_emulator_errors_are_failed_reports(kernel, monkeypatch, error, hazards):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(verify, "run_observed", fail)
    report = verify_kernel(kernel.binary, (1, 2, 1, 4, 4))
    assert (report.passed, report.hazards) == (False, hazards)
    assert report.failures == (f"{type(error).__name__}: {error}",)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["rel_err"] is None


def test_a_failing_row_is_valid_json(kernel, monkeypatch):
    """Nothing was written: every figure is NaN, and the row must still be JSON."""

    def unwritten(binary, q, **options):
        return Run(tuple(Output(*layout) for layout in output_layout(binary.spec, view_of("q", q))), 0.0, ())

    monkeypatch.setattr(verify, "run_observed", unwritten)
    report = verify_kernel(kernel.binary, (1, 2, 1, 4, 4))
    row = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (row["passed"], row["cos"], row["rel_err"]) == (False, None, None)
    assert "o: 256 of 256 elements were not written" in row["failures"]
    assert "fmha_sm100_d32_gqa2_causal [1,2,1,4,4] on emulator, seed 0: rel_err nan" in str(report)


def test_a_shape_of_other_groups_is_bad_input(kernel):
    with pytest.raises(CallError, match="heads"):
        verify_kernel(kernel.binary, (1, 3, 1, 4, 4))
