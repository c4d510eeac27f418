"""V within K where K comes in chunks: the ring by hand, the cost and the choice, and what the kernels do."""

import re
from dataclasses import replace

import numpy as np
import pytest

import generator
from generator.arch import SM100A
from generator.budget import Tiling
from generator.chunks import budget_of, geometry
from generator.compile import compile_kernel
from generator.cost import cost_of
from generator.emit import emit_kernel
from generator.explain import explain_kernel
from generator.plan import DoesNotFit, NotImplementedYet, candidates, plan_kernel
from generator.reference import attention
from generator.resources import checkout_root
from generator.spec import load_spec
from generator.verify import COS_MIN, cosine, random_operands, verify_kernel

CHUNKS = {"head_dim": 320, "kv_shared": True}
PASSES = {"head_dim": 576, "head_dim_v": 512, "kv_shared": True, "strategy": "passes"}
SHARED = Tiling(128, 48, 13, "tmem", True, 256, "chunks", 2, 64, 0)


def plan_of(**fields):
    return plan_kernel(load_spec(fields))


def test_a_ring_of_k_that_is_v_too_by_hand():
    """9 chunks of 64 columns, 4 of them V's in each pass; QK of a tile goes before PV of the one before: 9 + 4."""
    spec = load_spec(PASSES)
    shape, budget = geometry(spec, SM100A, SHARED), budget_of(spec, SM100A, SHARED)
    assert (shape.k_chunks, shape.kept, shape.v_groups, shape.v_width, shape.o_columns) == (9, 4, 4, 64, 256)
    assert shape.fewest_buffers == 9 + 4 and shape.chunk_bytes == (48 * 64 * 2, 48 * 64 * 2)
    assert [(b.name, b.offset, b.bytes) for b in budget.buffers] == [
        ("barriers", 0, 8 * (1 + 13 + 13 + 4) + 4),
        ("sQ", 1024, 128 * 576 * 2),
        ("ring", 148480, 13 * 6144),
        ("sO", 1024, 128 * 256 * 2),
    ]
    assert budget.fits and budget.smem_total == 228352
    assert budget.buffer("ring").reason == (
        "48 x 64 of K a buffer, 4 of a tile's 9 V's too, which saves 24576 bytes a tile"
    )
    assert plan_kernel(spec).tiling == SHARED
    one_more = budget_of(spec, SM100A, replace(SHARED, tile_n=64))
    assert [over.resource for over in one_more.overflows] == ["smem"]  # 64 keys: 13 buffers of 8192 bytes


def test_cost_counts_one_load():
    spec, apart = load_spec(PASSES), load_spec(PASSES | {"kv_shared": False})
    cost = cost_of(spec, SM100A, SHARED)
    assert cost.load_bytes == cost.write_bytes == 2 * 48 * 576
    assert cost.mma_read_bytes == 32 * (36 * (128 + 48) + 4 * 3 * 64)
    assert cost_of(apart, SM100A, replace(SHARED, v_keys=16)).load_bytes == 2 * 48 * (576 + 256)
    pair = Tiling(64, 128, 9, "smem", True, 128, "pair", 1, 64, 32)
    assert cost_of(spec, SM100A, pair) == cost_of(apart, SM100A, pair)  # loads V's columns a second time


@pytest.mark.parametrize(
    "fields, apart, shared",
    [
        ({"head_dim": 272}, ("chunks", 1, 128), ("chunks", 1, 128)),
        ({"head_dim": 320}, ("chunks", 1, 128), ("chunks", 1, 112)),
        ({"head_dim": 384}, ("chunks", 1, 64), ("chunks", 1, 80)),
        ({"head_dim": 512}, ("pair", 1, 128), ("pair", 1, 128)),
        ({"head_dim": 432}, ("pair", 1, 128), ("chunks", 1, 48)),
        ({"head_dim": 448}, ("pair", 1, 128), ("pair", 1, 128)),
        ({"head_dim": 576, "head_dim_v": 512}, ("pair", 1, 128), ("pair", 1, 128)),
    ],
)
def test_sharing_changes_the_plan_where_it_costs_less(fields, apart, shared):
    def told(plan):
        return plan.tiling.strategy, plan.passes, plan.tile_n

    plans = plan_of(**fields), plan_of(kv_shared=True, **fields)
    assert tuple(map(told, plans)) == (apart, shared)
    scores = [cost_of(plan.spec, SM100A, plan.tiling).score for plan in plans]
    assert scores[1] < scores[0] or (scores[1] == scores[0] and plans[1].pair)


def test_documented_table_is_what_the_plans_say():
    def told(plan):
        cost, tiling = cost_of(plan.spec, SM100A, plan.tiling), plan.tiling
        moved = cost.load_bytes * cost.passes * 128 * 128 // (cost.rows * cost.keys)
        return f"{tiling.strategy}, {tiling.tile_m}x{tiling.tile_n} | {cost.score:.0f} | {moved}"

    page = (checkout_root() / "docs" / "features.md").read_text()
    for d in (272, 320, 336, 384, 416, 432, 448, 512, 576):
        fields = {"head_dim": d, "head_dim_v": min(d, 512)}
        dims = d if d <= 512 else f"{d}/512"
        assert f"| {dims} | {told(plan_of(**fields))} | {told(plan_of(**fields, kv_shared=True))} |" in page


def test_a_pair_says_that_it_loads_v_a_second_time():
    rows = {row.strategy: row for row in explain_kernel(load_spec(head_dim=512, kv_shared=True))}
    assert "V is loaded a second time, for one descriptor serves both CTAs" in rows["pair"].says and rows["pair"].chosen
    assert rows["passes"].budget.fits and rows["passes"].cost.load_bytes == 2 * 64 * 512
    plan = plan_of(head_dim=512, kv_shared=True)
    assert "V loaded a second time, from K" in plan.budget.buffer("ring").reason


