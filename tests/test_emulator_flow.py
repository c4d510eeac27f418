"""emulator/flow, translation and machine: divergence, loops, registers across blocks, reads of unwritten registers."""

import numpy as np
import pytest
from ptx_kernels import fails, run

from generator.emulator import Hazard, UnsupportedInstruction

LANES = np.arange(64, dtype=np.uint32)


def result(body: str, block=64, grid=1, dtype=np.uint32, **arguments) -> np.ndarray:
    """What each thread left in %r1 (or %d1 for a 64-bit dtype)."""
    y = np.zeros(block * grid, dtype)
    register = "%d1" if y.itemsize == 8 else "%r1"
    run(f"{body}\nst.global.b{8 * y.itemsize} [%y_g], {register};", block=block, grid=grid, y=y, **arguments)
    return y


# -- divergence --------------------------------------------------------------------------------------------------------
IF_ELSE = """setp.lt.u32 %p1, %tid, 40; @%p1 bra SMALL;
add.u32 %r1, %tid, 1000; bra.uni JOIN;
SMALL: mul.lo.u32 %r1, %tid, 3;
JOIN: """


def test_if_else_inside_a_warp():
    assert (result(IF_ELSE) == np.where(LANES < 40, LANES * 3, LANES + 1000)).all()


@pytest.mark.parametrize(
    "aligned", ["bar.sync 0;", "vote.sync.ballot.b32 %r9, %p1, -1;", "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;"]
)
def test_lanes_reconverge_after_if_else(aligned):
    assert (result(IF_ELSE + aligned) == np.where(LANES < 40, LANES * 3, LANES + 1000)).all()


def test_activemask_shows_who_runs_each_side():
    body = """setp.lt.u32 %p1, %tid, 5; @%p1 bra SMALL; activemask.b32 %r2; bra JOIN;
    SMALL: activemask.b32 %r2; JOIN: activemask.b32 %r1; xor.b32 %r1, %r1, %r2;"""
    assert (result(body, block=32) == np.where(LANES[:32] < 5, 0xFFFFFFE0, 0x1F)).all()


def test_nested_divergence():
    body = """mov.u32 %r1, 0; and.b32 %r2, %tid, 1; and.b32 %r3, %tid, 2; setp.eq.u32 %p1, %r2, 0;
    setp.eq.u32 %p2, %r3, 0;
    @%p1 bra OUTER; add.u32 %r1, %r1, 1; @%p2 bra DONE; add.u32 %r1, %r1, 10; bra DONE;
    OUTER: add.u32 %r1, %r1, 100; @!%p2 bra DONE; add.u32 %r1, %r1, 1000;
    DONE: add.u32 %r1, %r1, 10000;"""
    expected = [10000 + (100 + 1000 * (not t & 2) if not t & 1 else 1 + 10 * bool(t & 2)) for t in range(64)]
    assert result(body).tolist() == expected


