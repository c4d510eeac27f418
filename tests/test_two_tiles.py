"""Two query tiles in flight: the budget, what is refused, when O is rescaled, the polynomial, hidden interleavings."""

import numpy as np
import pytest

from generator.arch import SM100A
from generator.compile import compile_kernel
from generator.emulator.exhaustive import Exhaustive
from generator.lifetime import Overlap, check_overlaps
from generator.plan import DoesNotFit, NotImplementedYet, plan_kernel
from generator.run import run_observed
from generator.spec import load_spec
from generator.two_tiles import EXP2_CUBIC
from generator.verify import verify_kernel


def plan(**fields):
    return plan_kernel(load_spec(None, strategy="two_tiles", **fields))


def test_budget_of_head_dim_128():
    budget = plan(head_dim=128).budget
    assert [(r.name, r.column, r.columns) for r in budget.regions] == [
        ("S0", 0, 128),
        ("S1", 128, 128),
        ("P0", 0, 64),
        ("P1", 128, 64),
        ("O0", 256, 128),
        ("O1", 384, 128),
    ]
    assert (budget.tmem_used, budget.tmem_columns, budget.threads) == (512, 512, 512)
    sizes = {b.name: b.bytes for b in budget.buffers}
    assert sizes["sQ"] == sizes["sK"] == sizes["sV"] == 2 * 128 * 128 * 2 and sizes["rows"] == 3 * 2 * 128 * 4
    assert budget.buffer("sO").alias_of is None, "O of two query tiles leaves while Q of the next two arrives"
    assert sizes["sO"] == 2 * 128 * 32 * 2
    assert budget.smem_total == 1024 + 3072 + 3 * 65536 + 16384 == 217088
    registers = sum(32 * role.warps * role.registers for role in budget.roles)
    assert registers == budget.registers_total == SM100A.registers_per_sm, "setmaxnreg hands out all of them"


@pytest.mark.parametrize("head_dim, tile_n", [(16, 128), (64, 128), (128, 128), (144, 64), (192, 64), (240, 16)])
def test_tile_n_leaves_room_for_two_accumulators(head_dim, tile_n):
    chosen = plan(head_dim=head_dim)
    assert chosen.tile_n == tile_n and 2 * tile_n + 2 * head_dim <= 512


