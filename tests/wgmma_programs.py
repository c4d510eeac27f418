"""PTX programs of wgmma for its tests: operands in shared memory and registers, products, and their results.

Operands are small integers, so every product and sum is exact and results are compared bit for bit.
"""

import struct

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import SHARED, aligned, operand_image, operand_layout, ptx

from generator.emulator import Gpu

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
