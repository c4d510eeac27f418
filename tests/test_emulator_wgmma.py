"""emulator/ops/wgmma: products of a warpgroup against NumPy, in every operand form, and what may go wrong around them.

Operands are small integers, so every product and sum is exact and results are compared bit for bit.
"""

import struct

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import SHARED, aligned, operand_image, operand_layout, ptx, tensor_map

from generator.emulator import Gpu, Hazard, UnsupportedInstruction

BF16, F16, E4M3, E5M2 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
TF32 = np.float32
S8, U8 = np.int8, np.uint8
NAMES = {S8: "s8", U8: "u8", BF16: "bf16", F16: "f16", TF32: "tf32", E4M3: "e4m3", E5M2: "e5m2"}
SWIZZLE_CODES = {0: 0, 1: 3, 2: 2, 3: 1}  # swizzle none, 32 B, 64 B, 128 B (facts/ptx.md §3.2)
DECLARE = ".reg .b32 %acc<128>, %other<128>, %frag<32>; .reg .pred %one, %zero, %q; .reg .b64 %da, %db, %group;"
SETUP = """setp.eq.u32 %one, 0, 0; setp.ne.u32 %zero, 0, 0; shr.u32 %r150, %tid, 7; cvt.u64.u32 %group, %r150;"""
PROXY = "fence.proxy.async.shared::cta; bar.sync 0;"
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"


def wait(pending: int = 0) -> str:
    return f"wgmma.wait_group.sync.aligned {pending};\n"


def run(body: str, block=128, grid=1, smem=65536, known=None, **arguments):
    text = ptx(SETUP + body, DECLARE, **arguments).replace("sm_100a", "sm_90a")
    gpu = Gpu("sm_90a")
    params = []
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            gpu.add_array(value, name)
        params.append(struct.pack("<Q", value.ctypes.data) if isinstance(value, np.ndarray) else value)
    for name, value in (known or {}).items():
        gpu.add_array(value, name)
    return gpu.launch(gpu.load_ptx(text), "k", (grid, 1, 1), (block, 1, 1), (1, 1, 1), smem, params), text


def fails(error, body: str, *parts: str, **arguments) -> None:
    with pytest.raises(error) as caught:
        run(body, **arguments)
    message = str(caught.value)
    text = ptx(SETUP + body, DECLARE, **{k: v for k, v in arguments.items() if isinstance(v, (np.ndarray, bytes))})
    marked = [n for n, line in enumerate(text.splitlines(), 1) if "// HERE" in line]
    assert not marked or f"PTX line {marked[0]}" in message, message
    for part in parts:
        assert part in message, message


