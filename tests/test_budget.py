"""The arithmetic of the budget, against numbers worked out by hand and against the rules of the hardware."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.arch import ARCHS, SM100A
from generator.budget import Tiling, compute_budget, swizzle_bytes
from generator.spec import load_spec

tilings = st.builds(
    Tiling,
    tile_m=st.just(128),
    tile_n=st.sampled_from([16, 32, 48, 64, 96, 128]),
    kv_stages=st.integers(1, 16),
    p_staging=st.sampled_from(["tmem", "smem"]),
    o_over_q=st.booleans(),
    o_chunk=st.just(16),
)
specs = st.builds(
    load_spec,
    head_dim=st.integers(1, 32).map(lambda n: 16 * n),
    output=st.sampled_from(["normalized", "unnormalized"]),
)


def test_head_dim_128_by_hand():
    budget = compute_budget(load_spec(head_dim=128), SM100A, Tiling(128, 128, 2, "smem", False, 64))
    assert [(b.name, b.offset, b.bytes) for b in budget.buffers] == [
        ("barriers", 0, (5 + 4 * 2) * 8 + 4),
        ("sQ", 1024, 32768),
        ("sK", 33792, 65536),
        ("sV", 99328, 65536),
        ("sP", 164864, 32768),
        ("sO", 197632, 16384),
    ]
    assert budget.smem_total == 197632 + 16384 and budget.fits
    assert [(r.name, r.column, r.columns) for r in budget.regions] == [("S", 0, 128), ("O", 128, 128)]
    assert (budget.tmem_used, budget.tmem_columns, budget.threads) == (256, 256, 192)


def test_reuse_saves_the_bytes_of_so():
    spec, plain = load_spec(head_dim=128), Tiling(128, 128, 2, "tmem", False, 128)
    reused = Tiling(128, 128, 2, "tmem", True, 128)
    budget = compute_budget(spec, SM100A, reused)
    assert compute_budget(spec, SM100A, plain).smem_total - budget.smem_total == 32768
    assert budget.buffer("sO").offset == budget.buffer("sQ").offset and budget.bytes_of("sO") == 0


def test_unnormalized_output_is_staged_in_float32():
    spec, tiling = load_spec(head_dim=64, output="unnormalized"), Tiling(128, 64, 1, "tmem", False, 64)
    assert compute_budget(spec, SM100A, tiling).buffer("sO").bytes == 128 * 64 * 4


def test_so_larger_than_sq_cannot_lie_over_it():
    spec = load_spec(head_dim=64, output="unnormalized")
    budget = compute_budget(spec, SM100A, Tiling(128, 64, 1, "tmem", True, 64))
    assert [str(over) for over in budget.overflows] == [
        "smem: sO cannot lie over sQ: sO = 32768 bytes of 16384, over by 16384"
    ]
    assert budget.overflows[0].remedy == "sO of its own, or fewer columns of O at a time"


def test_overflows_say_the_sum_and_the_excess():
    budget = compute_budget(load_spec(head_dim=512), SM100A, Tiling(128, 128, 1, "tmem", False, 512))
    smem, tmem = budget.overflows
    assert str(smem) == (
        "smem: barriers 76 + sQ 131072 + sK 131072 + sV 131072 + sO 131072, aligned to 1024, "
        "= 525312 bytes of 232448, over by 292864"
    )
    assert str(tmem) == (
        "tmem: a 128 x 512 float32 accumulator takes all 512 columns, so S and P have no room: "
        "S 128 + P 64 + O 512 = 704 columns of 512, over by 192"
    )
    assert "CTA pair" in tmem.remedy and "M = 64" in tmem.remedy and "two passes" in tmem.remedy


@pytest.mark.parametrize("head_dim, span", [(16, 32), (32, 64), (48, 32), (64, 128), (80, 32), (96, 64), (192, 128)])
def test_swizzle_is_the_largest_span_that_divides_a_row(head_dim, span):
    assert swizzle_bytes(head_dim * 2) == span


def test_swizzle_refuses_rows_that_no_span_divides():
    with pytest.raises(ValueError, match="24 bytes"):
        swizzle_bytes(24)


@settings(max_examples=300, deadline=None)
@given(specs, tilings)
def test_shared_memory_adds_up(spec, tiling):
    budget = compute_budget(spec, SM100A, tiling)
    own = [b for b in budget.buffers if b.alias_of is None]
    end = 0
    for buffer in own:
        assert buffer.offset % buffer.alignment == 0 and end <= buffer.offset < end + buffer.alignment
        assert buffer.bytes % buffer.stages == 0
        end = buffer.offset + buffer.bytes
    assert end <= budget.smem_total < end + 1024 and budget.smem_total % 1024 == 0
    assert sum(-(-b.bytes // 1024) * 1024 for b in own) == budget.smem_total
    for buffer in budget.buffers:
        if buffer.alias_of:
            assert buffer.offset == budget.buffer(buffer.alias_of).offset
    assert budget.fits == (not budget.overflows)
    assert all(over.over > 0 and over.remedy for over in budget.overflows)


@settings(max_examples=300, deadline=None)
@given(specs, tilings)
def test_stages_keep_the_swizzle_pattern_s_phase(spec, tiling):
    budget = compute_budget(spec, SM100A, tiling)
    for name, columns in (("sK", spec.head_dim), ("sV", spec.v_dim)):
        assert budget.buffer(name).stage_bytes % (8 * swizzle_bytes(columns * 2)) == 0


@settings(max_examples=300, deadline=None)
@given(specs, tilings)
def test_tensor_memory_regions_do_not_overlap(spec, tiling):
    budget = compute_budget(spec, SM100A, tiling)
    column = 0
    for region in budget.regions:
        assert region.column == column
        column += region.columns
    assert column == budget.tmem_used <= budget.tmem_columns < 2 * max(column, 32)
    assert budget.tmem_columns >= 32 and budget.tmem_columns & (budget.tmem_columns - 1) == 0
    assert ("P" in [r.name for r in budget.regions]) == (tiling.p_staging == "tmem")


@settings(max_examples=100, deadline=None)
@given(specs, tilings)
def test_barrier_block_is_dense(spec, tiling):
    budget = compute_budget(spec, SM100A, tiling)
    slot = 0
    for barrier in budget.mbarriers:
        assert barrier.slot == slot and barrier.offset == 8 * slot
        slot += barrier.stages
    assert slot == 5 + 4 * tiling.kv_stages
    assert budget.tmem_slot_offset == 8 * slot and budget.buffer("barriers").bytes == 8 * slot + 4


def test_roles_cover_the_threads_and_registers_fit():
    for tile_n in (16, 64, 128):
        budget = compute_budget(load_spec(head_dim=64), SM100A, Tiling(128, tile_n, 1, "tmem", False, 64))
        assert budget.role("softmax").first_warp == 0
        assert sum(role.warps for role in budget.roles) * 32 == budget.threads
        assert all(role.registers <= 255 and "estimate" in role.reason for role in budget.roles)
        assert budget.registers_total <= SM100A.registers_per_sm
        assert [barrier.threads for barrier in budget.named_barriers] == [192]


def test_absent_buffers_raise():
    budget = compute_budget(load_spec(head_dim=64), SM100A, Tiling(128, 64, 1, "tmem", False, 64))
    with pytest.raises(KeyError):
        budget.buffer("sP")
    assert budget.bytes_of("sP") == 0


def test_architectures_are_named_by_their_key():
    assert {name: arch.name for name, arch in ARCHS.items()} == {name: name for name in ("sm_100a", "sm_90a")}
    assert SM100A.smem_per_cta == 232448 and SM100A.tmem_columns == 512
