"""emulator/races: accesses that nothing orders are found in whatever order they run; ordered ones are not reported."""

import struct

import numpy as np
import pytest
from ptx_kernels import aligned, fails, instruction_descriptor, launch, ptx, run, smem_descriptor, tensor_map, with_tmem

from generator.emulator import Gpu, Hazard

LD, ST = "tcgen05.ld.sync.aligned.32x32b", "tcgen05.st.sync.aligned.32x32b"
WAIT_LD, WAIT_ST = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
WARP0, WARP1 = "setp.ge.u32 %p1, %tid, 32;", "setp.lt.u32 %p2, %tid, 32;"
ROLES = f"{WARP0} {WARP1} @%p1 bra CONSUMER;"


def init(offset: int, count: int = 1) -> str:
    return f"setp.eq.u32 %p3, %tid, 0; @%p3 mbarrier.init.shared.b64 [%s+{offset}], {count};\n"


def wait(offset: int, parity: int = 0, label: str = "W") -> str:
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p9, [%s+{offset}], {parity}; @!%p9 bra {label};\n"


def arrive(offset: int) -> str:
    return f"mbarrier.arrive.shared.b64 _, [%s+{offset}];\n"


# -- ordinary accesses -------------------------------------------------------------------------------------------------
REVERSED = "sub.u32 %r1, 63, %tid; mad.lo.u32 %r2, %r1, 4, %s;"


def test_a_barrier_between_store_and_load_of_other_warps():
    y = np.zeros(64, np.uint32)
    body = f"{REVERSED} st.shared.b32 [%s4], %tid; {{}}\nld.shared.b32 %r3, [%r2]; st.global.b32 [%y_g], %r3;"
    run(body.format("bar.sync 0;"), block=64, y=y)
    assert (y == np.arange(64)[::-1]).all()
    message = fails(
        Hazard, body.replace("\nld", "\n/*HERE*/ld").format("") + "// HERE", "nothing orders", block=64, y=y
    )
    assert "reads shared offset 0xfc, which warp 1 writes at PTX line" in message and "CTA (0, 0, 0), warp 0" in message


def test_a_store_after_a_load_needs_the_barrier_too():
    y = np.zeros(64, np.uint32)
    body = f"""{REVERSED} st.shared.b32 [%s4], %tid; bar.sync 0; ld.shared.b32 %r3, [%r2]; {{}}
    st.shared.b32 [%s4], %r3; // HERE\n st.global.b32 [%y_g], %r3;"""
    run(body.format("bar.sync 0;"), block=64, y=y)
    fails(Hazard, body.format(""), "overwrites shared offset", "reads at PTX line", block=64, y=y)


def test_two_warps_store_to_one_word():
    fails(Hazard, "and.b32 %r1, %tid, 31; mad.lo.u32 %r1, %r1, 4, %s;\nst.shared.b32 [%r1], %tid; // HERE\n",
          "overwrites shared offset 0x0, which warp", "writes at PTX line", block=64)  # fmt: skip


@pytest.mark.parametrize("width, kind", [(1, "b8"), (2, "b16")])
def test_neighbours_in_one_word_do_not_race(width, kind):
    """Warp 0 and warp 1 use alternate bytes or halves of the same words."""
    y = np.zeros(64, np.uint32)
    body = f"""shr.u32 %r1, %tid, 5; and.b32 %r2, %tid, 31; mad.lo.u32 %r2, %r2, 2, %r1;
    mad.lo.u32 %r2, %r2, {width}, %s; cvt.u16.u32 %h1, %tid;
    st.shared.{kind} [%r2], %h1; ld.shared.{kind.replace("b", "u")} %h2, [%r2];
    cvt.u32.u16 %r3, %h2; st.global.b32 [%y_g], %r3;"""
    run(body, block=64, y=y)
    assert (y == np.arange(64)).all()


def test_a_word_over_bytes_of_another_warp():
    body = """setp.ge.u32 %p1, %tid, 32; cvt.u16.u32 %h1, %tid; add.u32 %r1, %s, %tid; @!%p1 st.shared.b8 [%r1], %h1;
    @%p1 st.shared.b32 [%s+8], %tid; // HERE\n"""
    fails(Hazard, body, "shared offset 0x8, which warp 0 writes", block=64)