@pytest.mark.parametrize("fields", [CHUNKS, PASSES, {"head_dim": 448, "head_dim_v": 272, "kv_shared": True}], ids=str)
def test_every_candidate_keeps_what_pv_reads(fields):
    spec = load_spec(fields | {"strategy": fields.get("strategy", "chunks")})
    for tiling in candidates(spec, SM100A):
        shape = geometry(spec, SM100A, tiling)
        assert shape.fewest_buffers == shape.k_chunks + shape.kept <= tiling.kv_stages
        assert tiling.passes * shape.o_width >= spec.v_dim > (tiling.passes - 1) * shape.o_width
        assert tiling.passes * shape.kept <= shape.k_chunks


def test_too_shallow_a_ring_says_why_and_how_deep():
    with pytest.raises(DoesNotFit) as caught:
        plan_of(**PASSES, kv_stage=3)
    error = str(caught.value)
    assert error.startswith("kv_stage = 3: does not fit; the closest is K and V in chunks, O in 2 passes, ")
    assert "kv_stage: QK of a tile, " in error and "is issued before PV of the one before has read its " in error
    assert caught.value.remedy.startswith("the deepest that fits is ")


def test_two_passes_over_sixteen_columns_are_refused():
    with pytest.raises(NotImplementedYet, match="strategy = 'passes': .*; O has 16 columns, two passes need 32"):
        plan_of(head_dim=64, head_dim_v=16, kv_shared=True, strategy="passes")


@pytest.mark.parametrize("fields", [CHUNKS, PASSES], ids=str)
def test_a_ring_one_buffer_shallower_waits_for_itself(fields, tmp_path):
    """What lifetime.py says of the depth, by the emulator: the kernel hangs, and says who waits."""
    plan = plan_of(**fields)
    tiling = replace(plan.tiling, kv_stages=plan.shape.fewest_buffers - 1)
    budget = replace(budget_of(plan.spec, SM100A, tiling), overflows=())
    path = tmp_path / "shallow.py"
    path.write_text(emit_kernel(replace(plan, tiling=tiling, budget=budget)))
    shallow = compile_kernel(replace(plan, tiling=tiling, budget=budget), path, use_cache=False)
    report = verify_kernel(shallow, (1, 1, 1, 128, 400))
    assert "deadlock" in report.failures[0] and "ring_" in report.failures[0].lower(), report
    assert verify_kernel(shallow, (1, 1, 1, 128, plan.tile_n)).passed  # one tile fits it


@pytest.mark.parametrize(
    "fields", [CHUNKS, PASSES, pytest.param(PASSES | {"causal": True}, marks=pytest.mark.sweep)], ids=str
)
def test_compiled_kernel_loads_k_alone(fields):
    binary = compile_kernel(plan_of(**fields))
    plan, shape = binary.plan, binary.plan.shape
    loads = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", binary.ptx)
    assert len(loads) == 2 * shape.boxes_a_tile  # of Q, and of K in its loop
    mmas = re.findall(r"tcgen05\.mma\.(\S+) ", binary.ptx)
    assert len(mmas) == 2 * (shape.qk_columns // 16 + shape.v_groups * (plan.tile_n // 16))
    assert binary.spills == 0


OTHERS = [CHUNKS, {"head_dim": 512, "kv_shared": True, "causal": True, "strategy": "passes"}]


@pytest.mark.parametrize(
    "fields", [PASSES, *(pytest.param(fields, marks=pytest.mark.sweep) for fields in OTHERS)], ids=str
)
def test_other_schedules(fields):
    def schedules(gpu, outputs):
        gpu.schedules = 4

    report = verify_kernel(compile_kernel(plan_of(**fields)), (1, 1, 1, 130, 261), prepare=schedules)
    assert report.passed, report


def test_v_as_a_view_of_k_is_the_same_without_kv_shared():
    """A pair of V's own tensor reads the same bytes through other strides: the results are equal bit by bit."""
    shared = generator.build(head_dim=576, head_dim_v=512, kv_shared=True)
    apart = generator.build(head_dim=576, head_dim_v=512)
    operands = random_operands(shared.spec, (1, 2, 2, 70, 200), seed=5)
    q, k = operands["q"], operands["k"]
    o, lse = shared(q, k)
    assert shared.plan.pair and apart.plan.tiling == shared.plan.tiling
    other_o, other_lse = apart(q, k, k[..., :512])
    np.testing.assert_array_equal(o, other_o)
    np.testing.assert_array_equal(lse, other_lse)
    assert cosine(o.astype(float), attention(q, k, k[..., :512], 576**-0.5).o) >= COS_MIN


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", ["chunks", "passes", "pair"])
@pytest.mark.parametrize("head_dim", [*range(272, 513, 16), 576])
def test_every_wide_head_dim_with_every_strategy(head_dim, strategy):
    for head_dim_v in {min(head_dim, 512)} | ({head_dim // 32 * 16} if head_dim < 576 else set()):
        spec = load_spec(head_dim=head_dim, head_dim_v=head_dim_v, kv_shared=True, strategy=strategy)
        if strategy == "chunks" and head_dim_v > 480:
            with pytest.raises(DoesNotFit, match="accumulator takes all 512 columns|of 512, over by"):
                plan_kernel(spec)
            continue
        report = verify_kernel(compile_kernel(plan_kernel(spec)), (1, 1, 1, 140, 201))
        assert report.passed, report
