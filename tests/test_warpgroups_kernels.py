"""Kernels of consumer warpgroups (sm_90a) in the emulator: sizes, work, schedules, rescaling, and what is broken."""

import numpy as np
import pytest

from generator.compile import compile_kernel
from generator.emulator.exhaustive import Exhaustive
from generator.emulator.schedule import DELAYS, STYLES
from generator.plan import plan_kernel
from generator.run import run_observed
from generator.spec import load_spec
from generator.tiles import seen_of
from generator.verify import compare, judge, judge_writes, random_operands, verify_kernel

EVERY = len(STYLES) * len(DELAYS)  # seeds in a row that combine every style with every delay


def plan(**fields):
    return plan_kernel(load_spec(None, **{"arch": "sm_90a", **fields}))


# -- kernels -----------------------------------------------------------------------------------------------------------
SMALL = {
    "one consumer": {"tile_m": 64, "window_right": 20},
    "causal": {"causal": True, "tile_m": 128},
    "shared": {"kv_shared": True, "head_dim_v": 16, "tile_m": 192},
    "two sources": {"kv_sources": 2, "limit2": True, "seqlens": True, "tile_m": 128},
    "one stage": {"kv_stage": 1, "window_left": 40, "sink": True, "tile_m": 128},
    "beside PV": {"head_dim_v": 144, "output": "unnormalized", "causal": True, "tile_m": 128},
    "lazy": {"head_dim_v": 144, "causal": True, "window_left": 60, "tile_m": 128},
    "one loop": {"head_dim_v": 224, "causal": True, "seqlens": True, "tile_m": 128},
    "packed window": {"q_heads_per_kv": 8, "causal": True, "window_left": 50, "seqlens": True, "tile_m": 192},
}


@pytest.fixture(scope="module")
def small():
    made = {}

    def binary_of(name):
        if name not in made:
            made[name] = compile_kernel(plan(**{"head_dim": 32, "tile_n": 32, "kv_stage": 2, **SMALL[name]}))
        return made[name]

    return binary_of


def test_the_small_kernels_are_what_their_names_say(small):
    assert small("lazy").plan.lazy and small("lazy").plan.looks_for_maxima
    assert small("beside PV").plan.scores_again and not small("causal").plan.beside_pv
    assert small("one loop").plan.one_loop and not small("beside PV").plan.one_loop
    assert not plan(head_dim=256, q_heads_per_kv=8, split_kv=True).one_loop


def sized(name, batch, heads, kv_heads, *rest):
    shape = batch, heads * SMALL[name].get("q_heads_per_kv", 1), kv_heads, *rest
    return (*shape, 70) if name == "two sources" else shape


@pytest.mark.parametrize("sms", [1, 2, 5, 148])
@pytest.mark.parametrize("name", SMALL)
def test_right_whatever_the_number_of_multiprocessors(small, name, sms):
    """A CTA goes through one query tile, several, or all of them; some see no key."""
    report = verify_kernel(small(name), sized(name, 3, 2, 2, 260, 170), sms=sms)
    assert report.passed, report


def test_the_grid_is_as_large_as_the_device_or_the_work(small):
    operands = random_operands(small("causal").spec, (3, 2, 2, 260, 170), 0)
    runs = [run_observed(small("causal"), **operands, strict=False, sms=sms) for sms in (1, 5, 17, 18, 148)]
    assert [run.launches[0].grid[0] for run in runs] == [1, 5, 17, 18, 18]


OWN = {
    "causal": {"causal": True, "tile_m": 192},
    "window": {"window_left": 70, "window_right": 9, "tile_m": 128, "seqlens": True},
    "narrow": {"window_left": 10, "tile_m": 192, "tile_n": 16},
    "packed": {"q_heads_per_kv": 8, "causal": True, "window_left": 60, "tile_m": 256, "sink": True},
    "packed, 128 heads": {"q_heads_per_kv": 128, "causal": True, "window_left": 60, "tile_m": 256},
    "apart": {"q_heads_per_kv": 3, "causal": True, "window_left": 60, "tile_m": 192, "pack_heads": False},
}


