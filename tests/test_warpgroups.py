"""Consumer warpgroups (sm_90a): the budget by hand, what is refused, the choice, turns, the protocol."""

from dataclasses import replace

import pytest

from generator.accumulators import accumulators
from generator.arch import SM90A
from generator.budget import Tiling
from generator.chunks import budget_of
from generator.plan import DoesNotFit, NotImplementedYet, candidates, plan_kernel
from generator.protocol import protocol
from generator.spec import load_spec
from generator.warpgroups import REGISTERS, can_pack, model_preference, predicted_cycles


def plan(**fields):
    return plan_kernel(load_spec(None, **{"arch": "sm_90a", **fields}))


def refusal(kind, **fields):
    with pytest.raises(kind) as caught:
        plan(**fields)
    return caught.value


# -- the budget --------------------------------------------------------------------------------------------------------
def test_budget_of_head_dim_128():
    """Two consumers, 160 keys a tile, two stages."""
    chosen = plan(head_dim=128, tile_m=128, tile_n=160)
    budget = chosen.budget
    assert [(b.name, b.offset, b.bytes, b.stages, b.alias_of) for b in budget.buffers] == [
        ("barriers", 0, 12 * 8, 1, None),
        ("sQ", 1024, 2 * 64 * 128 * 2, 2, None),
        ("sK", 1024 + 32768, 2 * 160 * 128 * 2, 2, None),
        ("sV", 1024 + 32768 + 81920, 2 * 160 * 128 * 2, 2, None),
        ("sO", 1024 + 32768 + 2 * 81920, 2 * 64 * 128 * 2, 2, None),
    ]
    assert budget.smem_total == 1024 + 32768 + 81920 + 81920 + 32768 == 230400
    assert [(m.name, m.stages, m.arrivals, m.slot) for m in budget.mbarriers] == [
        ("q_full", 2, 1, 0),
        ("q_empty", 2, 4, 2),
        ("k_full", 2, 1, 4),
        ("k_empty", 2, 8, 6),
        ("v_full", 2, 1, 8),
        ("v_empty", 2, 8, 10),
    ]
    assert [(b.id, b.name, b.threads) for b in budget.named_barriers] == [
        (0, "cta", 384),
        (1, "turn 0", 256),
        (2, "turn 1", 256),
        (3, "consumer 0", 128),
        (4, "consumer 1", 128),
    ]
    assert [(r.name, r.first_warp, r.warps, r.registers) for r in budget.roles] == [
        ("consumer", 0, 8, 240),
        ("tma", 8, 2, 24),
        ("idle", 10, 2, 24),
    ]
    held = accumulators(chosen.spec, chosen.tiling, budget)
    assert held.parts == {"S": 80, "P": 40, "O": 64} and (held.other, held.used, held.limit) == (28, 212, 240)
    assert not budget.regions and budget.tmem_columns == 0


def test_budget_of_head_dim_256_lays_so_over_sq():
    budget = plan(head_dim=256).budget
    assert [(b.name, b.offset, b.bytes, b.alias_of) for b in budget.buffers] == [
        ("barriers", 0, 12 * 8, None),
        ("sQ", 1024, 65536, None),
        ("sK", 66560, 2 * 64 * 256 * 2, None),
        ("sV", 132096, 65536, None),
        ("sO", 1024, 65536, "sQ"),
    ]
    assert budget.smem_total == 197632 and budget.bytes_of("sO") == 0
    assert budget.mbarrier("q_empty").arrivals == 1, "its first warp alone has waited for the store of O"


def test_budget_of_three_consumers_with_v_within_k_and_float32_o():
    chosen = plan(head_dim=192, head_dim_v=128, kv_shared=True, output="unnormalized", tile_m=192, tile_n=80)
    budget = chosen.budget
    assert [(b.name, b.bytes) for b in budget.buffers] == [
        ("barriers", (3 + 3 + 4 + 4) * 8),
        ("sQ", 3 * 64 * 192 * 2),
        ("sK", 4 * 80 * 192 * 2),
    ]
    assert budget.smem_total == 1024 + 73728 + 122880
    assert [m.name for m in budget.mbarriers] == ["q_full", "q_empty", "k_full", "k_empty"]
    assert budget.mbarrier("k_empty").arrivals == 12 and budget.threads == 512
    assert sum(accumulators(chosen.spec, chosen.tiling, budget).parts.values()) == 40 + 20 + 64


