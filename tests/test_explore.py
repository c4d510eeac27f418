"""emulator/explore: small barrier programs with known faults, random ones against brute force, and extracted ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import ptx

from generator.compile import compile_kernel
from generator.emulator import Deadlock, Gpu
from generator.emulator.barrier_program import BarrierProgram, Step, extract, split
from generator.emulator.exhaustive import Exhaustive
from generator.emulator.explore import explore
from generator.plan import plan_kernel
from generator.run import run_observed
from generator.spec import load_spec
from generator.verify import random_inputs


def init(*counts):
    return tuple(Step("init", 1 + i, i, count=count) for i, count in enumerate(counts))


def start(*counts, warps):
    """Warp 0 initializes the mbarriers, then all meet."""
    return [(*(init(*counts) if w == 0 else ()), Step("sync", 9, 0, count=32 * warps)) for w in range(warps)]


def wait(line, barrier, phase, parity=None):
    return Step("wait", line, barrier, parity=phase & 1 if parity is None else parity, phase=phase)


def arrive(line, barrier, nbytes=0, count=1):
    return Step("arrive", line, barrier, count=count, nbytes=nbytes)


def program(bodies, *counts):
    return BarrierProgram([s + tuple(b) for s, b in zip(start(*counts, warps=len(bodies)), bodies, strict=True)])


def ring(rounds, stages, empty_waits=True):
    """A producer that copies into a ring, a consumer whose tensor-core work frees a stage: full 0.., empty stages.."""
    produce, consume = [], []
    for i in range(rounds):
        stage, turn = i % stages, i // stages
        if empty_waits:
            produce.append(wait(20, stages + stage, turn - 1))
        produce += [arrive(21, stage, 64), Step("issue", 22, stage, nbytes=64)]
        consume += [wait(30, stage, turn), Step("fifo", 31, stages + stage, count=1)]
    return program([produce, consume], *[1] * 2 * stages)


def both(given, **options):
    """The exploration, with and without reduction agreeing on whether there is a fault."""
    reduced, whole = explore(given, **options), explore(given, reduced=False, symmetric=False)
    assert (reduced.fault is None) == (whole.fault is None), f"{reduced}\n{whole}"
    assert reduced.states <= whole.states or reduced.fault
    return reduced


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_a_ring_is_right(rounds):
    found = both(ring(rounds, 2))
    assert found.fault is None and found.complete and str(found).startswith("no deadlock, no aliased phase")


def test_a_ring_without_the_empty_wait():
    found = both(ring(3, 1, empty_waits=False))
    assert "arrives on mbarrier 0 in phase 0, of which no arrival is left" in found.fault
    assert len(found.schedule) == 7 and "warp 0, PTX line 21" in found.schedule[-1]


def test_a_phase_that_is_missed():
    found = both(program([[arrive(20, 0), arrive(21, 0)], [wait(30, 0, 0)]], 1))
    assert found.fault == (
        "warp 1 waits at PTX line 30 for phase 0 of mbarrier 0, which 2 phases have passed: its parity 0 came round "
        "again"
    )
    assert found.schedule[-1] == "warp 0, PTX line 21: arrives on mbarrier 0"


def test_a_phase_bit_that_is_wrong():
    found = both(program([[wait(20, 1, 0), arrive(21, 0)], [wait(30, 0, 0, parity=1), arrive(31, 1)]], 1, 1))
    assert "goes on after 0 phases: parity 1 is that of another phase" in found.fault


def test_a_deadlock_names_what_is_missing():
    found = both(program([[wait(20, 0, 0), arrive(21, 1)], [wait(30, 1, 0), arrive(31, 0)]], 1, 2))
    assert found.fault == (
        "deadlock: warp 0 waits at PTX line 20 for phase 0 of mbarrier 0 (phase 0: 1 arrivals and 0 bytes missing); "
        "warp 1 waits at PTX line 30 for phase 0 of mbarrier 1 (phase 0: 2 arrivals and 0 bytes missing)"
    )


def test_bytes_beyond_what_is_expected():
    copies = [arrive(20, 0, 64), Step("issue", 21, 0, nbytes=64), Step("issue", 22, 0, nbytes=64), wait(23, 0, 0)]
    assert "brings mbarrier 0 64 bytes more than phase 1 expects" in both(program([copies, []], 1)).fault


def test_use_before_init_and_twice():
    early = BarrierProgram([init(1), (arrive(20, 0),)])
    assert "uses mbarrier 0 before mbarrier.init" in both(early).fault
    assert "which is live" in both(BarrierProgram([init(1), init(1)])).fault


def test_named_barriers_that_mix():
    pair = Step("sync", 20, 1, count=64)
    steps = [(pair,), (pair,), (pair,), (pair,)]
    assert both(BarrierProgram(steps)).fault is None  # any two of four
    late = [(Step("join", 20, 0, count=96), pair), (pair,), (Step("sync", 30, 0, count=96),)]
    assert "deadlock" in both(BarrierProgram(late)).fault


def test_symmetry_merges_twins():
    workers = [[wait(20, 0, 0), arrive(21, 1)]] * 5
    given = program([[arrive(10, 0), wait(11, 1, 0)], *workers], 1, 5)
    assert explore(given, reduced=False).states * 4 < explore(given, reduced=False, symmetric=False).states
    assert both(given).fault is None


STEPS = st.one_of(
    st.builds(
        lambda b, p, q: wait(40, b, p, (p + (q == 0)) & 1), st.integers(0, 1), st.integers(-1, 2), st.integers(0, 5)
    ),
    st.builds(lambda b, n: arrive(41, b, n), st.integers(0, 1), st.sampled_from([0, 0, 0, 16])),
    st.builds(lambda b: Step("issue", 42, b, nbytes=16), st.integers(0, 1)),
    st.builds(lambda b: Step("fifo", 43, b, count=1), st.integers(0, 1)),
    st.builds(lambda b, n: Step("sync", 44, b, count=32 * n), st.just(1), st.integers(2, 3)),
    st.builds(lambda b, n: Step("join", 45, b, count=32 * n), st.just(1), st.integers(2, 3)),
    st.builds(lambda b: arrive(46, b, 16, 0), st.integers(0, 1)),
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(STEPS, max_size=4), min_size=2, max_size=3),
    st.lists(st.integers(1, 2), min_size=2, max_size=2),
    st.booleans(),
)
def test_reduction_agrees_with_brute_force(bodies, counts, one_queue):
    given = program(bodies, *counts)
    if one_queue:
        given = BarrierProgram(given.steps, queues=[0] * len(bodies))
    both(given)


@st.composite
def likely_right(draw):
    """Handovers between warps through mbarriers, mostly with the right phases: most of these programs are right."""
    warps, rounds = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    bodies = [[] for _ in range(warps)]
    for turn in range(rounds):
        for barrier in range(2):
            giver, taker = draw(st.permutations(range(warps)))[:2]
            kind = draw(st.sampled_from(["arrive", "copy", "fifo"]))
            if draw(st.integers(0, 3)):
                bodies[giver].append(wait(50 + barrier, 2 + barrier, turn - 1))
            if kind == "copy":
                bodies[giver] += [arrive(60, barrier, 16), Step("issue", 61, barrier, nbytes=16)]
            else:
                bodies[giver].append(arrive(62, barrier) if kind == "arrive" else Step("fifo", 63, barrier, count=1))
            bodies[taker] += [wait(70 + barrier, barrier, turn), arrive(72 + barrier, 2 + barrier)]
    return program(bodies, 1, 1, 1, 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(likely_right())
def test_reduction_agrees_on_programs_that_are_mostly_right(given):
    both(given)


def shared_ring(rounds, stages, change=lambda producer, turn, steps: steps):
    """Two producers that fill each stage together, as the CTAs of a pair do, and a consumer that frees it for both:
    full 0.., empty stages... `change` may break what a producer does in a round.
    """
    produce, consume = [[], []], []
    for i in range(rounds):
        stage, turn = i % stages, i // stages
        for one, mine in enumerate(produce):
            copy = [arrive(21 + 10 * one, stage, 64), Step("issue", 22 + 10 * one, stage, nbytes=64)]
            mine += change(one, i, [wait(20 + 10 * one, stages + stage, turn - 1), *copy])
        consume += [wait(50, stage, turn), Step("fifo", 51, stages + stage, count=1)]
    return program([*produce, consume], *[2] * stages, *[1] * stages)


@pytest.mark.parametrize("rounds, stages", [(2, 2), (3, 2), (3, 1)])
def test_two_producers_of_one_stage(rounds, stages):
    found = both(shared_ring(rounds, stages))
    assert found.fault is None and found.complete


def test_two_producers_are_followed_one_after_the_other():
    """Copies of one producer do not depend on those of the other: states grow with the length, not with its square."""
    short, long = (explore(shared_ring(rounds, 4)).states for rounds in (16, 32))
    assert long < 2.2 * short, (short, long)


def dropped(kind):
    return lambda one, turn, steps: [s for s in steps if (one, turn, s.kind) != (1, 2, kind)]


@pytest.mark.parametrize("kind, fault", [
    ("wait", "of which no arrival is left"),
    ("arrive", "64 bytes more than phase"),
    ("issue", "deadlock: "),
])  # fmt: skip
def test_two_producers_one_of_which_errs(kind, fault):
    assert fault in both(shared_ring(3, 1, dropped(kind))).fault


def test_a_producer_that_expects_what_the_other_copies():
    """Warp 0 expects all the bytes: where warp 1 is faster, its copy brings bytes that nobody expects yet."""

    def change(one, turn, steps):
        sizes = {"arrive": 0 if one else 128, "issue": 64}
        return [s._replace(nbytes=sizes.get(s.kind, 0)) for s in steps]

    assert "64 bytes more than phase 0 expects" in both(shared_ring(2, 2, change)).fault


@st.composite
def broken_pairs(draw):
    """Two producers of one stage, here and there with a step dropped, moved or with other bytes."""

    def change(one, turn, steps):
        steps = list(draw(st.permutations(steps)) if not draw(st.integers(0, 4)) else steps)
        if not draw(st.integers(0, 5)):
            steps.pop(draw(st.integers(0, len(steps) - 1)))
        if not draw(st.integers(0, 4)):
            at = draw(st.integers(0, len(steps) - 1))
            if steps[at].kind != "wait":
                steps[at] = steps[at]._replace(nbytes=draw(st.sampled_from([0, 32, 64, 128])))
        return steps

    return shared_ring(draw(st.integers(1, 3)), draw(st.integers(1, 2)), change)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(broken_pairs())
def test_reduction_agrees_on_broken_pairs(given):
    both(given)


def extracted(p_staging):
    fields = {"head_dim": 16, "strategy": "tiles", "p_staging": p_staging, "kv_stage": 2, "tile_n": 16}
    binary = compile_kernel(plan_kernel(load_spec(None, **fields)))
    found = []

    class Around:
        def __init__(self, case):
            found.append(extract(case))

        __enter__ = __exit__ = lambda *_: None

    shape = (1, 1, 1, 200, 64)  # two CTAs alike, four KV tiles
    q, k, v = random_inputs(binary.spec.dtype, shape, 16, 16, 0)
    run_observed(binary, q, k, v, backend="emulator", prepare=lambda gpu, _: gpu.observers.append(Around))
    (part,) = split(found[0])
    return part


@pytest.fixture(scope="module", params=["tmem", "smem"])
def kernel(request):
    return extracted(request.param)


def test_a_generated_kernel_is_proven(kernel):
    found = explore(kernel)
    assert found.fault is None and found.complete and found.states < 5000, str(found)


def test_the_producer_misses_an_empty_wait(kernel):
    tma = len(kernel.steps) - 1
    waits = [s for s in kernel.steps[tma] if s.kind == "wait" and s.phase >= 0]
    broken = kernel.without(lambda w, s: w == tma and s in waits)
    assert explore(broken).fault


def test_a_phase_bit_of_the_ring_is_wrong(kernel):
    tma = len(kernel.steps) - 1
    broken = kernel.changed(lambda w, s: s._replace(parity=s.parity ^ 1) if (w, s.kind) == (tma, "wait") else s)
    assert "parity" in explore(broken).fault or "deadlock" in explore(broken).fault


def test_an_arrival_too_few(kernel):
    softmax = next(s for s in kernel.steps[1] if s.kind == "arrive")
    broken = kernel.without(lambda w, s: w == 1 and s == softmax)
    assert explore(broken).fault.startswith("deadlock: ")


GIVES = """{LEADER} bar.sync 0; setp.ge.u32 %p2, %tid, 32; @%p2 bra B;
W: mbarrier.try_wait.parity.shared.b64 %p3, [%s], 0; @!%p3 bra W; ld.global.b32 %r1, [%y]; bra END;
B: mbarrier.arrive.shared.b64 _, [%s]; mbarrier.arrive.shared.b64 _, [%s+8]; END:"""


def launched(body, y, grid):
    gpu, proof = Gpu(strict=False), Exhaustive()
    gpu.add_array(y, "y")
    gpu.observers.append(proof)
    leader = (
        "setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 32; @%p1 mbarrier.init.shared.b64 [%s+8], 32;"
    )
    text = ptx(body.replace("{LEADER}", leader), y=y)
    params = [y.ctypes.data.to_bytes(8, "little")]
    gpu.launch(gpu.load_ptx(text), "k", (grid, 1, 1), (64, 1, 1), (1, 1, 1), 1024, params)
    return proof.proofs


def test_ctas_of_every_wave_are_explored_and_alike():
    (proof,) = launched(GIVES, np.zeros(1, np.uint32), 70)  # three waves
    assert "1 different groups of warps" in proof


def test_a_launch_that_only_happens_to_end():
    """In the deterministic schedule warp 0 looks between the two arrivals; in another it does not."""
    twice = GIVES.replace("_, [%s];", "_, [%s]; bra NEXT; NEXT:").replace("_, [%s+8]", "_, [%s]")
    with pytest.raises(Deadlock, match="which 2 phases have passed: its parity 0 came round again") as caught:
        launched(twice, np.zeros(1, np.uint32), 1)
    assert "warp 1, PTX line" in str(caught.value) and "arrives on shared offset 0x0" in str(caught.value)


def test_command_proves_or_shows():
    from typer.testing import CliRunner

    from generator.cli import app

    words = [
        "verify",
        "--head-dim",
        "16",
        "--tile-n",
        "16",
        "--kv-stage",
        "2",
        "--shape",
        "1,1,1,60,60",
        "--exhaustive",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "every interleaving of its barriers ends, no phase is aliased, no count overflows" in result.output