def integers(shape, dtype, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def descriptor(offset: int, lbo: int, sbo: int, swizzle: int) -> int:
    return SHARED + offset >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32 | SWIZZLE_CODES[swizzle] << 62


def halves(values: np.ndarray) -> np.ndarray:
    """[rows, k] of any size as 16-bit units along k: layouts of K-major operands depend on bytes only."""
    return np.ascontiguousarray(values).view(np.uint16)


def vector(prefix: str, count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(first, first + count)) + "}"


class Operands:
    """A [64 · groups, k] and B [n, k] in shared memory, one A a warpgroup, and the text that multiplies them."""

    def __init__(self, n=64, steps=2, dtype=BF16, dtype_b=None, d="f32", a_mn=False, b_mn=False, swizzle=3, groups=1,
                 negate=(1, 1), seed=0):  # fmt: skip
        self.n, self.steps, self.d, self.groups, self.a_mn, self.b_mn = n, steps, d, groups, a_mn, b_mn
        self.negate, self.sixteen = negate, np.dtype(dtype).itemsize == 2
        self.dtype, dtype_b = dtype, dtype_b or dtype
        self.k = steps * 32 // np.dtype(dtype).itemsize
        self.a, self.b = integers((64 * groups, self.k), dtype, seed), integers((n, self.k), dtype_b, seed + 1)
        images = [operand_image(halves(part), a_mn, swizzle) for part in np.split(self.a, groups)]
        self.stride = len(images[0])
        images.append(operand_image(halves(self.b), b_mn, swizzle))
        self.x = aligned(-(-sum(map(len, images)) // 2048) * 2048, np.uint8)
        self.x[: sum(map(len, images))] = np.concatenate(images)
        _, _, lbo, sbo, starts = operand_layout(64, 16 * steps, a_mn, swizzle)
        self.da = [descriptor(start, lbo, sbo, swizzle) for start in starts]
        _, _, lbo, sbo, starts = operand_layout(n, 16 * steps, b_mn, swizzle)
        self.db = [descriptor(groups * self.stride + start, lbo, sbo, swizzle) for start in starts]
        self.opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{self.k // steps}.{d[:3]}.{NAMES[dtype]}.{NAMES[dtype_b]}"
        self.opcode += d[3:]
        self.registers = n // 4 if d == "f16" else n // 2

    def fill(self, fence: str = PROXY) -> str:
        """The threads copy `x` to shared memory."""
        block = 128 * self.groups
        text = "mad.wide.u32 %d10, %tid, 16, %x;\n"
        for i in range(0, len(self.x), 16 * block):
            guard = f"add.u32 %r20, %tid, {i // 16}; setp.lt.u32 %p9, %r20, {len(self.x) // 16};"
            text += f"{guard} @%p9 ld.global.v4.b32 {vector('r', 4, 30)}, [%d10+{i}];\n"
            text += f"@%p9 st.shared.v4.b32 [%s16+{i}], {vector('r', 4, 30)};\n"
        return text + fence

    def step(self, i: int, add: str, acc="acc", registers: bool = False, mark: str = "") -> str:
        tail = f", {add}, {self.negate[0]}, {self.negate[1]}" if self.d[0] == "f" else f", {add}"
        if self.sixteen:
            tail += f", {int(self.b_mn)}" if registers else f", {int(self.a_mn)}, {int(self.b_mn)}"
        a = vector("frag", 4, 4 * i) if registers else "%da"
        text = f"mov.b64 %db, {self.db[i]:#x};"
        if not registers:
            text += f" mad.lo.s64 %da, %group, {self.stride >> 4}, {self.da[i]:#x};"
        return f"{text}\n{self.opcode} {vector(acc, self.registers)}, {a}, %db{tail}; {mark}\n"

    def mmas(self, first: str = "%zero", acc="acc", registers: bool = False) -> str:
        steps = (self.step(i, first if i == 0 else "%one", acc, registers) for i in range(self.steps))
        return FENCE + "".join(steps)

    def fragments(self) -> np.ndarray:
        """A as registers: u32 [threads, 4 · steps] (facts/ptx.md §4)."""
        size = self.a.dtype.itemsize
        per = 4 // size
        thread, step, r, h = np.ix_(range(64 * 2 * self.groups), range(self.steps), range(4), range(per))
        w, lane = thread // 32, thread % 32
        row = 16 * w + lane // 4 + 8 * (r & 1)
        k = step * 32 // size + lane % 4 * per + h + 4 * per * (r >> 1)
        return np.ascontiguousarray(self.a[row, k]).view(np.uint32).reshape(128 * self.groups, 4 * self.steps)

    def load_fragments(self) -> str:
        count = 4 * self.steps
        return f"mad.wide.u32 %d12, %tid, {4 * count}, %f;" + "".join(
            f"ld.global.b32 %frag{i}, [%d12+{4 * i}];" for i in range(count)
        )

    def dump(self, acc="acc") -> str:
        return f"mad.wide.u32 %d11, %tid, {4 * self.registers}, %y;" + "".join(
            f"st.global.b32 [%d11+{4 * i}], %{acc}{i};\n" for i in range(self.registers)
        )

    def output(self) -> np.ndarray:
        return np.full((128 * self.groups, self.registers), 0xFFFFFFFF, np.uint32)

    def matrix(self, y: np.ndarray) -> np.ndarray:
        """D registers [threads, registers] → D [64 · groups, n] (facts/ptx.md §4)."""
        values = y.view({"f32": np.float32, "f16": np.float16, "s32": np.int32}[self.d[:3]])
        thread, i = np.ix_(range(len(y)), range(self.n // 2))
        result = np.full((64 * self.groups, self.n), np.nan, np.float64)
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * ((i >> 1) & 1)
        result[row, 2 * (thread % 4) + (i & 1) + 8 * (i >> 2)] = values
        return result

    def product(self) -> np.ndarray:
        return self.a.astype(np.float32) @ self.b.astype(np.float32).T * self.negate[0] * self.negate[1]

    def multiply(self, body: str | None = None, registers: bool = False, grid: int = 1, **more) -> np.ndarray:
        y = self.output()
        body = self.mmas(registers=registers) + COMMIT + wait() if body is None else body
        load = self.load_fragments() if registers else ""
        more |= {"f": self.fragments()} if registers else {}
        run(self.fill() + load + body + self.dump(), 128 * self.groups, grid, x=self.x, y=y, **more)
        return self.matrix(y)


def zeros(acc: str, count: int) -> str:
    return "".join(f"mov.b32 %{acc}{i}, 0;" for i in range(count))


# -- the product in every form -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("a_mn, b_mn", [(False, False), (False, True), (True, False), (True, True)])
def test_every_major_and_swizzle(a_mn, b_mn, swizzle, dtype):
    operands = Operands(64, 4, dtype, a_mn=a_mn, b_mn=b_mn, swizzle=swizzle)
    assert (operands.multiply() == operands.product()).all()


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("b_mn", [False, True])
def test_a_in_registers(b_mn, swizzle):
    operands = Operands(48, 4, F16, b_mn=b_mn, swizzle=swizzle)
    assert (operands.multiply(registers=True) == operands.product()).all()


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(n):
    for b_mn in (False, True):
        operands = Operands(n, 2, b_mn=b_mn, swizzle=1 + n // 8 % 3, seed=n)
        assert (operands.multiply() == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swizzle", [0, 3])
@pytest.mark.parametrize("a, b", [(TF32, TF32), (E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
def test_tf32_and_fp8(a, b, swizzle, registers):
    operands = Operands(40, 2, a, b, swizzle=swizzle)
    assert (operands.multiply(registers=registers) == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("dtype, other", [(F16, F16), (E4M3, E5M2), (E5M2, E5M2)])
def test_accumulators_in_float16(dtype, other, registers):
    operands = Operands(24, 2, dtype, other, d="f16")
    assert (operands.multiply(registers=registers) == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("a, b", [(S8, S8), (S8, U8), (U8, S8), (U8, U8)])
@pytest.mark.parametrize("d", ["s32", "s32.satfinite"])
def test_integers(a, b, d, registers):
    operands = Operands(48, 3, a, b, d=d)
    rng = np.random.default_rng(4)
    for part in (operands.a, operands.b):
        part[:] = rng.integers(np.iinfo(part.dtype).min, np.iinfo(part.dtype).max + 1, part.shape)
    images = [operand_image(halves(v), False, 3) for v in (operands.a, operands.b)]
    operands.x[: sum(map(len, images))] = np.concatenate(images)
    product = operands.a.astype(np.int64) @ operands.b.astype(np.int64).T
    assert (operands.multiply(registers=registers) == product).all()
    for first in (2**31 - 1, -(2**31)):
        start = "".join(f"mov.b32 %acc{i}, {first & 0xFFFFFFFF:#x};" for i in range(24))
        body = start + operands.mmas("%one", registers=registers) + COMMIT + wait()
        total = np.full(product.shape, first)
        for k in range(0, operands.k, 32):
            total = total + operands.a[:, k : k + 32].astype(np.int64) @ operands.b[:, k : k + 32].astype(np.int64).T
            total = np.clip(total, -(2**31), 2**31 - 1) if d != "s32" else total.astype(np.int32).astype(np.int64)
        assert (operands.multiply(body, registers=registers) == total).all()


def test_tf32_drops_the_low_bits_of_the_mantissa():
    operands = Operands(8, 1, TF32)
    expected = operands.product()
    operands.x.view(np.uint32)[:] |= (operands.x.view(np.uint32) != 0) * np.uint32(0x1FFF)
    assert (operands.multiply() == expected).all()


def test_a_float16_accumulator_is_rounded_by_every_instruction():
    operands = Operands(8, 4, F16, d="f16")
    operands.a[:], operands.b[:] = 0, 0
    operands.a[:, ::16], operands.b[:, ::16] = 1, 1
    operands.x[:] = 0
    images = [operand_image(halves(v), False, 3) for v in (operands.a, operands.b)]
    operands.x[: sum(map(len, images))] = np.concatenate(images)
    start = "".join(f"mov.b32 %acc{i}, 0x68006800;" for i in range(2))  # 2048: a step of 1 is rounded away
    result = operands.multiply(start + operands.mmas("%one") + COMMIT + wait())
    assert (result == 2048).all()


@pytest.mark.parametrize("negate", [(1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("registers", [False, True])
def test_negated_operands(negate, registers):
    operands = Operands(16, 2, negate=negate)
    assert (operands.multiply(registers=registers) == operands.product()).all()
    start = "".join(f"mov.b32 %acc{i}, 0f41200000;" for i in range(8))
    body = start + operands.mmas("%one", registers=registers) + COMMIT + wait()
    assert (operands.multiply(body, registers=registers) == operands.product() + 10).all()


def test_warpgroups_with_an_a_each_and_several_ctas():
    operands = Operands(64, 4, groups=3)
    assert (operands.multiply(grid=5) == operands.product()).all()


def test_warpgroups_that_read_different_b():
    """The upper warpgroup multiplies by the second half of the k extent only."""
    operands = Operands(32, 4, groups=2)
    low, high = operands.db[0], operands.db[2]
    pick = f"mov.b64 %db, {low:#x}; setp.ge.u32 %q, %tid, 128; @%q add.s64 %db, %db, {high - low};"
    step = operands.step(0, "%zero").replace(f"mov.b64 %db, {low:#x};", pick)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    expected = np.concatenate([a[:64, :16] @ b[:, :16].T, a[64:, :16] @ b[:, 32:48].T])
    assert (operands.multiply(FENCE + step + COMMIT + wait(), grid=2) == expected).all()


def test_ctas_that_read_different_operands():
    """CTA 1 takes the later k step of both; each CTA adds into its own rows."""
    operands = Operands(16, 4, groups=2)
    da, db = (d[2] - d[0] for d in (operands.da, operands.db))
    move = f"mul.wide.u32 %d1, %cta, {da}; add.s64 %da, %da, %d1; mul.wide.u32 %d1, %cta, {db}; add.s64 %db, %db, %d1;"
    text = operands.step(0, "%zero").replace("\nwgmma", f"{move}\nwgmma")
    y = np.zeros((2, *operands.output().shape), np.uint32)
    shift = f"mad.wide.u32 %d11, %tid, {4 * operands.registers}, %y; mul.wide.u32 %d1, %cta, {y[0].nbytes};"
    dump = operands.dump().replace(f"mad.wide.u32 %d11, %tid, {4 * operands.registers}, %y;",
                                   f"{shift} add.s64 %d11, %d11, %d1;")  # fmt: skip
    run(operands.fill() + FENCE + text + COMMIT + wait() + dump, 256, 2, x=operands.x, y=y)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    for cta, k in ((0, slice(0, 16)), (1, slice(32, 48))):
        assert (operands.matrix(y[cta]) == a[:, k] @ b[:, k].T).all()


def test_only_one_of_two_warpgroups_multiplies():
    operands = Operands(16, 2, groups=2)
    guarded = operands.mmas().replace("\nwgmma.mma", "\n@%q wgmma.mma")
    body = zeros("acc", 8) + "setp.ge.u32 %q, %tid, 128;" + guarded + COMMIT + wait()
    assert (operands.multiply(body)[:64] == 0).all()
    assert (operands.multiply(body)[64:] == operands.product()[64:]).all()


# -- accumulation, groups, registers -----------------------------------------------------------------------------------
def test_scale_d_false_needs_no_accumulator_and_true_adds():
    operands = Operands(16, 2)
    assert (operands.multiply() == operands.product()).all()
    twice = operands.mmas() + COMMIT + operands.mmas("%one") + COMMIT + wait()
    assert (operands.multiply(twice) == 2 * operands.product()).all()
    runtime = "setp.gt.u32 %q, %cta, 7;" + operands.mmas("%q") + COMMIT + wait()
    assert (operands.multiply(zeros("acc", 8) + runtime) == operands.product()).all()
    again = operands.mmas() + operands.mmas() + COMMIT + wait()  # the second product replaces the first
    assert (operands.multiply(again) == operands.product()).all()


def test_adding_to_an_accumulator_that_was_never_written():
    operands = Operands(16, 1)
    body = operands.fill() + FENCE + operands.step(0, "%one", mark="// HERE") + COMMIT + wait()
    fails(Hazard, body, "%acc0", "never written", x=operands.x)


def test_accumulators_carried_and_scaled_around_a_loop():
    operands = Operands(16, 2)
    scale = "".join(f"add.f32 %acc{i}, %acc{i}, %acc{i};" for i in range(8))
    body = zeros("acc", 8) + f"mov.u32 %r1, 0; LOOP: {scale}\n" + operands.mmas("%one") + COMMIT + wait()
    body += "add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 3; @%p1 bra LOOP;"
    assert (operands.multiply(body) == 7 * operands.product()).all()


def test_a_copy_of_the_accumulator_keeps_its_old_value():
    """Moves only rename in the translator; the wait writes the register's storage."""
    operands = Operands(16, 1)
    start = "".join(f"mov.b32 %acc{i}, 0f3F800000;" for i in range(8)) + "bar.sync 0;"
    copies = "".join(f"mov.b32 %other{i}, %acc{i};" for i in range(8))
    scale = "".join(f"add.f32 %acc{i}, %acc{i}, %acc{i};" for i in range(8))
    joined = "".join(f"add.f32 %acc{i}, %acc{i}, %other{i};" for i in range(8))
    for change, old in (("", 1), (scale, 2)):
        body = start + copies + change + operands.mmas("%one") + COMMIT + wait() + joined
        assert (operands.multiply(body) == operands.product() + old + 1).all()


def test_accumulators_that_share_registers_in_another_order():
    operands = Operands(16, 1)
    reverse = "{" + ", ".join(f"%acc{i}" for i in (4, 5, 6, 7, 0, 1, 2, 3)) + "}"
    second = operands.step(0, "%one").replace(vector("acc", 8), reverse)
    body = operands.mmas() + COMMIT + wait() + FENCE + second + COMMIT + wait()
    product = operands.product()
    assert (operands.multiply(body) == product + np.roll(product, 8, axis=1)).all()


def test_a_wait_leaves_the_younger_groups_pending():
    operands = Operands(16, 2)
    two = operands.mmas() + COMMIT + operands.mmas(acc="other") + COMMIT
    assert (operands.multiply(two + wait(1) + "bar.sync 0;" + operands.dump() + wait()) == operands.product()).all()
    body = operands.fill() + two + wait(1) + "bar.sync 0;\nadd.u32 %r1, %other3, 0; // HERE\n" + wait()
    fails(Hazard, body, "touches register %other3", "wgmma in flight", x=operands.x)
    sums = "".join(f"add.f32 %acc{i}, %acc{i}, %other{i};" for i in range(8))
    assert (operands.multiply(two + wait(1) + wait(0) + sums) == 2 * operands.product()).all()


def test_a_wait_covers_only_what_was_committed():
    operands = Operands(16, 1)
    body = operands.fill() + operands.mmas() + wait() + "\nadd.u32 %r1, %acc0, 0; // HERE\n"
    fails(Hazard, body, "touches register %acc0", x=operands.x)


# -- what may go wrong -------------------------------------------------------------------------------------------------
ONE = Operands(16, 1)
QUIET = FENCE + ONE.step(0, "%zero")


@pytest.mark.parametrize("between", ["", COMMIT, COMMIT + wait(1), "bar.sync 0;"])
@pytest.mark.parametrize(
    "use", ["add.u32 %r1, %acc7, 0;", "mov.b32 %acc7, 0;", "add.u32 %acc7, %tid, 0;", "st.shared.b32 [%s4], %acc7;"]
)
def test_the_accumulator_may_not_be_touched_before_the_wait(between, use):
    body = ONE.fill() + QUIET + between + f"\n{use} // HERE\n" + COMMIT + wait()
    fails(Hazard, body, "touches register %acc7", "accumulator register of a wgmma in flight", x=ONE.x)


def test_registers_of_a_may_not_be_changed_before_the_wait():
    text = ONE.fill() + ONE.load_fragments() + ONE.mmas(registers=True) + COMMIT
    more = {"x": ONE.x, "f": ONE.fragments()}
    fails(Hazard, text + "\nmov.b32 %frag2, 0; // HERE\n" + wait(), "touches register %frag2", "operand A", **more)
    again = ONE.step(0, "%zero", "other", True)  # another wgmma may read the same registers
    run(text + again + COMMIT + wait() + "mov.b32 %frag2, 0;", **more)


def test_registers_of_a_may_not_be_an_accumulator_in_flight():
    text = ONE.fill() + QUIET + ONE.step(0, "%zero", "other", True, "// HERE").replace("%frag", "%acc")
    fails(Hazard, text + COMMIT + wait(), "touches register %acc0", x=ONE.x)


def test_two_accumulators_in_flight_may_not_overlap():
    shifted = ONE.step(0, "%zero", mark="// HERE").replace(vector("acc", 8), vector("acc", 8, 4))
    fails(Hazard, ONE.fill() + QUIET + shifted + COMMIT + wait(), "uses register %acc4", x=ONE.x)


def test_registers_need_a_fence_after_they_were_written():
    fails(Hazard, ONE.fill() + ONE.step(0, "%zero", mark="// HERE"), "%acc0", "no wgmma.fence since", x=ONE.x)
    change = "add.u32 %acc5, %tid, 0;"
    add = ONE.step(0, "%one", mark="// HERE")
    for between in (change, change + "bar.sync 0;", change + "bar.sync 0; bar.sync 0;"):
        body = ONE.fill() + QUIET + COMMIT + wait() + between + add
        fails(Hazard, body, "uses register %acc5", "no wgmma.fence since", x=ONE.x)
        run(body.replace(add, FENCE + add + COMMIT + wait()), x=ONE.x)
    run(ONE.fill() + QUIET + COMMIT + wait() + add + COMMIT + wait(), x=ONE.x)  # only wgmma used the accumulator
    read = "add.u32 %r1, %acc5, 0;"  # and may not be overwritten before it was read
    fails(Hazard, ONE.fill() + QUIET + COMMIT + wait() + read + ONE.step(0, "%zero", mark="// HERE"), "%acc5", x=ONE.x)
    for set_to, fine in (("mov.b32 %acc4, 0; mov.b32 %acc5, %acc4;", True), ("mov.b32 %acc5, %tid;", False)):
        body = ONE.fill() + QUIET + COMMIT + wait() + FENCE + set_to + add + COMMIT + wait()
        if fine:  # compilers move a constant below the fence: a warning
            run(body, x=ONE.x)
        else:
            fails(Hazard, body, "uses register %acc5", "no wgmma.fence since", x=ONE.x)
    text = ONE.fill() + FENCE + ONE.load_fragments() + ONE.step(0, "%zero", registers=True, mark="// HERE")
    fails(Hazard, text, "uses register %frag0", "no wgmma.fence since", x=ONE.x, f=ONE.fragments())


def test_operands_need_the_proxy_fence():
    fails(Hazard, ONE.fill("bar.sync 0;") + QUIET, "operand A of CTA (0, 0, 0)", "fence.proxy.async", x=ONE.x)
    fails(Hazard, ONE.fill("bar.sync 0;") + ONE.load_fragments() + ONE.mmas(registers=True), "operand B of CTA",
          "fence.proxy.async", x=ONE.x, f=ONE.fragments())  # fmt: skip


def test_operands_that_were_never_written():
    far = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] + (32768 >> 4):#x}")
    fails(Hazard, ONE.fill() + far, "operand B of CTA (0, 0, 0)", "never written", x=ONE.x)


def test_operands_outside_shared_memory():
    fails(Hazard, QUIET, "descriptor of A reaches shared offsets", "the CTA has 256 bytes", smem=256)


def test_an_operand_that_threads_overwrite_before_the_wait():
    store = "\nst.shared.b32 [%s4], %tid; // HERE\n"
    fails(Hazard, ONE.fill() + QUIET + COMMIT + store + wait(), "operand A of a wgmma in flight", x=ONE.x)
    at = ONE.stride
    store = f"\nst.shared.b32 [%s4+{at}], %tid; // HERE\n"
    fails(Hazard, ONE.fill() + QUIET + COMMIT + store + wait(), "operand B of a wgmma in flight", x=ONE.x)
    store = "st.shared.b32 [%s4], %tid;"
    assert (ONE.multiply(QUIET + COMMIT + wait() + store) == ONE.product()).all()


def test_an_operand_may_be_overwritten_once_its_own_warpgroup_has_waited():
    """What the other warpgroup still multiplies is held, what this one has multiplied no longer."""
    operands = Operands(16, 1, groups=2)
    split = operands.mmas() + COMMIT + "setp.ge.u32 %q, %tid, 128; @%q bra LATE;\n"
    late = "\nLATE:\n" + wait()
    for held, side in ((operands.stride, "A"), (2 * operands.stride, "B")):
        store = f"\nst.shared.b32 [%s4+{held}], %tid; // HERE\n"
        body = operands.fill() + split + wait() + store + late
        fails(Hazard, body, f"operand {side} of a wgmma in flight", x=operands.x, block=256)
    store = "st.shared.b32 [%s4], %tid;\n"
    assert (operands.multiply(split + wait() + store + late) == operands.product()).all()
    early = operands.fill() + split + store.replace(";", "; // HERE") + wait() + late
    fails(Hazard, early, "operand A of a wgmma in flight", x=operands.x, block=256)


def test_an_operand_that_tma_overwrites_before_the_wait():
    source = aligned((8, 64), BF16)
    load = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    bar = len(ONE.x)
    begin = f"""setp.eq.u32 %p1, %tid, 0; mov.u32 %r149, 0; @%p1 mbarrier.init.shared.b64 [%s+{bar}], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+{bar}], 1024;"""
    copy = f"\n@%p1 {load} [%s], [%m, {{%r149, %r149}}], [%s+{bar}]; // HERE\n"
    more = {"m": tensor_map(source, (64, 8), 3), "known": {"source": source}}
    text = ONE.fill() + begin + QUIET + COMMIT
    fails(Hazard, text + copy + wait(), "operand A of a wgmma in flight", x=ONE.x, **more)
    fails(Hazard, ONE.fill() + begin + copy.replace("// HERE", "") + QUIET, "operand A", "TMA load", x=ONE.x, **more)
    assert (ONE.multiply(begin + QUIET + COMMIT + wait() + copy, **more) == ONE.product()).all()


def test_a_warp_that_exits_with_a_wgmma_in_flight():
    marked = QUIET.replace(", 0, 0;", ", 0, 0; // HERE")
    for end in ("", COMMIT, COMMIT + wait(1)):
        fails(Hazard, ONE.fill() + marked + end, "wgmma.wait_group is missing", x=ONE.x)


def test_part_of_a_warp():
    guarded = QUIET.replace("\nwgmma.mma", "\n@%q wgmma.mma").replace(", 0, 0;", ", 0, 0; // HERE")
    fails(Hazard, ONE.fill() + "setp.ne.u32 %q, %tid, 5;" + guarded, "all 32 lanes must converge", x=ONE.x)


def test_lanes_that_disagree():
    for register, what in (("%da", "descriptors of A"), ("%db", "descriptors of B")):
        odd = f"cvt.u64.u32 %d1, %tid; add.s64 {register}, {register}, %d1;"
        text = QUIET.replace("\nwgmma.mma", f"{odd}\nwgmma.mma")
        fails(Hazard, ONE.fill() + text, f"different {what}", x=ONE.x)
    body = zeros("acc", 8) + "setp.ne.u32 %q, %tid, 5;" + FENCE + ONE.step(0, "%q")
    fails(Hazard, ONE.fill() + body, "different values of scale-d", x=ONE.x)


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 46, 47, 48, 52, 61])
def test_reserved_bits_of_the_descriptor(bit):
    text = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] | 1 << bit:#x}")
    fails(Hazard, ONE.fill() + text, "matrix descriptor", "reserved bit", x=ONE.x)


def test_a_base_offset_is_refused():
    text = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] | 1 << 50:#x}")
    fails(UnsupportedInstruction, ONE.fill() + text, "base offset", x=ONE.x)


def test_operands_that_do_not_fit_the_opcode():
    wrong = QUIET.replace(vector("acc", 8), vector("acc", 4))
    fails(Hazard, ONE.fill() + wrong, "D has 4 registers, N = 16 takes 8", x=ONE.x)
    wrong = QUIET.replace("1, 1, 0, 0;", "1, 1, 0;")
    fails(UnsupportedInstruction, ONE.fill() + wrong, "1 transpose immediates, it takes 2", x=ONE.x)
    wrong = QUIET.replace("1, 1, 0, 0;", "2, 1, 0, 0;")
    fails(Hazard, ONE.fill() + wrong, "imm-scale must be 1 or -1", x=ONE.x)
    wrong = QUIET.replace("m64n16k16", "m64n12k16")
    fails(UnsupportedInstruction, ONE.fill() + wrong, "does not know 'wgmma.mma_async.sync.aligned.m64n12k16", x=ONE.x)
