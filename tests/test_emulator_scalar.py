"""emulator/ops integer, floating, select, convert: every elementwise entry against exact integers and fractions."""

import math
from collections import defaultdict

import numpy as np
import pytest
import scalar_oracle
from family_oracle import AnyNan, lookup
from ptx_kernels import run
from scalar_oracle import Exact, Float, Near, bits_of, fused, is_nan, to_float

from generator.emulator.table import BITS, TABLE

ALU = sorted(name for name, entry in TABLE.items() if entry.pure)
N = 1024  # lanes a launch: one CTA
FEWER = 160  # of them, compared for the wider families
TYPE = {1: np.uint32, 16: np.uint16, 32: np.uint32, 64: np.uint64}
LETTER = {16: "h", 32: "r", 64: "d"}


def integer_edges(w: int) -> list[int]:
    half = 1 << w // 2
    top = 1 << w - 1
    powers = [top - 1, top, top + 1, 2 * top - 2, 2 * top - 1, half - 1, half]
    return [0, 1, 2, 3, 7, 8, w - 1, w, w + 1, 127, 128, 255, 0x55AA55AA55AA55AA % (2 * top), *powers]


INTEGERS = {w: integer_edges(w) for w in (16, 32, 64)}
MAX, TINY = 2.0**128 - 2.0**104, 2.0**-126
FLOATS = [0.0, 1.0, 1.5, 2.5, 0.5, MAX, math.inf, TINY, TINY / 2, 2.0**-149, 1 + 2.0**-23, 1 - 2.0**-24]
FLOATS += [-f for f in FLOATS] + [math.nan, 12582912.0, 65504.0, 65520.0, 2.0**31, -(2.0**31), 2.0**63, 4294967040.0]
FLOAT_BITS = [bits_of(f) for f in FLOATS]
DOUBLE_BITS = [int(np.float64(f).view(np.uint64)) for f in FLOATS]


def oracle(name: str):
    found = lookup(name)
    return found[2] if found else scalar_oracle.oracle(name)


def widths(name: str):
    found = lookup(name)
    return found[:2] if found else scalar_oracle.widths(name)


def group_of(name: str) -> str:
    """Opcodes that share a launch: same operation, same operand widths."""
    entry = TABLE[name]
    return f"{name.split('.')[0]} {','.join(entry.dests)}={','.join(entry.sources)}"


GROUPS = defaultdict(list)
for _name in ALU:
    GROUPS[group_of(_name)].append(_name)


def inputs(kind: str, seed: int, lanes: int = N) -> np.ndarray:
    """Edge values and random bits for one operand of a signature letter."""
    rng = np.random.default_rng(seed)
    width = BITS[kind]
    if width == 1:
        return rng.integers(0, 2, lanes).astype(np.uint32)
    if kind in "f2d":
        edges = np.array(DOUBLE_BITS if kind == "d" else FLOAT_BITS, np.uint64)
        if kind == "2":
            edges = edges[rng.integers(0, len(edges), len(edges))] << 32 | edges
            close = rng.integers(0x3F000000, 0x41000000, (2, lanes)).astype(np.uint64)
            close = close[0] << 32 | close[1]
        elif kind == "d":
            close = rng.standard_normal(lanes).view(np.uint64)
        else:
            close = (
                rng.integers(0x3F000000, 0x41000000, lanes).astype(np.uint64)
                | rng.integers(0, 2, lanes).astype(np.uint64) << 31
            )
    else:
        edges = np.array(INTEGERS[width], np.uint64)
        close = rng.integers(0, 70, lanes).astype(np.uint64)
    wild = (
        rng.integers(0, 2**width, lanes, np.uint64, endpoint=False)
        if width < 64
        else rng.integers(0, 2**64, lanes, np.uint64)
    )
    choice = rng.integers(0, 5, lanes)
    values = np.where(choice < 3, edges[rng.integers(0, len(edges), lanes)], np.where(choice == 3, close, wild))
    return values.astype(TYPE[width])


