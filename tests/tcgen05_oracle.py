"""tcgen05 kernels for the tests, and an oracle that places every element by itself, from the ISA's tables.

A case fills shared memory with `x` and tensor memory with `t`, runs `body` in thread 0 of the first CTA, waits for its
commit and returns tensor memory. facts/ptx.md §2.2 (data paths), §3.1 to §3.3 (descriptors, canonical layouts).
"""

import struct

import ml_dtypes
import numpy as np
from ptx_kernels import SHARED, aligned, ptx

from generator.emulator import Gpu

DTYPE = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn, "u8": np.uint8, "s8": np.int8,
}  # fmt: skip
WIDTH = {"f16": 16, "bf16": 16, "tf32": 32, "e2m3": 6, "e3m2": 6, "e2m1": 4}
CODES = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5, "u8": 0, "s8": 1}
RESULT = {"f16": 0, "f32": 1, "s32": 2}
LAYOUT = {0: 0, 1: 6, 2: 4, 3: 2, "atom": 1}  # swizzle none, 32 B, 64 B, 128 B, 128 B with 32-byte atoms


def bits_of(values: np.ndarray, form: str) -> np.ndarray:
    """Values → unsigned integers that hold their bits."""
    typed = np.asarray(values).astype(DTYPE[form])
    return typed.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[typed.dtype.itemsize]).astype(np.int64)


