"""Module variables, calls, printf and assert from kernels, branches through tables, 128-bit registers."""

import numpy as np
import pytest
from ptx_kernels import aligned, fails, launch, ptx, run

from generator.emulator import Gpu, Hazard, PtxSyntaxError, UnsupportedInstruction
from generator.emulator.parse import parse_ptx


def with_outside(outside: str, body: str, declare: str = "", **arguments) -> str:
    """A module with the kernel `k` around `body` and something before it."""
    head, entry = ptx(body, declare, **arguments).split(".visible .entry", 1)
    return f"{head}{outside}\n.visible .entry{entry}"


def execute(outside, body, **arguments):
    return launch(with_outside(outside, body, **arguments), arguments)


def raises(error, outside, body, *parts, **arguments):
    with pytest.raises(error) as caught:
        execute(outside, body, **arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# -- variables ---------------------------------------------------------------------------------------------------------
VARIABLES = """.global .align 4 .b8 bytes[7] = {1, 2, 0x83, 255};
.visible .global .align 8 .u64 table[3] = {bytes, bytes+2, generic(word)};
.const .align 4 .f32 weights[4] = {0f3F800000, 2.5, 0fC0400000};
.global .s32 word = -5;
.global .align 8 .b8 parts[4] = {0xFF(word), 0xFF00(word), 0xFF0000(word), 0xFF000000(word)};
.const .align 8 .u64 where[1] = {weights};
.global .align 4 .u32 grid[2][2] = {{1, 2}, {3, 4}};"""


def test_initial_values():
    y, f, z = np.zeros(32, np.uint32), np.zeros(32, np.float32), np.zeros(32, np.uint64)
    body = """mov.b64 %d1, bytes; cvta.global.u64 %d1, %d1; min.u32 %r1, %tid, 6; cvt.u64.u32 %d2, %r1;
    add.u64 %d2, %d1, %d2; ld.u8 %r2, [%d2]; st.global.b32 [%y_g], %r2;
    mov.b64 %d3, weights; and.b32 %r3, %tid, 3; mad.wide.u32 %d3, %r3, 4, %d3; ld.const.f32 %r4, [%d3];
    st.global.b32 [%f_g], %r4; ld.const.f32 %r4, [weights+8]; setp.gt.u32 %p1, %tid, 15; @%p1 st.global.b32 [%f_g], %r4;
    mov.b64 %d4, table; min.u32 %r5, %tid, 2; mad.wide.u32 %d4, %r5, 8, %d4; ld.global.u64 %d5, [%d4];
    sub.u64 %d6, %d5, %d1; st.global.b64 [%z_g], %d6; setp.eq.u32 %p2, %tid, 2; @%p2 ld.global.s32 %d7, [%d5];
    @%p2 st.global.b64 [%z_g], %d7; setp.eq.u32 %p3, %tid, 3; ld.global.u32 %d8, [grid+8];
    @%p3 st.global.b64 [%z_g], %d8;"""
    execute(VARIABLES, body, y=y, f=f, z=z)
    assert y[:8].tolist() == [1, 2, 0x83, 255, 0, 0, 0, 0]
    assert f[:4].tolist() == [1, 2.5, -3, 0] and (f[16:] == -3).all()
    assert z[:4].view(np.int64).tolist() == [0, 2, -5, 3]


def test_a_variable_lives_as_long_as_its_gpu():
    text = with_outside(
        ".global .u32 counter;",
        "atom.global.add.u32 %r1, [counter], 1; st.global.b32 [%y_g], %r1;",
        y=np.zeros(1, np.uint32),
    )
    y = np.zeros(32, np.uint32)
    gpu = Gpu()
    gpu.add_array(y, "y")
    for _ in range(2):
        gpu.launch(gpu.load_ptx(text), "k", (1, 1, 1), (32, 1, 1), params=[int(y.ctypes.data).to_bytes(8, "little")])
    assert (y == np.arange(32, 64)).all()


def test_parts_of_an_address():
    y = np.zeros(32, np.uint32)
    execute(
        VARIABLES,
        """mov.b64 %d1, word; cvt.u32.u64 %r1, %d1; ld.global.b32 %r2, [parts]; sub.u32 %r1, %r1, %r2;
        st.global.b32 [%y_g], %r1;""",
        y=y,
    )
    assert not y.any()


@pytest.mark.parametrize("text, part", [
    (".global .u32 x[2] = {1, 2, 3};", "3 values for x, which has 2"),
    (".global .u32 x = nowhere;", "nowhere in the initial value of x"),
    (".global .f16x3 x;", "cannot read"),
    (".extern .global .u32 x;", "modules are not linked"),
    (".global .align 4 .u32 x[2] = {1,", "cut off"),
    (".something else;", "cannot read"),
])  # fmt: skip
def test_a_bad_variable(text, part):
    raises(PtxSyntaxError, text, "ret;", part)


def test_a_variable_has_bounds():
    raises(
        Hazard, ".global .u32 x[2];", "mov.b64 %d1, x; st.global.b32 [%d1+8], %tid;", "out of bounds", "'variable x'"
    )


def test_spaces_of_generic_addresses():
    y = np.zeros((8, 32), np.uint32)
    spaces = ("global", "const", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry")
    ask = "".join(
        f"isspacep.{space} %p1, %d9; selp.u32 %r1, 1, 0, %p1; st.global.b32 [%y_g+{128 * i}], %r1;"
        for i, space in enumerate(spaces)
    )
    body = f"""cvt.u64.u32 %d1, %s; mov.b64 %d2, c; mov.b64 %d3, mine; cvta.local.u64 %d3, %d3; mov.b64 %d4, y;
    cvta.param.u64 %d4, %d4;
    mov.b64 %d9, %y; setp.eq.u32 %p2, %tid, 1; selp.b64 %d9, %d2, %d9, %p2; setp.eq.u32 %p2, %tid, 2;
    selp.b64 %d9, %d1, %d9, %p2;
    setp.eq.u32 %p2, %tid, 3; selp.b64 %d9, %d3, %d9, %p2; setp.eq.u32 %p2, %tid, 4;
    selp.b64 %d9, %d4, %d9, %p2; {ask}"""
    execute(".const .u32 c;", ".local .align 8 .b8 mine[8]; " + body, y=y)
    expected = np.zeros((8, 5), np.uint32)
    for thread, rows in enumerate(((0,), (1,), (2, 3, 4), (5,), (6, 7))):
        expected[list(rows), thread] = 1
    assert (y[:, :5] == expected).all()


# -- calls -------------------------------------------------------------------------------------------------------------
SQUARE = """.func (.param .b32 result) square(.param .b32 value)
{ .reg .b32 %r<4>; .reg .pred %p<2>; ld.param.b32 %r1, [value]; setp.gt.u32 %p1, %r1, 20; @%p1 bra BIG;
mul.lo.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret; BIG: mov.u32 %r3, 7; st.param.b32 [result+0], %r3; ret; }
.func (.param .align 8 .b8 both[16]) pair(.param .b32 value)
{ .reg .b32 %r<4>; ld.param.b32 %r1, [value];
{ .param .b32 arg; .param .b32 out; st.param.b32 [arg], %r1; call.uni (out), square, (arg); ld.param.b32 %r2, [out]; }
st.param.v2.b32 [both], {%r1, %r2}; add.u32 %r3, %r1, %r2; st.param.b32 [both+8], %r3; }
"""
CALL = "{{ .param .b32 arg; .param .b32 out; st.param.b32 [arg], {0}; {1} call (out), square, (arg); "
CALL += "ld.param.b32 {2}, [out]; }}"


def test_a_function_is_called_twice():
    y = np.zeros(32, np.uint32)
    body = (
        CALL.format("%tid", "", "%r1")
        + "add.u32 %r1, %r1, 1;"
        + CALL.format("%r1", "", "%r2")
        + "st.global.b32 [%y_g], %r2;"
    )
    execute(SQUARE, body, y=y)
    f = lambda x: 7 if x > 20 else x * x  # noqa: E731
    assert y.tolist() == [f(f(t) + 1) for t in range(32)]


def test_calls_nest_and_return_arrays():
    y = aligned((32, 4), np.uint32)
    body = """{ .param .b32 arg; .param .align 8 .b8 out[16]; st.param.b32 [arg], %tid; call.uni (out), pair, (arg);
    ld.param.v2.b32 {%r1, %r2}, [out]; ld.param.b32 %r3, [out+8]; } mad.wide.u32 %d1, %tid, 16, %y;
    st.global.v2.b32 [%d1], {%r1, %r2}; st.global.b32 [%d1+8], %r3;"""
    execute(SQUARE, body, y=y)
    t = np.arange(32)
    square = np.where(t > 20, 7, t * t)
    assert (y[:, 0] == t).all() and (y[:, 1] == square).all() and (y[:, 2] == t + square).all()


def test_a_call_under_a_guard():
    y = np.zeros(32, np.uint32)
    body = """setp.lt.u32 %p1, %tid, 10; mov.u32 %r9, 5; { .param .b32 arg; .param .b32 out; st.param.b32 [arg], %tid;
    st.param.b32 [out], %r9; @%p1 call (out), square, (arg); ld.param.b32 %r1, [out]; } st.global.b32 [%y_g], %r1;"""
    execute(SQUARE, body, y=y)
    assert y.tolist() == [t * t if t < 10 else 5 for t in range(32)]


@pytest.mark.parametrize("outside, call, part", [
    ("", "call nowhere;", "calls nowhere, which the module does not define"),
    (".extern .func other;", "call other;", "calls other, which the module does not define"),
    (".func loop() { call loop; ret; }", "call loop;", "loop calls itself"),
    ("", "call %d1, (), proto;", "calls through registers"),
])  # fmt: skip
def test_a_call_that_cannot_be(outside, call, part):
    raises(UnsupportedInstruction, outside, call, part, "PTX line")


# -- what the driver provides ------------------------------------------------------------------------------------------
PRINT = """.extern .func (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);
.global .align 1 .b8 name[4] = {97, 98, 99, 0};
.global .align 1 .b8 format[64] = {"""


def printing(template: str) -> str:
    return PRINT + ", ".join(str(b) for b in template.encode() + b"\0") + "};"


def test_printf_goes_to_the_standard_output_and_the_report(capsys):
    body = """.local .align 8 .b8 buffer[48]; mov.b64 %d1, buffer; cvta.local.u64 %d2, %d1;
    setp.lt.u32 %p1, %tid, 2; @!%p1 ret;
    neg.s32 %r1, %tid; st.local.v2.b32 [%d1], {%r1, %tid}; mov.b64 %d3, 0d400921FB54442D18; st.local.b64 [%d1+8], %d3;
    mov.b64 %d4, 0x123456789AB; st.local.b64 [%d1+16], %d4; mov.b64 %d5, name; st.local.b64 [%d1+24], %d5;
    { .param .b64 param0; .param .b64 param1; .param .b32 retval0; mov.b64 %d6, format; st.param.b64 [param0], %d6;
    st.param.b64 [param1], %d2; call.uni (retval0), vprintf, (param0, param1); }"""
    report = execute(printing("%d %3u|%.3f %llx %s 100%%\n"), body)
    assert report.printed == "0   0|3.142 123456789ab abc 100%\n-1   1|3.142 123456789ab abc 100%\n"
    assert capsys.readouterr().out == report.printed


def test_what_was_printed_before_an_error_is_seen(capsys):
    body = """{ .param .b64 param0; .param .b64 param1; .param .b32 retval0; mov.b64 %d6, format;
    st.param.b64 [param0], %d6;
    st.param.b64 [param1], 0; setp.eq.u32 %p1, %tid, 0; @%p1 call.uni (retval0), vprintf, (param0, param1); } trap;"""
    raises(Hazard, printing("once\n"), body, "trap")
    assert capsys.readouterr().out == "once\n"


def test_an_assertion_names_its_place_and_thread():
    outside = """.extern .func __assertfail
    (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e) .noreturn;
    .global .align 1 .b8 what[6] = {120, 32, 62, 32, 48, 0}; .global .align 1 .b8 file[5] = {97, 46, 112, 121, 0};
    .global .align 1 .b8 func[2] = {102, 0};"""
    body = """mov.u32 %r1, %tid.y; mad.lo.u32 %r1, %r1, 8, %tid; setp.lt.u32 %p1, %r1, 40; @%p1 ret;
    { .param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4;
    mov.b64 %d1, what; st.param.b64 [p0], %d1; mov.b64 %d1, file; st.param.b64 [p1], %d1; st.param.b32 [p2], 42;
    mov.b64 %d1, func; st.param.b64 [p3], %d1; st.param.b64 [p4], 1; call.uni __assertfail, (p0, p1, p2, p3, p4); }"""
    with pytest.raises(
        Hazard, match=r"CTA \(0, 0, 0\), warp 1, lane 8, thread \(0, 5, 0\): assertion failed: x > 0 \(a.py:42, f\)"
    ):
        launch(with_outside(outside, body), {}, block=(8, 8))


# -- branches through tables -------------------------------------------------------------------------------------------
SWITCH = """and.b32 %r1, %tid, 3; mov.u32 %r2, 100;
ts: .branchtargets A, B, C; {} brx.idx %r1, ts; mov.u32 %r2, 4; bra.uni DONE;
A: mov.u32 %r2, 1; bra.uni DONE; B: mov.u32 %r2, 2; bra.uni DONE; C: mov.u32 %r2, 3; DONE: st.global.b32 [%y_g], %r2;"""


def test_a_branch_through_a_table():
    y = np.zeros(32, np.uint32)
    run("setp.lt.u32 %p1, %tid, 100; and.b32 %r5, %tid, 3; setp.ne.u32 %p2, %r5, 3;" + SWITCH.format("@%p2"), y=y)
    assert (y == np.arange(32) % 4 + 1).all()
    fails(Hazard, SWITCH.format("\n").replace("ts; mov", "ts; // HERE\nmov"), "outside of its table", "lane 3", y=y)


# -- 128 bits ----------------------------------------------------------------------------------------------------------
def test_128_bit_registers():
    x = aligned((32, 2), np.uint64, np.random.default_rng(1).integers(0, 2**63, (32, 2)).astype(np.uint64))
    y, z = aligned((32, 4), np.uint32), aligned((32, 2), np.uint64)
    body = """mad.wide.u32 %d1, %tid, 16, %x; mad.wide.u32 %d2, %tid, 16, %y; mad.wide.u32 %d3, %tid, 16, %z;
    ld.global.b128 %q1, [%d1]; st.shared.b128 [%s16], %q1; ld.shared.b128 %q2, [%s16]; mov.b128 {%d4, %d5}, %q2;
    xor.b64 %d4, %d4, 1; mov.b128 %q3, {%d5, %d4}; mov.b128 {%r1, %r2, %r3, %r4}, %q3;
    st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};
    mov.b128 %q4, {%r4, %r3, %r2, %r1}; st.global.b128 [%d3], %q4;"""
    run(body, declare=".reg .b128 %q<5>;", x=x, y=y, z=z)
    words = np.stack([x[:, 1], x[:, 0] ^ np.uint64(1)], axis=1).view(np.uint32)
    assert (y == words).all() and (z.view(np.uint32) == words[:, ::-1]).all()


def test_128_bit_exchange_and_compare_and_swap():
    y, z = aligned(2, np.uint64), aligned((32, 2), np.uint64)
    y[:] = 5, 6
    body = """cvt.u64.u32 %d1, %tid; add.u64 %d2, %d1, 1; mov.b128 %q1, {%d1, %d2}; mad.wide.u32 %d3, %tid, 16, %z; {op}
    st.global.b128 [%d3], %q2;"""
    run(body.replace("{op}", "atom.global.exch.b128 %q2, [%y], %q1;"), declare=".reg .b128 %q<5>;", y=y, z=z)
    assert y.tolist() == [31, 32] and z[0].tolist() == [5, 6] and (z[1:, 0] == np.arange(31)).all()
    y[:] = 0, 1  # each lane finds what the one before it left
    swap = "add.u64 %d4, %d2, 1; mov.b128 %q3, {%d2, %d4}; atom.global.cas.b128 %q2, [%y], %q1, %q3;"
    run(body.replace("{op}", swap), declare=".reg .b128 %q<5>;", y=y, z=z)
    assert y.tolist() == [32, 33] and (z[:, 0] == np.arange(32)).all()


def test_four_16_bit_values_are_one_of_64():
    y = np.zeros(32, np.uint64)
    run(
        """cvt.u16.u32 %h1, %tid; add.u16 %h2, %h1, 1; add.u16 %h3, %h1, 2; add.u16 %h4, %h1, 3;
        mov.b64 %d1, {%h1, %h2, %h3, %h4};
        mov.b64 {%h5, %h6, %h7, %h8}, %d1; mov.b64 %d2, {%h8, %h7, %h6, %h5}; st.global.b64 [%y_g], %d2;""",
        y=y,
    )
    assert (y.view(np.uint16).reshape(32, 4) == np.arange(32)[:, None] + np.array([3, 2, 1, 0])).all()


def test_every_cut_is_told():
    """Whatever byte a module ends at, it is a syntax error or a whole module."""
    text = with_outside(
        VARIABLES + SQUARE, CALL.format("%tid", "", "%r1") + "st.global.b32 [%y_g], %r1;", y=np.zeros(1)
    )
    for cut in range(0, len(text) - 1, 3):
        try:
            module = parse_ptx(text[:cut])
        except (PtxSyntaxError, UnsupportedInstruction):
            continue
        assert not text[cut:].strip() or module.kernels, cut
