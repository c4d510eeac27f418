"""Two query tiles that see different KV tiles: what is visited and loaded; windows, a second source, V within K."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import generator
from generator.compile import compile_kernel
from generator.emulator.exhaustive import Exhaustive
from generator.mask import Mask, kv_span, kv_span2, loaded_tiles
from generator.plan import DoesNotFit, plan_kernel
from generator.reference import Seen
from generator.run import run_observed
from generator.spec import load_spec
from generator.tiles import count_tiles, seen_of
from generator.verify import COS_MIN, LSE_ABS_MAX, random_operands, verify_kernel

WINDOWS = st.none() | st.integers(0, 40) | st.just(1 << 30)
FLAGSHIP = {
    **{"head_dim": 16, "tile_n": 32, "causal": True, "window_left": 40, "seqlens": True, "sink": True},
    **{"kv_sources": 2, "limit2": True},
}


def plan(**fields):
    return plan_kernel(load_spec(None, strategy="two_tiles", **fields))


def needed(mask, tile_n):
    """KV tiles of which some row of the mask sees some key."""
    return {block for block in range(-(-mask.shape[1] // tile_n)) if mask[:, block * tile_n :][:, :tile_n].any()}


# -- what is loaded ----------------------------------------------------------------------------------------------------
@settings(max_examples=400, deadline=None)
@given(
    left=WINDOWS,
    right=WINDOWS,
    queries=st.integers(1, 60),
    keys=st.integers(1, 80),
    cut=st.integers(0, 80),
    tokens=st.sampled_from([1, 4, 16]),
    tile_n=st.sampled_from([8, 16]),
)
def test_neighbours_leave_no_kv_tile_between_them(left, right, queries, keys, cut, tokens, tile_n):
    """The first of two query tiles begins first, and each KV tile from there to the last end is seen by one of them: so
    the kernel's stretches (the first alone, both, the second alone) are all that there is.
    """
    length = max(keys - cut, 0)
    mask = Mask(left, right, lengths=True, sources=1, limits=False)
    seen = Seen(left=left, right=right, seqlens=[length]).first(0, queries, keys)
    for first in range(0, queries, 2 * tokens):
        tiles = [range(at, min(at + tokens, queries)) for at in (first, first + tokens) if at < queries]
        spans = [kv_span(mask, rows, queries, length, tile_n) for rows in tiles]
        of_both = needed(seen[first : first + 2 * tokens], tile_n)
        assert loaded_tiles(spans) == len(of_both)
        if len(spans) == 2 and spans[1].tiles:
            assert spans[0].begin <= spans[1].begin <= spans[0].stop <= spans[1].stop
            assert of_both == set(range(spans[0].begin, spans[1].stop))


@given(st.lists(st.integers(0, 90), min_size=2, max_size=16), st.integers(0, 80), st.sampled_from([8, 16]))
def test_what_is_loaded_of_the_second_source(limits, length, tile_n):
    source = SimpleNamespace(shape=(1, 80, 1, 16))
    seen = Seen(k2=source, seqlens2=[length], limit2=[limits]).second(0, len(limits))
    half = len(limits) // 2
    spans = [kv_span2(part, length, tile_n) for part in (limits[:half], limits[half:])]
    assert loaded_tiles(spans) == len(needed(seen, tile_n))


SHAPE = (3, 2, 2, 390, 270, 200)  # two query tiles, then two with the second one past the end or not full
SWEPT_COUNTS = [
    {},
    {"causal": True},
    {"seqlens": True},
    {"window_left": 0, "window_right": 0},
    {"window_left": 150},
    {"kv_sources": 2, "causal": True, "limit2": True},
    {"kv_sources": 2, "seqlens": True, "kv_shared": True, "q_heads_per_kv": 3},
]
COUNTED = [
    {"causal": True, "window_left": 20, "seqlens": True},
    {"window_left": 1 << 30, "window_right": 1 << 30},
    {"kv_shared": True, "causal": True, "window_left": 70},
    {"kv_sources": 2, "window_left": 9, "seqlens": True, "limit2": True, "q_heads_per_kv": 4},
    *(pytest.param(fields, marks=pytest.mark.sweep) for fields in SWEPT_COUNTS),
]


@pytest.mark.parametrize("fields", COUNTED, ids=str)
def test_kernels_execute_and_load_what_is_needed(fields):
    """QK of a tile is head_dim / 16 MMAs, PV tile_n / 16; K, V and Q of 16 columns are one TMA load a tile each. What
    is needed is counted here from the definition alone, element by element.
    """
    kernel = generator.build(head_dim=16, tile_n=32, strategy="two_tiles", **fields)
    spec, tokens = kernel.spec, kernel.plan.tokens
    batch, _, kv_heads, *lengths = SHAPE
    operands = random_operands(spec, (batch, kv_heads * spec.q_heads_per_kv, kv_heads, *lengths), seed=1)
    seen, heads = seen_of(spec, operands), operands["q"].shape[2] // kernel.plan.heads_per_tile
    visits = loads = query_tiles = 0
    for b in range(batch):
        masks = [seen.first(b, *lengths[:2])] + ([seen.second(b, lengths[0])] if spec.kv_sources == 2 else [])
        for first in range(0, lengths[0], tokens):
            own = sum(len(needed(mask[first : first + tokens], 32)) for mask in masks)
            visits, query_tiles = visits + heads * own, query_tiles + heads * (own > 0)
        for first in range(0, lengths[0], 2 * tokens):
            loads += heads * sum(len(needed(mask[first : first + 2 * tokens], 32)) for mask in masks)
    counts = count_tiles(kernel.plan, operands)
    assert (counts.visited, counts.needed, counts.loaded) == (visits, visits, loads)
    (launch,) = run_observed(kernel.binary, **operands).launches
    mmas = sum(n for name, n in launch.opcodes.items() if name.startswith("tcgen05.mma."))
    copies = sum(
        n for name, n in launch.opcodes.items() if name.startswith("cp.async.bulk.tensor.") and "mbarrier" in name
    )
    assert mmas == visits * (1 + 2)
    assert copies == loads * (1 if spec.kv_shared else 2) + query_tiles


# -- numbers -----------------------------------------------------------------------------------------------------------
SWEPT_KERNELS = [
    {"head_dim": 32, "tile_n": 16, "window_left": 0, "window_right": 0, "kv_shared": True, "q_heads_per_kv": 2},
    {"head_dim": 32, "tile_n": 32, "window_left": 40, "kv_stage": 1, "lse": False},
    {"head_dim": 48, "head_dim_v": 16, "tile_n": 32, "kv_sources": 2, "kv_shared": True, "q_heads_per_kv": 3},
    {"head_dim": 16, "head_dim_v": 32, "tile_n": 64, "kv_sources": 2, "limit2": True, "output": "unnormalized"},
]
VERIFIED = [
    FLAGSHIP,
    *(pytest.param(fields, marks=pytest.mark.sweep) for fields in SWEPT_KERNELS),
]
SHAPES = [(2, 1, 256, 256, 100), (1, 1, 300, 130, 229), (2, 1, 385, 300, 65), (1, 2, 129, 200, 1), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("fields", VERIFIED, ids=lambda fields: load_spec(fields, strategy="two_tiles").name)
def test_the_same_bits_in_several_interleavings(fields):
    binary = compile_kernel(plan(**fields))

    def repeat(gpu, outputs):
        gpu.schedules = 3

    for batch, kv_heads, *lengths in SHAPES:
        shape = (batch, kv_heads * binary.spec.q_heads_per_kv, kv_heads, *lengths)
        report = verify_kernel(binary, shape, prepare=repeat)
        assert report.passed and report.figures.cos >= COS_MIN, report
        assert report.tiles.visited == report.tiles.needed and not report.hazards


@pytest.mark.parametrize("lengths, lengths2", [((0, 0), (90, 1)), ((200, 3), (0, 0)), ((0, 0), (0, 0))], ids=str)
def test_sources_without_keys(lengths, lengths2):
    fields = {name: value for name, value in FLAGSHIP.items() if name != "limit2"}
    kernel = generator.build(strategy="two_tiles", **fields)
    operands = random_operands(kernel.spec, (2, 1, 1, 300, 200, 90), seed=3)
    rng = np.random.default_rng(0)
    for name in ("k", "v", "k2", "v2"):
        operands[name][:] = rng.standard_normal(operands[name].shape)
    operands["seqlens"][:], operands["seqlens2"][:] = lengths, lengths2
    o, lse = kernel(**operands)
    exact = generator.reference.attention(*(operands[n] for n in "qkv"), 0.25, seen=seen_of(kernel.spec, operands))
    np.testing.assert_allclose(o.astype(float), exact.o, atol=3e-2)
    np.testing.assert_allclose(lse, exact.lse, atol=LSE_ABS_MAX)
    if not any((*lengths, *lengths2)):
        assert not o.any()
        np.testing.assert_allclose(lse, np.broadcast_to(operands["sink"][None, :, None], lse.shape), rtol=1e-6)


def test_limits_that_only_the_first_query_tile_reaches():
    """Source 2 ends earlier for the second query tile, and not at all begun by it: its stretches in the other order."""
    kernel = generator.build(head_dim=16, tile_n=32, strategy="two_tiles", kv_sources=2, limit2=True)
    operands = random_operands(kernel.spec, (2, 1, 1, 256, 70, 200), seed=5)
    operands["limit2"][0, :128], operands["limit2"][0, 128:] = 200, 33
    operands["limit2"][1, :128], operands["limit2"][1, 128:] = 7, 0
    o, lse = kernel(**operands)
    exact = generator.reference.attention(*(operands[n] for n in "qkv"), 0.25, seen=seen_of(kernel.spec, operands))
    np.testing.assert_allclose(o.astype(float), exact.o, atol=3e-2)
    np.testing.assert_allclose(lse, exact.lse, atol=LSE_ABS_MAX)
    counts = count_tiles(kernel.plan, operands)
    assert (counts.visited, counts.loaded) == (4 * 3 + 7 + 2 + 1 + 0, 2 * 3 + 7 + 1)


def test_every_interleaving_of_the_barriers_ends():
    binary = compile_kernel(plan(**FLAGSHIP, kv_stage=2))
    proof = Exhaustive()

    def observe(gpu, outputs):
        gpu.observers.append(proof)

    assert verify_kernel(binary, (1, 1, 1, 256, 160, 70), prepare=observe).passed
    (text,) = proof.proofs
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in text


# -- the budget --------------------------------------------------------------------------------------------------------
def test_kv_shared_saves_the_ring_of_v():
    apart, shared = plan(head_dim=128, kv_stage=2).budget, plan(head_dim=128, kv_stage=2, kv_shared=True).budget
    assert apart.smem_total == 1024 + 3072 + 3 * 65536 + apart.buffer("sO").bytes and apart.buffer("sV").bytes == 65536
    assert shared.smem_total == 1024 + 3072 + 2 * 65536 + shared.buffer("sO").bytes
    assert {bar.name for bar in apart.mbarriers} - {bar.name for bar in shared.mbarriers} == {"v_full", "v_empty"}
    assert "V its first 128 columns, which saves 65536" in shared.buffer("sK").reason
    assert plan(head_dim=128, kv_shared=True).kv_stages == 3


def test_kv_shared_with_one_stage_is_refused():
    with pytest.raises(DoesNotFit) as caught:
        plan(head_dim=64, kv_shared=True, kv_stage=1)
    message = str(caught.value)
    assert message.startswith("kv_stage = 1: does not fit") and "the deepest that fits is" in message
    assert "QK of the next tile is issued before PV of this one, which reads the same stage" in message