def test_p_may_lie_over_s_because_pv_is_issued_before_the_next_qk():
    check_overlaps([("P", "S"), ("S", "P")], qk_first=False)
    with pytest.raises(Overlap):
        check_overlaps([("P", "S")])
    with pytest.raises(Overlap):
        check_overlaps([("sP", "O")], qk_first=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": 128, "p_staging": "smem"}, "P lies over S in tensor memory"),
        ({"head_dim": 576, "head_dim_v": 512}, "head_dim_v = 512: not implemented for sm_100a yet; at most 256"),
        ({"head_dim": 128, "tile_m": 64}, "tile_m = 64"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(fields, message):
    with pytest.raises(NotImplementedYet) as caught:
        plan(**fields)
    assert message in str(caught.value)


def test_two_accumulators_of_256_columns_do_not_fit():
    with pytest.raises(DoesNotFit) as caught:
        plan(head_dim=256)
    message = str(caught.value)
    assert "tmem: S0 16 + S1 16 + O0 256 + O1 256 = 544 columns of 512, over by 32" in message
    assert "strategy = tiles fits" in message


def test_the_cubic_is_within_a_fortieth_of_bf16_s_rounding():
    x = np.linspace(0, 1, 100_001, dtype=np.float32)[:-1]
    c3, c2, c1 = (np.float32(c) for c in EXP2_CUBIC)
    value = ((c3 * x + c2) * x + c1) * x + np.float32(1)
    error = np.abs(value / np.exp2(x.astype(np.float64)) - 1).max()
    assert 8.0e-5 < error < 8.9e-5 < 2.0**-8 / 40
    assert value[0] == 1 and (np.diff(value) >= 0).all() and value[-1] <= 2 * (1 + 8.9e-5)


# -- when O is rescaled ------------------------------------------------------------------------------------------------
KV_TILES = 5


@pytest.fixture(scope="module")
def unnormalized():
    return compile_kernel(plan(head_dim=32, output="unnormalized", tile_n=32))


def growing(step: float):
    """Inputs whose scores are alike within a KV tile of 32 keys and grow by `step` in log2 from each to the next."""
    q = np.zeros((1, 256, 1, 32), np.float32)
    k = np.zeros((1, KV_TILES * 32, 1, 32), np.float32)
    q[..., 0] = 1
    k[..., 0] = (np.arange(KV_TILES * 32) // 32 * step)[None, :, None]
    v = np.random.default_rng(0).standard_normal((1, KV_TILES * 32, 1, 32)).astype(np.float32)
    return q, k, v


def rescaled(binary, step: float) -> tuple[int, np.ndarray, np.ndarray]:
    """How many warps of the correction rescaled O, and m and LSE."""
    import ml_dtypes

    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in growing(step))
    run = run_observed(binary, q, k, v, scale=float(np.log(2)))
    opcodes = run.launches[0].opcodes
    loads = sum(n for name, n in opcodes.items() if name.startswith("tcgen05.ld"))
    softmax, epilogue = 8 * KV_TILES, 8  # of one tcgen05.ld each: 32 columns of S, and of O
    _, lse, m = (output.array for output in run.outputs)
    return loads - softmax - epilogue, m, lse


def test_o_is_rescaled_only_where_the_maximum_moves_by_more_than_2_to_the_8(unnormalized):
    none, m, lse = rescaled(unnormalized, 1.75)  # 4 steps: a maximum 7 above the reference, P up to 128
    assert none == 0 and (m == 0).all(), "the first tile's maximum stays the reference"
    total = 32 * sum(2.0 ** (1.75 * j) for j in range(KV_TILES))
    assert np.allclose(lse, np.log(total), atol=1e-4)
    some, m, _ = rescaled(unnormalized, 4.0)  # 8 above is kept, 12 is not: once, at the fourth tile
    assert some == 8 and np.allclose(m, 12 * np.log(2), atol=1e-5)
    every, m, _ = rescaled(unnormalized, 9.0)
    assert every == 8 * (KV_TILES - 1) and np.allclose(m, 36 * np.log(2), atol=1e-5)


@pytest.mark.parametrize("step", [1.75, 2.0, 4.0, 9.0])
def test_results_hold_whatever_the_reference(unnormalized, step):
    import ml_dtypes

    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in growing(step))
    run = run_observed(unnormalized, q, k, v, scale=float(np.log(2)))
    p = np.exp2(np.arange(KV_TILES * 32) // 32 * step - (KV_TILES - 1) * step)
    exact = (p[:, None] * v[0, :, 0].astype(np.float64)).sum(axis=0) / p.sum()
    o, lse, m = (output.array for output in run.outputs)
    got = o[0, :, 0].astype(np.float64) * np.exp(m - lse)[0, 0, :, None].astype(np.float64)
    assert np.linalg.norm(got - exact) / np.linalg.norm(np.broadcast_to(exact, got.shape)) < 3e-3


# -- interleavings -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_in_several_interleavings(causal):
    """Tiles of a pair that see different numbers of KV tiles, and one that sees none."""
    binary = compile_kernel(plan(head_dim=32, causal=causal, tile_n=32, kv_stage=2))

    def repeat(gpu, outputs):
        gpu.schedules = 4

    for shape in ((1, 1, 1, 200, 100), (1, 1, 1, 129, 200)):
        report = verify_kernel(binary, shape, prepare=repeat)
        assert report.passed, report


@pytest.mark.parametrize("causal", [False, True])
def test_every_interleaving_of_its_barriers_ends(causal):
    binary = compile_kernel(plan(head_dim=32, causal=causal, tile_n=32, kv_stage=2))
    proof = Exhaustive()

    def observe(gpu, outputs):
        gpu.observers.append(proof)

    assert verify_kernel(binary, (1, 1, 1, 256, 160), prepare=observe).passed
    (text,) = proof.proofs
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in text


REGISTERS = [(128, True)]  # head_dim, causal: the most
OTHERS = ((64, False), (64, True), (96, False), (96, True), (128, False))
REGISTERS += [pytest.param(*case, marks=pytest.mark.sweep) for case in OTHERS]


@pytest.mark.parametrize("head_dim, causal", REGISTERS)
def test_nothing_spills(head_dim, causal):
    """The registers that setmaxnreg hands out are what the roles need: a figure of this DSL's ptxas, see WHOLE_ROW."""
    binary = compile_kernel(plan(head_dim=head_dim, causal=causal))
    assert binary.spills == binary.stack_bytes == 0