def test_a_plan_that_takes_the_last_byte():
    """16 stages of 224 keys of 16 columns: with sO of its own it would be 2048 bytes too many."""
    chosen = plan(head_dim=16, tile_m=64, tile_n=224, kv_stage=16)
    assert chosen.o_over_q and chosen.budget.smem_total == 1024 + 2048 + 2 * 16 * 224 * 32 == 232448
    own = Tiling(64, 224, 16, "register", False, 16, "warpgroups")
    (over,) = budget_of(chosen.spec, SM90A, own).overflows
    assert (over.resource, over.need, over.over) == ("smem", 234496, 2048) and "sO over sQ" in over.remedy


@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_setmaxnreg_hands_out_no_more_registers_than_there_are(consumers):
    """Threads get an equal share, a multiple of 8, at launch; what consumers get more, the producer's give up."""
    consumer, producer = REGISTERS[consumers]
    threads = 128 * (consumers + 1)
    budget = plan(head_dim=64, tile_m=64 * consumers).budget
    assert budget.threads == threads and budget.registers_total == 128 * (consumers * consumer + producer)
    assert budget.registers_total <= budget.registers_pool == 65536 // threads // 8 * 8 * threads
    assert consumer % 8 == producer % 8 == 0 and consumer <= 255 - 15
    at_entry = 65536 // threads // 8 * 8  # 256 (255 a thread at most), 168, 128: setmaxnreg must know which way it goes
    changed = plan(head_dim=64, tile_m=64 * consumers).register_change("consumer")
    assert changed == ("increase" if consumer > at_entry else "decrease") == {1: "decrease"}.get(consumers, "increase")


@pytest.mark.parametrize(
    "fields, held",
    [
        ({"head_dim": 64, "tile_m": 64, "tile_n": 240}, (120, 60, 32)),  # 240 of 240
        ({"head_dim": 256, "tile_m": 128, "tile_n": 112, "kv_stage": 1}, (56, 28, 128)),  # 240 of 240
        ({"head_dim": 96, "tile_m": 192, "tile_n": 112}, (56, 28, 48)),  # 160 of 160
    ],
)
def test_the_widest_tile_that_the_registers_hold(fields, held):
    chosen = plan(**fields)
    parts = accumulators(chosen.spec, chosen.tiling, chosen.budget)
    assert tuple(parts.parts.values()) == held and parts.used == parts.limit
    error = refusal(DoesNotFit, **{**fields, "tile_n": fields["tile_n"] + 16})
    s, p, o = held[0] + 8, held[1] + 4, held[2]
    need = s + p + o + 28
    assert f"S {s} + P {p} + O {o} + 28 else, a thread = {need} registers of {parts.limit}, over by 12" in str(error)
    assert error.field in ("tile_n", "tile_m") and "tile_n = " in error.remedy


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (DoesNotFit, {"tile_m": 96}, "tile_m = 96: a consumer warpgroup has 64 query rows; use 64, 128, 192, 256"),
        (
            DoesNotFit,
            {"pack_heads": True, "q_heads_per_kv": 5},
            "a group of 5 query heads does not fold into 64 or 128",
        ),
        (DoesNotFit, {"pack_heads": True, "q_heads_per_kv": 3, "tile_m": 192}, "3 query heads does not fold into 192"),
        (DoesNotFit, {"pack_heads": True, "q_heads_per_kv": 96, "tile_m": 64}, "does not fold into 64 rows of a tile"),
        (DoesNotFit, {"head_dim": 256, "tile_m": 192}, "tile_m = 192: does not fit; the closest is 3 consumer"),
        (
            DoesNotFit,
            {"head_dim_v": 208, "tile_m": 192, "tile_n": 16},
            "one wgmma writes O: 104 + 30 else, a thread at entry = 134 registers of 128, over by 6",
        ),
        (DoesNotFit, {"head_dim_v": 144, "tile_m": 256, "tile_n": 16}, "72 + 30 else, a thread at entry = 102"),
        (
            DoesNotFit,
            {"head_dim": 256, "tile_m": 64, "kv_stage": 16},
            "kv_stage = 16: does not fit; the closest is 1 con",
        ),
        (DoesNotFit, {"kv_shared": True, "kv_stage": 1}, "QK of the next tile is issued before PV of this one"),
        (NotImplementedYet, {"p_staging": "smem", "strategy": "warpgroups"}, "P goes from the registers of S to PV"),
        (NotImplementedYet, {"strategy": "tiles"}, "is for Blackwell (sm_100a) only"),
        (NotImplementedYet, {"head_dim": 272, "strategy": "warpgroups"}, "not implemented for sm_90a yet"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, fields, message):
    error = refusal(kind, **{"head_dim": 64, **fields})
    assert message in str(error) and error.remedy and error.field in fields


