"""Which buffers may overlap: the model, the budgets that follow it, and the emulator's word on an overlap forced in."""

from dataclasses import replace

import pytest

from generator.arch import SM100A
from generator.budget import Buffer, Region, place_buffers
from generator.chunks import budget_of
from generator.compile import compile_kernel
from generator.emit import emit_kernel
from generator.lifetime import Overlap, check_overlaps, fewest_buffers
from generator.plan import candidates, plan_kernel
from generator.spec import load_spec
from generator.verify import verify_kernel


@pytest.mark.parametrize("over", ["sQ", "sK", "sV", "ring", "sP", "S", "P"])
def test_o_may_be_staged_over_what_the_mmas_have_read(over):
    check_overlaps([("sO", over), (over, "sO")])


@pytest.mark.parametrize(
    "one, other, missing",
    [
        ("sP", "sQ", "nothing orders QK 1 (sQ) before write P 0 (sP of tile 0)"),
        ("sP", "ring", "nothing orders"),
        ("P", "S", "nothing orders QK 1 (S of tile 1) before write P 0 (P of tile 0)"),
        ("sO", "O", "nothing orders stage O"),
        ("sQ", "ring", "nothing orders"),
        ("S", "O", "nothing orders"),
    ],
)
def test_buffers_that_are_alive_at_once_are_refused(one, other, missing):
    with pytest.raises(Overlap) as caught:
        check_overlaps([(one, other)])
    assert str(caught.value).startswith(f"{one} cannot lie over {other}: ") and missing in str(caught.value)
    with pytest.raises(Overlap):
        check_overlaps([(other, one)])


def test_a_buffer_that_the_model_does_not_know():
    with pytest.raises(KeyError):
        check_overlaps([("sX", "sQ")])


@pytest.mark.parametrize("rest, kept", [(0, 1), (1, 1), (0, 5), (4, 4), (5, 4), (8, 1), (2, 6)])
def test_a_ring_holds_the_chunks_that_stay_twice_and_the_others_once(rest, kept):
    """QK of a tile, all of its chunks, is issued before PV of the tile before it has read those that stayed."""
    assert fewest_buffers(rest, kept) == rest + 2 * kept


def test_a_ring_of_which_qk_frees_every_buffer_needs_one():
    assert fewest_buffers(4, 0) == 1


def test_placing_refuses_an_illegal_overlap():
    wanted = [("sQ", 4096, 1, None, ""), ("sP", 2048, 1, "sQ", "")]
    with pytest.raises(Overlap, match="sP cannot lie over sQ: nothing orders"):
        place_buffers(wanted)
    assert place_buffers([wanted[0], ("sO", 2048, 1, "sQ", "")])[1] == 4096


OVER_S = {"two_tiles": {"qk_first": False}, "two_ctas": {"scores": 2}}  # strategies with P over S, and what orders it


@pytest.mark.parametrize("head_dim", [64, 128, 256, 272, 384, 512])
def test_every_candidate_s_overlaps_are_legal_and_all_others_are_apart(head_dim):
    spec = load_spec(head_dim=head_dim)
    for tiling in candidates(spec, SM100A):
        budget = budget_of(spec, SM100A, tiling)
        check_overlaps([(b.name, b.alias_of) for b in budget.buffers if b.alias_of])
        own = [b for b in budget.buffers if b.alias_of is None]
        assert all(a.offset + a.bytes <= b.offset for a, b in zip(own, own[1:], strict=False))
        order = OVER_S.get(tiling.strategy)
        over = [r for r in budget.regions if order and r.name in ("P0", "P1")]
        for p, s in zip(over, budget.regions, strict=False):
            check_overlaps([("P", "S")], **order)
            assert s.name == p.name.replace("P", "S") and s.column <= p.column and p.end <= s.end
        apart = [r for r in budget.regions if r not in over]
        assert all(a.column + a.columns <= b.column for a, b in zip(apart, apart[1:], strict=False))


def forced(plan, **moved):
    """The plan with buffers or TMEM regions moved, no questions asked."""
    buffers = tuple(replace(b, offset=moved.get(b.name, b.offset)) for b in plan.budget.buffers)
    regions = tuple(replace(r, column=moved.get(r.name, r.column)) for r in plan.budget.regions)
    return replace(plan, budget=replace(plan.budget, buffers=buffers, regions=regions))


def report(plan, tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(emit_kernel(plan))
    return verify_kernel(compile_kernel(plan, path, use_cache=False), (1, 1, 1, 128, 520))


def test_p_forced_over_q_in_shared_memory_is_caught(tmp_path):
    plan = plan_kernel(load_spec(head_dim=272, strategy="pair"))
    found = report(forced(plan, sP=plan.budget.buffer("sQ").offset), tmp_path)
    assert found.hazards == 1 and "sQ" in found.failures[0], found


def test_p_forced_over_the_ring_is_caught(tmp_path):
    plan = plan_kernel(load_spec(head_dim=272, strategy="pair"))
    found = report(forced(plan, sP=plan.budget.buffer("ring").offset), tmp_path)
    assert found.hazards == 1 and "TMA load" in found.failures[0], found


def test_p_forced_over_s_in_tensor_memory_is_caught(tmp_path):
    plan = plan_kernel(load_spec(head_dim=272, strategy="chunks"))
    found = report(forced(plan, P=plan.budget.region("S").column), tmp_path)
    assert found.hazards == 1 and "TMEM column" in found.failures[0], found


def test_the_same_kernels_unmoved_are_clean(tmp_path):
    plan = plan_kernel(load_spec(head_dim=272, strategy="pair"))
    assert isinstance(plan.budget.buffers[0], Buffer) and isinstance(plan.budget.regions[0], Region)
    assert report(forced(plan), tmp_path).passed
