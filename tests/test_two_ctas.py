"""Two CTAs that multiply as one, each with a query tile: the budget, what is refused, turns, when O is rescaled."""

import itertools

import numpy as np
import pytest

from generator.arch import SM100A
from generator.compile import compile_kernel
from generator.cost import cost_of
from generator.emulator.exhaustive import Exhaustive
from generator.lifetime import Overlap, check_overlaps
from generator.plan import DoesNotFit, NotImplementedYet, plan_kernel
from generator.run import run_observed
from generator.spec import load_spec
from generator.two_ctas import polynomial_pairs
from generator.verify import verify_kernel


def plan(**fields):
    return plan_kernel(load_spec(None, strategy="two_ctas", **fields))


def test_budget_of_head_dim_256():
    budget = plan(head_dim=256).budget
    assert [(r.name, r.column, r.columns) for r in budget.regions] == [
        ("S0", 0, 128),
        ("S1", 128, 128),
        ("P0", 0, 64),
        ("P1", 128, 64),
        ("O", 256, 256),
    ]
    sizes = {b.name: (b.bytes, b.stages, b.alias_of) for b in budget.buffers}
    assert sizes["sQ"] == (128 * 256 * 2, 1, None)
    assert sizes["sK"] == (2 * 64 * 256 * 2, 2, None), "half of the keys"
    assert sizes["sV"] == (2 * 128 * 128 * 2, 2, None), "half of the columns"
    assert sizes["sO"] == (128 * 128 * 2, 1, None), "O of a query tile leaves while Q of the next arrives"
    assert budget.smem_total == 1024 + 2048 + 3 * 65536 + 32768 == 232448 == budget.smem_limit
    assert budget.threads == 384 and budget.registers_total == 32 * (4 * 240 + 4 * 152 + 4 * 112) <= 384 * 168


@pytest.mark.parametrize("head_dim_v, width", [(16, 32), (48, 64), (80, 96), (240, 256), (256, 256)])
def test_o_is_as_wide_as_a_pair_s_mma_writes(head_dim_v, width):
    """N of a tcgen05.mma of two CTAs is a multiple of 32; the columns past head_dim_v are computed and left."""
    chosen = plan(head_dim=64, head_dim_v=head_dim_v)
    assert chosen.budget.region("O").columns == width and chosen.layouts["sV"].columns == width // 2


def test_p_may_lie_over_s_of_the_same_slot():
    check_overlaps([("P", "S"), ("S", "P")], scores=2)
    with pytest.raises(Overlap, match="nothing orders"):
        check_overlaps([("P", "S")])
    with pytest.raises(Overlap):
        check_overlaps([("sP", "S")], scores=2)


def test_both_read_k_and_v_once():
    """Half of the bytes from L2 for each block of scores, and fewer of shared memory, than one query tile a CTA."""
    plans = [plan_kernel(load_spec(head_dim=256, strategy=strategy)) for strategy in ("two_ctas", "tiles")]
    two, one = (cost_of(p.spec, SM100A, p.tiling) for p in plans)
    per = [c.load_bytes / c.rows / c.keys for c in (two, one)]
    assert per[0] == per[1] / 2
    assert two.mma_flop / two.rows / two.keys == one.mma_flop / one.rows / one.keys
    assert two.mma_read_bytes / two.rows / two.keys < one.mma_read_bytes / one.rows / one.keys