def test_a_loop_whose_trip_count_depends_on_the_lane():
    body = """add.u32 %r2, %g, 1; mov.u32 %r1, 0;
    LOOP: setp.le.u32 %p1, %r2, 1; @%p1 bra DONE; add.u32 %r1, %r1, 1; and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 1;
    @%p2 mad.lo.u32 %r2, %r2, 3, 1; @%p2 bra LOOP; shr.u32 %r2, %r2, 1; bra LOOP;
    DONE: bar.sync 0;"""

    def steps(n: int) -> int:
        count = 0
        while n > 1:
            n, count = (3 * n + 1 if n & 1 else n // 2), count + 1
        return count

    assert result(body, block=96, grid=3).tolist() == [steps(g + 1) for g in range(288)]


def test_nested_loops_with_breaks():
    body = """mov.u32 %r1, 0; mov.u32 %r2, 0;
    OUTER: mov.u32 %r3, 0;
    INNER: mad.lo.u32 %r4, %r2, 7, %r3; setp.gt.u32 %p1, %r4, %tid; @%p1 bra NEXT; add.u32 %r1, %r1, %r4;
    add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 5; @%p2 bra INNER;
    NEXT: add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 6; @%p3 bra OUTER;"""
    expected = []
    for t in range(64):
        total = 0
        for i in range(6):
            for j in range(5):
                if 7 * i + j > t:
                    break
                total += 7 * i + j
        expected.append(total)
    assert result(body).tolist() == expected


def test_a_side_that_lies_out_of_line():
    body = """setp.lt.u32 %p1, %tid, 7; mov.u32 %r1, 1; @%p1 bra SIDE; JOIN: bar.sync 0; st.global.b32 [%y_g], %r1; ret;
    SIDE: add.u32 %r1, %r1, 5; bra JOIN;"""
    y = np.zeros(64, np.uint32)
    run(body, block=64, y=y)
    assert (y == np.where(LANES < 7, 6, 1)).all()


@pytest.mark.parametrize("block", [1, 31, 33, 35, 63, 95])
def test_a_last_warp_that_is_not_full(block):
    body = """mov.u32 %r1, 0; LOOP: add.u32 %r1, %r1, 2; setp.lt.u32 %p1, %r1, %tid; @%p1 bra LOOP;"""
    y = np.full(128, 7, np.uint32)
    run(body + "st.global.b32 [%y_g], %r1; st.shared.b32 [%s4], %r1;", block=block, y=y)
    threads = np.arange(block)
    assert (y[:block] == np.maximum(2, threads + threads % 2)).all() and (y[block:] == 7).all()


def test_barriers_accept_a_last_warp_that_is_not_full():
    """The missing lanes never existed; the barrier counts the warp as a whole (ISA 9.7.13.1)."""
    body = (
        "st.shared.b32 [%s4], %tid; bar.sync 0; xor.b32 %r2, %tid, 32; min.u32 %r2, %r2, 34;mad.lo.u32 %r2, %r2, 4, %s;"
    )
    y = result(body + "ld.shared.b32 %r1, [%r2];", block=35)
    assert y.tolist() == [min(t ^ 32, 34) for t in range(35)]


def test_some_lanes_exit_early():
    y = np.zeros(64, np.uint32)
    run("""setp.gt.u32 %p1, %tid, 40; @%p1 ret; mov.u32 %r1, 0;
        LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, %tid; @%p2 bra LOOP; st.global.b32 [%y_g], %r1;""",
        block=64, y=y)  # fmt: skip
    assert (y == np.where(LANES > 40, 0, np.maximum(LANES, 1))).all()


def test_whole_warps_exit_early():
    y = np.zeros(96, np.uint32)
    run("setp.ge.u32 %p1, %tid, 32; @%p1 exit; mov.u32 %r1, 9; st.global.b32 [%y_g], %r1;", block=96, y=y)
    assert (y == np.where(np.arange(96) < 32, 9, 0)).all()


@pytest.mark.parametrize(
    "operation, words",
    [("bar.sync 0", "converge"), ("shfl.sync.idx.b32 %r2, %tid, 0, 31, -1", "all 32 lanes"),
     ("redux.sync.add.u32 %r2, %tid, -1", "all 32 lanes"), ("bar.warp.sync -1", "diverged")],
)  # fmt: skip
def test_aligned_operations_under_divergence_raise(operation, words):
    body = f"setp.lt.u32 %p1, %tid, 7; @%p1 bra SIDE; bra JOIN;\nSIDE: {operation}; // HERE\nJOIN: mov.u32 %r1, 0;"
    fails(Hazard, body, words, "CTA (0, 0, 0), warp 0")


# -- registers across blocks -------------------------------------------------------------------------------------------
def test_registers_swap_around_a_loop():
    """Moves only rename inside a block; at its end both must land, each from the other's old value."""
    body = """mov.u32 %r1, %tid; mov.u32 %r2, 500; mov.u32 %r3, 0;
    LOOP: mov.u32 %r4, %r1; mov.u32 %r1, %r2; mov.u32 %r2, %r4; add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 3;
    @%p1 bra LOOP;
    mad.lo.u32 %r1, %r1, 1000, %r2;"""
    assert (result(body) == 500_000 + LANES).all()


def test_three_registers_rotate_around_a_divergent_loop():
    body = """mov.u32 %r1, 1; mov.u32 %r2, 2; mov.u32 %r3, 3; mov.u32 %r5, 0;
    LOOP: setp.ge.u32 %p1, %r5, %tid; @%p1 bra DONE; mov.u32 %r4, %r1; mov.u32 %r1, %r2; mov.u32 %r2, %r3;
    mov.u32 %r3, %r4;
    add.u32 %r5, %r5, 1; bra LOOP; DONE: mad.lo.u32 %r1, %r1, 10, %r2; mad.lo.u32 %r1, %r1, 10, %r3;"""
    assert result(body).tolist() == [[123, 231, 312][t % 3] for t in range(64)]


def test_pairs_of_halves_cross_blocks_under_guards():
    body = """mov.b64 %d1, {%tid, 7}; setp.gt.u32 %p1, %tid, 20; bra.uni A;
    A: mov.b64 {%r2, %r3}, %d1; @%p1 mov.b64 %d1, {%r3, %r2}; bra.uni B; B: add.u64 %d1, %d1, 1;"""
    assert result(body, dtype=np.uint64).tolist() == [
        (t << 32 | 7) + 1 if t > 20 else (7 << 32 | t) + 1 for t in range(64)
    ]


def test_halves_of_16_bits():
    body = """cvt.u16.u32 %h1, %tid; add.u16 %h2, %h1, 300; mov.b32 %r1, {%h2, %h1}; bra.uni A;
    A: mov.b32 {%h3, %h4}, %r1; mov.b32 %r1, {%h4, %h3};"""
    assert (result(body) == (LANES + 300 << 16 | LANES)).all()


def test_predicates_cross_blocks():
    body = """setp.lt.u32 %p1, %tid, 9; not.pred %p2, %p1; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2;
    mov.pred %p5, %p1;
    bra.uni A; A: selp.u32 %r1, 1, 0, %p1; @%p2 add.u32 %r1, %r1, 2; @%p3 add.u32 %r1, %r1, 4; @%p4 add.u32 %r1, %r1, 8;
    @!%p5 add.u32 %r1, %r1, 16;"""
    assert (result(body) == np.where(LANES < 9, 1, 2 + 16) + 8).all()


@pytest.mark.parametrize(
    "literal, bits",
    [("-1", 2**32 - 1), ("0x80000000", 2**31), ("0f3F800000", 0x3F800000), ("1.5", 0x3FC00000), ("077", 63),
     ("4294967295", 2**32 - 1), ("123U", 123), ("-2147483648", 2**31), ("0b101", 5)],
)  # fmt: skip
def test_immediates(literal, bits):
    kind = "f32" if "." in literal or "f" in literal[:2] else "b32"
    assert (result(f"mov.{kind} %r1, {literal};") == bits).all()


@pytest.mark.parametrize(
    "literal, bits", [("-1", 2**64 - 1), ("0d3FF0000000000000", 0x3FF << 52), ("0x8000000000000001", 2**63 + 1)]
)
def test_wide_immediates(literal, bits):
    kind = "f64" if "d" in literal else "b64"
    assert (result(f"mov.{kind} %d1, {literal};", dtype=np.uint64) == np.uint64(bits)).all()


def test_special_registers_of_blocks_and_grids_with_three_extents():
    block, grid = (4, 3, 5), (2, 3, 2)
    y = np.zeros((grid[2], grid[1], grid[0], *block[::-1], 8), np.uint32)
    specials = ["tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ctaid.z", "laneid", "warpid"]
    moves = "".join(f"mov.u32 %r{i}, %{s}; st.global.b32 [%d1+{4 * i}], %r{i};" for i, s in enumerate(specials, 10))
    run(
        f"""mov.u32 %r1, %tid.z; mov.u32 %r2, %tid.y; mad.lo.u32 %r1, %r1, 3, %r2; mad.lo.u32 %r1, %r1, 4, %tid;
        mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.y; mad.lo.u32 %r2, %r2, %r4, %r3;
        mov.u32 %r4, %nctaid.x; mad.lo.u32 %r2, %r2, %r4, %cta; mad.lo.u32 %r1, %r2, 60, %r1;
        mad.wide.u32 %d1, %r1, 32, %y;
        sub.u64 %d1, %d1, 40; {moves}""",
        block=block,
        grid=grid,
        y=y,
    )
    for cz, cy, cx, tz, ty, tx in np.ndindex(*y.shape[:-1]):
        linear = (tz * 3 + ty) * 4 + tx
        assert y[cz, cy, cx, tz, ty, tx].tolist() == [tx, ty, tz, cx, cy, cz, linear % 32, linear // 32]


# -- registers read before they are written ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "use",
    ["add.u32 %r2, %r1, 1", "st.global.b32 [%y_g], %r1", "cvt.u64.u32 %d1, %r1", "setp.eq.u32 %p2, %r1, 0",
     "st.shared.b32 [%r1], %tid", "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1", "selp.u32 %r2, %r1, 0, %p1"],
)  # fmt: skip
def test_reading_a_register_that_was_never_written(use):
    body = f"setp.eq.u32 %p1, %tid, %tid;\n{use}; // HERE\n"
    fails(
        Hazard,
        body,
        "reads register %r1, which was never written",
        "CTA (0, 0, 0), warp 0, lane 0",
        y=np.zeros(32, np.uint32),
    )


def test_a_move_carries_poison_to_its_first_use():
    fails(
        Hazard,
        "mov.u32 %r2, %r1; mov.b64 %d1, {%tid, %r2}; mov.b64 {%r4, %r5}, %d1;\nadd.u32 %r6, %r5, 1; // HERE\n",
        "%r5",
    )
    run("mov.u32 %r2, %r1; mov.b64 %d1, {%tid, %r2}; mov.b64 {%r4, %r5}, %d1; add.u32 %r6, %r4, 1;")


def test_guarded_use_of_a_guarded_definition():
    y = np.zeros(32, np.uint32)
    run(
        "setp.lt.u32 %p1, %tid, 11; @%p1 mov.u32 %r1, 4; @%p1 add.u32 %r2, %r1, 1; @%p1 st.global.b32 [%y_g], %r2;", y=y
    )
    assert (y == np.where(np.arange(32) < 11, 5, 0)).all()


def test_an_unwritten_guard():
    fails(Hazard, "@%p9 mov.u32 %r1, 0; // HERE\n", "reads register %p9")


def test_an_unwritten_branch_condition():
    fails(Hazard, "@!%p9 bra END; // HERE\nmov.u32 %r1, 0; END:", "reads register %p9")


GUARDED = "a guarded write counts as a full definition (flow.solve_liveness, translate._find_checked)"


def test_a_register_written_in_some_lanes_only():
    start = "setp.lt.u32 %p1, %tid, 11; @%p1 mov.u32 %r1, 4;"
    y = np.zeros(32, np.uint32)
    run(start + "@%p1 bra USE; mov.u32 %r1, 5; USE: st.global.b32 [%y_g], %r1;", y=y)
    assert (y == np.where(np.arange(32) < 11, 4, 5)).all()
    fails(Hazard, start + "\nadd.u32 %r2, %r1, 1; // HERE\n", "reads register %r1", "lane 11")


def test_a_register_written_on_one_path_only():
    body = (
        "setp.lt.u32 %p1, %tid, {n}; @%p1 bra SIDE; bra JOIN; SIDE: mov.u32 %r1, 4;\nJOIN: add.u32 %r2, %r1, 1;"
        "// HERE\n"
    )
    run(body.format(n=32))
    fails(Hazard, body.format(n=17), "reads register %r1", "lane 17")
    fails(Hazard, body.format(n=0), "reads register %r1", "lane 0")


def test_a_loop_carried_register_without_a_first_value():
    body = (
        "mov.u32 %r2, 0; LOOP: add.u32 %r2, %r2, 1;\nadd.u32 %r1, %r1, 1; // HERE\nsetp.lt.u32 %p1, %r2, 4;"
        "@%p1 bra LOOP;"
    )
    fails(Hazard, body, "reads register %r1")


def test_a_wide_register_written_in_one_branch():
    body = "setp.eq.u32 %p1, %cta, 0; @%p1 mov.b64 %d1, {%tid, %tid};\nadd.u64 %d2, %d1, 1; // HERE\n"
    run(body)
    fails(Hazard, body, "reads register %d1", "CTA (1, 0, 0)", grid=2)


def test_a_half_that_the_compiler_left_empty():
    """A register that nothing writes fills the unused half of a pack; what is used of it is known."""
    body = "cvt.u16.u32 %h0, %tid; mov.b32 %r1, {%h0, %h1};\n"
    y = np.zeros(32, np.uint8)
    run(body + "st.global.b8 [%y_g], %r1;", y=y)
    assert (y == np.arange(32)).all()
    fails(Hazard, "mov.b32 %r1, {%h0, %h1};\nadd.u32 %r2, %r1, 1; // HERE\n", "reads register %r1")
    fails(Hazard, body + "cvt.u32.u16 %r2, %h1; // HERE\n", "reads register %h1")


# -- what cannot be translated -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "statement",
    ["frobnicate.b32 %r1, %r2", "add.sat.u32 %r1, %tid, 1", "mov.b256 %r1, %r2", "wgmma.fence.sync",
     "cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%s], [%d1, {%r1, %r2}], [%s]",
     "tcgen05.ld.sync.aligned.16x64b.x3.b32 {%r1}, [%r2]",
     "mbarrier.arrive.noComplete.shared::cluster.b64 %d1, [%s], 1"],
)  # fmt: skip
def test_an_unknown_opcode_or_modifier_names_its_line(statement):
    fails(UnsupportedInstruction, f"mov.u32 %r2, 1;\n{statement}; // HERE\n", repr(statement.split()[0]))


