"""tune.py and tuned.py: which plans are compared, who wins, what the table keeps, and what a deadline cuts off."""

import json
import math
from dataclasses import replace

import pytest

from generator import tuned
from generator.arch import ARCHS
from generator.chunks import budget_of
from generator.plan import DoesNotFit, plan_kernel, plan_tiling
from generator.resources import tuned_path
from generator.spec import SpecError, load_spec
from generator.timing import Timing
from generator.tune import (
    ARCH,
    HEAD_DIMS,
    Candidate,
    Deadline,
    Result,
    compiled_cases,
    parse_head_dims,
    parse_masks,
    picked_of_best,
    ranked_tiles,
    schedules,
    tune_cases,
    tuning_cases,
)
from generator.tuned import Winner, merged, read_winners, spelled
from generator.tuned import winner as winner_of
from generator.warpgroups import model_preference, warpgroup_tilings

SM90 = ARCHS[ARCH]


def spec_of(head_dim, **fields):
    return load_spec(arch=ARCH, head_dim=head_dim, **fields)


def winner(head_dim, mask="full", **fields):
    usual = {
        "tile_m": 128,
        "tile_n": 128,
        "turns": True,
        "beside_pv": True,
        "v_keys": 0,
        "tflops": {"4096": 1},
        "device": "d",
        "date": "t",
    }
    return Winner(ARCH, head_dim, head_dim, mask, **{**usual, **fields})


class Ticks:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_tiles_are_distinct_fitting_and_in_the_models_order(head_dim):
    spec = spec_of(head_dim)
    ranked = ranked_tiles(spec, SM90)
    assert len({(tiling.tile_m, tiling.tile_n) for tiling in ranked}) == len(ranked) > 4
    assert all(budget_of(spec, SM90, tiling).fits for tiling in ranked)
    keys = [model_preference(spec, SM90, tiling) for tiling in ranked]
    assert keys == sorted(keys)
    best = {
        model_preference(spec, SM90, item) for item in warpgroup_tilings(spec, SM90) if budget_of(spec, SM90, item).fits
    }
    assert keys[0] == min(best)


def test_schedules_are_all_there_are():
    usual = plan_kernel(spec_of(128)).tiling
    found = schedules(usual, SM90)
    assert found[0] == usual and len(found) == 4 == len({(item.turns, item.beside_pv) for item in found})
    alone = replace(usual, tile_m=64, turns=False)
    assert schedules(alone, SM90) == [alone]


def test_cases_hold_the_models_pick():
    cases = tuning_cases([(64, 64), (192, 128)], ["full", "causal"], 2)
    assert [str(case) for case in cases] == [
        "head_dim 64 full",
        "head_dim 64 causal",
        "head_dim 192/128 full",
        "head_dim 192/128 causal",
    ]
    for case in cases:
        assert case.picked in [plan.tiling for plan in case.plans]
        tiles = {(plan.tile_m, plan.tile_n) for plan in case.plans}
        first = {(tiling.tile_m, tiling.tile_n) for tiling in ranked_tiles(case.spec, SM90)[:2]}
        known = winner_of(case.spec)
        assert tiles == first | ({(known.tile_m, known.tile_n)} if known else set())


def test_wide_head_dims_have_candidates_of_columns():
    (case,) = tuning_cases([(512, 512)], ["causal"], 3)
    assert {(plan.tiling.strategy, plan.tile_m) for plan in case.plans} == {("columns", 128)}
    found = [(plan.tile_n, plan.tiling.v_keys) for plan in case.plans]
    assert found[:3] == [(96, 16), (64, 16), (128, 16)] and case.picked == case.plans[0].tiling
    taken = plan_kernel(case.spec).tiling
    assert (taken.tile_n, taken.v_keys) in found, "the table's is among them"


