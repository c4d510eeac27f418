"""The planner: its rule of choice, every head_dim, what it refuses and with which words, and its speed."""

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.arch import ARCHS
from generator.chunks import budget_of
from generator.cost import cost_of
from generator.plan import DoesNotFit, NotImplementedYet, candidates, plan_kernel, preference
from generator.spec import load_spec
from generator.survey import survey_kernel

HEAD_DIMS = list(range(16, 257, 16))
SIMPLEST = ("two_tiles", "two_ctas", "tiles")  # of equal costs the first is taken


def plan_of(**fields):
    return plan_kernel(load_spec(**fields))


def refusal(kind, **fields):
    with pytest.raises(kind) as caught:
        plan_of(**fields)
    return caught.value


@pytest.mark.parametrize(
    "fields, tiling",
    [
        ({"head_dim": 64}, "tile 128x128, kv_stage 3, P in TMEM, own sO by 64 columns"),
        ({"head_dim": 128}, "tile 128x128, kv_stage 3, P in TMEM, sO over sQ by 128 columns"),
        ({"head_dim": 256}, "tile 128x64, kv_stage 2, P in TMEM, sO over sQ by 256 columns"),
        ({"head_dim": 256, "p_staging": "smem"}, "tile 128x64, kv_stage 2, P in SMEM, sO over sQ by 256 columns"),
        ({"head_dim": 256, "kv_stage": 1}, "tile 128x128, kv_stage 1, P in TMEM, sO over sQ by 256 columns"),
        ({"head_dim": 128, "output": "unnormalized"}, "tile 128x128, kv_stage 3, P in TMEM, sO over sQ by 64 columns"),
        ({"head_dim": 64, "tile_n": 48}, "tile 128x48, kv_stage 3, P in TMEM, own sO by 64 columns"),
    ],
)
def test_choice_of_one_query_tile_follows_the_stated_rule(fields, tiling):
    assert str(plan_of(strategy="tiles", **fields).tiling) == tiling


@pytest.mark.parametrize(
    "fields, strategy, tiling",
    [
        ({"head_dim": 64}, "two_tiles", "two query tiles, tile 128x128, kv_stage 3, P in TMEM, own sO by 64 columns"),
        ({"head_dim": 128}, "two_tiles", "two query tiles, tile 128x128, kv_stage 2, P in TMEM, own sO by 32 columns"),
        ({"head_dim": 160}, "two_ctas", "two CTAs, tile 128x128, kv_stage 3, P in TMEM, own sO by 160 columns"),
        (
            {"head_dim": 192, "head_dim_v": 128},
            *("two_ctas", "two CTAs, tile 128x128, kv_stage 3, P in TMEM, own sO by 128 columns"),
        ),
        ({"head_dim": 256}, "two_ctas", "two CTAs, tile 128x128, kv_stage 2, P in TMEM, own sO by 128 columns"),
        (  # two CTAs do not share K and V, and two query tiles' O fill tensor memory
            {"head_dim": 256, "kv_shared": True},
            *("tiles", "tile 128x128, kv_stage 2, P in TMEM, sO over sQ by 256 columns"),
        ),
        (  # the others lay P over S
            {"head_dim": 128, "p_staging": "smem"},
            *("tiles", "tile 128x128, kv_stage 2, P in SMEM, own sO by 128 columns"),
        ),
        (  # no multiple of 32 keys: not for two CTAs
            {"head_dim": 160, "tile_n": 48},
            *("two_tiles", "two query tiles, tile 128x48, kv_stage 3, P in TMEM, own sO by 80 columns"),
        ),
        (  # two query tiles would cost less, with one stage
            {"head_dim": 176, "head_dim_v": 128, "tile_n": 112},
            *("tiles", "tile 128x112, kv_stage 2, P in TMEM, own sO by 128 columns"),
        ),
        (  # one stage in any case: the cost decides
            {"head_dim": 256, "kv_stage": 1},
            *("two_ctas", "two CTAs, tile 128x128, kv_stage 1, P in TMEM, own sO by 256 columns"),
        ),
    ],
)
def test_strategy_follows_the_stated_rule(fields, strategy, tiling):
    chosen = plan_of(**fields).tiling
    assert (chosen.strategy, str(chosen)) == (strategy, tiling)
    assert chosen == plan_of(**fields, strategy=strategy).tiling