def test_wide_accesses_meet_narrow_ones():
    body = """setp.ge.u32 %p1, %tid, 32; @!%p1 st.shared.v4.b32 [%s16], {%tid, %tid, %tid, %tid}; {}
    @%p1 ld.shared.b32 %r1, [%s+20]; // HERE\n"""
    fails(Hazard, body.replace("{}", ""), "reads shared offset 0x14, which warp 0 writes", block=64)
    run(body.replace("{}", "bar.sync 0;"), block=64)


def test_atomics_do_not_race_with_one_another():
    y = np.zeros(1, np.uint32)
    body = """setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.b32 [%s], 0; bar.sync 0; atom.shared.add.u32 %r1, [%s], 1; {}
    ld.shared.b32 %r1, [%s]; // HERE\n @%p1 st.global.b32 [%y], %r1;"""
    run(body.replace("{}", "bar.sync 0;"), block=128, y=y)
    assert y[0] == 128
    fails(Hazard, body.replace("{}", ""), "reads shared offset 0x0", block=128, y=y)


FLAG = """setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [%s+128], 0; bar.sync 0; setp.ge.u32 %p1, %tid, 32;
@%p1 bra READ; st.shared.b32 [%s4], %tid; STORE bra DONE;
READ: LOAD setp.ne.u32 %p2, %r1, 1; @%p2 bra READ; AFTER
ld.shared.b32 %r2, [%s4+-128]; // HERE
st.global.b32 [%y_g+-128], %r2; DONE:"""


def flag(store: str, load: str, after: str = "") -> str:
    return FLAG.replace("STORE", store).replace("LOAD", load).replace("AFTER", after)


def test_a_flag_orders_by_release_and_acquire():
    y = np.zeros(32, np.uint32)
    release, acquire = "st.release.cta.shared.b32 [%s+128], 1;", "ld.acquire.cta.shared.b32 %r1, [%s+128];"
    relaxed_st, relaxed_ld = (x.replace("release", "relaxed").replace("acquire", "relaxed") for x in (release, acquire))
    run(flag(release, acquire), block=64, y=y)
    assert (y == np.arange(32)).all()
    run(flag(f"fence.acq_rel.cta; {relaxed_st}", relaxed_ld, "fence.acq_rel.cta;"), block=64, y=y)
    fails(Hazard, flag(relaxed_st, acquire), "which warp 0 writes", block=64, y=y)
    fails(Hazard, flag(release, relaxed_ld), "which warp 0 writes", block=64, y=y)


# -- mbarriers ---------------------------------------------------------------------------------------------------------
def handed_over(signal: str, receive: str) -> str:
    """Warp 0 stores, warp 1 loads."""
    return f"""{init(512)} bar.sync 0; {ROLES} st.shared.b32 [%s4], %tid; bar.warp.sync -1; {signal} bra DONE;
    CONSUMER: {receive}\nld.shared.b32 %r1, [%s4+-128]; // HERE\n st.global.b32 [%y_g+-128], %r1; DONE:"""


ARRIVE = "@%p3 " + arrive(512)


def test_an_arrival_and_its_wait_order():
    y = np.zeros(32, np.uint32)
    run(handed_over(ARRIVE, wait(512)), block=64, y=y)
    assert (y == np.arange(32)).all()


def test_a_wait_that_is_missing_though_the_run_is_kind():
    """Warp 1 is held back by a barrier that warp 0 joins before it stores: it loads last anyway."""
    y = np.zeros(32, np.uint32)
    slow = "".join(f"L{i}: bar.warp.sync -1; bra L{i + 1};" for i in range(40)) + "L40:"
    message = fails(Hazard, handed_over(ARRIVE, slow), "which warp 0 writes at PTX line", block=64, y=y)
    assert "let warp 0 signal after PTX line" in message


def test_use_before_the_initialization_is_visible():
    body = f"{init(512)} {{}}\nsetp.lt.u32 %p4, %tid, 32; @%p4 bra DONE;\n{arrive(512).strip()} // HERE\nDONE:"
    run(body.replace("], 1;", "], 32;").format("bar.sync 0;"), block=64)
    fails(Hazard, body.replace("], 1;", "], 32;").format(""), "which warp 0 initializes", block=64)


