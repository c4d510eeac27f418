"""emulator/ops/memory: loads and stores of every width, and everything that must raise."""

import numpy as np
import pytest
from ptx_kernels import aligned, fails, ptx, run

from generator.emulator import Gpu, Hazard
from generator.emulator.ops.memory import WIDTHS

REGISTER = {1: "h", 2: "h", 4: "r", 8: "d"}
SHAPES = [(t, w, v) for t, w in WIDTHS.items() for v in (1, 2, 4) if w * v <= 16 and w < 16]


@pytest.mark.parametrize("kind, width, count", SHAPES, ids=[f"v{v}.{t}" for t, _, v in SHAPES])
def test_every_width_and_vector_goes_through_shared_and_global_memory(kind, width, count):
    size, vector = width * count, f".v{count}" if count > 1 else ""
    x = aligned(64 * size, np.uint8, np.random.default_rng(size).integers(0, 256, 64 * size))
    y = aligned(64 * size, np.uint8)
    regs = ", ".join(f"%{REGISTER[width]}{i}" for i in range(10, 10 + count))
    regs = f"{{{regs}}}" if count > 1 else regs
    run(
        f"""mad.wide.u32 %d1, %tid, {size}, %x; mad.wide.u32 %d2, %tid, {size}, %y;
        mad.lo.u32 %r1, %tid, {size}, %s; xor.b32 %r2, %tid, 33; mad.lo.u32 %r2, %r2, {size}, %s;
        ld.global{vector}.{kind} {regs}, [%d1]; st.shared{vector}.{kind} [%r1+64], {regs}; bar.sync 0;
        ld.shared{vector}.{kind} {regs}, [%r2+64]; st.global{vector}.{kind} [%d2], {regs};""",
        block=64,
        smem=64 * size + 64,
        x=x,
        y=y,
    )
    assert (y.reshape(64, size) == x.reshape(64, size)[np.arange(64) ^ 33]).all()


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("kind", ["s8", "u8", "b8", "s16", "u16", "b16", "s32", "u32"])
def test_a_narrow_load_extends_by_its_type(space, kind):
    """ISA 9.4.1: into a wider register a signed type is sign-extended, any other zero-extended."""
    width = int(kind[1:]) // 8
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width}")
    x = aligned(32, dtype, np.random.default_rng(1).integers(0, 256, 32 * width, np.uint8).view(dtype))
    y, z = np.zeros(32, np.uint32), np.zeros(32, np.uint64)
    short = "%h1" if width < 4 else "%r9"
    address = "[%r1]" if space == "shared" else "[%x_g]"
    run(
        f"""mad.lo.u32 %r1, %tid, {width}, %s; ld.global.{kind} {short}, [%x_g]; st.shared.{kind} [%r1], {short};
        ld.{space}.{kind} %r2, {address}; ld.{space}.{kind} %d1, {address};
        st.global.b32 [%y_g], %r2; st.global.b64 [%z_g], %d1;""",
        x=x,
        y=y,
        z=z,
    )
    assert (y.view(np.int32) == x.astype(np.int64).astype(np.int32)).all()
    assert (z.view(np.int64) == x.astype(np.int64)).all()


def test_a_narrow_store_takes_the_low_bits_of_a_wider_register():
    y = np.zeros(32, np.uint8)
    run("add.u32 %r1, %tid, 0x1200; st.global.b8 [%y_g], %r1;", y=y)
    assert (y == np.arange(32)).all()


def test_guarded_stores_write_only_where_the_guard_holds():
    y, z = np.full(64, 7, np.uint32), np.full(64, 7, np.uint32)
    run(
        """st.shared.b32 [%s4], %tid; and.b32 %r1, %tid, 3; setp.eq.u32 %p1, %r1, 1; mov.u32 %r2, 99;
        @%p1 st.shared.b32 [%s4], %r2; ld.shared.b32 %r3, [%s4]; st.global.b32 [%z_g], %r3;
        @!%p1 st.global.b32 [%y_g], %tid; setp.gt.u32 %p2, %tid, 1000; @%p2 st.global.b32 [%y_g+4096], %tid;""",
        block=64,
        y=y,
        z=z,
    )
    lanes = np.arange(64)
    assert (y == np.where(lanes % 4 == 1, 7, lanes)).all()
    assert (z == np.where(lanes % 4 == 1, 99, lanes)).all()


def test_guarded_loads_keep_the_old_value():
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run(
        "mov.u32 %r1, 5; setp.lt.u32 %p1, %tid, 9; @%p1 ld.global.b32 %r1, [%x_g]; st.global.b32 [%y_g], %r1;", x=x, y=y
    )
    assert (y == np.where(np.arange(32) < 9, np.arange(32), 5)).all()


