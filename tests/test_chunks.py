"""K and V in chunks: arithmetic by hand and by rule, the cost and the choice that follows, and the compiled kernels."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.arch import SM100A
from generator.budget import Tiling
from generator.chunks import budget_of, geometry
from generator.compile import compile_kernel
from generator.cost import cost_of
from generator.explain import STRATEGIES, explain_kernel
from generator.plan import WHOLE_TILES, DoesNotFit, candidates, plan_kernel, ranking
from generator.spec import load_spec
from generator.verify import verify_kernel

WIDE = list(range(272, 513, 16))
PAIR = Tiling(64, 128, 9, "smem", True, 128, "pair", 1, 128, 64)
PASSES = Tiling(128, 128, 6, "tmem", True, 256, "chunks", 2, 64, 32)


def plan_of(**fields):
    return plan_kernel(load_spec(**fields))


def test_a_pair_at_512_by_hand():
    spec = load_spec(head_dim=512)
    shape, budget = geometry(spec, SM100A, PAIR), budget_of(spec, SM100A, PAIR)
    assert (shape.k_chunks, shape.v_groups, shape.v_width, shape.v_key_blocks) == (4, 2, 256, 2)
    assert (shape.k_rows, shape.v_columns, shape.chunk_bytes) == (64, 128, (16384, 16384))
    assert [(b.name, b.offset, b.bytes) for b in budget.buffers] == [
        ("barriers", 0, 8 * (1 + 9 + 9 + 4) + 4),
        ("sQ", 1024, 64 * 512 * 2),
        ("ring", 66560, 9 * 16384),
        ("sP", 214016, 64 * 128 * 2),
        ("peaks", 230400, 1024),
        ("sO", 1024, 128 * 128 * 2),
    ]
    assert budget.smem_total == 231424 and budget.fits
    assert [(r.name, r.column, r.columns) for r in budget.regions] == [("S", 0, 64), ("O", 64, 256)]
    arrivals = {bar.name: bar.arrivals for bar in budget.mbarriers}
    assert arrivals == {
        "q_full": 2,
        "ring_full": 2,
        "ring_empty": 1,
        "s_full": 1,
        "s_empty": 8,
        "p_full": 8,
        "o_full": 1,
    }


def test_cost_at_512_by_hand():
    spec = load_spec(head_dim=512)
    pair, passes = cost_of(spec, SM100A, PAIR), cost_of(spec, SM100A, PASSES)
    assert pair.mma_instructions == 512 // 16 + 2 * 128 // 16
    assert pair.mma_flop == 2 * 64 * 128 * (512 + 512)  # each CTA's half of a 128 x 128 block
    assert pair.mma_read_bytes == 32 * (32 * (64 + 64) + 16 * (64 + 128))  # A and B of 32 QK and 16 PV steps
    assert pair.load_bytes == 2 * (64 * 512 + 128 * 256)
    assert pair.write_bytes == pair.load_bytes + 2 * 64 * 128
    assert passes.mma_flop == 2 * 128 * 128 * (512 + 256)
    assert passes.mma_read_bytes == 32 * (32 * (128 + 128) + 8 * 256)
    assert passes.load_bytes == 2 * (128 * 512 + 128 * 256)
    assert pair.cycles["tensor core"] == 2048 and passes.cycles["tensor core"] == 3072
    assert passes.score / pair.score == pytest.approx(4096 * 2 / (2944 * 2))


@pytest.mark.parametrize("strategy", ["chunks", "passes", "pair", "auto"])
@pytest.mark.parametrize("dims", [*WIDE, 576])
def test_every_wide_head_dim_has_a_plan(dims, strategy):
    fields = {"head_dim": dims, "head_dim_v": min(dims, 512), "strategy": strategy}
    if strategy == "chunks" and dims > 480:
        with pytest.raises(DoesNotFit, match="tmem: .*columns of 512, over by"):
            plan_of(**fields)
        return
    plan = plan_of(**fields)
    shape = plan.shape
    assert plan.budget.fits and plan.kv_stages >= 2
    assert plan.passes * shape.o_width >= plan.spec.v_dim > (plan.passes - 1) * shape.o_width
    assert shape.k_chunks * plan.tiling.k_chunk >= dims > (shape.k_chunks - 1) * plan.tiling.k_chunk
    assert shape.v_width <= 256 and shape.v_width % (16 * shape.ctas) == 0
    assert (shape.v_columns if plan.pair else shape.o_columns) % plan.o_chunk == 0


@settings(max_examples=60, deadline=None)
@given(head_dim=st.sampled_from(WIDE), data=st.data())
def test_the_cheapest_candidate_that_fits_is_taken(head_dim, data):
    spec = load_spec(head_dim=head_dim, output=data.draw(st.sampled_from(["normalized", "unnormalized"])))
    plan, rank = plan_kernel(spec), ranking(spec, SM100A)
    best = cost_of(spec, SM100A, plan.tiling).score
    for tiling in candidates(spec, SM100A):
        if budget_of(spec, SM100A, tiling).fits:
            assert best <= cost_of(spec, SM100A, tiling).score and rank(plan.tiling) <= rank(tiling)
    reasons = {item.candidate: item for item in plan.rejected}
    assert all(item.reason and item.remedy for item in reasons.values())


@settings(max_examples=200, deadline=None)
@given(head_dim=st.sampled_from([*WIDE, 64, 192]), data=st.data())
def test_budgets_of_chunks_add_up(head_dim, data):
    spec = load_spec(head_dim=head_dim, strategy=data.draw(st.sampled_from(["chunks", "passes", "pair"])))
    tiling = data.draw(st.sampled_from(candidates(spec, SM100A)))
    budget, shape = budget_of(spec, SM100A, tiling), geometry(spec, SM100A, tiling)
    own = [b for b in budget.buffers if b.alias_of is None]
    assert budget.smem_total == sum(-(-b.bytes // 1024) * 1024 for b in own)
    assert budget.buffer("ring").stage_bytes >= max(shape.chunk_bytes) and budget.buffer("ring").stage_bytes % 1024 == 0
    assert budget.fits == (not budget.overflows) and all(over.over > 0 and over.remedy for over in budget.overflows)
    assert budget.tmem_used == sum(region.columns for region in budget.regions)


@pytest.mark.parametrize(
    "fields, tiling",
    [
        ({"head_dim": 272}, "chunks"),
        ({"head_dim": 320}, "chunks"),
        ({"head_dim": 448}, "pair"),
        ({"head_dim": 512}, "pair"),
        ({"head_dim": 576, "head_dim_v": 512}, "pair"),
        ({"head_dim": 512, "tile_m": 64}, "pair"),
        ({"head_dim": 512, "p_staging": "tmem"}, "chunks"),  # in two passes: a pair keeps P in shared memory
        ({"head_dim": 320, "tile_m": 128}, "chunks"),
        ({"head_dim": 256, "head_dim_v": 288}, "chunks"),
        ({"head_dim": 64, "strategy": "pair"}, "pair"),
    ],
)
def test_choice_follows_the_counted_cost(fields, tiling):
    assert plan_of(**fields).tiling.strategy == tiling


@pytest.mark.parametrize("head_dim, head_dim_v", [(256, 256), (192, 128), (64, 256)])
def test_whole_tiles_where_one_mma_writes_all_of_o(head_dim, head_dim_v):
    spec = load_spec(head_dim=head_dim, head_dim_v=head_dim_v)
    assert {tiling.strategy for tiling in candidates(spec, SM100A)} == set(WHOLE_TILES)
    assert plan_kernel(spec).tiling.strategy == "two_ctas"


def test_512_on_one_cta_of_128_rows_says_tmem_with_the_columns():
    with pytest.raises(DoesNotFit) as caught:
        plan_of(head_dim=512, tile_m=128)
    error = caught.value
    assert error.field == "tile_m" and "strategy = passes fits" in error.remedy
    assert "tmem: a 128 x 512 float32 accumulator takes all 512 columns, so S has no room" in str(error)
    assert plan_of(head_dim=512, tile_m=128, strategy="passes").passes == 2


def test_ring_that_is_too_deep_says_the_deepest_that_fits():
    with pytest.raises(DoesNotFit) as caught:
        plan_of(head_dim=512, strategy="passes", kv_stage=16)
    assert caught.value.field == "kv_stage" and caught.value.remedy.startswith("the deepest that fits is 12")
    assert plan_of(head_dim=512, strategy="passes", kv_stage=12).budget.fits


@pytest.mark.parametrize("head_dim", [128, 256, 320, 512])
def test_every_strategy_is_explained(head_dim):
    rows = explain_kernel(load_spec(head_dim=head_dim))
    assert [row.strategy for row in rows] == list(STRATEGIES["sm_100a"])
    assert [row.tiling for row in rows if row.chosen] == [plan_of(head_dim=head_dim).tiling]
    for row in rows:
        assert row.status and (row.chosen or row.remedy)
        assert row.refused or row.budget.fits or "over by" in row.status


def test_a_strategy_that_the_template_does_not_have_is_refused_and_not_costed():
    rows = {row.strategy: row for row in explain_kernel(load_spec(head_dim=320))}
    assert [name for name, row in rows.items() if row.refused] == ["tiles", "two_tiles", "two_ctas"]
    assert all(row.cost is row.tiling is None for row in rows.values() if row.refused)
    assert rows["tiles"].status.startswith("refused: strategy not implemented for sm_100a yet")
    assert "one MMA writes all of O, head_dim and head_dim_v of at most 256" in rows["tiles"].remedy
    assert rows["two_ctas"].remedy.startswith("at most 256, or a CTA pair")


def test_explanation_of_what_does_not_fit_still_shows_every_strategy():
    rows = {row.strategy: row for row in explain_kernel(load_spec(head_dim=512, tile_m=128))}
    assert not any(row.chosen for row in rows.values())
    assert "takes all 512 columns" in rows["chunks"].status and "strategy = pair" in rows["chunks"].remedy
    assert rows["passes"].budget.fits and rows["pair"].budget.fits


KERNELS = ("fmha_sm100_d320", "fmha_sm100_d512", "fmha_sm100_d512_causal_passes", "fmha_sm100_d272_causal_pair_stage2")


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernel_is_the_plan_s(name):
    binary = compile_kernel(plan_kernel(load_spec(name)))
    plan, shape = binary.plan, binary.plan.shape
    mmas = re.findall(r"tcgen05\.mma\.(\S+) ", binary.ptx)
    qk, pv = plan.spec.head_dim // 16, shape.v_groups * (plan.tile_n // 16)
    assert len(mmas) == 2 * (qk + pv)  # each stands in the loop and outside it
    assert all(f"cta_group::{shape.ctas}" in mma for mma in mmas)
    assert binary.cluster == ((2, 1, 1) if plan.pair else (1, 1, 1))
    announced = set(re.findall(r"expect_tx\S* .*?, (%r\d+);", binary.ptx))
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", binary.ptx))
    assert {int(constants[r]) for r in announced} == {plan.budget.buffer("sQ").bytes, *shape.chunk_bytes}
    assert binary.spills == 0


@pytest.mark.parametrize("tile_n, span", [(32, 64), (64, 128), (96, 32), (128, 128)])
def test_every_tile_of_a_pair(tile_n, span):
    """A thread stores half a row of P, which takes whole swizzle spans or half of one."""
    plan = plan_of(head_dim=48, strategy="pair", tile_n=tile_n)
    assert plan.layouts["sP"].swizzle_bytes == span
    report = verify_kernel(compile_kernel(plan), (1, 1, 1, 140, 201))
    assert report.passed, report


@pytest.mark.parametrize("name", ["fmha_sm100_d512", "fmha_sm100_d512_causal_passes", "fmha_sm100_d320"])
def test_other_schedules(name):
    def schedules(gpu, outputs):
        gpu.schedules = 3

    report = verify_kernel(compile_kernel(plan_kernel(load_spec(name))), (1, 1, 1, 130, 261), prepare=schedules)
    assert report.passed, report


@pytest.mark.sweep
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strategy", ["chunks", "passes", "pair"])
@pytest.mark.parametrize("head_dim", [*WIDE, 576])
def test_every_wide_head_dim_with_every_strategy(head_dim, strategy, causal):
    fields = {"head_dim": head_dim, "head_dim_v": min(head_dim, 512), "strategy": strategy, "causal": causal}
    if strategy == "chunks" and head_dim > 480:
        with pytest.raises(DoesNotFit, match="accumulator takes all 512 columns"):
            plan_kernel(load_spec(fields))
        return
    report = verify_kernel(compile_kernel(plan_kernel(load_spec(fields))), (1, 1, 1, 140, 201))
    assert report.passed, report