def test_a_phase_that_can_be_passed_twice():
    """Warp 1 waits for both phases; warp 0 completes them without asking whether it is through the first."""
    asked = f"""{init(512)} {init(520)} bar.sync 0; {ROLES} @%p3 {arrive(512)} {{}}
    @%p3 {arrive(512)} bra DONE; CONSUMER: {wait(512, 0, "A")} setp.eq.u32 %p4, %tid, 32; @%p4 {arrive(520)}
    {wait(512, 1, "B")} DONE:"""
    run(asked.format(wait(520, 0, "C")), block=64)
    fails(Hazard, asked.format(""), "passed twice", block=64)


def test_the_end_of_an_mbarrier():
    """Warp 1 ends it: when warp 0 has arrived and said so, or at a time of its own."""
    body = f"""{init(512)} bar.sync 0; {ROLES} @%p3 {arrive(512)} {{}} bra DONE;
    CONSUMER: setp.eq.u32 %p4, %tid, 32; {{}}\n@%p4 mbarrier.inval.shared.b64 [%s+512]; // HERE\nDONE:"""
    run(body.format("bar.sync 1, 64;", "bar.sync 1, 64;"), block=64)
    fails(Hazard, body.format("", ""), "may still arrive on it", block=64)


def test_relaxed_forms_order_with_fences_only():
    y = np.zeros(32, np.uint32)
    relaxed = "@%p3 mbarrier.arrive.relaxed.cta.shared.b64 _, [%s+512];\n"
    looks = wait(512).replace("parity.shared", "parity.relaxed.cta.shared")
    fence = "fence.acq_rel.cta;"
    run(handed_over(fence + relaxed, looks + fence), block=64, y=y)
    assert (y == np.arange(32)).all()
    fails(Hazard, handed_over(relaxed, looks + fence), "which warp 0 writes", block=64, y=y)
    fails(Hazard, handed_over(fence + relaxed, looks), "which warp 0 writes", block=64, y=y)


TURNS = (
    init(0, 2)
    + """bar.sync 0; and.b32 %r1, %tid, 31; setp.eq.u32 %p4, %r1, 0; setp.eq.u32 %p5, %tid, 32;
@%p4 mbarrier.arrive.shared.b64 _, [%s];\n{}
@%p5 mbarrier.arrive.shared.b64 _, [%s]; // HERE\n"""
)


def test_an_arrival_that_can_count_in_the_place_of_another_warps():
    """Of two arrivals a phase, warp 1 gives a third: were warp 0 late, warp 1 would complete the phase alone."""
    parts = "warp 1 arrives for phase 1", "knows that 0 phases completed", "nothing says that warp 0 came first"
    fails(Hazard, TURNS.format(""), *parts, "can count for phase 0 instead", block=64)
    run(TURNS.format(wait(0)), block=64)
    run(TURNS.format("bar.sync 0;"), block=64)  # knows the other arrival, whatever it knows of the phase


# -- named barriers ----------------------------------------------------------------------------------------------------
def test_a_named_barrier_that_is_used_again_too_early():
    """Warps that only arrive do not know whether the round is over: the next arrival can count for it."""
    body = "{}\nbar.arrive 1, 64; // HERE\n"
    parts = "comes to named barrier 1 although nothing says that the round before, of warp", "bar.sync, not bar.arrive"
    fails(Hazard, body.format("bar.arrive 1, 64;"), *parts, block=64)
    run(body.format("bar.sync 1, 64;"), block=64)
    run(body.format("bar.arrive 1, 64; bar.sync 2, 64;"), block=64)


def test_tensor_memory_that_is_not_known_to_be_allocated():
    """Warp 1 knows the address (512 columns begin at 0), and nothing of the allocation."""
    body = f"""setp.ge.u32 %p14, %tid, 32; @%p14 bra OTHER;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 512; bra.uni TOGETHER;
    OTHER: nanosleep.u32 100; {{}}
    mov.u32 %r1, 0x200000; mov.u32 %r2, 7;\n{ST}.x1.b32 [%r1], {{{{%r2}}}}; // HERE\n{WAIT_ST}
    TOGETHER: {{}} bar.sync 0; @%p14 bra END; tcgen05.dealloc.cta_group::1.sync.aligned.b32 0, 512; END:"""
    message = fails(Hazard, body.format("", ""), "TMEM column 0", block=64)
    assert "warp 0 writes at PTX line" in message and "(tcgen05.alloc" in message
    early = body.format("bar.sync 1, 64;", "@!%p14 bar.sync 1, 64;")
    run(early.replace("bra.uni TOGETHER", "bar.arrive 1, 64; bra.uni TOGETHER").replace("@!%p14 bar.sync 1, 64;", ""),
        block=64)  # fmt: skip