@pytest.mark.parametrize("strategy", ["auto", "tiles"])
@pytest.mark.parametrize("output", ["normalized", "unnormalized"])
@pytest.mark.parametrize("p_staging", ["auto", "tmem", "smem"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_a_plan_on_both_p_paths(head_dim, p_staging, output, strategy):
    plan = plan_of(head_dim=head_dim, p_staging=p_staging, output=output, strategy=strategy)
    assert plan.budget.fits and plan.kv_stages >= 2
    assert p_staging in ("auto", plan.p_staging)
    assert plan.o_chunk % 16 == 0 and plan.o_chunk * plan.o_steps == head_dim


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {"head_dim": st.sampled_from(HEAD_DIMS)},
        optional={
            "kv_stage": st.integers(1, 16),
            "tile_n": st.sampled_from(range(16, 129, 16)),
            "p_staging": st.sampled_from(["tmem", "smem"]),
            "output": st.sampled_from(["normalized", "unnormalized"]),
        },
    )
)
def test_chosen_fits_is_preferred_and_honours_the_specification(fields):
    spec = load_spec(fields)
    try:
        plan = plan_kernel(spec)
    except DoesNotFit as error:
        assert "over by" in str(error) and error.remedy
        return
    assert fields.get("kv_stage", plan.kv_stages) == plan.kv_stages
    assert fields.get("tile_n", plan.tile_n) == plan.tile_n
    assert fields.get("p_staging", plan.p_staging) == plan.p_staging
    all_candidates = candidates(spec, plan.arch)
    fitting = sorted((t for t in all_candidates if budget_of(spec, plan.arch, t).fits), key=preference)
    best = {tiling.strategy: tiling for tiling in reversed(fitting)}
    order = {
        name: (t.kv_stages < 2, cost_of(spec, plan.arch, t).score, SIMPLEST.index(name)) for name, t in best.items()
    }
    assert {plan.tiling, *(item.candidate for item in plan.rejected)} == set(all_candidates)
    assert len(plan.rejected) == len(all_candidates) - 1
    for item in plan.rejected:
        assert item.remedy
        if item.reason.startswith("fits"):
            chosen, other = ((order[t.strategy], preference(t)) for t in (plan.tiling, item.candidate))
            assert chosen < other
        else:
            assert "over by" in item.reason


def test_rejected_candidates_say_why_and_what_helps():
    rejected = plan_of(head_dim=256, strategy="tiles").rejected
    reasons = {str(item.candidate): (item.reason, item.remedy) for item in rejected}
    reason, remedy = reasons["tile 128x128, kv_stage 2, P in TMEM, sO over sQ by 256 columns"]
    assert reason.endswith("= 328704 bytes of 232448, over by 96256")
    assert remedy == "a lower kv_stage or a smaller tile_n"
    assert reasons["tile 128x32, kv_stage 3, P in TMEM, own sO by 256 columns"] == (
        "fits, but has a smaller tile_n",
        "tile_n = 32 asks for it",
    )


COSTS = "fits, but costs more: {} SM cycles a 128 x 128 block of scores, the chosen one {}"


@pytest.mark.parametrize(
    "fields, candidate, reason, strategy",
    [
        (
            {"head_dim": 64},
            "tile 128x128, kv_stage 3, P in TMEM, own sO by 64 columns",
            COSTS.format(1024, 640),
            "tiles",
        ),
        (
            {"head_dim": 64},
            "two CTAs, tile 128x128, kv_stage 3, P in TMEM, own sO by 64 columns",
            *("fits at the same cost, but is less simple", "two_ctas"),
        ),
        (
            {"head_dim": 160},
            "tile 128x128, kv_stage 2, P in TMEM, sO over sQ by 160 columns",
            *(COSTS.format(1600, 1280), "tiles"),
        ),
        (
            {"head_dim": 160},
            "two query tiles, tile 128x64, kv_stage 3, P in TMEM, own sO by 32 columns",
            *(COSTS.format(1600, 1280), "two_tiles"),
        ),
        (
            {"head_dim": 256},
            "tile 128x64, kv_stage 2, P in TMEM, sO over sQ by 256 columns",
            *(COSTS.format(3072, 2048), "tiles"),
        ),
        (
            {"head_dim": 176, "head_dim_v": 128, "tile_n": 112},
            "two query tiles, tile 128x112, kv_stage 1, P in TMEM, own sO by 128 columns",
            *("fits, but has fewer than two kv stages", "two_tiles"),
        ),
    ],
)
def test_rejected_strategies_say_what_they_cost_and_how_to_ask_for_them(fields, candidate, reason, strategy):
    rejected = {str(item.candidate): (item.reason, item.remedy) for item in plan_of(**fields).rejected}
    assert rejected[candidate] == (reason, f"strategy = {strategy} asks for it")