@pytest.mark.parametrize("head_dim, share", [(64, 6), (128, 6), (192, 6), (240, 6), (256, 3)])
def test_share_of_the_exponentials_by_polynomial(head_dim, share):
    """MUFU takes 256 / (d + dv) of the tensor core's time: half of it at head_dim 256."""
    assert len(polynomial_pairs(load_spec(head_dim=head_dim), SM100A)) == share


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": 128, "kv_shared": True}, "kv_shared = True: not implemented for sm_100a yet"),
        ({"head_dim": 128, "p_staging": "smem"}, "P lies over S in tensor memory"),
        ({"head_dim": 272}, "head_dim = 272: not implemented for sm_100a yet; at most 256, or a CTA pair with K and V"),
        ({"head_dim": 256, "head_dim_v": 272}, "head_dim_v = 272: not implemented for sm_100a yet; at most 256"),
        ({"head_dim": 128, "tile_m": 64}, "tile_m = 64"),
        ({"head_dim": 128, "tile_n": 48}, "a tcgen05.mma of two CTAs takes multiples of 32 keys"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(fields, message):
    with pytest.raises(NotImplementedYet) as caught:
        plan(**fields)
    assert message in str(caught.value)


def test_more_stages_than_fit():
    with pytest.raises(DoesNotFit, match="kv_stage = 3: does not fit.*the deepest that fits is 2"):
        plan(head_dim=256, kv_stage=3, tile_n=128)


# -- turns -------------------------------------------------------------------------------------------------------------
def turns(causal: bool, pairs: int, tiles: int, heads: int, batches: int) -> list[list[tuple[int, int, int]]]:
    """templates/_work_ctas.py.j2 in Python: (query tile, head, batch entry) of each pair, in order."""

    def place(pair: int, turn: int) -> int:
        return pairs - 1 - pair if causal and turn % 2 else pair

    def block(i: int) -> tuple[int, int, int]:
        if causal:
            return tiles - 1 - i // (heads * batches), i % heads, i // heads % batches
        return i % tiles, i // tiles % heads, i // (tiles * heads)

    whole, rest = divmod(tiles * heads * batches, pairs)
    counts = [whole + (place(pair, whole) < rest) for pair in range(pairs)]
    return [[block(t * pairs + place(pair, t)) for t in range(count)] for pair, count in enumerate(counts)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pairs, tiles, heads, batches", [(1, 3, 2, 2), (2, 5, 3, 1), (7, 4, 4, 2), (74, 16, 8, 4)])
def test_every_query_tile_has_one_turn(causal, pairs, tiles, heads, batches):
    done = list(itertools.chain(*turns(causal, pairs, tiles, heads, batches)))
    assert sorted(done) == sorted(itertools.product(range(tiles), range(heads), range(batches)))


@pytest.mark.parametrize("tiles, heads, batches", [(16, 32, 1), (64, 8, 1), (16, 16, 4), (32, 16, 2)])
def test_causal_turns_are_balanced(tiles, heads, batches):
    """Pairs of 148 multiprocessors: the one with the most keys has at most 6 % more than the mean."""
    work = [sum(tile + 1 for tile, _, _ in own) for own in turns(True, 74, tiles, heads, batches)]
    assert max(work) <= 1.06 * np.mean(work)
    plain = [sum(tile + 1 for tile, _, _ in own) for own in turns(False, 74, tiles, heads, batches)]
    assert max(work) <= max(plain), "in the order of the tiles it would be worse"


@pytest.fixture(scope="module")
def small():
    return {
        causal: compile_kernel(plan(head_dim=32, causal=causal, tile_n=32, kv_stage=2, seqlens=True, q_heads_per_kv=2))
        for causal in (False, True)
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sms", [1, 2, 3, 4, 6, 148])
def test_right_whatever_the_number_of_multiprocessors(small, causal, sms):
    """An odd one out is left idle; more than there is work for are not asked for."""
    report = verify_kernel(small[causal], (3, 4, 2, 260, 200), sms=sms)
    assert report.passed, report


def test_the_grid_is_as_large_as_the_device_or_the_work(small):
    from generator.verify import random_operands

    operands = random_operands(small[True].spec, (3, 4, 2, 260, 200), 0)
    grids = [run_observed(small[True], **operands, strict=False, sms=sms).launches[0].grid[0] for sms in (1, 5, 12, 99)]
    assert grids == [2, 4, 12, 2 * 3 * 2 * 3]


# -- when O is rescaled ------------------------------------------------------------------------------------------------
KV_TILES = 5


@pytest.fixture(scope="module")
def unnormalized():
    return compile_kernel(plan(head_dim=32, output="unnormalized", tile_n=32))


@pytest.mark.parametrize("step, rescaled", [(1.75, 0), (2.0, 0), (4.0, 1), (9.0, KV_TILES - 1)])
def test_o_is_rescaled_only_where_the_maximum_moves_by_more_than_2_to_the_8(unnormalized, step, rescaled):
    """Scores are alike within a KV tile of 32 keys and grow by `step` in log2 from each to the next."""
    import ml_dtypes

    q = np.zeros((1, 256, 1, 32), np.float32)
    k = np.zeros((1, KV_TILES * 32, 1, 32), np.float32)
    q[..., 0] = 1
    k[..., 0] = (np.arange(KV_TILES * 32) // 32 * step)[None, :, None]
    v = np.random.default_rng(0).standard_normal((1, KV_TILES * 32, 1, 32)).astype(np.float32)
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    run = run_observed(unnormalized, q, k, v, scale=float(np.log(2)))
    loads = sum(n for name, n in run.launches[0].opcodes.items() if name.startswith("tcgen05.ld"))
    softmax, epilogue = 8 * KV_TILES, 8  # of one tcgen05.ld each, by the 8 warps of both CTAs
    assert loads - softmax - epilogue == 8 * rescaled
    p = np.exp2(np.arange(KV_TILES * 32) // 32 * step - (KV_TILES - 1) * step)
    exact = (p[:, None] * v[0, :, 0].astype(np.float64)).sum(axis=0) / p.sum()
    o, lse, m = (output.array for output in run.outputs)
    got = o[0, :, 0].astype(np.float64) * np.exp(m - lse)[0, 0, :, None].astype(np.float64)
    assert np.linalg.norm(got - exact) / np.linalg.norm(np.broadcast_to(exact, got.shape)) < 3e-3


# -- interleavings -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_in_several_interleavings(small, causal):
    def repeat(gpu, outputs):
        gpu.schedules = 4

    for shape in ((3, 2, 1, 200, 100), (1, 4, 2, 129, 200)):
        report = verify_kernel(small[causal], shape, prepare=repeat, sms=2)
        assert report.passed, report


def test_every_interleaving_of_its_barriers_ends():
    binary = compile_kernel(plan(head_dim=32, causal=True, tile_n=32, kv_stage=2))
    proof = Exhaustive()

    def observe(gpu, outputs):
        gpu.observers.append(proof)

    assert verify_kernel(binary, (1, 1, 1, 256, 96), prepare=observe).passed
    (text,) = proof.proofs
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in text


@pytest.mark.parametrize(
    "head_dim, head_dim_v, causal",
    [(192, 128, True), (256, 256, False), (256, 256, True), pytest.param(192, 128, False, marks=pytest.mark.sweep)],
)
def test_nothing_spills(head_dim, head_dim_v, causal):
    assert compile_kernel(plan(head_dim=head_dim, head_dim_v=head_dim_v, causal=causal)).spills == 0
