"""Defects planted in an emitted kernel: the verification must find each, and say so in terms of the defect."""

import pytest

from generator.compile import compile_kernel
from generator.emit import emit_kernel
from generator.plan import plan_kernel
from generator.spec import load_spec
from generator.verify import verify_kernel

SHAPE = (1, 1, 1, 300, 700)  # three query tiles; rows whose maximum moves from KV tile to KV tile

P_STORED = "    write_row(p_tile, cute.recast_tensor(p, Float32), P_COLUMNS)\n"
WAIT_STORED = "    cute.arch.fence_view_async_tmem_store()\n"

# name: (text in the emitted kernel, what the defect makes of it, words of the report)
DEFECTS = {
    "K extent of QK fixed at 64": ("range_constexpr(HEAD_DIM // MMA_K)", "range_constexpr(64 // MMA_K)", "rel_err"),
    "no wait after the P store": (P_STORED + WAIT_STORED, P_STORED, "tcgen05.wait::st"),
    "P operand one TMEM column off": (
        "recast_ptr(tmem + P_COLUMN,",
        "recast_ptr(tmem + P_COLUMN + 1,",
        "A operand at TMEM",
    ),
    "P store one TMEM column off": (
        "make_tensor(tmem + P_COLUMN, s_tmem",
        "make_tensor(tmem + P_COLUMN + 1, s_tmem",
        "never written",
    ),
    "no rescale of O": ("        rescale(o_tmem, factor)\n", "        pass\n", "rel_err"),
    "P_FULL's phase flipped": ("P_FULL, j & 1)", "P_FULL, (j + 1) & 1)", "can have been passed twice"),
    "S_FULL's phase flipped": ("S_FULL, j & 1)", "S_FULL, (j + 1) & 1)", "Hazard"),
    "O_FULL's phase flipped": ("O_FULL, (j + 1) & 1)", "O_FULL, j & 1)", "Deadlock"),
    "S_EMPTY's phase flipped": ("S_EMPTY, (j + 1) & 1)", "S_EMPTY, j & 1)", "Deadlock"),
    "V_FULL's phase flipped": ("V_FULL + stage, phase)", "V_FULL + stage, phase ^ 1)", "TMA load"),
    "a ring's empty phase flipped": ("empty + stage, phase ^ 1)", "empty + stage, phase)", "Deadlock"),
    "O rescaled while PV runs": ("    wait_tmem(bars + O_FULL, (j + 1) & 1)", "    # no wait", "tcgen05.mma"),
    "S overwritten while the softmax warps read it": (
        "    wait_tmem(bars + S_EMPTY, (j + 1) & 1)",
        "    # no wait",
        "TMEM column 0 (S), which may not be read",
    ),
    "no proxy fence before O leaves": (
        "    cute.arch.fence_view_async_shared()",
        "    # no fence",
        "no fence.proxy.async followed",
    ),
    "no wait after S was read": ("    cute.arch.fence_view_async_tmem_load()\n", "", "insert tcgen05.wait::ld after"),
    "S given back before it is read": (
        "    s = read_row(s_tmem, S_COLUMNS)\n    arrive_warp(bars + S_EMPTY)",
        "    arrive_warp(bars + S_EMPTY)\n    s = read_row(s_tmem, S_COLUMNS)",
        "not known to be complete",
    ),
    "P announced before it is stored": (
        "    cute.arch.fence_view_async_tmem_store()\n    arrive_warp(bars + P_FULL)",
        "    arrive_warp(bars + P_FULL)\n    cute.arch.fence_view_async_tmem_store()",
        "tcgen05.wait::st",
    ),
    "no wait for V": ("    cute.arch.mbarrier_wait(bars + V_FULL + stage, phase)\n", "", "TMA load"),
    "a V stage given back before PV": (
        "        tcgen05.commit(bars + V_EMPTY + stage)\n",
        "        cute.arch.mbarrier_arrive(bars + V_EMPTY + stage)\n",
        "wait on the mbarrier of its tcgen05.commit first",
    ),
    "no barrier after the setup": (
        "            cpasync.prefetch_descriptor(tma)\n    cute.arch.sync_threads()\n",
        "            cpasync.prefetch_descriptor(tma)\n",
        "nothing orders the two",
    ),
    "TMEM freed before every warp is done": (
        "    cute.arch.sync_threads()  # every warp is done with TMEM\n",
        "",
        "tcgen05.dealloc",
    ),
    "TMEM kept": ("cute.arch.dealloc_tmem(tmem, TMEM_COLUMNS)", "pass", "dealloc is missing"),
}


@pytest.fixture(scope="module")
def plan():
    return plan_kernel(load_spec("fmha_sm100_d128_causal_tiles"))


def test_the_kernel_without_a_defect_passes(plan):
    assert verify_kernel(compile_kernel(plan), SHAPE).passed


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(plan, tmp_path, name):
    sound, unsound, words = DEFECTS[name]
    source = emit_kernel(plan)
    assert source.count(sound) == 1, "the template no longer has this text"
    path = tmp_path / f"{plan.kernel_name}.py"
    path.write_text(source.replace(sound, unsound))
    report = verify_kernel(compile_kernel(plan, path, use_cache=False), SHAPE)
    assert not report.passed
    assert words in str(report)
