"""tcgen05.ld and .st in every shape, tcgen05.cp and .shift, against the ISA's tables element by element."""

import numpy as np
import pytest
from ptx_kernels import fails, run, with_tmem
from tcgen05_oracle import Tile, bits_of, execute, issue, scaled_instruction

from generator.emulator import Hazard, UnsupportedInstruction

WAIT = "tcgen05.wait::st.sync.aligned;"
SHAPES = {"16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1, "32x32b": 1}


def registers(n: int) -> str:
    return "{" + ", ".join(f"%v{i}" for i in range(n)) + "}"


def cell(shape: str, i: int, t: int, split: int) -> tuple[int, int]:
    """Lane and column of register i of thread t (facts/ptx.md §2.4)."""
    return {
        "16x64b": ((t >> 2) + 8 * (t & 1), (t >> 1 & 1) + 2 * i),
        "16x128b": ((t >> 2) + 8 * (i & 1), (t & 3) + 4 * (i >> 1)),
        "16x256b": ((t >> 2) + 8 * (i >> 1 & 1), 2 * (t & 3) + (i & 1) + 8 * (i >> 2)),
        "16x32bx2": (t & 15, i + (t >> 4) * split),
        "32x32b": (t, i),
    }[shape]


def cells(shape: str, count: int, half: int, split: int, packed: bool):
    """(register, thread of the block, part of the register, lane, column) of everything a warpgroup touches."""
    for i in range(count):
        for thread in range(128):
            for part in range(2 if packed else 1):
                lane, column = cell(shape, i, thread % 32, 0 if packed else split)
                if packed:
                    column = 2 * column + part + (split if shape == "16x32bx2" and thread % 32 >= 16 else 0)
                yield i, thread, part, lane + half + thread // 32 * 32, column


CASES = [(shape, repeat, half, packed) for shape in SHAPES for repeat in (1, 8) for packed in (False, True)
         for half in ((0,) if shape == "32x32b" else (0, 16))]  # fmt: skip


@pytest.mark.parametrize("shape, repeat, half, packed", CASES)
def test_load(shape, repeat, half, packed):
    count, width, split = SHAPES[shape] * repeat, 128, 13
    y = np.zeros((128, count), np.uint32)
    fill = f"""mov.u32 %r20, 0; LOOP: add.u32 %r21, %r151, %r20; mad.lo.u32 %r0, %tid, 65537, %r20;
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r21], {{%r0}}; add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, {width};
    @%p1 bra LOOP; {WAIT}"""
    name = f"tcgen05.ld.sync.aligned.{shape}.x{repeat}{'.pack::16b' * packed}.b32"
    offset = f", {split}" if shape == "16x32bx2" else ""
    out = "".join(f"st.global.b32 [%d1+{4 * i}], %v{i};" for i in range(count))
    load = f"{fill} add.u32 %r22, %r151, {half << 16}; {name} {registers(count)}, [%r22]{offset};"
    body = with_tmem(f"{load} mad.wide.u32 %d1, %tid, {4 * count}, %y; {out}")
    run(body, block=128, y=y, declare=".reg .b32 %v<128>;")
    expected = np.zeros_like(y)
    for i, thread, part, lane, column in cells(shape, count, half, split, packed):
        value = lane * 65537 + column
        expected[thread, i] |= (value & 0xFFFF) << 16 * part if packed else value
    assert (y == expected).all()


@pytest.mark.parametrize("shape, repeat, half, packed", CASES)
def test_store(shape, repeat, half, packed):
    count, width, split = SHAPES[shape] * repeat, 128, 17
    y = np.zeros((128, width), np.uint32)
    clear = "mov.u32 %r0, -1;" + "".join(
        f"add.u32 %r21, %r151, {c}; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r21], {{%r0}};" for c in range(width)
    )
    values = "".join(f"mad.lo.u32 %v{i}, %tid, 100003, {i * 65539};" for i in range(count))
    name = f"tcgen05.st.sync.aligned.{shape}.x{repeat}{'.unpack::16b' * packed}.b32"
    offset = f"{split}, " if shape == "16x32bx2" else ""
    store = f"{values} add.u32 %r22, %r151, {half << 16}; {name} [%r22], {offset}{registers(count)}; {WAIT}"
    out = "".join(
        f"add.u32 %r21, %r151, {c}; tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r0}}, [%r21];"
        f"st.global.b32 [%d1+{4 * c}], %r0;"
        for c in range(width)
    )
    body = with_tmem(f"{clear} {WAIT} {store} mad.wide.u32 %d1, %tid, {4 * width}, %y; {out}")
    run(body, block=128, y=y, declare=".reg .b32 %v<128>;")
    expected = np.full_like(y, 0xFFFFFFFF)
    for i, thread, part, lane, column in cells(shape, count, half, split, packed):
        value = thread * 100003 + i * 65539
        expected[lane, column] = value >> 16 * part & 0xFFFF if packed else value
    assert (y == expected).all()


def store_16(shape: str, lane: int, column: int, tail: str = "") -> str:
    n = SHAPES[shape]
    vector = "{" + ", ".join(["%tid"] * n) + "}"
    move = f"add.u32 %r22, %r151, {(lane << 16) + column};\n"
    return f"{move}tcgen05.st.sync.aligned.{shape}.x1.b32 [%r22], {vector};{tail}\n"


def load_16(shape: str, lane: int, column: int, tail: str = "") -> str:
    vector = registers(SHAPES[shape])
    move = f"add.u32 %r22, %r151, {(lane << 16) + column};\n"
    return f"{move}tcgen05.ld.sync.aligned.{shape}.x1.b32 {vector}, [%r22];{tail}\n"


def wrong(body: str, *words: str, columns: int = 512) -> None:
    fails(Hazard, with_tmem(body, columns), *words, block=128, declare=".reg .b32 %v<128>;")


def test_sixteen_lanes_are_known_by_themselves():
    both = store_16("16x64b", 0, 4) + WAIT
    wrong(both + load_16("16x64b", 16, 4, " // HERE"), "reads TMEM column 4", "never written")
    wrong(both + load_16("32x32b", 0, 4, " // HERE"), "reads TMEM column 4", "never written")
    wrong(store_16("16x64b", 0, 4) + load_16("16x64b", 0, 4, " // HERE"), "tcgen05.wait::st")
    run(with_tmem(both + load_16("16x128b", 0, 4).replace("16x128b", "16x64b").replace("%v0, %v1", "%v0")),
        block=128, declare=".reg .b32 %v<128>;")  # fmt: skip


def test_lanes_and_columns_of_the_narrow_shapes():
    wrong(store_16("16x128b", 8, 0, " // HERE"), "addresses TMEM lane 8", "may touch only 16 lanes of 0 to 31")
    wrong(store_16("16x128b", 32, 0, " // HERE"), "addresses TMEM lane 32")
    wrong(store_16("16x256b", 0, 508, " // HERE"), "TMEM columns 508 to 515 are out of bounds (512 columns)")
    wrong(store_16("16x256b", 0, 60, " // HERE"), "TMEM column 64 is not allocated", columns=64)
    bad = store_16("16x32bx2", 0, 0, " // HERE").replace("[%r22], ", "[%r22], 64, ")
    wrong(bad, "TMEM column 64 is not allocated", columns=64)


def test_reductions_are_for_later_architectures():
    body = with_tmem("tcgen05.ld.red.sync.aligned.32x32b.x2.min.f32 {%r1, %r2}, %r3, [%r151];\n")
    fails(UnsupportedInstruction, body, "tcgen05.ld.red.sync.aligned.32x32b.x2.min.f32")


# -- tcgen05.cp --------------------------------------------------------------------------------------------------------
DESTINATIONS = {  # lanes of source row r, and words of it (facts/ptx.md §2.5)
    "128x256b": (128, 8, lambda r: [r]),
    "128x128b": (128, 4, lambda r: [r]),
    "4x256b": (4, 8, lambda r: [32 * r + 5]),
    "64x128b.warpx2::02_13": (64, 4, lambda r: [r, r + 64]),
    "64x128b.warpx2::01_23": (64, 4, lambda r: [r + 32 * (r // 32), r + 32 * (r // 32) + 32]),
    "32x128b.warpx4": (32, 4, lambda r: [r, r + 32, r + 64, r + 96]),
}


def copy(shape: str, descriptor: int, column: int, group: int = 1, lane: int = 0) -> str:
    return f"""mov.b64 %d1, {descriptor:#x}; add.u32 %r147, %r150, {(lane << 16) + column};
    tcgen05.cp.cta_group::{group}.{shape} [%r147], %d1; // HERE\n"""


def noise(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("swizzle", [0, 1, 3])
@pytest.mark.parametrize("shape", DESTINATIONS)
def test_copy(shape, swizzle, group):
    rows, words, lanes = DESTINATIONS[shape]
    data = [np.random.default_rng(rank).integers(0, 256, (rows, 4 * words)) for rank in range(group)]
    tiles = [Tile(part, "u8", swizzle=swizzle) for part in data]
    t = noise((group, 128, 32))
    text = copy(shape, tiles[0].descriptor(0), 11, group, 5 if shape == "4x256b" else 0)
    found = execute(text, np.stack([tile.image for tile in tiles]), t, group)
    for rank in range(group):
        for r in range(rows):
            for lane in lanes(r):
                t[rank, lane, 11 : 11 + words] = data[rank][r].astype(np.uint8).view(np.uint32)
    assert (found == t).all()


@pytest.mark.parametrize("form, suffix, shift", [("e2m1", "b4x16_p64", 2), ("e3m2", "b6x16_p32", 0)])
def test_copy_that_unpacks(form, suffix, shift):
    values = np.random.default_rng(0).integers(-4, 5, (128, 32))
    tile, t = Tile(values, form, swizzle=3), noise((1, 128, 16))
    found = execute(copy(f"128x256b.b8x16.{suffix}", tile.descriptor(0), 2), tile.image[None], t)
    t[0, :, 2:10] = (bits_of(values, form) << shift).astype(np.uint8).view(np.uint32)
    assert (found == t).all()


def test_scale_factors_copied_right_before_the_product():
    """A copy and a product of one thread run in their order: no wait in between."""
    a, b = (Tile(np.full((128, 32), 2), "e4m3", swizzle=3) for _ in range(2))
    factors = np.random.default_rng(1).integers(125, 130, (2, 128))
    tables = []
    for side in factors:  # 32 rows of 16 bytes: row r has the factors of rows r, r + 32, r + 64, r + 96
        table = np.zeros((32, 16), int)
        table[:, ::4] = side.reshape(4, 32).T
        tables.append(Tile(table, "u8"))
    images = [a.image, b.image, *(table.image for table in tables)]
    at = np.cumsum([0, *map(len, images)]).tolist()
    text = copy("32x128b.warpx4", tables[0].descriptor(at[2]), 128) + copy(
        "32x128b.warpx4", tables[1].descriptor(at[3]), 132
    )
    text += "add.u32 %r145, %r150, 128; add.u32 %r144, %r150, 132;"
    idesc = scaled_instruction(128, 128, "e4m3", "e4m3")
    opcode = "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"
    text += issue(opcode, 0, a.descriptor(0), b.descriptor(at[1]), idesc, "[%r145], [%r144], 0")
    found = execute(text, np.concatenate(images)[None], np.zeros((1, 128, 144), np.uint32))
    expected = 128 * 2.0 ** (factors[0][:, None] - 127) * 2.0 ** (factors[1][None] - 127)
    assert (found[0, :, :128].view(np.float32) == expected).all()


def broken_copy(text: str, *words: str, nbytes: int = 8192) -> None:
    with pytest.raises(Hazard) as caught:
        execute(text, np.zeros((1, nbytes), np.uint8), np.zeros((1, 128, 16), np.uint32))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_copies_that_are_wrong():
    source = Tile(np.zeros((128, 32), int), "u8")
    broken_copy(
        copy("128x256b", source.descriptor(65536), 0), "the descriptor of the source reaches shared offsets 65536"
    )
    broken_copy(copy("128x256b", source.descriptor(4608), 0), "the source of CTA (0, 0, 0) at", "it holds an mbarrier")
    broken_copy(copy("128x256b", source.descriptor(0), 508), "the destination in TMEM columns 508 to 515")
    broken_copy(copy("128x128b", source.descriptor(0), 0, lane=32), "TMEM lane 32: it must start at lane 0")
    twice = copy("128x256b", source.descriptor(0), 0) + "st.shared.b32 [%s+16], %tid;"
    broken_copy(twice, "overwrites", "which is the source of a tcgen05.cp that is not known to be complete")


def test_a_copy_is_not_complete_before_its_commit():
    source = Tile(np.zeros((128, 16), int), "u8").descriptor(0)
    text = f"""mov.u32 %r1, 0; st.shared.v4.b32 [%s16], {{%r1, %r1, %r1, %r1}}; fence.proxy.async.shared::cta;
    bar.sync 0; setp.eq.u32 %p1, %tid, 0; mov.b64 %d1, {source:#x}; @%p1 tcgen05.cp.cta_group::1.128x128b [%r150],
    %d1; bar.sync 0;
    """
    reason = "a tcgen05.cp or tcgen05.shift that writes it is not known to be complete"
    for access, words in (
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r151];", "reads TMEM column 0"),
        ("tcgen05.st.sync.aligned.32x32b.x1.b32 [%r151], {%r1};", "writes TMEM column 0"),
        ("tcgen05.st.sync.aligned.16x64b.x1.b32 [%r151], {%r1};", "writes TMEM column 0"),
        ("st.shared.b32 [%s16], %r1;", "the source of a tcgen05.cp that is not known to be complete"),
    ):
        body = with_tmem(f"{text}\n{access} // HERE\n", slot=4096)
        fails(Hazard, body, words, reason if "TMEM" in words else "", block=128, smem=8192)


# -- tcgen05.shift -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("lane", [0, 64])
def test_shift(lane, group):
    t = noise((group, 128, 32))
    text = f"add.u32 %r147, %r150, {(lane << 16) + 9}; tcgen05.shift.cta_group::{group}.down [%r147];"
    found = execute(text, np.zeros((group, 2048), np.uint8), t, group)
    t[:, lane : lane + 31, 9:17] = t[:, lane + 1 : lane + 32, 9:17].copy()
    assert (found == t).all()


def test_shift_of_a_lane_that_is_not_aligned():
    broken_copy(
        "add.u32 %r147, %r150, 1048576; tcgen05.shift.cta_group::1.down [%r147];", "lane must be a multiple of 32"
    )