def test_swizzles_and_boxes():
    layouts = plan_of(head_dim=96, p_staging="smem", tile_n=64).layouts
    assert {name: (layout.box, layout.swizzle_bytes) for name, layout in layouts.items()} == {
        "sQ": ((32, 128), 64),
        "sK": ((32, 64), 64),
        "sV": ((32, 64), 64),
        "sP": ((64, 128), 128),
        "sO": ((32, 32), 64),
    }
    assert layouts["sK"].bytes == 64 * 96 * 2
    assert layouts["sV"].major == "MN" and layouts["sK"].major == "K"
    assert "sP" not in plan_of(head_dim=96, p_staging="tmem").layouts


@pytest.mark.parametrize("tile_n, s_columns, p_columns", [(128, 32, 32), (64, 32, 32), (48, 16, 8), (32, 32, 16)])
def test_register_tiles_walk_their_regions_evenly(tile_n, s_columns, p_columns):
    plan = plan_of(head_dim=80, tile_n=tile_n, strategy="tiles")
    assert (plan.s_columns, plan.p_columns, plan.o_columns) == (s_columns, p_columns, 16)


@pytest.mark.parametrize(
    "fields, deepest",
    [
        ({"head_dim": 128, "tile_n": 128, "kv_stage": 8, "strategy": "tiles"}, 3),
        ({"head_dim": 128, "tile_n": 128, "kv_stage": 8}, 5),  # half of K and V in each of two CTAs
        ({"head_dim": 256, "kv_stage": 16}, 10),
    ],
)
def test_kv_stage_too_deep_says_the_deepest_that_fits(fields, deepest):
    error = refusal(DoesNotFit, **fields)
    assert str(error).startswith(f"kv_stage = {fields['kv_stage']}: does not fit; ")
    assert "bytes of 232448, over by " in str(error)
    assert error.remedy.startswith(f"the deepest that fits is {deepest}")
    assert plan_of(**{**fields, "kv_stage": deepest}).kv_stages == deepest
    assert refusal(DoesNotFit, **{**fields, "kv_stage": deepest + 1}).field == "kv_stage"


def test_p_in_registers_is_hopper_s():
    assert str(refusal(NotImplementedYet, head_dim=64, p_staging="register")) == (
        "p_staging = 'register': is for Hopper (sm_90a) only; on sm_100a P waits in tmem or smem; "
        'use "auto" or "tmem"'
    )


def test_p_in_tensor_memory_is_blackwell_s():
    message = str(refusal(NotImplementedYet, arch="sm_90a", head_dim=64, p_staging="tmem"))
    assert "is for Blackwell (sm_100a) only; on sm_90a P waits in register or smem" in message


def test_p_staging_that_a_pair_does_not_have():
    """A pair is the cheapest plan at head_dim 512, with P in shared memory: not where P is asked to be in TMEM."""
    assert plan_of(head_dim=512).tiling.strategy == "pair"
    asked = plan_of(head_dim=512, p_staging="tmem")
    assert (asked.tiling.strategy, asked.tiling.passes, asked.p_staging) == ("chunks", 2, "tmem")