def test_a_measured_tile_of_columns_is_taken(monkeypatch):
    found = winner(512, tile_m=64, tile_n=64, turns=False, v_keys=32)
    monkeypatch.setattr(tuned, "_winners", lambda: {found.key: found})
    spec = load_spec(arch="sm_90a", head_dim=512)
    taken = plan_kernel(spec).tiling
    assert (taken.tile_m, taken.tile_n, taken.v_keys) == (64, 64, 32)
    assert plan_kernel(load_spec(spec, causal=True)).tile_n == 96, "the model's"
    assert plan_kernel(load_spec(spec, q_heads_per_kv=8)).tile_n == 64
    assert plan_kernel(load_spec(spec, kv_shared=True, tile_n=64)).tiling.v_keys == 0, "V in K was not measured"
    why = {reject.reason for reject in plan_kernel(spec).rejected if reject.candidate.tile_n == 96}
    assert "fits, but another tile was measured to be faster" in why


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(SpecError, match="^head_dim = 24: must be a multiple of 16"):
        tuning_cases([(24, 24)], ["full"], 1)
    with pytest.raises(SpecError, match="^head_dim = '6x': must be whole numbers, or pairs"):
        parse_head_dims("64,6x")
    with pytest.raises(SpecError, match="^mask = 'window': must be of full, causal; for example"):
        parse_masks("full,window")


def test_lists():
    assert parse_head_dims("64, 192/128,64") == [(64, 64), (192, 128)]
    assert parse_masks("causal,full,causal") == ["causal", "full"]
    assert HEAD_DIMS[0] == 16 and HEAD_DIMS[-1] == 256 and len(HEAD_DIMS) == 16


def test_a_plan_of_a_tiling_is_that_tiling():
    spec = spec_of(128)
    chosen = plan_kernel(spec)
    assert plan_tiling(spec, chosen.tiling) == replace(chosen, rejected=())
    with pytest.raises(DoesNotFit, match=r"^tiling = .*: does not fit: "):
        plan_tiling(spec, replace(chosen.tiling, tile_m=192, tile_n=256))


# --- results ----------------------------------------------------------------------------------------------------------


def candidate(tiling, *milliseconds, failure="", wrong=False):
    tokens = (4096, 16384)[: len(milliseconds)]
    timings = {count: Timing((time,)) for count, time in zip(tokens, milliseconds, strict=True)}
    return Candidate(tiling, timings, {count: 1000 / timings[count].median for count in tokens}, failure, wrong)


def result_of(*times, picked=0):
    (case,) = tuning_cases([(64, 64)], ["causal"], 3)
    case = replace(case, picked=case.plans[picked].tiling)
    return Result(case, tuple(candidate(plan.tiling, *time) for plan, time in zip(case.plans, times, strict=False)))


def test_the_geometric_mean_over_the_shapes_decides():
    result = result_of((1.0, 9.0), (2.0, 4.0), (3.0, 3.5))
    assert result.best is result.candidates[1] and result.best.score == pytest.approx(math.sqrt(8))
    assert result.of_best == pytest.approx(math.sqrt(8) / 3)


def test_the_winner_is_a_record_of_the_table():
    result = result_of((2.0, 8.0), (1.0, 2.0))
    tiling = result.candidates[1].tiling
    found = result.winner("NVIDIA H200", "2026-01-02")
    assert found.key == (ARCH, 64, 64, "causal") and found.tflops == {"4096": 1000, "16384": 500}
    assert (found.tile_m, found.tile_n, found.turns, found.beside_pv, found.v_keys) == (
        *(tiling.tile_m, tiling.tile_n),
        *(tiling.turns, tiling.beside_pv),
        0,
    )
    (case,) = tuning_cases([(512, 512)], ["full"], 1)
    found = Result(case, (candidate(case.picked, 1.0, 1.0),)).winner("d", "t")
    assert (found.tile_n, found.v_keys) == (96, 16)


def test_nothing_timed_gives_no_winner():
    result = result_of((1.0, 1.0))
    broken = replace(result, candidates=tuple(replace(item, failure="why") for item in result.candidates))
    assert broken.best is None and broken.of_best is None and broken.winner("d", "t") is None