def test_bar_arrive_releases_and_bar_sync_acquires():
    y = np.zeros(32, np.uint32)
    run(handed_over("bar.arrive 1, 64;", "bar.sync 1, 64;"), block=64, y=y)
    assert (y == np.arange(32)).all()
    late = "bar.arrive 1, 64;" + "".join(f"L{i}: bra L{i + 1};" for i in range(60)) + "L60:"
    fails(Hazard, handed_over("bar.sync 1, 64;", late), "warp 0", block=64, y=y)


# -- copies ------------------------------------------------------------------------------------------------------------
def test_a_load_overwrites_what_another_warp_reads():
    x, y = aligned(64, np.uint32, np.arange(64)), np.zeros(64, np.uint32)
    copy = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%s+512];"
    body = f"""{init(512)} bar.sync 0; @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256; @%p3 {copy}
    {wait(512)} ld.shared.b32 %r1, [%s4]; st.global.b32 [%y_g], %r1; {{}}
    @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256;\n@%p3 {copy} // HERE
    {wait(512, 1, "V")}"""
    run(body.format("fence.proxy.async; bar.sync 0;"), block=64, x=x, y=y)
    assert (y == x).all()
    fails(Hazard, body.format("fence.proxy.async;"), "which warp 1 reads at PTX line", block=64, x=x, y=y)


def test_a_read_is_over_for_a_load_only_after_a_proxy_fence():
    """On an H200 ldmatrix, a barrier and the load that the barrier lets go gave the load's bytes (2026-11-29)."""
    x, y = aligned(64, np.uint32, np.arange(64)), np.zeros(64, np.uint32)
    copy = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%s+512];"
    body = f"""{init(512)} bar.sync 0; @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256; @%p3 {copy}
    {wait(512)} ld.shared.b32 %r1, [%s4]; st.global.b32 [%y_g], %r1; BEFORE bar.sync 0; AFTER
    @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256;\n@%p3 {copy} // HERE
    {wait(512, 1, "V")}"""
    fence = "fence.proxy.async.shared::cta;"
    for before, after in ((fence, ""), ("", fence)):
        run(body.replace("BEFORE", before).replace("AFTER", after), block=64, x=x, y=y)
    plain = body.replace("BEFORE", "").replace("AFTER", "")
    fails(Hazard, plain, "which warp 0 reads at PTX line", "with no fence.proxy.async between", block=64, x=x, y=y)


def test_only_those_who_waited_for_the_load_may_read():
    x, y = aligned(64, np.uint32, np.arange(64)), np.zeros(64, np.uint32)
    body = f"""{init(512)} bar.sync 0; {ROLES} @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256;
    @%p3 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%s+512]; {wait(512)} {{0}}
    bra DONE; CONSUMER: {{1}}\nld.shared.b32 %r1, [%s4]; // HERE\n st.global.b32 [%y_g], %r1; DONE:"""
    run(body.format("bar.sync 1, 64;", "bar.sync 1, 64;"), block=64, x=x, y=y)
    assert (y[32:] == x[32:]).all()
    slow = "".join(f"L{i}: bar.warp.sync -1; bra L{i + 1};" for i in range(60)) + "L60:"
    fails(Hazard, body.format("", slow), block=64, x=x, y=y)


def test_a_bulk_store_has_read_only_for_those_who_were_told():
    y = aligned(64, np.uint32)
    body = """st.shared.b32 [%s4], %tid; fence.proxy.async.shared::cta; bar.sync 0; setp.ge.u32 %p1, %tid, 32;
    @%p1 bra OTHER;
    setp.eq.u32 %p3, %tid, 0; @%p3 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 256;
    @%p3 cp.async.bulk.commit_group; @%p3 cp.async.bulk.wait_group.read 0; {}
    bra DONE; OTHER: {} \nst.shared.b32 [%s4], 0; // HERE\nDONE:"""
    run(body.format("bar.sync 1, 64;", "bar.sync 1, 64;"), block=64, y=y)
    assert (y == np.arange(64)).all()
    slow = "".join(f"L{i}: bar.warp.sync -1; bra L{i + 1};" for i in range(60)) + "L60:"
    fails(Hazard, body.format("", slow), block=64, y=y)


