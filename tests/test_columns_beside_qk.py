"""Strategy "columns" with the softmax of a KV tile between the steps of QK of the next one: no GPU has measured it, so
the planner takes it only where tuned.json says so, and `bespoke tune` compares it.
"""

import pytest

from generator import tuned
from generator.arch import SM90A
from generator.chunks import budget_of
from generator.columns import chunks_apart, column_order, column_tilings
from generator.compile import compile_kernel
from generator.emulator.exhaustive import Exhaustive
from generator.plan import plan_kernel, plan_tiling
from generator.run import run_observed
from generator.spec import load_spec
from generator.tune import tuning_cases
from generator.tuned import Winner
from generator.verify import compare, judge, judge_writes, random_operands, verify_kernel

SMALL = {"head_dim": 48, "p_staging": "smem", "tile_m": 64, "tile_n": 64, "kv_stage": 2}


def plan_of(**fields):
    """The best plan with this schedule, by the model."""
    spec = load_spec(arch="sm_90a", **fields)
    fitting = [tiling for tiling in column_tilings(spec, SM90A) if budget_of(spec, SM90A, tiling).fits]
    others = [tiling for tiling in fitting if not tiling.beside_pv]
    return plan_tiling(spec, min(others, key=lambda tiling: column_order(spec, SM90A, tiling)))


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_budget_at_head_dim_512_by_hand():
    plan = plan_of(head_dim=512, tile_n=64)
    usual = plan_kernel(load_spec(arch="sm_90a", head_dim=512, tile_n=64))
    # of 168 registers 16 are something else, S of two tiles 64, P 16; 72 hold 288 columns of Q: four chunks of eight
    assert plan.chunks_apart == chunks_apart(plan.spec, SM90A, plan.tiling) == 4 and usual.chunks_apart == 2
    assert plan.budget.buffer("sQ").bytes == 4 * 64 * 64 * 2 and plan.kv_stages == 8
    names = {barrier.name for barrier in plan.budget.mbarriers}
    assert "scored" not in names and {barrier.name for barrier in usual.budget.mbarriers} == names | {"scored"}
    assert "softmax beside QK" in str(plan.tiling) and not plan.looks_for_maxima


@pytest.mark.parametrize("fields", [{"causal": True, "window_left": 300}, {"kv_sources": 2}])
def test_where_maxima_are_looked_for_there_is_none(fields):
    spec = load_spec(arch="sm_90a", head_dim=512, **fields)
    assert all(tiling.beside_pv for tiling in column_tilings(spec, SM90A))


def test_the_planner_takes_it_where_it_was_measured(monkeypatch):
    spec = load_spec(arch="sm_90a", head_dim=512)
    usual = plan_kernel(spec)
    assert usual.beside_pv
    assert {reject.reason for reject in usual.rejected if not reject.candidate.beside_pv} >= {
        "fits, but its softmax beside QK has not been measured: bespoke tune compares it"
    }
    record = Winner("sm_90a", 512, 512, "full", 64, 64, False, False, {}, "H200", "today")
    monkeypatch.setattr(tuned, "_winners", lambda: {("sm_90a", 512, 512, "full"): record})
    taken = plan_kernel(spec)
    assert (taken.tile_n, taken.beside_pv) == (64, False)


def test_tune_compares_both():
    (case,) = tuning_cases([(512, 512)], ["full"], 2)
    found = [(plan.tile_n, plan.beside_pv) for plan in case.plans]
    assert found == [(96, True), (96, False), (64, True), (64, False)]
    assert len({plan.budget.smem_total for plan in case.plans}) > 1


# --- what it computes -------------------------------------------------------------------------------------------------
CASES = {  # fields, shape
    "512 causal": ({"head_dim": 512, "tile_n": 64, "causal": True}, (1, 2, 1, 130, 300)),
    "a cluster, sinks, lengths": (
        {"head_dim": 384, "tile_m": 128, "causal": True, "sink": True, "seqlens": True},
        (2, 2, 1, 150, 400),
    ),
    "odd widths, float16": ({"head_dim": 304, "head_dim_v": 208, "dtype": "fp16"}, (1, 1, 1, 70, 300)),
    "packed heads, un-normalized": (
        {"head_dim": 320, "q_heads_per_kv": 8, "output": "unnormalized", "causal": True},
        (1, 8, 1, 40, 300),
    ),
    "shared keys, V within K": (
        {"head_dim": 576, "head_dim_v": 512, "kv_shared": True, "split_kv": True, "seqlens": True},
        (2, 16, 1, 1, 700),
    ),
    "small": (SMALL, (1, 2, 1, 130, 300)),
}


def fields_of(name):
    fields, shape = CASES[name]
    return fields | {"q_heads_per_kv": shape[1] // shape[2]}


KEPT = ("512 causal", "a cluster, sinks, lengths", "small")  # in the default run


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.sweep] * (x not in KEPT)) for x in CASES])
def test_it_computes_attention(name):
    report = verify_kernel(compile_kernel(plan_of(**fields_of(name))), CASES[name][1])
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["512 causal", "small"])
def test_scores_that_jump_from_tile_to_tile(name):
    """Up and down, by more than float32's exponent and by less: references are raised, of the first tile never."""
    binary = compile_kernel(plan_of(**fields_of(name)))
    keys = binary.plan.tile_n
    for values in ((0, 20, 200, 60, 400, -50), (400, 0, 5, 10, 15, 20)):
        operands = random_operands(binary.spec, (1, 2, 1, 70, 5 * keys + 7), 0)
        operands["q"][..., 0] = 4
        for tile, value in enumerate(values):
            operands["k"][:, tile * keys : (tile + 1) * keys, :, 0] = value
        outputs = run_observed(binary, **operands).outputs
        assert not [*judge(compare(binary, operands, outputs)), *judge_writes(outputs)]


def test_every_interleaving_of_its_barriers_ends():
    proof = Exhaustive()

    def observe(gpu, outputs):
        gpu.observers.append(proof)

    report = verify_kernel(compile_kernel(plan_of(**SMALL)), (1, 1, 1, 65, 130), prepare=observe, sms=1)
    assert report.passed, str(report)
    (text,) = proof.proofs
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in text
