"""Hot blocks in machine code: the same bits as the interpreter, whose functions they are traced from."""

import ctypes

import numpy as np
import pytest
from llvmlite import ir
from ptx_kernels import run

import generator
from generator.emulator import gpu, hot
from generator.emulator.errors import LaunchError
from generator.emulator.formats import hardware_nan
from generator.emulator.lower import RegionWriter
from generator.emulator.symbolic import Graph, NotTraceable, Symbol
from generator.emulator.table import TABLE
from generator.emulator.values import DTYPE
from generator.run import run_observed
from generator.verify import random_inputs

NAMES = """
testp.infinite.f32 testp.normal.f32
add.f32 sub.rn.f32 mul.f32 fma.rn.f32 fma.rn.ftz.f32 add.rm.f32 sub.rp.f32 fma.rz.f32 mul.ftz.f32 add.sat.f32
neg.f32 abs.f32 max.f32 min.f32 max.NaN.f32 min.ftz.f32 max.xorsign.abs.f32 ex2.approx.ftz.f32 ex2.approx.f32
lg2.approx.ftz.f32 rcp.approx.ftz.f32 rsqrt.approx.f32 sqrt.rn.f32 div.rn.f32 tanh.approx.f32 sin.approx.f32
copysign.f32 cvt.rn.bf16x2.f32 cvt.rn.f16x2.f32 cvt.rn.bf16.f32 cvt.f32.bf16 cvt.f32.f16 cvt.rni.s32.f32
cvt.rzi.u32.f32 cvt.rn.f32.s32 cvt.rn.f32.u32 cvt.s64.s32 cvt.u32.u64 cvt.u16.u32 cvt.s32.s16 cvt.sat.u8.s32
cvt.rn.f64.s32 add.f64 add.u32 sub.s32 mul.lo.u32 mul.hi.u32 mul.hi.s32 mul.wide.s32 mul.wide.u16 mad.lo.s32
mad.wide.u32 min.s32 max.u32 max.s16 neg.s32 abs.s32 and.b32 or.b64 xor.b32 not.b32 not.pred and.pred shl.b32
shl.b16 shl.b64 shr.u32 shr.s32 shr.s64 shr.u16 shf.l.wrap.b32 shf.r.clamp.b32 prmt.b32 bfe.u32 bfi.b32 selp.f32
selp.b32 selp.b64 setp.lt.f32 setp.neu.f32 setp.ltu.f32 setp.ge.s32 setp.ne.and.b32 set.gt.u32.f32 slct.f32.s32
popc.b32
"""
SPECIAL = [0, 0x80000000, 1, 0x807FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
SPECIAL += [0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0xFFFFFFFF, 31, 32, 33, 63, 64, 0x4F000000, 0xCF000000, 0x34000000]
ROWS = 12


def operands(kind: str, seed: int) -> np.ndarray:
    """[ROWS, 32] values of a kind: half of them special, half random."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, (ROWS, 32), np.uint64)
    chosen = np.array(SPECIAL, np.uint64)[rng.integers(0, len(SPECIAL), (ROWS, 32))]
    bits = np.where(rng.random((ROWS, 32)) < 0.5, chosen, bits)
    if kind == "d":
        return np.where(rng.random((ROWS, 32)) < 0.5, bits.view(np.float64), rng.standard_normal((ROWS, 32)))
    if kind == "p":
        return bits & np.uint64(1) != 0
    dtype = np.dtype(DTYPE[kind])
    return bits.astype(f"u{dtype.itemsize}").view(dtype)


def arguments(entry) -> list[np.ndarray]:
    """Its operands; immediates stay out."""
    kinds = [k for k in entry.sources if k[0] != "?"]
    return [operands("f" if kind == "2" else kind, 7 * i + len(entry.name)) for i, kind in enumerate(kinds)]


def execute(symbols: dict[str, Symbol], inputs: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Compile one region that computes every symbol, and run it on the inputs (by node number)."""
    module, loops = ir.Module("test"), {}
    nodes = {s.number: s for s in symbols.values()}
    units = {number: 2 * i for i, number in enumerate(dict.fromkeys([*inputs, *nodes]))}
    writer = RegionWriter(module, "region", loops, units)
    writer.write([(node, "scratch", None) for node in nodes.values()], lambda node: False)
    scratch = np.zeros((2 * len(units), ROWS * 128), np.uint8)
    for number, value in inputs.items():
        scratch.reshape(-1)[units[number] * ROWS * 128 :][: value.nbytes] = (
            np.ascontiguousarray(value).view(np.uint8).ravel()
        )
    found = {symbol: hot.inner_loop(*loop) for symbol, loop in loops.items()}
    work = hot._work_memory([data for _, data in found.values()])
    engine = hot._load(hot._assemble(str(module)), {symbol: function for symbol, (function, _) in found.items()})
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 5)(engine.get_function_address("region"))
    rows = np.arange(ROWS, dtype=np.int32)
    function(ROWS, rows.ctypes.data, None, scratch.ctypes.data, None, work.ctypes.data)
    flat, results = scratch.reshape(-1), {}
    for name, symbol in symbols.items():
        size = symbol.dtype.itemsize * 32 * ROWS
        results[name] = flat[units[symbol.number] * ROWS * 128 :][:size].view(symbol.dtype).reshape(ROWS, 32)
    return results