# -- tensor memory -----------------------------------------------------------------------------------------------------
def test_a_load_is_complete_by_its_use_or_its_wait():
    """Warps 0 and 4 share lanes: warp 4 overwrites what warp 0 loaded."""
    body = f"""setp.ge.u32 %p1, %tid, 128; @%p1 bra OTHER; {ST}.x1.b32 [%r151], {{%tid}}; {WAIT_ST}
    {LD}.x1.b32 {{%r2}}, [%r151]; DONE bar.sync 1, 256; bra JOIN; OTHER: bar.sync 1, 256;
    {ST}.x1.b32 [%r151], {{%tid}}; // HERE\n{WAIT_ST} JOIN:"""
    for done in (WAIT_LD, "add.u32 %r3, %r2, 1;", "mov.b32 %r3, %r2; add.u32 %r3, %r3, 1;"):
        run(with_tmem(body.replace("DONE", done)), block=256)
    for late in ("", "mov.b32 %r3, %r2;"):
        fails(Hazard, with_tmem(body.replace("DONE", late)), "warp 0 reads at PTX line", "tcgen05.wait::ld", block=256)


def test_a_load_that_nothing_needs_is_complete_with_a_later_one():
    """Warp 0 frees its columns: the first load delivers nothing, the second is used, or only moved."""
    body = f"""{ST}.x1.b32 [%r151], {{%tid}}; {WAIT_ST} {LD}.x1.b32 {{%r2}}, [%r151];
    {LD}.x1.b32 {{%r3}}, [%r151]; USE\ntcgen05.dealloc.cta_group::1.sync.aligned.b32 %r150, 512; // HERE\n"""
    run(with_tmem(body.replace("USE", "add.u32 %r3, %r3, 1;"), free=False))
    fails(Hazard, with_tmem(body.replace("USE", "mov.b32 %r4, %r3;"), free=False), "frees TMEM column 0")
    needed = body.replace("USE", "add.u32 %r3, %r3, 1;") + "add.u32 %r2, %r2, 1;"
    fails(Hazard, with_tmem(needed, free=False), "frees TMEM column 0, which warp 0 reads")


def test_a_store_before_its_wait_is_not_for_others():
    """The states of cells would let warp 4's own wait pass here; the clocks know whose store it is."""
    body = f"""setp.ge.u32 %p1, %tid, 128; @%p1 bra OTHER; {ST}.x1.b32 [%r151], {{%tid}}; FIRST bar.sync 1, 256; SECOND
    bra JOIN; OTHER: bar.sync 1, 256; {LD}.x1.b32 {{%r2}}, [%r151]; // HERE\nJOIN:"""
    run(with_tmem(body.replace("FIRST", WAIT_ST).replace("SECOND", "")), block=256)
    fails(Hazard, with_tmem(body.replace("FIRST", "").replace("SECOND", WAIT_ST)), "tcgen05.wait::st", block=256)


def test_columns_are_freed_after_everyone_is_done():
    body = f"""{ST}.x1.b32 [%r151], {{%tid}}; {WAIT_ST} bar.sync 0; {LD}.x1.b32 {{%r2}}, [%r151]; {WAIT_LD}"""
    free = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r150, 512;"
    run(with_tmem(body), block=128)
    late = with_tmem(f"{body} @%p14 bra END;\n{free} // HERE\nEND:", free=False)
    fails(Hazard, late, "frees TMEM column 0", "warp 1", block=128)


IDESC = instruction_descriptor(16)
A, B = smem_descriptor(0, 2048, 128, 0), smem_descriptor(4096, 256, 128, 0)
MBAR = 8192
FILL = "".join(f"st.shared.v4.b32 [%s16+{i * 2048}], {{0, 0, 0, 0}};" for i in range(3)) + "FENCE bar.sync 0;"
MMA = f"""@%p3 tcgen05.mma.cta_group::1.kind::f16 [%r150], %d1, %d2, {IDESC}, 0;
@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%s+{MBAR}];"""