@pytest.mark.parametrize("shape", [(1, 1, 260, 260), (2, 1, 100, 190), (1, 2, 190, 100)])
@pytest.mark.parametrize("name", OWN)
def test_consumers_multiply_the_tiles_that_their_own_rows_see(name, shape):
    """Counted by the definition of who sees what, 64 rows a consumer, and by the wgmma that the emulator executed."""
    binary = compile_kernel(plan(**{"head_dim": 16, "tile_n": 32, **OWN[name]}))
    chosen, (batch, kv_heads, queries, keys) = binary.plan, shape
    group = chosen.spec.q_heads_per_kv
    operands = random_operands(binary.spec, (batch, kv_heads * group, kv_heads, queries, keys), 0)
    launch = run_observed(binary, **operands, strict=False).launches[0]
    seen, heads, tiles = seen_of(binary.spec, operands), chosen.heads_per_tile, 0
    for b in range(batch):
        rows = np.repeat(seen.first(b, queries, keys), heads, axis=0)
        for at in range(0, len(rows), chosen.tile_m):
            of_tile = rows[at : at + chosen.tile_m]
            origin = int(of_tile[0].argmax()) if chosen.tiles_move else 0  # the first key that its first token sees
            for first in range(0, len(of_tile), 64):
                of_consumer = of_tile[first : first + 64].any(axis=0)
                blocks = range(origin, keys, chosen.tile_n)
                tiles += kv_heads * group // heads * sum(of_consumer[k : k + chosen.tile_n].any() for k in blocks)
    wgmma = sum(n for opcode, n in launch.opcodes.items() if opcode.startswith("wgmma.mma_async"))
    each = 4 * (1 + chosen.tile_n // 16)  # warps x (QK, of 16 columns, and PV)
    assert chosen.own_spans and wgmma == each * tiles


LIKE_OTHERS = ("one consumer", "causal", "one stage", "lazy")
INTERLEAVED = [pytest.param(name, marks=[pytest.mark.sweep] * (name in LIKE_OTHERS)) for name in SMALL]


@pytest.mark.parametrize("name", INTERLEAVED)
def test_the_same_bits_in_several_interleavings(small, name):
    """Every style of schedule with every delay of asynchronous work; a CTA has several turns."""

    def repeat(gpu, outputs):
        gpu.schedules = EVERY + 1

    report = verify_kernel(small(name), sized(name, 2, 1, 1, 200, 100), prepare=repeat, sms=1)
    assert report.passed, report


@pytest.mark.parametrize("name", SMALL)
def test_every_interleaving_of_its_barriers_ends(small, name):
    """Of the mbarriers and of the named barriers by which consumers take turns."""
    proof = Exhaustive()

    def observe(gpu, outputs):
        gpu.observers.append(proof)

    assert verify_kernel(small(name), sized(name, 2, 1, 1, 200, 100), prepare=observe, sms=1).passed
    (text,) = proof.proofs
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in text


# -- when O is rescaled ------------------------------------------------------------------------------------------------
KV_TILES = 5


def stepped(step, **fields):
    """The plan, and m in log2, of scores that are alike within a KV tile of 32 keys and grow by `step` in log2 from one
    to the next. O and LSE are checked.
    """
    import ml_dtypes

    more = {"head_dim": 32, "head_dim_v": 144, "tile_n": 32, "tile_m": 128, "output": "unnormalized"}
    binary = compile_kernel(plan(**more | fields))
    q = np.zeros((1, 130, 1, 32), np.float32)
    k = np.zeros((1, KV_TILES * 32, 1, 32), np.float32)
    q[..., 0] = 1
    k[..., 0] = (np.arange(KV_TILES * 32) // 32 * step)[None, :, None]
    v_dim = binary.spec.v_dim
    v = np.random.default_rng(0).standard_normal((1, KV_TILES * 32, 1, v_dim)).astype(np.float32)
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    o, lse, m = (output.array for output in run_observed(binary, q, k, v, scale=float(np.log(2))).outputs)
    p = np.exp2(np.arange(KV_TILES * 32) // 32 * step - (KV_TILES - 1) * step)
    total = np.log(p.sum()) + (KV_TILES - 1) * step * np.log(2)
    assert np.allclose(lse, total, rtol=1e-7, atol=2e-5)
    exact = (p[:, None] * v[0, :, 0].astype(np.float64)).sum(axis=0) / p.sum()
    got = o[0, :, 0].astype(np.float64) * np.exp(m - lse)[0, 0, :, None].astype(np.float64)
    assert np.linalg.norm(got - exact) / np.linalg.norm(np.broadcast_to(exact, got.shape)) < 3e-3
    return binary.plan, m / np.log(2)


@pytest.mark.parametrize("step, reference", [(1.75, 0), (2.0, 0), (4.0, 12.0), (9.0, 36.0)])
def test_a_lazy_kernel_rescales_only_where_the_maximum_moves_by_more_than_2_to_the_8(step, reference):
    """m is what the exponentials were taken against: 4 steps of 2 are a factor of 2^8, which is kept; of 4, the third
    is 2^12.
    """
    chosen, m = stepped(step, window_left=4000, tile_m=64)
    assert chosen.lazy and not chosen.keeps_reference and np.allclose(m, reference, atol=2e-5)


@pytest.mark.parametrize(
    "step, reference", [(1.75, 0), (2.25, 2.25), (4.0, 16.0), (9.0, 36.0), (200.0, 800.0), (-200.0, 0)]
)
@pytest.mark.parametrize("v_dim, beside", [(144, True), (64, False)])
def test_a_reference_is_kept_until_a_part_of_the_sum_is_too_large(step, reference, v_dim, beside):
    """The second tile's part is 2^1.75 times the first one's, which stays the reference; 2^2.25 is more than 4 times,
    and its maximum becomes the reference, the third one's is less than 4 times both. 2^200 is infinite: there the
    scores are computed again, unless they are still there.
    """
    chosen, m = stepped(step, head_dim_v=v_dim)
    assert (chosen.keeps_reference, chosen.beside_pv, chosen.scores_again) == (True, beside, beside)
    assert np.allclose(m, reference, atol=2e-5)


def test_a_reference_is_raised_to_the_maximum_where_maxima_are_followed_lazily():
    """A window whose first tiles follow the maxima, up to 2^8 behind; then parts of the sums are looked at."""
    chosen, m = stepped(2.25, head_dim_v=64, window_left=4000)
    assert chosen.lazy and chosen.keeps_reference and chosen.looks_for_maxima and not chosen.beside_pv
    assert np.allclose(m, 2.25, atol=2e-5)


JUMPS = {
    "64": {"head_dim": 64},
    "64 causal, in turns": {"head_dim": 64, "causal": True},
    "128, packed": {"head_dim": 128, "q_heads_per_kv": 4},
    "fp16": {"head_dim": 64, "dtype": "fp16"},
    "V within K": {"head_dim": 144, "head_dim_v": 96, "kv_shared": True},
    "two sources": {"head_dim": 32, "kv_sources": 2, "causal": True},
}


@pytest.mark.parametrize("name", JUMPS)
def test_scores_that_jump_from_tile_to_tile(name):
    """Up and down, by more than float32's exponent and by less, beside random scores, with every hazard check on."""
    binary = compile_kernel(plan(**JUMPS[name]))
    group, keys = binary.spec.q_heads_per_kv, binary.plan.tile_n
    shape = (1, 2 * group, 2, 150, 5 * keys + 7, *([300] if binary.spec.kv_sources == 2 else []))
    for values in ((0, 20, 200, 60, 400, -50), (0, 5, 10, 15, 20, 25)):
        operands = random_operands(binary.spec, shape, 0)
        operands["q"][..., 0] = 4
        for tile, value in enumerate(values):
            operands["k"][:, tile * keys : (tile + 1) * keys, :, 0] = value
        outputs = run_observed(binary, **operands).outputs
        assert not [*judge(compare(binary, operands, outputs)), *judge_writes(outputs)]


# -- the mutation test: docs/mutation.md has all of it, the suite what is sm_90a's own ---------------------------------
OWN_KINDS = ("bar.warp.sync", "wgmma.", "bar.arrive removed", "bar.sync removed", "bar.sync: another barrier")


def test_what_orders_wgmma_and_turns_is_missed_by_none_when_broken(monkeypatch):
    from generator import mutate
    from generator.emulator.mutation import run_mutants

    def sampled(*arguments, **options):
        return run_mutants(*arguments, **options, select=lambda mutant: mutant.kind.startswith(OWN_KINDS))

    monkeypatch.setattr(mutate, "run_mutants", sampled)
    binary = compile_kernel(plan(head_dim=16, causal=True, tile_m=128, tile_n=16, kv_stage=2))
    found = mutate.mutate_kernel(binary, mutate.shape_for(binary), jobs=1)
    by_kind = {}
    for outcome in found:
        by_kind.setdefault(outcome.kind, set()).add(outcome.result)
    assert not any("missed" in results for results in by_kind.values()), by_kind
    ran = {kind: results - {"not run"} for kind, results in by_kind.items()}  # no reference is raised in a short run
    assert ran["wgmma.wait_group removed"] == {"reported"} == ran["wgmma.commit_group removed"]
    assert ran["bar.warp.sync removed"] == {"equivalent"}, "wgmma and its wait are the whole warp's"
    assert len(found) > 40
