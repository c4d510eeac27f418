"""Fast mode (strict=False): the same bits as with every check, bounds and deadlocks still caught."""

import numpy as np
import ptx_kernels
import pytest
from ptx_kernels import fails, run

import generator
from generator.emulator import Deadlock, Gpu, Hazard
from generator.emulator.warps import Warps, common
from generator.run import run_observed
from generator.verify import random_inputs

FORMS = {
    "tmem": {"head_dim": 32, "causal": True, "q_heads_per_kv": 2},
    "smem": {"head_dim": 64, "p_staging": "smem", "dtype": "fp16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_fast_and_strict_give_the_same_bits(form):
    kernel = generator.build(**FORMS[form])
    dim, dtype = kernel.spec.head_dim, kernel.spec.dtype
    inputs = random_inputs(dtype, (1, 2, 1 if form == "tmem" else 2, 130, 300), dim, dim, seed=1)
    strict, fast = (run_observed(kernel.binary, *inputs, strict=strict) for strict in (True, False))
    for ours, theirs in zip(strict.outputs, fast.outputs, strict=True):
        assert ours.array.tobytes() == theirs.array.tobytes()
    assert strict.launches[0].opcodes == fast.launches[0].opcodes


@pytest.fixture
def fast(monkeypatch):
    """Kernels of this test run in fast mode."""
    monkeypatch.setattr(ptx_kernels, "Gpu", lambda: Gpu(strict=False))


UNWRITTEN = "ld.shared.b32 %r2, [%s4]; add.u32 %r3, %r4, %r2; st.global.b32 [%out_g], %r2;"


def test_fast_mode_does_not_check_what_was_written(fast):
    out = np.zeros(32, np.uint32)
    run(UNWRITTEN, out=out)
    assert (out == 0xFFFFFFFF).all()


def test_strict_mode_does():
    fails(Hazard, UNWRITTEN, "never written", out=np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 %r2, [%s4+1024];", "out of bounds"),
        ("st.shared.b32 [%s4+2], %tid;", "misaligned"),
        ("st.global.b32 [%out_g+128], %tid;", "is out of bounds"),
        (
            "elect.sync %r1|%p1, -1; @%p1 mbarrier.init.shared.b64 [%s], 1; mbarrier.arrive.shared.b64 _, [%s];",
            "arrival overflow",
        ),
    ],
)
def test_fast_mode_keeps_to_the_memory_and_the_barriers(body, message, fast):
    fails(Hazard, body, message, out=np.zeros(32, np.uint32))


def test_fast_mode_reports_a_deadlock(fast):
    body = """setp.ne.u32 %p1, %tid, 0;
    @!%p1 mbarrier.init.shared.b64 [%s], 1;
    bar.sync 0;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%s], 0;
    @!%p2 bra WAIT;"""
    fails(Deadlock, body, "for parity 0 of the mbarrier")


def test_strict_must_be_said_plainly():
    assert Gpu().strict and not Gpu(strict=False).strict


def test_fast_mode_lets_pass_what_silicon_lets_pass(fast):
    """A bulk store that nobody waits for lands; lanes may initialize an mbarrier together."""
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """mbarrier.init.shared.b64 [%s+512], 1; ld.global.b32 %r1, [%x_g]; st.shared.b32 [%s4], %r1;
    fence.proxy.async.shared::cta; bar.warp.sync -1; elect.sync %r2|%p1, -1;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 128;"""
    run(body, x=x, y=y)
    assert (y == x).all()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.full((2, 1, 32), 70000, np.uint32), 70000),
        (np.broadcast_to(np.uint64(1 << 40), (4, 32)), 1 << 40),
        (np.uint32(0xFFFFFFFF), 0xFFFFFFFF),
        (5, 5),
        (np.arange(32, dtype=np.uint32), None),
        (np.uint16([1, 0]), None),
    ],
)
def test_what_all_lanes_have_in_common(value, found):
    assert common(value) == found


def test_lanes_that_run_by_cta():
    ws = Warps(np.array([0, 0, 2]), np.array([1, 3, 3]))
    active = np.zeros((3, 32), bool)
    active[1, :5] = active[2, 7] = True
    assert [x.tolist() for x in ws.lanes_by_cta(None)] == [[1, 3], [32, 64]]
    assert [x.tolist() for x in ws.lanes_by_cta(active)] == [[3], [6]]