def test_p_staging_that_does_not_fit():
    error = refusal(DoesNotFit, head_dim=160, p_staging="smem", tile_n=128, kv_stage=2)
    assert "the closest is tile 128x128, kv_stage 2, P in SMEM, sO over sQ by 160 columns, smem: " in str(error)
    assert "sP 32768" in str(error) and "over by 6144" in str(error)
    assert error.remedy == "the deepest that fits is 1, or p_staging = tmem fits, or tile_n = 64 fits"
    for cure in ({"kv_stage": 1}, {"p_staging": "tmem"}, {"tile_n": 64}):
        assert plan_of(**{"head_dim": 160, "p_staging": "smem", "tile_n": 128, "kv_stage": 2, **cure}).budget.fits


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"arch": "sm_90a", "head_dim": 272, "strategy": "warpgroups"}, "strategy"),
        ({"head_dim": 272, "strategy": "tiles"}, "strategy"),
        ({"head_dim": 64, "head_dim_v": 272, "strategy": "tiles"}, "strategy"),
        ({"head_dim": 512, "p_staging": "tmem", "strategy": "pair"}, "p_staging"),
        ({"head_dim": 512, "tile_n": 48, "strategy": "pair"}, "tile_n"),
        ({"head_dim": 512, "tile_m": 96}, "tile_m"),
        ({"head_dim": 64, "head_dim_v": 16, "strategy": "passes"}, "strategy"),
        ({"head_dim": 16, "strategy": "pair"}, "strategy"),
        ({"head_dim": 512, "head_dim_v": 16, "tile_m": 64}, "tile_m"),
        ({"head_dim": 128, "kv_shared": True, "strategy": "two_ctas"}, "kv_shared"),
        ({"tile_m": 64}, "tile_m"),
        ({"tile_n": 256}, "tile_n"),
    ],
)
def test_later_work_is_refused_by_field(fields, field):
    error = refusal(NotImplementedYet, **{"head_dim": 64, **fields})
    arch = fields.get("arch", "sm_100a")
    assert error.field == field and error.remedy
    assert f"not implemented for {arch} yet" in str(error) and str(error).startswith(f"{field} = ")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"arch": "sm_90a", "p_staging": "tmem"}, "p_staging = 'tmem': is for Blackwell (sm_100a) only"),
        (
            {"arch": "sm_90a", "strategy": "tiles"},
            'strategy = \'tiles\': is for Blackwell (sm_100a) only; use "auto", "warp',
        ),
        ({"strategy": "warpgroups"}, "strategy = 'warpgroups': is for Hopper (sm_90a) only; use \"auto\""),
    ],
)
def test_another_architectures_means_are_refused(fields, message):
    assert message in str(refusal(NotImplementedYet, **{"head_dim": 64, **fields}))


@pytest.mark.parametrize(
    "fields, packed, tokens",
    [
        ({}, False, 128),
        ({"pack_heads": True}, False, 128),  # one head is no group
        ({"q_heads_per_kv": 8}, True, 16),
        ({"q_heads_per_kv": 8, "pack_heads": False}, False, 128),
        ({"q_heads_per_kv": 128, "pack_heads": True}, True, 1),
        ({"q_heads_per_kv": 6}, False, 128),
        ({"q_heads_per_kv": 256}, False, 128),
    ],
)
def test_heads_are_packed_where_the_group_divides_the_tile(fields, packed, tokens):
    plan = plan_of(head_dim=64, **fields)
    assert (plan.packed, plan.tokens) == (packed, tokens)


@pytest.mark.parametrize("group", [3, 6, 96, 256])
def test_packing_a_group_that_does_not_divide_the_tile_is_refused(group):
    error = refusal(DoesNotFit, head_dim=64, q_heads_per_kv=group, pack_heads=True)
    assert str(error) == (
        f"pack_heads = True: a group of {group} query heads does not divide the 128 rows of a tile; "
        'use "auto" or false, or a group that is a power of two up to 128'
    )


@pytest.mark.parametrize("head_dim, head_dim_v, span", [(64, 64, 128), (192, 128, 128), (64, 48, 32), (96, 64, 64)])
def test_shared_kv_is_one_buffer_with_one_swizzle(head_dim, head_dim_v, span):
    fields = {"head_dim": head_dim, "head_dim_v": head_dim_v, "kv_stage": 2, "strategy": "tiles"}
    apart, shared = (plan_of(kv_shared=x, **fields) for x in (False, True))
    assert {name: shared.layouts[name].swizzle_bytes for name in ("sK", "sV")} == {"sK": span, "sV": span}
    assert shared.budget.bytes_of("sV") == 0 and {bar.name for bar in apart.budget.mbarriers} - {
        bar.name for bar in shared.budget.mbarriers
    } == {"v_full", "v_empty"}
    saved = apart.budget.bytes_of("sV")
    assert shared.budget.buffer("sK").reason.endswith(f"V its first {head_dim_v} columns, which saves {saved}")
    if apart.o_over_q == shared.o_over_q:
        assert apart.budget.smem_total - shared.budget.smem_total == saved