class Tile:
    """One operand of one MMA in shared memory: [rows, k] values, their image and their descriptor.

    `packed`: 4-bit elements two to a byte (mxf4); narrow ones stand sixteen packed in 16 bytes otherwise.
    """

    def __init__(self, values: np.ndarray, form: str, mn_major=False, swizzle=0, packed=False):
        self.values, self.form, self.mn_major, self.swizzle, self.packed = values, form, mn_major, swizzle, packed
        rows, self.k = values.shape
        width = WIDTH.get(form, 8)
        size = max(width // 8, 1)
        span = 16 << (swizzle if isinstance(swizzle, int) else 3)
        per = 16 // size
        if not mn_major and swizzle == 0:
            self.sbo, self.lbo = 128, rows * 16
        elif not mn_major:
            self.sbo, self.lbo = 8 * span, 16
        elif swizzle == 0:
            self.sbo, self.lbo = 128, rows // per * 128
        elif swizzle == "atom":
            self.sbo, self.lbo = 512, 1024
        else:
            self.sbo, self.lbo = 8 * span, self.k // 8 * 8 * span
        self.image = np.zeros(65536, np.uint8)
        bits = bits_of(values, form)
        mn, k = np.indices(values.shape)
        if width < 8:
            whole = k * 4 if packed else k // 16 * 128 + k % 16 * width
            byte, shift = whole // 8, whole % 8
        else:
            byte, shift = k * size, 0 * k
        for i in range(size if width >= 8 else 2):
            parts = bits << shift >> 8 * i & 0xFF
            at = self.address(mn, k, byte + i, per, size, span)[parts != 0]
            np.bitwise_or.at(self.image, at, parts[parts != 0].astype(np.uint8))
        last = int(self.address(mn, k, byte, per, size, span).max())
        self.image = self.image[: (last // 1024 + 1) * 1024]

    def address(self, mn, k, byte, per: int, size: int, span: int):
        """Offset of byte `byte` of row `mn`'s k extent (K-major), or of byte `byte` - k · size of an element."""
        if not self.mn_major and self.swizzle == 0:
            return mn % 8 * 16 + mn // 8 * self.sbo + byte // 16 * self.lbo + byte % 16
        rest = byte - k * size
        if not self.mn_major:
            linear = mn % 8 * span + mn // 8 * self.sbo + byte
        elif self.swizzle == 0:
            return mn % per * size + mn // per * self.sbo + k % 8 * 16 + k // 8 * self.lbo + rest
        elif self.swizzle == "atom":
            linear = mn % 32 * 4 + mn // 32 * self.lbo + k % 4 * 128 + k // 4 * self.sbo + rest
            return linear ^ (linear >> 7 & 3) << 5
        else:
            wide = span // size
            linear = mn % wide * size + mn // wide * self.lbo + k % 8 * span + k // 8 * self.sbo + rest
        return linear ^ linear >> 3 & ((1 << self.swizzle) - 1) << 4

    def descriptor(self, offset: int) -> int:
        start = SHARED + offset >> 4
        return start | self.lbo >> 4 << 16 | self.sbo >> 4 << 32 | 1 << 46 | LAYOUT[self.swizzle] << 61


def instruction(m, n, a, b, d="f32", a_mn=False, b_mn=False, negate=(0, 0), saturate=0) -> int:
    types = RESULT[d] << 4 | CODES[a] << 7 | CODES[b] << 10
    return types | saturate << 3 | negate[0] << 13 | negate[1] << 14 | a_mn << 15 | b_mn << 16 | n << 14 | m << 20


def scaled_instruction(m, n, a, b, scale="ue8m0", sf_a=0, sf_b=0, packed=False) -> int:
    types = (1, 1) if packed else (CODES[a], CODES[b])
    fields = sf_b << 4 | types[0] << 7 | types[1] << 10 | n << 14 | (scale == "ue8m0") << 23
    return fields | m << 20 | sf_a << 29


def place(layout: str, m: int, n: int, rank: int, row, column, half: int = 0):
    """Lane and column of D's elements in the CTA of this rank, and which of them it holds. facts/ptx.md §2.2."""
    everywhere = row >= 0
    if layout == "D":
        return row, column, everywhere
    if layout == "A":
        return row - 128 * rank, column, row // 128 == rank
    if layout == "B":
        return row % 64 + 64 * (column // (n // 2)), column % (n // 2), row // 64 == rank
    if layout == "E":
        return row + 64 * (column // (n // 2)), column % (n // 2), everywhere
    if layout == "F":
        return row % 16 + 32 * (row // 16) + 16 * half, column, everywhere
    assert layout == "G"
    return row + 32 * (column // (n // 4)), column % (n // 4), everywhere


def encode(values: np.ndarray, form: str) -> np.ndarray:
    """Numbers as D holds them, in the low bits of a column: u32."""
    if form == "s32":
        return np.asarray(values).astype(np.int64).astype(np.uint32)
    kind, code = (np.float16, np.uint16) if form == "f16" else (np.float32, np.uint32)
    return np.asarray(values).astype(kind).view(code).astype(np.uint32)


INIT = "setp.eq.u32 %p1, %tid, 0; mov.u32 %r155, %cluster_ctarank; setp.eq.and.u32 %p2, %r155, 0, %p1;"
FENCE = "fence.proxy.async.shared::cta; tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync;"


def kernel(body: str, nbytes: int, columns: int, group: int, load: bool = True) -> str:
    """`body` between filling shared and tensor memory and storing all of the latter; %r150 is the base of it."""
    bar = nbytes
    sync = "bar.sync 0;" if group == 1 else "bar.sync 0; barrier.cluster.arrive; barrier.cluster.wait;"
    regs = "{" + ", ".join(f"%r{i}" for i in range(16)) + "}"
    quads = [f"{{%r{i}, %r{i + 1}, %r{i + 2}, %r{i + 3}}}" for i in range(0, 16, 4)]
    row = f"mad.lo.u32 %r140, %r155, 128, %tid; mad.wide.u32 %d20, %r140, {4 * columns}, "
    loop = "{n}: " + "{body}" + "add.u64 %d20, %d20, 64; add.u32 %r141, %r141, 16; add.u32 %r142, %r142, 16;"
    loop += f"setp.lt.u32 %p7, %r141, {columns}; @%p7 bra {{n}};"
    begin = "mov.u32 %r141, 0; mov.u32 %r142, %r151;"
    fill = "".join(f"ld.global.v4.b32 {q}, [%d20+{16 * i}];" for i, q in enumerate(quads))
    fill += f"tcgen05.st.sync.aligned.32x32b.x16.b32 [%r142], {regs};"
    dump = f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {regs}, [%r142];"
    dump += "".join(f"st.global.v4.b32 [%d20+{16 * i}], {q};" for i, q in enumerate(quads))
    loops = [loop.replace("{n}", f"L{i}").replace("{body}", text) for i, text in enumerate((fill, dump))]
    commit = f"tcgen05.commit.cta_group::{group}.mbarrier::arrive::one.shared::cluster"
    commit += f".b64 [%s+{bar}];" if group == 1 else f".multicast::cluster.b64 [%s+{bar}], %h1;"
    alloc = f"tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%s+{bar + 8}], 512;"
    return f"""{INIT} mov.u32 %r143, %tid; mul.wide.u32 %d22, %r155, {nbytes}; add.u64 %d22, %d22, %x; mov.u16 %h1, 3;
    COPY: mul.wide.u32 %d21, %r143, 16; add.u64 %d21, %d21, %d22; ld.global.v4.b32 {quads[0]}, [%d21];
    mad.lo.u32 %r144, %r143, 16, %s; st.shared.v4.b32 [%r144], {quads[0]}; add.u32 %r143, %r143, 128;
    setp.lt.u32 %p7, %r143, {nbytes // 16}; @%p7 bra COPY;
    @%p1 mbarrier.init.shared.b64 [%s+{bar}], 1; setp.ge.u32 %p14, %tid, 32; @%p14 bra ALLOCATED; {alloc}
    ALLOCATED: bar.sync 0; ld.shared.b32 %r150, [%s+{bar + 8}]; shr.u32 %r151, %tid, 5; shl.b32 %r151, %r151, 21;
    add.u32 %r151, %r150, %r151; {row} %t; {begin if load else ""} {loops[0] if load else ""}
    {FENCE} {sync} tcgen05.fence::after_thread_sync; @!%p2 bra WAIT;
    {body}
    {commit}
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p9, [%s+{bar}], 0; @!%p9 bra WAIT;
    {row} %y; {begin} {loops[1]} {sync} @%p14 bra END;
    tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r150, 512; END:"""


def execute(
    body: str, x: np.ndarray, t: np.ndarray, group: int = 1, accumulation="fast", strict=True, **flags
) -> np.ndarray:
    """x: u8 [CTAs, bytes]; t: u32 [CTAs, 128, columns], columns a multiple of 16. Returns tensor memory, as t."""
    nbytes = -(-x.shape[1] // 2048) * 2048
    image = aligned((len(x), nbytes), np.uint8)
    image[:, : x.shape[1]] = x
    before, y = aligned(t.shape, np.uint32), aligned(t.shape, np.uint32)
    before[:] = t
    arguments = {"x": image, "t": before, "y": y}
    text = ptx(kernel(body, nbytes, t.shape[2], group, **flags), **arguments)
    gpu = Gpu(strict=strict, accumulation=accumulation)
    for name, value in arguments.items():
        gpu.add_array(value, name)
    params = [struct.pack("<Q", value.ctypes.data) for value in arguments.values()]
    execute.text = text
    gpu.launch(gpu.load_ptx(text), "k", (group, 1, 1), (128, 1, 1), (group, 1, 1), nbytes + 1024, params)
    return y


def issue(opcode: str, d: int, a: int | str, b: int, idesc: int, tail: str) -> str:
    """`a`: a descriptor, or the column of A in tensor memory as text."""
    left = "%d1" if isinstance(a, int) else "[%r146]"
    move = f"mov.b64 %d1, {a:#x};" if isinstance(a, int) else f"add.u32 %r146, %r150, {a};"
    return f"""{move} mov.b64 %d2, {b:#x}; mov.b32 %r148, {idesc:#x}; add.u32 %r147, %r150, {d}; mov.b32 %r149, 0;
    {opcode} [%r147], {left}, %d2, %r148, {tail}; // HERE\n"""