def execute(names: list[str], operands: list[np.ndarray], kinds: list[str], dest: str, tables=("",)) -> dict:
    """Run every opcode on all lanes in one kernel: {(opcode, immediate): result bits}."""
    width = BITS[dest]
    cases = [(name, table) for name in names for table in tables]
    out = np.zeros((len(cases), len(operands[0])), TYPE[width])
    lines, registers = [], []
    for i, (array, kind) in enumerate(zip(operands, kinds, strict=True)):
        bits = array.dtype.itemsize * 8
        lines.append(f"ld.global.b{bits} %{LETTER[bits]}{i}, [%x{i}_g];")
        if BITS[kind] == 1:
            lines.append(f"setp.ne.u32 %p{i}, %r{i}, 0;")
        registers.append(f"%p{i}" if BITS[kind] == 1 else f"%{LETTER[bits]}{i}")
    letter = "r" if width == 1 else LETTER[width]
    lines.append("mov.b64 %d40, %y_g;")
    for name, table in cases:
        result = "%p15" if width == 1 else f"%{letter}30"
        lines.append(f"{name} {result}, {', '.join(registers)}{table and ', ' + table};")
        if width == 1:
            lines.append("selp.b32 %r30, 1, 0, %p15;")
        lines.append(f"st.global.b{out.itemsize * 8} [%d40], %{letter}30; add.u64 %d40, %d40, {out.strides[0]};")
    arrays = {f"x{i}": a for i, a in enumerate(operands)}
    run("\n".join(lines), block=len(operands[0]), y=out, **arrays)
    return dict(zip(cases, out.tolist(), strict=True))


def agrees(expected, got: int) -> bool:
    if expected is None:
        return True
    if isinstance(expected, int):
        return got == expected
    if isinstance(expected, AnyNan):
        infinity = {16: 0x7C00, 32: 0x7F800000, 64: 0x7FF << 52}[expected.bits]
        return got & (1 << expected.bits - 1) - 1 > infinity
    if isinstance(expected, Exact):
        return got == expected.bits
    if isinstance(expected, Float):
        return is_nan(got) if is_nan(expected.bits) else got == expected.bits
    value, actual = expected.value, to_float(got)
    if math.isnan(value) or math.isnan(actual):
        return math.isnan(value) and math.isnan(actual)
    if math.isinf(value) or (value == 0 and expected.absolute == 0):
        return actual == value and math.copysign(1, actual) == math.copysign(1, value)
    if abs(value) > 3.4028234663852886e38:
        return math.isinf(actual) or abs(actual) > 3.4e38
    ulp = 2.0 ** max(math.frexp(value)[1] - 24, -149)
    return abs(actual - value) <= max(expected.ulps * ulp, expected.absolute)


def check(names: list[str], kinds: list[str], seed: int = 0, operands=None, tables=("",)) -> None:
    """Compare every opcode with its oracle in every lane; one line a wrong opcode."""
    dest = TABLE[names[0]].dests[0]
    operands = operands or [inputs(kind, seed + i) for i, kind in enumerate(kinds)]
    if names == ["fns.b32"]:
        operands[1] &= 31
    columns = list(zip(*(o.tolist() for o in operands), strict=True))
    wrong = []
    for (name, table), results in execute(names, operands, kinds, dest, tables).items():
        expected_of = oracle(name)
        extra = (int(table, 0),) if table else ()
        lanes = FEWER if lookup(name) else len(columns)
        for arguments, got in zip(columns[:lanes], results[:lanes], strict=True):
            sides = [(arguments, got)]
            if dest == "2":
                sides = [(tuple(a >> s & 0xFFFFFFFF for a in arguments), got >> s & 0xFFFFFFFF) for s in (0, 32)]
            bad = [(a, g, e) for a, g in sides if not agrees(e := expected_of(*a, *extra), g)]
            if bad:
                a, g, e = bad[0]
                wrong.append(f"{name} {table} of {', '.join(map(hex, a))} gave {g:#x}, expected {e}")
                break
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_instruction_of_the_table_against_the_oracle(group):
    names = GROUPS[group]
    sources = [s for s in TABLE[names[0]].sources if s[0] not in "?k"]
    tables = ("0x80", "0xFE", "0x96", "0xE8", "0x00", "0xFF", "0x1B") if "k" in TABLE[names[0]].sources else ("",)
    check(names, sources, tables=tables)