def test_shared_kv_makes_room_for_larger_tiles():
    apart = plan_of(head_dim=256, strategy="tiles")
    assert str(apart.tiling) == "tile 128x64, kv_stage 2, P in TMEM, sO over sQ by 256 columns"
    shared = plan_of(head_dim=256, kv_shared=True, strategy="tiles")
    assert str(shared.tiling) == "tile 128x128, kv_stage 2, P in TMEM, sO over sQ by 256 columns"


def test_shared_kv_needs_two_stages():
    error = refusal(DoesNotFit, head_dim=64, kv_shared=True, kv_stage=1, strategy="tiles")
    assert str(error).startswith("kv_stage = 1: does not fit; the closest is tile 128x128, kv_stage 1, ")
    assert (
        "kv_stage: QK of the next tile is issued before PV of this one, which reads the same stage = 2 stages of 1, "
        "over by 1; the deepest that fits is 16"
    ) in str(error)
    assert {tiling.kv_stages for tiling in candidates(load_spec(head_dim=64, kv_shared=True), ARCHS["sm_100a"])} == {
        1,
        2,
        3,
    }


def test_head_dim_512_says_what_overflows_and_what_could_fit():
    rows = survey_kernel(load_spec(head_dim=512))
    assert len(rows) == 6 and not any(row.chosen for row in rows)
    smem, tmem = rows[0].overflows
    assert (smem.need, smem.limit, smem.over) == (525312, 232448, 292864)
    assert smem.remedy == "would fit with tile 128x32, kv_stage 1, P in TMEM, sO over sQ by 512 columns"
    assert (tmem.need, tmem.limit) == (704, 512)
    assert "accumulator takes all 512 columns, so S and P have no room" in tmem.reason
    assert tmem.remedy.startswith("no tile_n helps; a CTA pair")
    assert rows[0].status == "smem over by 292864 bytes, tmem over by 192 columns"
    assert rows[0].missing == ""


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_survey_marks_what_the_planner_chooses(head_dim):
    spec = load_spec(head_dim=head_dim)
    rows = survey_kernel(spec)
    (chosen,) = [row for row in rows if row.chosen]
    plan = plan_kernel(spec)
    assert (chosen.tiling, chosen.budget) == (plan.tiling, plan.budget)
    assert [(row.tiling.strategy, row.tiling.p_staging, row.tiling.kv_stages) for row in rows] == [
        (*place, stages)
        for place in (("tiles", "tmem"), ("tiles", "smem"), ("two_tiles", "tmem"), ("two_ctas", "tmem"))
        for stages in (1, 2, 3)
    ]


def test_survey_of_one_strategy_has_its_rows_alone():
    rows = survey_kernel(load_spec(head_dim=128, strategy="two_ctas", kv_stage=2))
    assert [(row.tiling.strategy, row.tiling.kv_stages, row.chosen) for row in rows] == [("two_ctas", 2, True)]
    assert {row.tiling.strategy for row in survey_kernel(load_spec(head_dim=128, kv_shared=True))} == {
        *("tiles", "two_tiles"),  # each CTA of a pair holds half of K's keys, but half of V's columns
    }


def test_planning_takes_less_than_50_ms():
    def seconds(head_dim):
        start = time.process_time()  # whatever else the machine does
        plan_of(head_dim=head_dim)
        return time.process_time() - start

    for head_dim in (96, 192, 256):
        assert min(seconds(head_dim) for _ in range(5)) < 0.05


def test_planning_does_not_import_the_dsl_or_numpy():
    program = (
        "import sys; from generator.plan import plan_kernel; from generator.spec import load_spec; "
        "plan_kernel(load_spec(head_dim=96)); print([m for m in ('cutlass', 'numpy', 'jinja2') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