def test_a_remedy_is_one():
    error = refusal(DoesNotFit, head_dim=256, tile_m=64, kv_stage=16)
    assert error.remedy.startswith("the deepest that fits is 12")
    assert plan(head_dim=256, tile_m=64, kv_stage=12).kv_stages == 12
    assert refusal(DoesNotFit, head_dim=256, tile_m=64, kv_stage=13).field == "kv_stage"
    assert plan(head_dim=256, tile_m=128).budget.fits and "tile_m = 128 fits" in str(
        refusal(DoesNotFit, head_dim=256, tile_m=192)
    )


@pytest.mark.parametrize(
    "group, rows, fits",
    [
        *((group, 64, True) for group in (1, 2, 4, 8, 16, 32, 64)),
        *((3, rows, False) for rows in (64, 128, 192)),  # 192 = 64 x 3, but no consumer's 64 rows are whole tokens
        *((128, rows, rows != 192) for rows in (64, 128, 192)),  # 64: half of a token's heads
        (192, 192, True),
        (192, 64, True),
        (192, 128, False),
        (256, 128, True),
        (96, 192, False),
    ],
)
def test_whole_tokens_or_a_part_of_one_fill_a_tile_and_each_consumer_has_a_box(group, rows, fits):
    assert can_pack(group, rows, SM90A) == fits
    if group > 1 and fits:
        chosen = plan(head_dim=64, q_heads_per_kv=group, tile_m=rows)
        assert chosen.packed and chosen.tokens == max(1, rows // group)
        assert chosen.heads_per_tile * chosen.tiles_a_group == group


# -- the choice --------------------------------------------------------------------------------------------------------
def test_predicted_cycles_by_hand():
    """128 x 160 scores at head_dim 128: 0.9 of the tensor core's 2560 cycles, 0.88 of the exponentials' 1280, 480."""
    spec = load_spec(None, arch="sm_90a", head_dim=128)
    two = Tiling(128, 160, 2, "register", False, 128, "warpgroups")
    assert predicted_cycles(spec, SM90A, two) == pytest.approx(0.9 * 2560 + 0.88 * 1280 + 480)
    three = Tiling(192, 80, 2, "register", False, 128, "warpgroups")
    assert predicted_cycles(spec, SM90A, three) == pytest.approx(0.9 * 1920 + 0.65 * 960 + 480)
    one = Tiling(64, 160, 2, "register", False, 128, "warpgroups")
    assert predicted_cycles(spec, SM90A, one) == pytest.approx(0.9 * 1280 + 1.6 * 640 + 480)


@pytest.mark.parametrize("dims", [(192, 128), (64, 96), (208, 208), (128, 32)])
def test_without_a_measurement_the_fewest_cycles_a_score_are_taken(dims):
    spec = load_spec(None, arch="sm_90a", head_dim=dims[0], head_dim_v=dims[1])
    chosen = plan_kernel(spec)
    fitting = [t for t in candidates(spec, SM90A) if budget_of(spec, SM90A, t).fits and t.kv_stages > 1]
    costs = [predicted_cycles(spec, SM90A, t) / (t.tile_m * t.tile_n) for t in fitting]
    best = [t for t, cost in zip(fitting, costs, strict=True) if cost == min(costs)]
    deepest = max(t.kv_stages for t in best)
    assert chosen.tiling in best and chosen.kv_stages == deepest
    if any(t.kv_stages == deepest and not t.o_over_q for t in best):
        assert not chosen.o_over_q, "sO lies over sQ only where it must"


def test_a_narrow_window_has_narrow_tiles():
    """What was measured without a window, or of a wide one, is no guide there."""
    windowed = {"head_dim": 64, "q_heads_per_kv": 8, "causal": True}
    costs = {}
    for rows, keys in ((192, 80), (256, 48), (256, 64), (192, 96), (128, 144), (192, 48)):
        tiling = plan(**windowed, window_left=127, tile_m=rows, tile_n=keys).tiling
        costs[rows, keys] = model_preference(load_spec(arch="sm_90a", window_left=127, **windowed), SM90A, tiling)[2]
    assert list(costs.values()) == sorted(costs.values()), "the order in which an H200 had them"
    chosen = plan(**windowed, window_left=127)
    assert (chosen.tile_m, chosen.tile_n) == (192, 80) and chosen.lazy and chosen.own_spans and chosen.tiles_move
    wider = plan(**windowed, window_left=1023)
    assert (wider.tile_m, wider.tile_n) == (192, 96) and wider.lazy
    for left in (2047, 10**6):
        assert plan(**windowed, window_left=left).tiling == replace(plan(**windowed).tiling, lazy=True)
    to_the_right = plan(head_dim=64, window_left=100).tiling
    assert to_the_right == replace(plan(head_dim=64, causal=True).tiling, lazy=True), "all keys to the right"


def test_the_order_of_preference():
    """Two stages before all; then a group's heads in one tile; then what was measured; then the model."""
    assert plan(head_dim=256, tile_n=96).kv_stages == 2 and plan(head_dim=256, tile_n=96).tile_m == 64
    assert plan(head_dim=256, tile_n=96, tile_m=128).kv_stages == 1
    group = plan(head_dim=64, q_heads_per_kv=128)
    assert group.packed and group.tile_m % 128 == 0, "the winner has 192 rows, which 128 heads do not fill"
    assert not plan(head_dim=64, q_heads_per_kv=128, pack_heads=False).packed
    assert (plan(head_dim=64).tile_m, plan(head_dim=64).tile_n) == (192, 128)
    reasons = {item.reason.split(":")[0] for item in plan(head_dim=64, q_heads_per_kv=128).rejected}
    assert "fits, but cannot hold the query heads of a group in a tile" in reasons
    assert "fits, but has fewer than two kv stages" in reasons
    measured = {item.reason.split(":")[0] for item in plan(head_dim=64).rejected}
    assert "fits, but another tile was measured to be faster" in measured


@pytest.mark.parametrize(
    "v_dim, tile_m, turns, lazy", [(96, 64, False, False), (128, 128, True, False), (144, 128, False, True)]
)
def test_turns_and_lazy_follow_the_width_of_o(v_dim, tile_m, turns, lazy):
    """Lazy only where maxima are looked for, as of a second source."""
    chosen = plan(head_dim=176, head_dim_v=v_dim, tile_m=tile_m, kv_sources=2)
    assert (chosen.takes_turns, chosen.lazy, chosen.skip_log2) == (turns, lazy, 8.0 if lazy else 0.0)
    assert chosen.looks_for_maxima
    kept = plan(head_dim=176, head_dim_v=v_dim, tile_m=tile_m)
    assert not kept.looks_for_maxima and not kept.lazy and kept.takes_turns == turns


@pytest.mark.parametrize("rows, dims, beside", [(128, 80, False), (128, 96, True), (64, 64, True)])
def test_a_narrow_softmax_runs_after_its_own_pv_where_others_are(rows, dims, beside):
    chosen = plan(head_dim=dims, tile_m=rows, tile_n=48)
    assert chosen.beside_pv == beside and ("softmax after PV" in str(chosen.tiling)) != beside


def test_the_protocol_tells_turns_and_who_frees_q():
    rows = {row.barrier: row for row in protocol(plan(head_dim=128, tile_m=128, tile_n=160))}
    assert rows["k_full"].arrivals == f"1 and {160 * 128 * 2} bytes" and rows["q_full"].arrivals == "1 and 16384 bytes"
    assert "consumer 1" in rows["bar.sync 1"].arrives and rows["bar.sync 1"].waits.startswith("consumer 0")
    assert "at the start" in rows["bar.sync 1"].arrives and "at the start" not in rows["bar.sync 2"].arrives
    over = {row.barrier: row for row in protocol(plan(head_dim=256))}
    assert "store of O" in over["q_empty"].arrives and over["q_empty"].arrivals == "1"
    assert "takes no turns" in over["bar.sync 1"].phase
    shared = {row.barrier: row for row in protocol(plan(head_dim=64, kv_shared=True))}
    assert "after PV n" in shared["k_empty"].arrives and "v_full" not in shared