def test_a_store_of_bytes_leaves_their_neighbours():
    y = np.zeros(32, np.uint32)
    run(
        """mov.u32 %r1, 0x11223344; st.shared.b32 [%s4], %r1; mov.b16 %h1, 0xAB; st.shared.b8 [%s4+2], %h1;
        ld.shared.b32 %r2, [%s4]; st.global.b32 [%y_g], %r2;""",
        y=y,
    )
    assert (y == 0x11AB3344).all()


def test_static_shared_variables_have_their_places():
    y = np.zeros(32, np.uint32)
    run(
        """mov.u32 %r1, a; mov.u32 %r2, b; sub.u32 %r3, %r2, %r1;
        mad.lo.u32 %r4, %tid, 4, %r2; st.shared.b32 [%r4], %tid;
        mov.u32 %r5, 3; st.shared.b32 [a+4], %r5; ld.shared.b32 %r6, [%r4]; ld.shared.b32 %r7, [a+4];
        mad.lo.u32 %r6, %r7, 1000, %r6; mad.lo.u32 %r6, %r3, 1000000, %r6; st.global.b32 [%y_g], %r6;""",
        declare=".shared .align 4 .b8 a[12]; .shared .align 16 .b32 b[32];",
        y=y,
    )
    assert (y == 16_003_000 + np.arange(32)).all()


@pytest.mark.parametrize(
    "access, nbytes",
    [("ld.shared.b32 %r1, [%s+2]", 4), ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%s+8]", 16),
     ("ld.shared.b64 %d1, [%s+4]", 8),
     ("st.shared.b32 [%s+1], %tid", 4), ("st.shared.v2.b64 [%s+8], {%d1, %d1}", 16), ("st.shared.b16 [%s+3], %h1", 2)],
)  # fmt: skip
def test_misaligned_shared_access(access, nbytes):
    body = f"mov.b64 %d1, 0; mov.b16 %h1, 0; st.shared.b32 [%s4], %tid;\n{access}; // HERE\n"
    fails(
        Hazard, body, f"access of {nbytes} bytes is misaligned", "CTA (0, 0, 0), warp 0, lane 0", f"alignment {nbytes}"
    )


@pytest.mark.parametrize("address, offset", [("[%s+1024]", 1024), ("[%s-4]", -4), ("[%s+4096]", 4096), ("[0]", -1024)])
@pytest.mark.parametrize("access", ["st.shared.b32 {}, %tid", "ld.shared.b32 %r1, {}"])
def test_out_of_bounds_shared_access(access, address, offset):
    fails(Hazard, f"{access.format(address)}; // HERE\n", "is out of bounds", f"offset {offset}", "1024 bytes")


def test_the_message_names_the_first_bad_warp_and_lane():
    body = "st.shared.b32 [%s4], %tid; // HERE\n"
    fails(Hazard, body, "CTA (0, 0, 0), warp 1, lane 8, address 0x4a0", block=64, grid=3, smem=160)
    body = "setp.eq.u32 %p1, %cta, 2;\n@%p1 st.shared.b32 [%s4], %tid; // HERE\n"
    fails(Hazard, body, "CTA (2, 0, 0), warp 1, lane 8, address 0x4a0", block=64, grid=3, smem=160)


def test_reading_shared_memory_that_was_never_written():
    fails(Hazard, "ld.shared.b32 %r1, [%s4]; // HERE\n", "never written", "lane 0, address 0x400")
    body = "setp.ne.u32 %p1, %tid, 21; @%p1 st.shared.b32 [%s4], %tid;\nld.shared.b32 %r1, [%s4]; // HERE\n"
    fails(Hazard, body, "never written", "lane 21, address 0x454")


def test_a_word_written_in_part_may_not_be_read():
    body = "mov.b16 %h1, 1; st.shared.b16 [%s4], %h1;\nld.shared.b32 %r1, [%s4]; // HERE\n"
    fails(Hazard, body, "never written", "lane 0")


def test_shared_memory_is_fresh_in_every_cta():
    body = "setp.eq.u32 %p1, %cta, 0; @%p1 st.shared.b32 [%s4], %tid;\nld.shared.b32 %r1, [%s4]; // HERE\n"
    fails(Hazard, body, "CTA (1, 0, 0)", "never written", grid=2)


@pytest.mark.parametrize(
    "access", ["st.shared.b32 [%s+20], %tid", "st.shared.b64 [%s+16], %d1", "ld.shared.b32 %r1, [%s+16]"]
)
def test_the_bytes_of_an_mbarrier_belong_to_it(access):
    body = f"mov.b64 %d1, 0; setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+16], 1;\n{access}; // HERE\n"
    fails(Hazard, body, "it holds an mbarrier")


def test_after_inval_the_bytes_are_free_and_poison():
    start = "setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 1; @%p1 mbarrier.inval.shared.b64 [%s];"
    y = np.zeros(32, np.uint32)
    run(f"{start} @%p1 st.shared.b32 [%s], %tid; ld.shared.b32 %r1, [%s]; st.global.b32 [%y_g], %r1;", y=y)
    fails(Hazard, f"{start}\nld.shared.b32 %r1, [%s]; // HERE\n", "never written")


