"""emulator/ops/matrix: fragments of ldmatrix, stmatrix, movmatrix and mma.sync against NumPy."""

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import aligned, fails, run

from generator.emulator import Hazard

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


@pytest.mark.parametrize("kind, k, accumulator", CASES, ids=[f"{t}-k{k}-{d}" for t, k, d in CASES])
def test_mma_sync(kind, k, accumulator):
    a, b = (RNG.integers(-8, 9, (n, k)).astype(np.float32).astype(TYPES[kind]) for n in (16, 8))
    c = RNG.integers(-99, 99, (16, 8)).astype(np.float32 if accumulator == "f32" else np.float16)
    left, right = spread(a, 16), spread(b, 8)
    group, pair = LANES // 4, LANES % 4 * 2
    if accumulator == "f32":
        start = np.array([c[group + r, pair + i] for r in (0, 8) for i in (0, 1)]).view(np.uint32)
    else:
        words = np.ascontiguousarray(c).view(np.uint32)
        start = np.array([words[group + r, LANES % 4] for r in (0, 8)])
    y = np.zeros_like(start)
    counts = {"a": len(left), "b": len(right), "c": len(start)}
    first = {"a": 10, "b": 20, "c": 30}
    loads = "".join(f"ld.global.b32 %r{first[n] + i}, [%{n}_g+{128 * i}];" for n in "abc" for i in range(counts[n]))
    d = names(40, len(start))
    operands = ", ".join([d, *(names(first[n], counts[n]) for n in "abc")])
    stores = "".join(f"st.global.b32 [%y_g+{128 * i}], %r{40 + i};" for i in range(len(start)))
    run(
        f"{loads} mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator} {operands}; {stores}",
        a=left,
        b=right,
        c=start,
        y=y,
    )
    expected = a.astype(np.float64) @ b.astype(np.float64).T + c
    if accumulator == "f32":
        for i, (r, n) in enumerate((r, n) for r in (0, 8) for n in (0, 1)):
            assert (y[i].view(np.float32) == expected[group + r, pair + n]).all()
    else:
        words = np.ascontiguousarray(expected.astype(np.float16)).view(np.uint32)
        assert all((y[i] == words[group + r, LANES % 4]).all() for i, r in enumerate((0, 8)))
