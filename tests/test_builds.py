"""Plans compiled by processes: the cache has them afterwards, and one that fails says why."""

from dataclasses import replace

from generator.builds import compile_plans
from generator.compile import compile_kernel
from generator.plan import plan_tiling
from generator.tune import schedules, tuning_cases
from generator.warpgroups import consumers


def test_plans_are_in_the_cache_and_failures_are_told():
    (case,) = tuning_cases([(16, 16)], ["full"], 1)
    good = case.plans[0]
    broken = replace(good, budget=replace(good.budget, tmem_columns=32))  # Hopper has none
    found = dict(compile_plans([good, broken], 2))
    assert found[0] == ""
    assert found[1].startswith("CompileError: ") and "does not match its plan: " in found[1]
    assert compile_kernel(good).cached


def test_closing_ends_the_processes():
    (case,) = tuning_cases([(16, 16)], ["full"], 1)
    builds = compile_plans(list(case.plans), 1)
    index, failure = next(builds)
    builds.close()
    assert (index, failure) == (0, "") and list(builds) == []


def test_every_schedule_of_a_tile_compiles_to_what_its_plan_says():
    """Turns and lazy rescaling change the kernel, not its budget."""
    (case,) = tuning_cases([(16, 16)], ["causal"], 1)
    tiling = case.picked
    plans = [plan_tiling(case.spec, item) for item in schedules(tiling, case.plans[0].arch)]
    assert consumers(tiling, case.plans[0].arch) > 1 and len(plans) == 4
    assert dict(compile_plans(plans, 2)) == {index: "" for index in range(4)}
    assert len({compile_kernel(plan).ptx for plan in plans}) == 4