def product(fence="fence.proxy.async.shared::cta;", before="", after="bar.sync 0;", end="") -> str:
    body = f"""{init(MBAR)} mov.b64 %d1, {A}; mov.b64 %d2, {B}; {FILL.replace("FENCE", fence)}
    {before} {MMA} {wait(MBAR)} {after} {end}"""
    return with_tmem(body, slot=MBAR + 16)


def test_an_operand_needs_the_proxy_fence_on_its_way():
    run(product(), block=128, smem=16384)
    fails(Hazard, product(fence=""), "fence.proxy.async", block=128, smem=16384)
    elsewhere = "setp.lt.u32 %p4, %tid, 64; @%p4 bra F; fence.proxy.async.shared::cta; F:"
    message = fails(Hazard, product(fence="", before=elsewhere), block=128, smem=16384)
    assert "with no fence.proxy.async between: insert fence.proxy.async after PTX line" in message


def test_the_result_is_known_to_those_who_wait():
    load = f"{LD}.x1.b32 {{%r2}}, [%r151]; // HERE\n"
    run(product(end=f"{load} {WAIT_LD}"), block=128, smem=16384)
    slow = "setp.ge.u32 %p5, %tid, 32; " + "".join(f"L{i}: bra L{i + 1};" for i in range(60)) + "L60:"
    body = product().replace(wait(MBAR), f"{slow}\n@%p5 bra SKIP; {wait(MBAR)} SKIP: {load} {WAIT_LD}")
    fails(Hazard, body, "tcgen05.commit", block=128, smem=16384)


def test_the_commits_of_a_warp_arrive_in_order():
    """Warp 3 waits only for the second phase of MBAR; by another mbarrier it can know of the first, or not."""
    commit = "@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%s+{}];\n".format
    body = f"""{init(MBAR)} {init(MBAR + 8)} {init(MBAR + 24)} bar.sync 0; setp.ge.u32 %p5, %tid, 96; @%p5 bra LAST;
    setp.ge.u32 %p6, %tid, 32; @%p6 bra DONE; FIRST {wait(MBAR, 0, "A")} {wait(MBAR + 24, 0, "B")} {commit(MBAR)}
    bra DONE; LAST: {wait(MBAR + 8, 0, "C")} setp.eq.u32 %p7, %tid, 96; @%p7 {arrive(MBAR + 24)} {wait(MBAR, 1, "D")}
    DONE:"""
    both = [commit(MBAR), commit(MBAR + 8)]
    run(with_tmem(body.replace("FIRST", "".join(both)), slot=MBAR + 16), block=128, smem=16384)
    backwards = with_tmem(body.replace("FIRST", "".join(both[::-1])), slot=MBAR + 16)
    fails(Hazard, backwards, "can have been passed twice", block=128, smem=16384)


def test_tensor_maps_too():
    """Two boxes in one place: the second may only come after the first was read, which a proxy fence orders."""
    x = aligned((64, 32), np.uint32)
    load = """mov.u32 %r20, 0; mov.u32 %r21, ROW;\n@%p3 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::
complete_tx::bytes [%s], [%m, {%r20, %r21}], [%s+2048];""".replace("::\n", "::")
    expect = "@%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+2048], 1024;"
    body = f"""{init(2048)} bar.sync 0; {expect} {load.replace("ROW", "0")} {wait(2048)}
    ld.shared.b32 %r1, [%s4]; BARRIER {expect} {load.replace("ROW", "8")} {wait(2048, 1, "V")}"""
    tensor = tensor_map(x, (32, 8))
    known = {"block": 64, "smem": 4096, "m": tensor, "known": {"x": x}}
    run(body.replace("BARRIER", "fence.proxy.async; bar.sync 0;"), **known)
    fails(Hazard, body.replace("BARRIER", "fence.proxy.async;"), "which warp 1 reads at", **known)
    fails(Hazard, body.replace("BARRIER", "bar.sync 0;"), "with no fence.proxy.async between", **known)