def test_the_models_standing_is_a_geometric_mean_of_the_cases():
    assert picked_of_best([result_of((2.0, 2.0), (1.0, 1.0)), result_of((1.0, 1.0))]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(picked_of_best([]))


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_packages_table_is_spelled_as_it_stands():
    assert spelled(merged(read_winners(tuned_path()).values(), [])) == tuned_path().read_text()


def test_only_measured_keys_are_replaced_and_all_are_sorted():
    known = [winner(64), winner(64, "causal"), winner(256)]
    found = merged(known, [winner(128), winner(64, tile_n=96)])
    assert [(item.head_dim, item.mask) for item in found] == [
        *((64, "causal"), (64, "full")),
        *((128, "full"), (256, "full")),
    ]
    assert found[1].tile_n == 96 and found[0] == known[1]


def test_a_spelled_table_reads_back(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(spelled([winner(64), winner(128)]))
    assert list(read_winners(path).values()) == [winner(64), winner(128)]
    assert len(path.read_text().splitlines()) == 4 and len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "is not a list of winners: "),
        ('[{"arch": "sm_90a"}]', "is not a list of winners: "),
        ("3", "is not a list of winners: "),
        (spelled([winner(64), winner(64)]), "has two winners for one key"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, text, message):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=f"^tuned.json = .*: {message}"):
        read_winners(path)
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_winners(tmp_path / "nowhere.json")


# --- time -------------------------------------------------------------------------------------------------------------


def test_compiling_may_take_half_of_the_time():
    cases, ticks = tuning_cases([(64, 64), (128, 128), (256, 256)], ["full"], 1), Ticks()
    count = len(cases[0].plans)

    def builds():
        for index in range(sum(len(case.plans) for case in cases)):
            ticks.now += 1
            yield index, "no" if index == 1 else ""

    ready, left = compiled_cases(cases, builds(), Deadline(2 * count + 1, ticks))
    assert [case for case, _ in ready] == cases[:1] and left == cases[1:]
    assert ready[0][1] == ["", "no", *[""] * (count - 2)]
    ready, left = compiled_cases(cases, builds(), Deadline(None, ticks))
    assert len(ready) == 3 and left == []


def test_a_deadline_ends_between_cases(monkeypatch):
    torch = pytest.importorskip("torch")
    measured = pytest.importorskip("measured")
    assert torch
    small(monkeypatch, measured)
    cases, ticks = tuning_cases([(16, 16), (32, 32)], ["full"], 1), Ticks()
    ready = [(case, [""] * len(case.plans)) for case in cases]
    found = []
    deadline = Deadline(5, ticks)
    for result in tune_cases(ready, lambda plan: measured.NumpyKernel(plan.spec), measured.FakeClock(), deadline):
        found.append(result)
        ticks.now = 6
    assert len(found) == 1


# --- measuring --------------------------------------------------------------------------------------------------------


def small(monkeypatch, measured):
    """Shapes for a CPU."""
    from generator import tune
    from generator.matrix import Shape

    monkeypatch.setattr(tune, "random_tensors", measured.on_the_cpu)
    monkeypatch.setattr(tune, "default_shapes", lambda spec: [Shape(2, 1, 1, 24, 24), Shape(1, 1, 1, 48, 48)])


def test_wrong_and_broken_candidates_are_kept_out_of_the_race(monkeypatch):
    pytest.importorskip("torch")
    measured = pytest.importorskip("measured")
    small(monkeypatch, measured)
    (case,) = tuning_cases([(16, 16)], ["causal"], 1)
    case = replace(case, plans=case.plans[:4])
    tilings = [plan.tiling for plan in case.plans]

    def build(plan):
        def spoil(named):
            named["o"] *= 1.1

        return measured.NumpyKernel(plan.spec, spoil if plan.tiling == tilings[2] else None)

    class Clock:
        """The last candidate that is timed is the fastest."""

        calls = 0

        def milliseconds(self, launch, count):
            Clock.calls += 1
            launch()
            return 4.0 if Clock.calls % 2 else 2.0

    failures = ["", "CompileError: no", "", ""]
    (result,) = tune_cases([(case, failures)], build, Clock(), Deadline(None), reps=3)
    by_tiling = {item.tiling: item for item in result.candidates}
    assert len(by_tiling) == 4 and len(result.timed) == 2
    assert by_tiling[tilings[1]].failure == "CompileError: no" and not by_tiling[tilings[1]].wrong
    assert by_tiling[tilings[2]].wrong and "O is off by 9.98e-02" in by_tiling[tilings[2]].failure
    assert result.candidates[0] is result.best and set(result.best.timings) == {24, 48}
    document = result.as_dict()
    assert document["mask"] == "causal" and [item["wrong"] for item in document["candidates"]].count(True) == 1
    assert sum(item["picked"] for item in document["candidates"]) == 1