def same(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Equal bits, or both NaN (PTX leaves its payload open)."""
    if ours.dtype.kind == "f":
        bits = f"u{ours.dtype.itemsize}"
        return (ours.view(bits) == theirs.view(bits)) | np.isnan(ours) & np.isnan(theirs)
    return ours == theirs


def test_traced_instructions_give_the_bits_of_the_interpreter():
    graph, symbols, inputs, expected = Graph(), {}, {}, {}
    with np.errstate(all="ignore"):
        for name in NAMES.split():
            entry = TABLE[name]
            values = arguments(entry)
            nodes = [graph.node("input", v.dtype, extra=(name, i)) for i, v in enumerate(values)]
            symbols[name] = entry.run(*nodes)
            inputs |= {node.number: value for node, value in zip(nodes, values, strict=True)}
            expected[name] = np.broadcast_to(entry.run(*values), (ROWS, 32))
    results = execute(symbols, inputs)
    wrong = {name: int((~same(results[name], expected[name])).sum()) for name in symbols}
    assert not {name: n for name, n in wrong.items() if n}
    assert all(results[name].dtype == expected[name].dtype for name in symbols)


def test_the_bits_of_a_computed_nan():
    graph, x = Graph(), operands("f", 3)
    node = graph.node("input", np.float32, extra="x")
    bits = execute({"bits": hardware_nan(node)}, {node.number: x})["bits"]
    assert np.isnan(x).any() and (bits == np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32))).all()


@pytest.mark.parametrize(
    ("what", "expression"),
    [
        ("decision", lambda x: x if x > 0 else -x),
        ("reduce", lambda x: np.add.reduce(x)),
        ("frexp", lambda x: np.frexp(x)[0]),
        ("array", lambda x: x + np.arange(3, dtype=np.float32)),
        ("view", lambda x: x.view(np.uint16)),
    ],
)
def test_what_is_not_elementwise_is_not_traced(what, expression):
    with pytest.raises(NotTraceable, match=what):
        expression(Graph().node("input", np.float32, extra="x"))


# -- whole kernels -----------------------------------------------------------------------------------------------------
@pytest.fixture
def native(monkeypatch):
    """Choose BESPOKE_NATIVE; programs are translated anew."""

    def choose(mode, folder=None):
        monkeypatch.setenv("BESPOKE_NATIVE", mode)
        if folder is not None:
            monkeypatch.setenv("BESPOKE_CACHE", str(folder))
        gpu._translate.cache_clear()

    yield choose
    gpu._translate.cache_clear()


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_a_kernel_gives_the_same_bits(native, strict):
    kernel = generator.build(head_dim=16)
    inputs = random_inputs("bf16", (1, 1, 1, 130, 260), 16, 16, seed=3)
    outputs = []
    for mode in ("off", "always"):
        native(mode)
        observed = run_observed(kernel.binary, *inputs, strict=strict)
        outputs.append([output.array.tobytes() for output in observed.outputs])
    assert outputs[0] == outputs[1]


BODY = """mov.u32 %r1, 0; mov.b32 %r2, 0f3F800000;
LOOP: ld.global.b32 %r3, [%x_g]; st.shared.b32 [%s4], %r3; ld.shared.b32 %r4, [%s4];
add.f32 %r2, %r2, %r4; mul.f32 %r5, %r2, 0f3F000000; ex2.approx.ftz.f32 %r6, %r5; add.f32 %r7, %r6, %r4;
fma.rn.f32 %r8, %r7, %r6, %r2; max.f32 %r9, %r8, %r7; sub.f32 %r10, %r9, %r2; cvt.rn.bf16x2.f32 %r11, %r9, %r10;
shl.b32 %r12, %r11, 3; xor.b32 %r13, %r12, %r11; setp.lt.f32 %p2, %r8, %r9; selp.b32 %r14, %r13, %r12, %p2;
@%p2 add.u32 %r14, %r14, 5; st.global.b32 [%y_g], %r14;
add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 4; @%p1 bra LOOP;"""


def values(mode=None) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(5).standard_normal(96).astype(np.float32), np.zeros(96, np.uint32)


def test_a_loop_with_effects_guards_and_memory(native):
    results = []
    for mode in ("off", "always"):
        native(mode)
        x, y = values()
        run(BODY, block=96, x=x, y=y)
        results.append(y)
    assert results[0].any()
    np.testing.assert_array_equal(*results)


def test_a_block_that_two_threads_compile_stays_one(native, monkeypatch):
    """The first one's work memory is in the arguments that machines keep: it must outlive the second's arrival."""
    compile_block, seen = hot.HotBlocks._native, []

    def twice(self, block):
        first = compile_block(self, block)
        kept = self.compiled.get(block)
        assert compile_block(self, block) is first and self.compiled.get(block) is kept
        seen.append(block)
        return first

    monkeypatch.setattr(hot.HotBlocks, "_native", twice)
    native("always")
    x, y = values()
    run(BODY, block=96, x=x, y=y)
    assert seen and y.any()


def test_code_is_kept_on_disk_and_a_damaged_entry_is_made_anew(native, tmp_path, monkeypatch):
    made = []
    assemble = hot._assemble
    monkeypatch.setattr(hot, "_assemble", lambda text: made.append(text) or assemble(text))
    monkeypatch.setattr(hot, "SECONDS_A_LINE", 0.0)  # everything is hot

    def result() -> bytes:
        native("auto", tmp_path)
        x, y = values()
        run(BODY, block=96, x=x, y=y)
        return y.tobytes()

    first = result()
    (folder,) = (tmp_path / "native").iterdir()
    entries = sorted(folder.iterdir())
    assert entries and len(made) == len(entries)
    assert result() == first and len(made) == len(entries)
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-1])
    assert result() == first and len(made) == 2 * len(entries)
    assert not [name for name in folder.iterdir() if name.name.startswith(".")]


def test_a_cache_that_cannot_be_written_is_no_cache(native, tmp_path, monkeypatch):
    monkeypatch.setattr(hot, "SECONDS_A_LINE", 0.0)
    (tmp_path / "native").write_text("a file where the folder should be")
    native("auto", tmp_path)
    x, y = values()
    run(BODY, block=96, x=x, y=y)
    assert y.any()


def test_old_programs_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hot, "PROGRAMS_KEPT", 3)
    for number in range(5):
        hot._write(tmp_path / f"program {number}" / "0", hot.Native("", "", [], 0, {}, 0), b"")
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unknown_mode_is_refused(native):
    native("perhaps")
    with pytest.raises(LaunchError, match="BESPOKE_NATIVE is 'perhaps': auto, off or always"):
        run(BODY, block=96, x=values()[0], y=values()[1])


def test_loops_are_numpys_own():
    x = np.linspace(-3, 3, 16, dtype=np.float32)
    y = np.zeros(16, np.float32)
    function, data = hot.inner_loop("exp2", "ff")
    pointers = (ctypes.c_void_p * 2)(x.ctypes.data, y.ctypes.data)
    sizes = (ctypes.c_int64 * 1)(16), (ctypes.c_int64 * 2)(4, 4)
    ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(function)(pointers, *sizes, data)
    np.testing.assert_array_equal(y, np.exp2(x))
    with pytest.raises(KeyError, match="exp2 has no loop for ii"):
        hot.inner_loop("exp2", "ii")