# -- clusters ----------------------------------------------------------------------------------------------------------
def of_a_pair(body: str, known: dict | None = None, **arguments):
    gpu = Gpu()
    for name, value in {**arguments, **(known or {})}.items():
        gpu.add_array(value, name)
    params = [struct.pack("<Q", value.ctypes.data) for value in arguments.values()]
    return gpu.launch(gpu.load_ptx(ptx(body, **arguments)), "k", (2, 1, 1), (32, 1, 1), (2, 1, 1), 1024, params)


MEET = "barrier.cluster.arrive; barrier.cluster.wait;"


def test_stores_to_a_peer_need_the_cluster_barrier():
    y = np.zeros(64, np.uint32)
    body = f"""mov.u32 %r1, %cluster_ctarank; xor.b32 %r1, %r1, 1; mapa.shared::cluster.u32 %r2, %s4, %r1;
    st.shared::cluster.b32 [%r2], %g; MEET ld.shared.b32 %r3, [%s4]; st.global.b32 [%y_g], %r3; {MEET}"""
    of_a_pair(body.replace("MEET", MEET), y=y)
    assert (y == np.arange(64).reshape(2, 32)[::-1].ravel()).all()
    for fewer in ("", "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"):
        with pytest.raises(Hazard, match=r"which warp 0 of CTA \(1, 0, 0\) writes at PTX line|never written"):
            of_a_pair(body.replace("MEET", fewer), y=y)


def test_a_multicast_load_waits_for_the_peer_as_well():
    x, y = aligned(64, np.uint32, np.arange(64)), np.zeros(64, np.uint32)
    copy = """@%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 256; @%p4 cp.async.bulk.shared::cluster.global
.mbarrier::complete_tx::bytes.multicast::cluster [%s], [%x], 256, [%s+512], %h1;""".replace("\n", "")
    body = f"""{init(512)} fence.mbarrier_init.release.cluster; mov.u32 %r1, %cluster_ctarank; mov.b16 %h1, 3;
    setp.eq.and.u32 %p4, %r1, 0, %p3; {MEET} {copy} {wait(512)} ld.shared.b32 %r3, [%s4]; BETWEEN
    {copy} {wait(512, 1, "V")} ld.shared.b32 %r3, [%s4]; st.global.b32 [%y_g], %r3; {MEET}"""
    of_a_pair(body.replace("BETWEEN", f"fence.proxy.async; {MEET}"), x=x, y=y)
    assert (y.reshape(2, 32) == x[:32]).all()
    with pytest.raises(Hazard, match=r"overwrites shared offset 0x0 of CTA \(1, 0, 0\), which"):
        of_a_pair(body.replace("BETWEEN", ""), x=x, y=y)


# -- registers ---------------------------------------------------------------------------------------------------------
def pool(*counts: int, more: str = "") -> str:
    """A warpgroup each: setmaxnreg to these counts, after a decrease to 24."""
    body = "setmaxnreg.dec.sync.aligned.u32 24; shr.u32 %r1, %tid, 7;"
    for group, count in enumerate(counts):
        body += f"setp.ne.u32 %p1, %r1, {group}; @%p1 bra G{group}; setmaxnreg.inc.sync.aligned.u32 {count}; G{group}:"
    return body + more


def test_setmaxnreg_within_the_pool():
    run(pool(240, 240, 24), block=384)
    run(pool(256, 256), block=256)
    fails(
        Hazard, pool(240, 240, 48), "67584 registers of a pool of 65536", "from warp 0: 240, 4: 240, 8: 48", block=384
    )
    once = "setp.ge.u32 %p1, %tid, 32; @%p1 bra X; setmaxnreg.inc.sync.aligned.u32 40; X:"
    fails(Hazard, pool(more=once), "different setmaxnreg", block=128)
    run(pool(more=once.replace("inc", "dec").replace("40", "24")), block=128)  # it leaves the warp as it is
    fails(Hazard, "\nsetmaxnreg.dec.sync.aligned.u32 136; // HERE\n", "has at most 128", block=512)
    fails(Hazard, pool(64, more="\nsetmaxnreg.inc.sync.aligned.u32 32; // HERE\n"), "has 64", block=128)


def test_setmaxnreg_inc_to_fewer_registers_than_at_launch():
    """Seen on an H200: a warpgroup of 512 threads that asks for 112 registers by inc dies of an illegal instruction."""

    def text(count: int) -> str:
        return ptx(f"setmaxnreg.inc.sync.aligned.u32 {count};").replace(")\n{", ")\n.minnctapersm 1\n{")

    with pytest.raises(Hazard, match="setmaxnreg.inc to 112 registers of a warp that has 128"):
        launch(text(112), {}, block=512)
    launch(text(128), {}, block=512)