@pytest.mark.parametrize(
    "statement",
    ["add.u32 %r1, %tid", "add.u32 %r1, %tid, 1, 2", "st.shared.b32 [%s]", "mov.u32 %r1, %pm0",
     "add.u32 %r1, %tid, %d1", "mov.u32 %r1, nowhere", "st.shared.b32 %s, %tid", "add.u32 %h1, %tid, 1",
     "lop3.b32 %r1, %tid, %tid, %tid, %r2"],
)  # fmt: skip
def test_operands_that_do_not_fit_name_their_line(statement):
    start = "mov.b64 %d1, 0; mov.b16 %h1, 0; mov.u32 %r2, 0;"
    fails(UnsupportedInstruction, f"{start}\n{statement}; // HERE\n")


def test_a_register_that_is_too_narrow_names_its_line():
    fails(UnsupportedInstruction, "mov.b16 %h1, 0;\nadd.u32 %r1, %tid, %h1; // HERE\n")


START = "mov.b64 %d1, 0; st.shared.v4.b32 [%s16], {%tid, %tid, %tid, %tid};"


@pytest.mark.parametrize(
    "statement",
    ["ld.shared.v2.b32 {%r1}, [%s]", "ld.shared.v2.b32 {%r1, %r2, %r3}, [%s]", "ld.shared.v2.b32 %r1, [%s]",
     "ld.shared.b32 {%r1, %r2}, [%s]", "st.shared.v4.b32 [%s16], {%tid, %tid}", "st.shared.b32 [%s4], {%tid, %tid}",
     "st.shared.v2.b32 [%s16], {%tid, %tid, %tid, %tid}", "add.u32 %r1, {%tid, %tid}, 1", "add.u32 %r1, [%s], 1",
     "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r1, %r2}, [%r3]", "add.u32 %r1, %tid, 1.5", "add.f32 %r1, %tid, 1",
     "ld.param.b64 %d2, [value]", "ld.param.b32 %r1, [value+4]"],
)  # fmt: skip
def test_operands_of_the_wrong_form_name_their_line(statement):
    fails(UnsupportedInstruction, f"{START}\n{statement}; // HERE\n", smem=2048, value=1)