def test_global_out_of_bounds_names_the_nearest_array():
    y = np.zeros(40, np.uint32)
    above = "the nearest array below is 'y', 160 bytes, which ends +0 bytes before it"
    fails(Hazard, "add.u32 %r1, %tid, 9; mad.wide.u32 %d1, %r1, 4, %y;\nst.global.b32 [%d1], %tid; // HERE\n",
          "out of bounds", above, "lane 31", hex(y.ctypes.data + 160), y=y)  # fmt: skip
    low, high = y.ctypes.data - 4, y.ctypes.data
    fails(Hazard, "ld.global.b32 %r1, [%y-4]; // HERE\n", f"[{low:#x}, {high:#x}) is out of bounds", y=y)


def test_global_vector_that_ends_past_the_array():
    y = aligned(18, np.uint32, align=256)
    body = "mov.u32 %r1, 0;\n@!%p1 st.global.v4.b32 [%y+64], {%r1, %r1, %r1, %r1}; // HERE\n"
    fails(Hazard, "setp.ne.u32 %p1, %tid, 0; " + body, "out of bounds", "'y', 72 bytes", y=y)


def test_global_address_between_two_arrays_and_null():
    raw = aligned(4096, np.uint8)
    fails(Hazard, "st.global.b32 [%d1], %tid; // HERE\n".replace("%d1", "%a+1024"), "nearest array below is 'a'",
          a=raw[:1024], b=raw[2048:])  # fmt: skip
    fails(Hazard, "mov.b64 %d1, 0;\nld.global.b32 %r1, [%d1]; // HERE\n", "[0x0, 0x4) is out of bounds", y=raw)


@pytest.mark.parametrize(
    "access, multiple",
    [("ld.global.b32 %r1, [%y+2]", 4), ("st.global.v2.b32 [%y+4], {%tid, %tid}", 8),
     ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%y+8]", 16)],
)  # fmt: skip
def test_misaligned_global_access(access, multiple):
    y = aligned(64, np.uint32)
    fails(Hazard, f"{access}; // HERE\n", f"misaligned: it must be a multiple of {multiple}", "lane 0", y=y)


def test_misaligned_in_one_lane_only():
    y = aligned(256, np.uint8)
    body = "setp.eq.u32 %p1, %tid, 13; selp.u32 %r1, 2, 0, %p1; cvt.u64.u32 %d1, %r1; add.u64 %d1, %d1, %y;"
    fails(Hazard, body + "\nld.global.b32 %r1, [%d1]; // HERE\n", "misaligned", "lane 13", y=y)


@pytest.mark.parametrize("kind, expected", [("b8", 0x83), ("u16", 0x8283), ("b32", 0x80818283), ("f32", 0x80818283)])
def test_parameters_of_every_size(kind, expected):
    y = np.zeros(32, np.uint32)
    run(f"ld.param.{kind} %r1, [value]; st.global.b32 [%y_g], %r1;", y=y, value=0x80818283)
    assert (y == expected).all()


def test_parameter_vectors_offsets_and_signs():
    y = np.zeros((32, 4), np.uint32)
    run(
        """ld.param.v4.b8 {%r1, %r2, %r3, %r4}, [map+4]; ld.param.s8 %r5, [map+6]; add.u32 %r4, %r4, %r5;
        mad.wide.u32 %d1, %tid, 16, %y; st.global.v2.b32 [%d1], {%r1, %r2}; st.global.v2.b32 [%d1+8], {%r3, %r4};""",
        y=y,
        map=bytes([0, 1, 2, 3, 4, 5, 0xFE, 7] * 16),
    )
    assert (y == [4, 5, 0xFE, 5]).all()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_output_may_not_be_read_before_it_is_written(width):
    array = np.zeros(32, f"u{width}")
    reg, kind = {1: "%h1", 2: "%h1", 4: "%r1", 8: "%d1"}[width], f"b{8 * width}"
    zero = {1: "mov.b16 %h1, 0;", 2: "mov.b16 %h1, 0;", 4: "mov.b32 %r1, 0;", 8: "mov.b64 %d1, 0;"}[width]
    load, store = f"ld.global.{kind} {reg}, [%y_g];", f"{zero} st.global.{kind} [%y_g], {reg};"
    for body, legal in ((load, False), (store + load, True)):
        gpu = Gpu("sm_100a")
        gpu.add_array(array, "y", initialized=False)
        module = gpu.load_ptx(ptx(body, y=array))
        arguments = (module, "k", (1, 1, 1), (32, 1, 1), (1, 1, 1), 0, [array.ctypes.data.to_bytes(8, "little")])
        if legal:
            gpu.launch(*arguments)
        else:
            with pytest.raises(Hazard, match=r"ld\.global.* lane 0.*never written"):
                gpu.launch(*arguments)