# -- warnings ----------------------------------------------------------------------------------------------------------
def warnings_of(body: str, wanted: bool = True, smem: int = 16384, **arguments) -> tuple[str, ...]:
    gpu = Gpu()
    gpu.warnings = wanted
    for name, value in arguments.items():
        gpu.add_array(value, name)
    params = [struct.pack("<Q", value.ctypes.data) for value in arguments.values()]
    module = gpu.load_ptx(ptx(body, **arguments))
    return gpu.launch(module, "k", (1, 1, 1), (128, 1, 1), (1, 1, 1), smem, params).warnings


def test_a_warning_of_a_setmaxnreg_that_some_warps_repeat():
    once = "setmaxnreg.dec.sync.aligned.u32 24; setp.ge.u32 %p1, %tid, 32; @%p1 bra X;"
    once += "setmaxnreg.dec.sync.aligned.u32 24; X:"
    (text,) = warnings_of(once)
    assert "some warps of warpgroup 0 repeat a setmaxnreg that changes nothing" in text
    assert warnings_of("setmaxnreg.dec.sync.aligned.u32 24; " * 2) == ()


def test_what_silicon_does_without_is_a_warning():
    used = f"{LD}.x1.b32 {{%r2}}, [%r151]; WAIT add.u32 %r3, %r2, 1;"
    body = product(end=used.replace("WAIT", ""))
    assert warnings_of(body, wanted=False) == ()
    found = " / ".join(warnings_of(body))
    assert "used before tcgen05.wait::ld" in found and "tcgen05.fence::after_thread_sync between" in found
    assert "tcgen05.fence::before_thread_sync" in found and "fence.mbarrier_init.release.cluster after" in found
    fenced = product(
        after="bar.sync 0; tcgen05.fence::after_thread_sync;",
        end=f"{used.replace('WAIT', WAIT_LD)} tcgen05.fence::before_thread_sync;",
    )
    fenced = fenced.replace(init(MBAR), f"{init(MBAR)} fence.mbarrier_init.release.cluster;")
    fenced = fenced.replace("@%p3 tcgen05.mma", "tcgen05.fence::after_thread_sync; @%p3 tcgen05.mma")
    assert warnings_of(fenced) == ()


def test_one_instruction_of_a_warp_may_initialize_alike():
    once = "setp.ge.u32 %p1, %tid, 32; @%p1 bra J; mbarrier.init.shared.b64 [%s], 1; J: bar.sync 0;"
    assert warnings_of(once, wanted=False) == ()
    [found] = warnings_of(once)
    assert "32 lanes initialize the same mbarrier" in found and "elect one" in found
    assert not warnings_of(init(0))
    fails(Hazard, "mbarrier.init.shared.b64 [%s], 1;\n", "64 lanes initialize", block=64)


def test_an_operand_that_cp_async_wrote():
    """Without a proxy fence tolerated; what st.shared wrote among it is not."""
    x = aligned(128 * 12, np.uint32)
    copies = "".join(
        f"add.u64 %d3, %x_g4, {i * 2048}; cp.async.cg.shared.global [%s16+{i * 2048}], [%d3], 16;" for i in range(3)
    )
    copies = "mad.wide.u32 %x_g4, %tid, 16, %x;" + copies + "cp.async.wait_all; STORE FENCE bar.sync 0;"
    body = ".reg .b64 %x_g4;" + product().replace(FILL.replace("FENCE", "fence.proxy.async.shared::cta;"), copies)
    for fence in ("", "fence.proxy.async.shared::cta;"):
        found = [
            w for w in warnings_of(body.replace("FENCE", fence).replace("STORE", ""), x=x) if "cp.async wrote it" in w
        ]
        assert [side for side in "AB" for w in found if f"operand {side}" in w] == ([] if fence else ["A", "B"])
    stored = body.replace("FENCE", "").replace("STORE", "@%p3 st.shared.b32 [%s+4096], 0;")
    fails(Hazard, stored, "operand B", "ordinary stores wrote it", block=128, smem=16384, x=x)
