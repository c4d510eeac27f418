"""emulator/ops/local: variables of each thread, by their name and through generic addresses."""

import numpy as np
import pytest
from ptx_kernels import fails, run

from generator.emulator import Hazard

DEPOT = ".local .align 8 .b8 first[4]; .local .align 16 .b8 depot[64];"


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("block, grid", [(32, 1), (96, 3)])
def test_each_thread_has_its_own(generic, block, grid):
    threads = block * grid
    x = np.random.default_rng(1).integers(0, 2**32, (16, threads), np.uint32)
    y = np.zeros((4, threads), np.uint32)
    space = "" if generic else ".local"
    stores = "".join(
        f"ld.global.b32 %r1, [%x_g+{4 * threads * i}]; st{space}.b32 [%d3+{4 * i}], %r1;" for i in range(16)
    )
    # a lane reads four words, from a place of its own
    loads = f"""and.b32 %r2, %tid, 3; mad.wide.u32 %d5, %r2, 16, %d3;
    ld{space}.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d5];"""
    back = "".join(f"st.global.b32 [%y_g+{4 * threads * i}], %r{10 + i};" for i in range(4))
    address = "mov.b64 %d2, depot; cvta.local.u64 %d3, %d2;"
    run(address + stores + loads + back, block=block, grid=grid, declare=DEPOT, x=x, y=y)
    lane = np.arange(threads)
    for i in range(4):
        assert (y[i] == x[4 * (lane % block % 4) + i, lane]).all()


def test_divergent_lanes_and_narrow_types():
    y = np.zeros(32, np.uint32)
    run(
        """mov.b16 %h1, -2; setp.lt.u32 %p1, %tid, 9; st.local.u8 [depot+1], %h1; @%p1 bra LOW;
        st.local.b16 [depot+2], %h1; bra END; LOW: mov.b16 %h2, 7; st.local.b16 [depot+2], %h2; END:
        ld.local.s16 %r1, [depot+2]; ld.local.u8 %r2, [depot+1]; add.s32 %r1, %r1, %r2; st.global.b32 [%y_g], %r1;""",
        declare=DEPOT,
        y=y,
    )
    assert (y.view(np.int32) == np.where(np.arange(32) < 9, 7, -2) + 254).all()


def test_local_memory_is_poison_until_written_and_has_bounds():
    fails(Hazard, "\nld.local.b32 %r1, [depot]; // HERE\n", "never written", declare=DEPOT)
    partly = "setp.lt.u32 %p1, %tid, 31; @%p1 st.local.b32 [depot], %tid;\nld.local.b32 %r1, [depot]; // HERE\n"
    fails(Hazard, partly, "lane 31", "never written", declare=DEPOT)
    fails(Hazard, "\nst.local.b32 [depot+64], %tid; // HERE\n", "out of bounds", declare=DEPOT)
    fails(Hazard, "\nst.local.b64 [depot+4], 1; // HERE\n", "misaligned", declare=DEPOT)