@pytest.mark.parametrize("name", [n for n in ALU if any(s[0] == "?" for s in TABLE[n].sources)])
def test_the_optional_third_operand(name):
    check([name], [s.lstrip("?") for s in TABLE[name].sources], seed=7)


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_signature_of_every_elementwise_instruction(group):
    for name in GROUPS[group]:
        entry = TABLE[name]
        dest, sources = widths(name)
        assert tuple(BITS[d] for d in entry.dests) == (dest,), name
        assert tuple(8 if s == "k" else BITS[s] for s in entry.sources if s[0] != "?") == sources, name
        assert entry.isa.startswith("9.7."), name


HARD_FMA = [  # the sum of product and addend lies so close to a float32 midpoint that rounding it twice goes wrong
    (1 + 2.0**-23, 1 + 2.0**-12, -(2.0**-60)),
    (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80),
    (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80)),
    (2.0**-75, 2.0**-75, 2.0**-149),
    (2.0**-75, -(2.0**-75), 2.0**-149),
    (1 - 2.0**-24, 1 + 2.0**-23, 2.0**-90),
    (4097.0, 4097.0, 2.0**-60),
    (3.0, 2.0**-150 + 2.0**-149, 1.0),
    (1 + 2.0**-23, 1 - 2.0**-24, 2.0**-100),
    (-(1 + 2.0**-12), 1 + 2.0**-12, -(2.0**-100)),
]


