"""emulator/ops/matrix: fragments of ldmatrix, stmatrix, movmatrix and mma.sync against NumPy."""

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import aligned, fails, run

from generator.emulator import Hazard, UnsupportedInstruction

RNG = np.random.default_rng(8)
LANES = np.arange(32)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def fragment(matrix: np.ndarray) -> np.ndarray:
    """8x8 of u16 → the register of each lane."""
    row, column = LANES // 4, LANES % 4 * 2
    return matrix[row, column].astype(np.uint32) | matrix[row, column + 1].astype(np.uint32) << 16


# the rows of shared memory, 16 bytes each, are permuted so that every lane's address matters
ORDER = RNG.permutation(32)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    x, order = aligned((32, 8), np.uint16), ORDER.astype(np.uint32)
    x[:] = RNG.integers(0, 2**16, x.shape)
    y, z = aligned((count, 32), np.uint32), aligned((32, 8), np.uint16)
    stores = "".join(f"st.global.b32 [%y_g+{128 * i}], %r{20 + i};" for i in range(count))
    run(
        f"""mad.wide.u32 %d1, %tid, 16, %x; ld.global.v4.b32 {names(1, 4)}, [%d1];
        st.shared.v4.b32 [%s16], {names(1, 4)}; st.shared.v4.b32 [%s16+512], {names(1, 4)};
        ld.global.b32 %r9, [%o_g]; mad.lo.u32 %r10, %r9, 16, %s; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(20, count)}, [%r10]; {stores}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r10+512], {names(20, count)};
        bar.sync 0; ld.shared.v4.b32 {names(1, 4)}, [%s16+512]; mad.wide.u32 %d2, %tid, 16, %z;
        st.global.v4.b32 [%d2], {names(1, 4)};""",
        smem=1024,
        x=x,
        y=y,
        z=z,
        o=order,
    )
    rows = x[ORDER].reshape(4, 8, 8)
    for i in range(count):
        assert (y[i] == fragment(rows[i].T if trans else rows[i])).all()
    assert (z == x).all()  # what was loaded is stored back to where it came from


def test_stmatrix_leaves_other_rows_alone():
    y = aligned((32, 4), np.uint32)
    run(
        f"""mov.b32 %r1, -1; st.shared.v4.b32 [%s16], {{%r1, %r1, %r1, %r1}}; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%s16], {{%tid}}; bar.sync 0;
        ld.shared.v4.b32 {names(1, 4)}, [%s16]; mad.wide.u32 %d2, %tid, 16, %y;
        st.global.v4.b32 [%d2], {names(1, 4)};""",
        y=y,
    )
    assert (y[8:] == 2**32 - 1).all()
    assert (y[:8] == np.arange(32).reshape(8, 4)).all()


def test_movmatrix_transposes():
    x, y = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16), np.zeros(32, np.uint32)
    run(
        """ld.global.b32 %r1, [%f_g]; movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.b32 [%y_g], %r2;""",
        f=fragment(x),
        y=y,
    )
    assert (y == fragment(x.T)).all()


def test_ldmatrix_is_strict():
    load = "\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%s16]; // HERE\n"
    fails(Hazard, load, "never written")
    fails(Hazard, load.replace("[%s16]", "[%s16+8]"), "misaligned")
    fails(Hazard, load.replace("[%s16]", "[%s16+4096]"), "out of bounds")
    fails(Hazard, "setp.lt.u32 %p1, %tid, 9;" + load.replace("ldm", "@%p1 ldm"), "32 lanes")


# -- mma.sync ----------------------------------------------------------------------------------------------------------
TYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SHAPES = [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4), ("e4m3", 32), ("e5m2", 32)]


