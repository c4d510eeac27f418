"""emulator/machine and gpu: many CTAs in several waves, launches, what they report and what they refuse."""

import struct

import numpy as np
import pytest
from ptx_kernels import HEADER, fails, launch, ptx, run

from generator.emulator import Deadlock, Gpu, Hazard, LaunchError

COLLATZ = """add.u32 %r2, %g, 1; mov.u32 %r1, 0;
LOOP: setp.le.u32 %p1, %r2, 1; @%p1 bra DONE; add.u32 %r1, %r1, 1; and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 1;
@%p2 mad.lo.u32 %r2, %r2, 3, 1; @%p2 bra LOOP; shr.u32 %r2, %r2, 1; bra LOOP;
DONE: st.global.b32 [%y_g], %r1;"""


def collatz(n: int) -> int:
    steps = 0
    while n > 1:
        n, steps = (3 * n + 1 if n & 1 else n // 2), steps + 1
    return steps


# -- many CTAs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid, block", [(1, 1), (5, 64), (31, 32), (32, 32), (33, 96), (100, 33)])
def test_results_that_depend_on_the_cta(grid, block):
    y = np.zeros(grid * block, np.uint32)
    run(COLLATZ, block=block, grid=grid, y=y)
    assert y.tolist() == [collatz(g + 1) for g in range(grid * block)]


def test_ctas_take_different_paths_and_meet_at_their_own_barriers():
    """CTA c goes c mod 5 times around a loop with a barrier, so that batches split and join."""
    grid, block = 70, 96
    x = np.random.default_rng(0).integers(0, 1000, (grid, block), np.uint32)
    y = np.zeros((grid, block), np.uint32)
    run(
        """rem.u32 %r2, %cta, 5; ld.global.b32 %r1, [%x_g]; add.u32 %r3, %tid, 1; rem.u32 %r3, %r3, 96;
        mad.lo.u32 %r3, %r3, 4, %s;
        LOOP: setp.eq.u32 %p1, %r2, 0; @%p1 bra DONE; st.shared.b32 [%s4], %r1; bar.sync 0; ld.shared.b32 %r4, [%r3];
        bar.sync 0;
        add.u32 %r1, %r1, %r4; sub.u32 %r2, %r2, 1; bra LOOP; DONE: st.global.b32 [%y_g], %r1;""",
        block=block,
        grid=grid,
        x=x,
        y=y,
    )
    expected = x.copy()
    for c in range(grid):
        for _ in range(c % 5):
            expected[c] = expected[c] + np.roll(expected[c], -1)
    assert (y == expected).all()


def test_warps_of_one_cta_take_different_roles():
    """Even warps produce, odd warps consume through shared memory and one mbarrier a pair, in every CTA."""
    grid, block = 37, 256
    y = np.zeros((grid, block), np.uint32)
    run(
        """shr.u32 %r1, %tid, 6; mad.lo.u32 %r2, %r1, 8, %s; and.b32 %r3, %tid, 63; setp.eq.u32 %p1, %r3, 0;
        @%p1 mbarrier.init.shared.b64 [%r2], 32; bar.sync 0; setp.ge.u32 %p2, %r3, 32; @%p2 bra CONSUME;
        mad.lo.u32 %r4, %cta, 1000, %tid; st.shared.b32 [%s4+64], %r4; mbarrier.arrive.shared.b64 _, [%r2]; bra END;
        CONSUME: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], 0; @!%p3 bra CONSUME;
        sub.u32 %r5, %s4, 128; ld.shared.b32 %r6, [%r5+64]; st.global.b32 [%y_g], %r6; END:""",
        block=block,
        grid=grid,
        smem=2048,
        y=y,
    )
    threads = np.arange(block)
    expected = np.where(threads % 64 >= 32, np.arange(grid)[:, None] * 1000 + threads - 32, 0)
    assert (y == expected).all()


def test_the_same_launch_twice_gives_the_same():
    y, z = np.zeros(96 * 40, np.uint32), np.zeros(96 * 40, np.uint32)
    run(COLLATZ, block=96, grid=40, y=y)
    run(COLLATZ, block=96, grid=40, y=z)
    assert (y == z).all()


def test_a_hazard_in_a_later_wave_names_its_cta():
    body = "mov.u32 %r9, %ctaid.y; setp.eq.u32 %p1, %r9, 3;\n@%p1 st.shared.b32 [%s+4096], %tid; // HERE\n"
    fails(Hazard, body, "CTA (0, 3, 0), warp 0, lane 0", "out of bounds", grid=(20, 5, 1))


def test_a_kernel_that_falls_off_its_end():
    y = np.zeros(32, np.uint32)
    text = ptx("st.global.b32 [%y_g], %tid;", y=y).replace("\nret;\n", "\n")
    launch(text, {"y": y})
    assert (y == np.arange(32)).all()


# -- reports -----------------------------------------------------------------------------------------------------------
def test_a_launch_counts_warp_instructions():
    y = np.zeros(96 * 5, np.uint32)
    body = "mov.u32 %r1, 0; LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 10; @%p1 bra LOOP;"
    body += "st.global.b32 [%y_g], %r1;"
    report = run(body, block=96, grid=5, y=y)
    assert report.opcodes["add.u32"] == 15 * 10 and report.opcodes["bra"] == 15 * 10
    assert report.opcodes["st.global.b32"] == 15 and report.opcodes["ret"] == 15
    assert report.warp_instructions == sum(report.opcodes.values())
    assert (report.kernel, report.grid, report.block, report.smem_bytes) == ("k", (5, 1, 1), (96, 1, 1), 1024)
    assert report.tmem_columns == 0 and 0 < report.seconds < 10


def test_the_gpu_keeps_its_launches():
    gpu = Gpu()
    module = gpu.load_ptx(HEADER + ".entry one()\n{\nret;\n}\n.entry two()\n{\nexit;\n}\n")
    assert list(module.kernels) == ["one", "two"]
    for name in ("two", "one", "two"):
        gpu.launch(module, name, (1, 1, 1), (32, 1, 1))
    assert [r.kernel for r in gpu.launches] == ["two", "one", "two"]


# -- launches that are refused -----------------------------------------------------------------------------------------
PARAMS = HEADER + ".visible .entry k(.param .u64 a, .param .align 4 .b8 b[12], .param .u8 c)\n{\nret;\n}\n"
GOOD = (bytes(8), bytes(12), bytes(1))


def refused(
    words: str, text=PARAMS, kernel="k", grid=(1, 1, 1), block=(32, 1, 1), cluster=(1, 1, 1), smem=0, params=GOOD
):
    gpu = Gpu()
    with pytest.raises(LaunchError, match=words):
        gpu.launch(gpu.load_ptx(text), kernel, grid, block, cluster, smem, list(params))


def test_a_launch_that_is_accepted():
    gpu = Gpu()
    gpu.launch(gpu.load_ptx(PARAMS), "k", (1, 1, 1), (1024, 1, 1), (1, 1, 1), 232448, list(GOOD))


@pytest.mark.parametrize("block", [(1025, 1, 1), (32, 33, 1), (0, 1, 1), (32, 1, -1)])
def test_illegal_blocks(block):
    refused("1 to 1024 threads a CTA", block=block)


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_illegal_grids(grid):
    refused("every extent must be at least 1", grid=grid)


def test_too_much_shared_memory():
    refused("k asks for 232449 bytes of shared memory a CTA, sm_100a has 232448", smem=232449)
    static = PARAMS.replace("{\n", "{\n.shared .align 16 .b8 fixed[1000];\n")
    refused("k asks for 23[0-9]{4} bytes of shared memory", static, smem=232448)


@pytest.mark.parametrize("reqntid, block, ok", [("64, 1, 1", (64, 1, 1), True), ("64, 1, 1", (32, 1, 1), False),
    ("64", (64, 1, 1), True),
                                                ("64", (128, 1, 1), False), ("8, 8, 1", (64, 1, 1),
                                                    False)])  # fmt: skip
def test_reqntid(reqntid, block, ok):
    text = PARAMS.replace(")\n{", f")\n.reqntid {reqntid}\n{{")
    if ok:
        gpu = Gpu()
        gpu.launch(gpu.load_ptx(text), "k", (1, 1, 1), block, (1, 1, 1), 0, list(GOOD))
    else:
        refused(rf"compiled for .reqntid {reqntid}", text, block=block)


def test_parameters_that_do_not_match():
    refused("k takes 3 parameters, 2 were given", params=GOOD[:2])
    refused("k takes 3 parameters, 4 were given", params=(*GOOD, bytes(4)))
    refused("parameter b has 12 bytes, 16 were given", params=(GOOD[0], bytes(16), GOOD[2]))
    refused("parameter a has 8 bytes, 4 were given", params=(bytes(4), *GOOD[1:]))


def test_an_unknown_kernel_a_cluster_and_an_unknown_device():
    refused("no kernel 'q', only k", kernel="q")
    refused(r"grid \(1, 1, 1\) is not a multiple of cluster \(2, 1, 1\)", cluster=(2, 1, 1))
    with pytest.raises(LaunchError, match="sm_80"):
        Gpu("sm_80")
    with pytest.raises(LaunchError, match="strict is 0: True or False"):
        Gpu(strict=0)


def test_arrays_may_not_overlap_but_may_come_twice():
    gpu, raw = Gpu(), np.zeros(1024, np.uint8)
    gpu.add_array(raw[:512], "low")
    gpu.add_array(raw[:512], "low")
    gpu.add_array((raw.ctypes.data + 512, 512), "high")
    with pytest.raises(LaunchError, match="array 'both' .* overlaps array 'low'"):
        gpu.add_array(raw[256:768], "both")
    gpu.add_array(np.zeros(0, np.uint8), "empty")


def test_an_array_with_strides_is_legal_between_its_first_and_last_byte():
    whole = np.zeros((8, 64), np.uint32)
    part = whole[2:4, :32]
    gpu = Gpu()
    gpu.add_array(part, "part")
    text = ptx("st.global.b32 [%y_g+{}], %tid;", y=whole)
    for offset, legal in ((0, True), (256, True), (-4, False), (256 + 4, False)):
        module = gpu.load_ptx(text.replace("{}", str(offset)))
        arguments = (module, "k", (1, 1, 1), (32, 1, 1), (1, 1, 1), 0, [struct.pack("<Q", part.ctypes.data)])
        if legal:
            gpu.launch(*arguments)
        else:
            with pytest.raises(Hazard, match="out of bounds"):
                gpu.launch(*arguments)
    assert (part == np.arange(32)).all() and whole.sum() == 2 * np.arange(32).sum()


def test_a_loop_that_polls_memory_gives_the_others_a_turn():
    """Warp 0 spins on a flag in shared memory that warp 1, further down in the code, sets."""
    body = """mov.u32 %r1, 0; setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.b32 [%s], %r1; bar.sync 0;
    setp.ge.u32 %p2, %tid, 32; @%p2 bra SET;
    POLL: ld.volatile.shared.b32 %r1, [%s]; setp.eq.u32 %p3, %r1, 0; @%p3 bra POLL; bra.uni DONE;
    SET: mov.u32 %r2, 9; st.volatile.shared.b32 [%s], %r2; mov.u32 %r1, %r2; DONE: st.global.b32 [%y_g], %r1;"""
    y = np.zeros(64, np.uint32)
    run(body, block=64, y=y)
    assert (y == 9).all()


def test_an_endless_loop_is_reported(monkeypatch):
    monkeypatch.setattr("generator.emulator.scheduler.IDLE_LIMIT", 4096)
    body = """mov.u32 %r1, 0; st.shared.b32 [%s], %r1;
    POLL: ld.volatile.shared.b32 %r1, [%s]; // HERE
    setp.eq.u32 %p3, %r1, 0; @%p3 bra POLL;"""
    text = ptx(body)
    line = next(n for n, t in enumerate(text.splitlines(), 1) if "// HERE" in t)
    with pytest.raises(
        Deadlock, match=rf"endless loop: .*CTA \(0, 0, 0\), warp 0 is at PTX lines {line} to {line + 1}"
    ):
        gpu = Gpu()
        gpu.launch(gpu.load_ptx(text), "k", (1, 1, 1), (32, 1, 1), (1, 1, 1), 1024)