def test_fma_rounds_once():
    rng = np.random.default_rng(3)
    a = rng.integers(0x3F800, 0x40000, N).astype(np.uint32) << np.uint32(12) | np.uint32(0x1000)  # 12 bits, odd
    b = rng.integers(0x7F000, 0x80000, N).astype(np.uint32) << np.uint32(11) | np.uint32(0x800)  # 13 bits, odd
    exponents = rng.integers(127 - 60, 127 - 20, N).astype(np.uint32)
    c = exponents << np.uint32(23) | rng.integers(0, 2, N).astype(np.uint32) << np.uint32(31)
    for i, case in enumerate(HARD_FMA):
        for array, value in zip((a, b, c), case, strict=True):
            array[i] = np.float32(value).view(np.uint32)
    check(["fma.rn.f32", "fma.rm.f32", "fma.rp.f32", "fma.rz.f32"], ["f", "f", "f"], operands=[a, b, c])
    twice = (a.view(np.float32).astype(np.float64) * b.view(np.float32) + c.view(np.float32)).astype(np.float32)
    once = np.array([fused(*t, "rn") for t in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.uint32)
    assert (twice.view(np.uint32) != once).sum() > 10, "the inputs no longer tell one rounding from two"


@pytest.mark.parametrize("mode", ["rm", "rp", "rz", "rn"])
def test_add_rounds_in_its_direction_however_small_the_addend(mode):
    big = np.array([1.0, -1.0, 12582912.0, 2.0**100, 2.0**-126, 1 + 2.0**-23], np.float32)
    small = np.array([2.0**-149, -(2.0**-149), 2.0**-60, -(2.0**-60), 2.0**-24, -(2.0**-25)], np.float32)
    a, b = (np.resize(x.reshape(-1), 64).view(np.uint32) for x in np.meshgrid(big, small))
    check([f"add.{mode}.f32", f"sub.{mode}.f32"], ["f", "f"], operands=[a, b])


def test_magic_number_addition_of_the_software_exp2():
    """FlashAttention-4 takes floor(x) from x + 1.5·2^23 rounded down; rounding to nearest breaks it."""
    x = np.linspace(-126.9, 0, N).astype(np.float32)
    y = np.zeros(N, np.float32)
    run("ld.global.b32 %r1, [%x_g]; add.rm.f32 %r2, %r1, 0f4B400000; sub.rn.f32 %r2, %r2, 0f4B400000; "
        "st.global.b32 [%y_g], %r2;", block=N, x=x, y=y)  # fmt: skip
    assert (y == np.floor(x)).all()


@pytest.mark.parametrize("dtype, tie", [("bf16", 2.0**-8), ("f16", 2.0**-11)])
def test_conversion_to_16_bits_ties_go_to_even(dtype, tie):
    values = np.array([1 + tie, 1 + 3 * tie, 1 + tie * 1.001, -(1 + tie), np.nan, np.inf, 1e-42, 65519.996], np.float32)
    check([f"cvt.rn.{dtype}.f32"], ["f"], operands=[values.view(np.uint32)])
    out = execute([f"cvt.rn.{dtype}.f32"], [values.view(np.uint32)], ["f"], "h")[f"cvt.rn.{dtype}.f32", ""]
    one = 0x3F80 if dtype == "bf16" else 0x3C00
    assert out[:5] == [one, one + 2, one + 1, one | 0x8000, 0x7FFF]


def test_specials_of_the_approximations():
    inf = math.inf
    cases = {
        "ex2.approx.ftz.f32": [
            (-inf, 0.0),
            (0.0, 1.0),
            (-0.0, 1.0),
            (inf, inf),
            (-127.0, 0.0),
            (1e-40, 1.0),
            (10.0, 1024.0),
        ],
        "lg2.approx.ftz.f32": [(0.0, -inf), (-0.0, -inf), (inf, inf), (8.0, 3.0), (1e-40, -inf), (-1e-40, -inf)],
        "rcp.approx.ftz.f32": [
            (0.0, inf),
            (-0.0, -inf),
            (inf, 0.0),
            (-inf, -0.0),
            (1e-40, inf),
            (4.0, 0.25),
            (2.0**127, 0.0),
        ],
    }
    for name, table in cases.items():
        x, expected = (np.array(column, np.float32).view(np.uint32) for column in zip(*table, strict=True))
        assert execute([name], [x], ["f"], "f")[name, ""] == expected.tolist(), name


def test_setp_writes_the_complement_too():
    x, y, z = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run("ld.global.b32 %r1, [%x_g]; setp.lt.u32 %p1|%p2, %r1, 7; selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 1, 0, %p2; "
        "st.global.b32 [%y_g], %r2; st.global.b32 [%z_g], %r3;", x=x, y=y, z=z)  # fmt: skip
    assert (y == (x < 7)).all() and (z == (x >= 7)).all()


def test_the_complement_of_a_combined_setp_combines_the_complement():
    """setp.lt.and p|q, a, b, c: p = (a < b) and c, q = !(a < b) and c (ISA 9.7.6.2)."""
    x, y, z = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run(
        "and.b32 %r1, %tid, 1; setp.eq.u32 %p3, %r1, 1; setp.lt.and.u32 %p1|%p2, %tid, 7, %p3;"
        "selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 1, 0, %p2; st.global.b32 [%y_g], %r2; st.global.b32 [%z_g], %r3;",
        y=y,
        z=z,
    )
    assert (y == ((x < 7) & (x % 2 == 1))).all()
    assert (z == ((x >= 7) & (x % 2 == 1))).all()


def test_the_near_oracle_can_fail():
    assert not agrees(Near(1.0, 1), bits_of(1.0) + 3)
    assert agrees(Near(1.0, 1), bits_of(1.0) + 1)