def spread(matrix: np.ndarray, rows: int) -> np.ndarray:
    """Rows x k → registers [n, 32 lanes]: lane t holds row t / 4 (and + 8), 4-byte words t % 4 of each 16 bytes."""
    words = np.ascontiguousarray(matrix).view(np.uint32)  # [rows, k bytes / 4]
    group, thread = LANES // 4, LANES % 4
    return np.array([words[group + r, thread + 4 * c] for c in range(words.shape[1] // 4) for r in range(0, rows, 8)])


CASES = [(t, k, "f32") for t, k in SHAPES] + [("f16", k, "f16") for k in (8, 16)]
CASES += [("e4m3", 16, "f32"), ("e5m2", 16, "f16"), ("e4m3", 32, "f16")]


def fragments_of(c: np.ndarray) -> np.ndarray:
    """C or D [rows, 8] → registers [n, 32 lanes]: rows t / 4 (and + 8), columns 2 (t % 4) and the next."""
    group, pair = LANES // 4, LANES % 4 * 2
    if c.dtype == np.float16:
        words = np.ascontiguousarray(c).view(np.uint32)
        return np.array([words[group + r, LANES % 4] for r in range(0, len(c), 8)])
    return np.array([c[group + r, pair + i] for r in range(0, len(c), 8) for i in (0, 1)]).view(np.uint32)


def execute(opcode: str, left: np.ndarray, right: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Run one mma.sync on registers of A and B and a matrix C: the registers of D."""
    start = fragments_of(c)
    y = np.zeros_like(start)
    counts = {"a": len(left), "b": len(right), "c": len(start)}
    first = {"a": 10, "b": 20, "c": 30}
    loads = "".join(f"ld.global.b32 %r{first[n] + i}, [%{n}_g+{128 * i}];" for n in "abc" for i in range(counts[n]))
    operands = ", ".join([names(40, len(start)), *(names(first[n], counts[n]) for n in "abc")])
    stores = "".join(f"st.global.b32 [%y_g+{128 * i}], %r{40 + i};" for i in range(len(start)))
    run(f"{loads} {opcode} {operands}; {stores}", a=left, b=right, c=start, y=y)
    return y


@pytest.mark.parametrize("kind, k, accumulator", CASES, ids=[f"{t}-k{k}-{d}" for t, k, d in CASES])
def test_mma_sync(kind, k, accumulator):
    a, b = (RNG.integers(-8, 9, (n, k)).astype(np.float32).astype(TYPES[kind]) for n in (16, 8))
    c = RNG.integers(-99, 99, (16, 8)).astype(np.float32 if accumulator == "f32" else np.float16)
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator}"
    expected = a.astype(np.float64) @ b.astype(np.float64).T + c
    assert (execute(opcode, spread(a, 16), spread(b, 8), c) == fragments_of(expected.astype(c.dtype))).all()


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [rows, k] as bytes; of 4-bit ones the even k is in the low half."""
    small = (values & ((1 << bits) - 1)).astype(np.uint8)
    return small if bits == 8 else small[:, ::2] | small[:, 1::2] << 4


@pytest.mark.parametrize("end", ["", ".satfinite"])
@pytest.mark.parametrize("a_type, b_type", [("s", "s"), ("s", "u"), ("u", "s"), ("u", "u")])
@pytest.mark.parametrize("bits, m, k", [(8, 8, 16), (8, 16, 16), (8, 16, 32), (4, 8, 32), (4, 16, 32), (4, 16, 64)])
def test_integer_mma_sync(bits, m, k, a_type, b_type, end):
    span = {"s": (-(1 << (bits - 1)), 1 << (bits - 1)), "u": (0, 1 << bits)}
    a, b = RNG.integers(*span[a_type], (m, k)), RNG.integers(*span[b_type], (8, k))
    c = RNG.integers(-99, 99, (m, 8)).astype(np.int32)
    c[0], c[1] = 2**31 - 1, -(2**31)
    sums = a @ b.T + c
    expected = np.clip(sums, -(2**31), 2**31 - 1) if end else sums
    opcode = f"mma.sync.aligned.m{m}n8k{k}.row.col.s32.{a_type}{bits}.{b_type}{bits}.s32{end}"
    found = execute(opcode, spread(packed(a, bits), m), spread(packed(b, bits), 8), c)
    assert (found == fragments_of(expected.astype(np.int32))).all()


def test_mma_sync_with_too_few_registers():
    text = f"\nmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {names(0, 4)}, {names(4, 2)}, {names(8, 2)}, "
    body = "".join(f"mov.b32 %r{i}, 0;" for i in range(16)) + text + f"{names(10, 4)}; // HERE\n"
    fails(UnsupportedInstruction, body, "with 2, 2 and 4 registers, it takes (4, 2, 4)")
