"""tcgen05.mma in every kind, shape, operand layout and data path, against an oracle that places element by element.

Operands are small integers, so every sum is exact in float32 and tensor memory is compared bit for bit, all of it:
what the product does not write stays as it was.
"""

import numpy as np
import pytest
from tcgen05_oracle import (
    Tile,
    bits_of,
    encode,
    execute,
    instruction,
    issue,
    place,
    scaled_instruction,
)

from generator.emulator import Hazard, UnsupportedInstruction

K = {"f16": 16, "tf32": 8, "mxf4": 64, "mxf4nvf4": 64}
A_AT, FACTORS_AT = 256, 272  # columns of A in tensor memory, and of scale factors


def integers(shape, form: str, seed: int) -> np.ndarray:
    low = 0 if form == "u8" else -4
    return np.random.default_rng(seed).integers(low, 5, shape)


class Case:
    """One MMA: operands, descriptors, and what it makes of tensor memory."""

    def __init__(self, kind, m, n, a="f16", b=None, d="f32", group=1, layout="D", a_mn=False, b_mn=False,
                 swizzle=(3, 3), half=0, a_in_tmem=False, columns=256, seed=0, draw=integers):  # fmt: skip
        self.kind, self.m, self.n, self.d, self.group, self.layout, self.half = kind, m, n, d, group, layout, half
        self.form, self.a_in_tmem, k = a, a_in_tmem, K.get(kind, 32)
        b = b or a
        self.a, self.b = draw((m, k), a, seed), draw((n, k), b, seed + 1)
        packed = kind in ("mxf4", "mxf4nvf4")
        self.tiles = [
            (Tile(left, a, a_mn, swizzle[0], packed), Tile(right, b, b_mn, swizzle[1], packed))
            for left, right in zip(np.split(self.a, group), np.split(self.b, group), strict=True)
        ]
        self.at_b = len(self.tiles[0][0].image)
        self.x = np.stack([np.concatenate([left.image, right.image]) for left, right in self.tiles])
        self.t = np.random.default_rng(seed + 2).integers(0, 2**32, (group, 128, columns), dtype=np.uint32)
        self.idesc = instruction(m, n, a, b, d, a_mn, b_mn)
        self.c = draw((m, n), "s8" if draw is integers else d, seed + 3)
        self.t[:] = self.expected(self.c)
        if a_in_tmem:
            self._put_a(k)

    def cells(self):
        """For each CTA: its rank, and lane, column, row and column of D of every element that it holds."""
        row, column = np.indices((self.m, self.n))
        for rank in range(self.group):
            *found, held = place(self.layout, self.m, self.n, rank, row, column, self.half)
            yield rank, *(x[held] for x in found), row[held], column[held]

    def _put_a(self, k: int) -> None:
        """A where the lanes of D's rows are; in each group of lanes."""
        words = np.zeros((self.m, 8), np.uint32)
        width = 256 // k
        bits = bits_of(self.a, self.form) << (2 if self.form == "e2m1" else 0)
        for i in range(k):
            words[:, i * width // 32] |= (bits[:, i] << i * width % 32).astype(np.uint32)
        for rank, lane, _, row, _ in self.cells():
            self.t[rank, lane, A_AT : A_AT + 8] = words[row]

    def text(self, opcode: str = "", tail="1", idesc: int | None = None) -> str:
        opcode = opcode or f"tcgen05.mma.cta_group::{self.group}.kind::{self.kind}"
        a = str(A_AT + (self.half << 20)) if self.a_in_tmem else self.tiles[0][0].descriptor(0)
        b = self.tiles[0][1].descriptor(self.at_b)
        return issue(opcode, self.half << 20, a, b, self.idesc if idesc is None else idesc, tail)

    def expected(self, d: np.ndarray) -> np.ndarray:
        y = self.t.copy()
        for rank, lane, at, row, column in self.cells():
            y[rank, lane, at] = encode(d[row, column], self.d)
        return y

    def product(self) -> np.ndarray:
        return self.a @ self.b.T

    def check(self, d: np.ndarray | None = None, text: str | None = None, **flags) -> None:
        found = execute(text or self.text(), self.x, self.t, self.group, **flags)
        assert (found == self.expected(self.c + self.product() if d is None else d)).all()


FORMS = [("f16", "f16", "f16", "f32"), ("f16", "bf16", "f16", "f32"), ("f16", "f16", "f16", "f16"),
         ("tf32", "tf32", "tf32", "f32"),
         ("i8", "s8", "u8", "s32"), ("i8", "u8", "s8", "s32"), ("f8f6f4", "e4m3", "e5m2", "f32"),
         ("f8f6f4", "e5m2", "e4m3", "f16"), ("f8f6f4", "e2m3", "e2m1", "f32"), ("f8f6f4", "e2m1", "e3m2", "f32"),
         ("f8f6f4", "e3m2", "e2m3", "f16")]  # fmt: skip


@pytest.mark.parametrize("m, n, layout, half", [(128, 32, "D", 0), (64, 8, "F", 0), (64, 48, "F", 1)])
@pytest.mark.parametrize("kind, a, b, d", FORMS)
def test_every_kind_and_type(kind, a, b, d, m, n, layout, half):
    Case(kind, m, n, a, b, d, layout=layout, half=half, columns=64).check()


@pytest.mark.parametrize("kind, a, b, d", FORMS)
@pytest.mark.parametrize("m, n, layout", [(256, 32, "A"), (128, 64, "B")])
def test_pairs(kind, a, b, d, m, n, layout):
    Case(kind, m, n, a, b, d, group=2, layout=layout, columns=64).check()


@pytest.mark.parametrize("kind, a, b, d", FORMS[::3])
@pytest.mark.parametrize("m, n, layout", [(32, 64, "G"), (64, 128, "E"), (128, 64, "D"), (32, 256, "G")])
def test_weight_stationary(kind, a, b, d, m, n, layout):
    case = Case(kind, m, n, a, b, d, layout=layout, columns=64)
    case.check(text=case.text(f"tcgen05.mma.ws.cta_group::1.kind::{kind}.collector::b2::fill"))


def test_weight_stationary_with_a_zero_column_mask():
    case = Case("f16", 32, 64, layout="G", columns=64)
    case.check(text=case.text("tcgen05.mma.ws.cta_group::1.kind::f16", "1, 0"))
    with pytest.raises(UnsupportedInstruction, match="a zero-column mask is not supported"):
        case.check(text=case.text("tcgen05.mma.ws.cta_group::1.kind::f16", "1, 8"))


@pytest.mark.parametrize("kind, a, b, d", FORMS)
@pytest.mark.parametrize("m, group, layout, half", [(128, 1, "D", 0), (64, 1, "F", 1), (128, 2, "B", 0)])
def test_a_in_tensor_memory(kind, a, b, d, m, group, layout, half):
    Case(kind, m, 32, a, b, d, group, layout, half=half, a_in_tmem=True, columns=272).check()


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("a, b", [("e4m3", "e5m2"), ("s8", "u8")])
@pytest.mark.parametrize("a_mn, b_mn", [(False, True), (True, False), (True, True)])
def test_eight_bit_operands_in_every_layout(a, b, a_mn, b_mn, swizzle):
    kind, d = ("i8", "s32") if a == "s8" else ("f8f6f4", "f32")
    Case(kind, 128, 128, a, b, d, a_mn=a_mn, b_mn=b_mn, swizzle=(swizzle, swizzle), columns=128).check()


@pytest.mark.parametrize("form", ["e2m3", "e3m2", "e2m1", "tf32"])
@pytest.mark.parametrize("swizzle", [0, 1, 2])
def test_narrow_and_wide_operands_in_every_swizzle(form, swizzle):
    kind = "tf32" if form == "tf32" else "f8f6f4"
    Case(kind, 64, 16, form, layout="F", swizzle=(swizzle, swizzle), columns=16).check()


@pytest.mark.parametrize("a_mn, b_mn", [(False, True), (True, False), (True, True)])
def test_transposed_tf32_in_atoms_of_32_bytes(a_mn, b_mn):
    swizzle = tuple("atom" if mn else 2 for mn in (a_mn, b_mn))
    Case("tf32", 128, 64, "tf32", a_mn=a_mn, b_mn=b_mn, swizzle=swizzle, columns=64).check()


def test_tf32_drops_the_low_bits_of_the_mantissa():
    case = Case("tf32", 64, 16, "tf32", layout="F", columns=16)
    words = case.x.view(np.uint32)
    words |= (words != 0) * np.uint32(0x1FFF)
    case.check()


# -- what the operands say ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, a, b, d", FORMS[::2])
def test_without_accumulation(kind, a, b, d):
    case = Case(kind, 64, 16, a, b, d, layout="F", columns=16)
    case.check(case.product(), case.text(tail="0"))


@pytest.mark.parametrize("kind, form", [("f16", "f16"), ("tf32", "tf32"), ("f8f6f4", "e4m3")])
@pytest.mark.parametrize("negate", [(1, 0), (0, 1), (1, 1)])
def test_negated_operands(kind, form, negate):
    case = Case(kind, 64, 16, form, layout="F", columns=16)
    sign = 1 - 2 * (negate[0] ^ negate[1])
    case.check(case.c + sign * case.product(), case.text(idesc=case.idesc | negate[0] << 13 | negate[1] << 14))


@pytest.mark.parametrize("kind, d", [("f16", "f32"), ("f16", "f16"), ("tf32", "f32")])
@pytest.mark.parametrize("scale", [1, 2, 15])
def test_scaled_input(kind, d, scale):
    case = Case(kind, 128, 16, kind, d=d, columns=16)
    d = case.c * 2.0**-scale + case.product()
    case.check(d, case.text(tail=f"1, {scale}"))


@pytest.mark.parametrize("m, group, layout", [(128, 1, "D"), (64, 1, "F"), (256, 2, "A"), (128, 2, "B")])
def test_lanes_that_are_disabled(m, group, layout):
    masks = [0x00FF00FF, 0xFFFFFFFF, 0, 0x0000FFFF, 0x1, 0x80000000, 0, 0xF0F0F0F0][: 4 * group]
    case = Case("f16", m, 32, "bf16", group=group, layout=layout, columns=32)
    moves = "".join(f"mov.b32 %r{130 + i}, {mask:#x};" for i, mask in enumerate(masks))
    vector = "{" + ", ".join(f"%r{130 + i}" for i in range(4 * group)) + "}"
    expected = case.expected(case.c + case.product())
    for rank in range(group):
        for lane in range(128):
            if masks[4 * rank + lane // 32] >> lane % 32 & 1:
                expected[rank, lane] = case.t[rank, lane]
    found = execute(moves + case.text(tail=f"{vector}, 1"), case.x, case.t, group)
    assert (found == expected).all()


@pytest.mark.parametrize("saturate", [0, 1])
def test_integers_wrap_or_saturate(saturate):
    case = Case("i8", 64, 16, "s8", "s8", "s32", layout="F", columns=16)
    case.c[::2], case.c[1::2] = 2**31 - 3, 3 - 2**31
    case.t[:] = case.expected(case.c)
    total = case.c + case.product()
    expected = np.clip(total, -(2**31), 2**31 - 1) if saturate else total.astype(np.int32)
    case.check(expected, case.text(idesc=case.idesc | saturate << 3))


def test_a_float16_accumulator_is_rounded():
    case = Case("f16", 64, 16, "f16", d="f16", layout="F", columns=16)
    case.c[:] = 2048
    case.t[:] = case.expected(case.c)
    case.check((2048 + case.product()).astype(np.float16).astype(np.float64))


# -- block scaling -----------------------------------------------------------------------------------------------------
def with_factors(case: Case, blocks: int, sf_a: int, sf_b: int, scale: str, seed: int):
    """Put scale factors into tensor memory: the values of A's [m, blocks] and of B's [n, blocks]."""
    rng = np.random.default_rng(seed)
    powers = [rng.integers(-2, 3, (rows, blocks)) for rows in (case.m, case.n)]
    factors = [2.0**p * (1.5 if scale == "ue4m3" else 1) for p in powers]
    encoded = [bits_of(f, "e4m3") if scale == "ue4m3" else 127 + p for p, f in zip(powers, factors, strict=True)]
    data = case.t.view(np.uint8).reshape(case.group, 128, -1, 4)
    rows = case.m // case.group
    for rank in range(case.group):
        for copy in range(4):
            for row in range(rows):
                at = data[rank, row % 32 + 32 * copy, FACTORS_AT + row // 32]
                at[sf_a : sf_a + blocks] = encoded[0][rank * rows + row]
            for column in range(case.n):
                inner = column
                if case.layout == "B":  # each pair of quarters has its half of N
                    if column // (case.n // 2) != copy // 2:
                        continue
                    inner = column % (case.n // 2)
                at = data[rank, inner % 32 + 32 * copy, FACTORS_AT + 8 + inner // 32]
                at[sf_b : sf_b + blocks] = encoded[1][column]
    return factors


SCALED = [("mxf8f6f4", "", 1, 0, 3, "ue8m0", "e4m3", "e5m2"),
          ("mxf8f6f4", ".block32", 1, 2, 1, "ue8m0", "e2m1", "e3m2"),
          ("mxf4", ".scale_vec::2X", 2, 2, 0, "ue8m0", "e2m1", "e2m1"),
          ("mxf4", ".block32", 2, 0, 2, "ue8m0", "e2m1", "e2m1"),
          ("mxf4nvf4", ".scale_vec::4X", 4, 0, 0, "ue4m3", "e2m1", "e2m1"),
          ("mxf4nvf4", ".block16", 4, 0, 0, "ue8m0", "e2m1", "e2m1")]  # fmt: skip


@pytest.mark.parametrize("m, n, group, layout", [(128, 40, 1, "D"), (256, 96, 2, "A"), (128, 128, 2, "B")])
@pytest.mark.parametrize("kind, suffix, blocks, sf_a, sf_b, scale, a, b", SCALED)
@pytest.mark.parametrize("accumulation", ["fast", "exact"])
def test_block_scaling(kind, suffix, blocks, sf_a, sf_b, scale, a, b, m, n, group, layout, accumulation):
    case = Case(kind, m, n, a, b, group=group, layout=layout, columns=288)
    packed = kind != "mxf8f6f4"
    case.idesc = scaled_instruction(m, n, a, b, scale, sf_a, sf_b, packed)
    factors = with_factors(case, blocks, sf_a, sf_b, scale, 9)
    each = case.a.shape[1] // blocks
    left, right = (x * np.repeat(f, each, axis=1) for x, f in zip((case.a, case.b), factors, strict=True))
    opcode = f"tcgen05.mma.cta_group::{group}.kind::{kind}.block_scale{suffix}"
    address = f"add.u32 %r145, %r150, {FACTORS_AT}; add.u32 %r144, %r150, {FACTORS_AT + 8 + (sf_b << 30)};"
    text = address + case.text(opcode, "[%r145], [%r144], 1")
    case.check(case.c + left @ right.T, text, accumulation=accumulation)  # powers of two: no rounding


def test_copies_of_scale_factors_that_differ():
    case = Case("mxf8f6f4", 128, 32, "e4m3", columns=288)
    case.idesc = scaled_instruction(128, 32, "e4m3", "e4m3")
    with_factors(case, 1, 0, 0, "ue8m0", 9)
    case.t[0, 70, FACTORS_AT] ^= 1 << 3
    address = f"add.u32 %r145, %r150, {FACTORS_AT}; add.u32 %r144, %r150, {FACTORS_AT + 8};"
    text = address + case.text("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale", "[%r145], [%r144], 1")
    with pytest.raises(Hazard, match="the scale factors of A from TMEM column 272.* differ between the warps' lanes"):
        case.check(text=text)


# -- what may go wrong -------------------------------------------------------------------------------------------------
def refused(case: Case, error: type, words: str, text: str | None = None, **flags) -> None:
    with pytest.raises(error) as caught:
        execute(text or case.text(), case.x, case.t, case.group, **flags)
    message = str(caught.value)
    marked = next(i for i, line in enumerate(execute.text.splitlines(), 1) if "// HERE" in line)
    assert f"PTX line {marked} " in message and words in message, message


SMALL = Case("f8f6f4", 64, 16, "e4m3", layout="F", columns=16)
HALF = Case("f16", 64, 16, "f16", layout="F", columns=16)


@pytest.mark.parametrize(
    "case, change, error, words",
    [
        (SMALL, 2 << 7, Hazard, "kind::f8f6f4 takes e4m3 (0), e5m2 (1), e2m3 (3), e3m2 (4), e2m1 (5) as A, not type 2"),
        (SMALL, 6 << 10, Hazard, "as B, not type 6"),
        (SMALL, 3 << 4, Hazard, "kind::f8f6f4 has D of type f16 (0), f32 (1), not 2"),
        (SMALL, 5 << 7 | 1 << 15, Hazard, "an operand of type e2m1 must be K-major"),
        (SMALL, 1 << 3, Hazard, "which kind::f8f6f4 reserves"),
        (SMALL, 1 << 23, Hazard, "which kind::f8f6f4 reserves"),
        (SMALL, 1 << 2, UnsupportedInstruction, "sparse products are not supported"),
        (SMALL, 3 << 24, Hazard, "M = 112: kind::f8f6f4 with cta_group::1 has M = 64 or 128"),
        (SMALL, 63 << 17, Hazard, "N = 488"),
        (HALF, 1 << 30, Hazard, "which only .ws has"),
        (HALF, 1 << 4 | 1 << 7, Hazard, "D of type f16 takes operands of type f16"),
    ],
)
def test_illegal_instruction_descriptors(case, change, error, words):
    refused(case, error, words, case.text(idesc=case.idesc ^ change))


def test_illegal_fields_of_other_kinds():
    case = Case("i8", 64, 16, "s8", d="s32", layout="F", columns=16)
    refused(case, Hazard, "kind::i8 cannot negate", case.text(idesc=case.idesc | 1 << 13))
    refused(case, Hazard, "N = 40: kind::i8", case.text(idesc=instruction(64, 40, "s8", "s8", "s32")))
    refused(case, Hazard, "kind::i8 has no scale-input-d", case.text(tail="1, 1"))
    case = Case("f16", 32, 64, "f16", layout="G", columns=16)
    opcode = "tcgen05.mma.ws.cta_group::1.kind::f16"
    refused(case, Hazard, "M = 32: kind::f16 with cta_group::1 has M = 64 or 128")
    refused(case, Hazard, "N = 96: kind::f16 with cta_group::1 and .ws and M = 32 has N = 64, 128, 256",
            case.text(opcode, idesc=instruction(32, 96, "f16", "f16")))  # fmt: skip
    refused(case, UnsupportedInstruction, "a maximum shift of .ws", case.text(opcode, idesc=case.idesc | 1 << 30))


def test_illegal_fields_of_block_scaling():
    case = Case("mxf4", 128, 16, "e2m1", columns=288)
    opcode = "tcgen05.mma.cta_group::1.kind::mxf4.block_scale"
    address = f"add.u32 %r145, %r150, {FACTORS_AT};"
    for idesc, words in (
        (scaled_instruction(128, 16, "e2m1", "e2m1", "ue4m3", packed=True), "as ue8m0, not ue4m3"),
        (scaled_instruction(128, 16, "e2m1", "e2m1", "ue8m0", 1, packed=True), "scale-factor id 1 of A"),
        (scaled_instruction(64, 16, "e2m1", "e2m1", packed=True), "M = 64: kind::mxf4"),
        (scaled_instruction(128, 16, "e2m1", "e2m1", packed=True) | 1 << 31, "bit 3, 6 or 31"),
    ):
        refused(case, Hazard, words, address + case.text(opcode, "[%r145], [%r145], 1", idesc))


def test_accumulators_in_the_wrong_lanes():
    moved = SMALL.text().replace("add.u32 %r147, %r150, 0;", f"add.u32 %r147, %r150, {32 << 16};")
    refused(SMALL, Hazard, "must start at lane 0 or 16", moved)
    case = Case("tf32", 128, 16, "tf32", columns=16)
    moved = case.text().replace("add.u32 %r147, %r150, 0;", f"add.u32 %r147, %r150, {16 << 16};")
    refused(case, Hazard, "must start at lane 0", moved)
    case = Case("tf32", 64, 16, "tf32", layout="F", a_in_tmem=True, columns=272)
    moved = case.text().replace("add.u32 %r147, %r150, 0;", f"add.u32 %r147, %r150, {16 << 16};")
    refused(case, Hazard, "must start at the lane of D", moved)


def test_operands_that_may_not_be_read():
    refused(SMALL, Hazard, "which were never written: the first MMA must not accumulate", load=False)
    case = Case("tf32", 128, 16, "tf32", a_in_tmem=True, columns=272)
    refused(
        case,
        Hazard,
        "operand A at TMEM column 256 may not be used: it was never written",
        case.text(tail="0"),
        load=False,
    )
    text = case.text().replace(f"add.u32 %r146, %r150, {A_AT}", "add.u32 %r146, %r150, 508")
    refused(case, Hazard, "A operand in TMEM columns 508 to 515", text)
    beyond = SMALL.text().replace(
        f"{SMALL.tiles[0][1].descriptor(SMALL.at_b):#x}", f"{Tile(SMALL.b, 'e4m3').descriptor(65536):#x}"
    )
    refused(SMALL, Hazard, "the descriptor of B reaches shared offsets", beyond)


def test_the_padding_of_narrow_elements_may_be_anything():
    """Sixteen 4-bit elements leave eight bytes of each 16: never written, and still legal."""
    case = Case("f8f6f4", 64, 16, "e2m1", layout="F", swizzle=(0, 0), columns=16)
    again = case.text().replace("// HERE", "") + "mbarrier.init.shared.b64 [%s+8], 1; // padding of the first row\n"
    case.check(text=again)
    refused(case, Hazard, "operand A of CTA (0, 0, 0)", "mbarrier.init.shared.b64 [%s], 1;\n" + case.text())


def test_transposed_operands_need_their_swizzle():
    case = Case("tf32", 64, 32, "tf32", layout="F", a_mn=True, swizzle=("atom", 2), columns=32)
    plain = case.tiles[0][0].descriptor(0) ^ 3 << 61
    text = case.text().replace(f"{case.tiles[0][0].descriptor(0):#x}", f"{plain:#x}")
    refused(case, Hazard, "32-bit MN-major operands, and no others", text)
