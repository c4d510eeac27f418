"""Small PTX kernels for the emulator's tests: wrap a body, launch it on NumPy arrays, say what it must raise.

    run("ld.global.b32 %r1, [%x_g]; add.u32 %r1, %r1, 1; st.global.b32 [%y_g], %r1;", x=x, y=y)

Each keyword becomes a parameter and a register of its name: an array its address (`%x`, and `%x_g` advanced to the
element of this thread), an int a 32-bit value, 128 bytes the generic address of a tensor map. Also at hand: `%tid`,
`%cta`, `%g` (thread in the grid), `%s` (dynamic shared memory), `%s4` and `%s16` (advanced by 4 or 16 bytes a thread),
and the registers %p0-15, %h0-31, %r0-159, %d0-47.
"""

import math
import struct

import numpy as np
import pytest

from generator.emulator import Gpu

SHARED = 1024  # where the shared window begins: the hardware keeps its first KiB
HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"
REGISTERS = (
    ".reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<160>; .reg .b64 %d<48>; .reg .b32 %tid, %cta, %g, %s, %s4, %s16;"
)
START = """mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %g, %ntid.x; mad.lo.u32 %g, %cta, %g, %tid;
mov.u32 %s, smem; mad.lo.u32 %s4, %tid, 4, %s; mad.lo.u32 %s16, %tid, 16, %s;"""


def ptx(body: str, declare: str = "", **arguments) -> str:
    """A module with the kernel `k` around `body`."""
    params, prologue = [], [REGISTERS, declare, START]
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            params.append(f".param .u64 {name}")
            prologue.append(f".reg .b64 %{name}, %{name}_g; ld.param.b64 %{name}, [{name}];")
            prologue.append(f"mad.wide.u32 %{name}_g, %g, {value.dtype.itemsize}, %{name};")
        elif isinstance(value, bytes):
            params.append(f".param .align 64 .b8 {name}[{len(value)}]")
            prologue.append(f".reg .b64 %{name}; mov.b64 %{name}, {name}; cvta.param.u64 %{name}, %{name};")
        else:
            params.append(f".param .u32 {name}")
            prologue.append(f".reg .b32 %{name}; ld.param.b32 %{name}, [{name}];")
    head = f".visible .entry k({', '.join(params)})\n{{\n"
    return HEADER + head + "\n".join(prologue) + "\n" + body + "\nret;\n}\n"


def launch(text: str, arguments: dict, block=32, grid=1, smem: int = 1024, known: dict | None = None, cluster: int = 1):
    """Launch `k` of a module; arrays among the arguments, and those in `known`, are legal global memory."""
    gpu = Gpu()
    params = []
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            gpu.add_array(value, name)
            params.append(struct.pack("<Q", value.ctypes.data))
        else:
            params.append(value if isinstance(value, bytes) else struct.pack("<I", value & 0xFFFFFFFF))
    for name, value in (known or {}).items():
        gpu.add_array(value, name)
    block, grid, cluster = ((*e, 1, 1)[:3] if isinstance(e, tuple) else (e, 1, 1) for e in (block, grid, cluster))
    return gpu.launch(gpu.load_ptx(text), "k", grid, block, cluster, smem, params)


def run(body: str, block=32, grid=1, smem: int = 1024, declare="", known: dict | None = None, cluster=1, **arguments):
    """Run `body` to its end; arrays among the arguments are written in place. Returns the launch report."""
    return launch(ptx(body, declare, **arguments), arguments, block, grid, smem, known, cluster)


def fails(
    error: type, body: str, *parts: str, block=32, grid=1, smem=1024, declare="", known=None, cluster=1, **arguments
):
    """`body` raises `error` at the line marked `// HERE` (if any), with a message that holds every part."""
    text = ptx(body, declare, **arguments)
    with pytest.raises(error) as caught:
        launch(text, arguments, block, grid, smem, known, cluster)
    message = str(caught.value)
    marked = [n for n, line in enumerate(text.splitlines(), 1) if "// HERE" in line]
    if marked:
        assert f"PTX line {marked[0]} " in message or f"PTX line {marked[0]}:" in message, message
    for part in parts:
        assert part in message, message
    return message


def aligned(shape, dtype, fill=0, align: int = 128) -> np.ndarray:
    """An array whose address is a multiple of `align`."""
    nbytes = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + align, np.uint8)
    start = -raw.ctypes.data % align
    array = raw[start : start + nbytes].view(dtype).reshape(shape)
    array[...] = fill
    return array


# -- tensor maps (facts/host_launch.md, "Tensor maps arrive encoded") --------------------------------------------------
ELEMENT_TYPES = {"uint8": 0, "uint16": 1, "uint32": 2, "float16": 6, "float32": 7, "bfloat16": 10}


def tensor_map(array: np.ndarray, box, swizzle: int = 0, sizes=None, words: dict | None = None) -> bytes:
    """The 128 bytes that describe `array`; `box` and `sizes` innermost first; `words` overrides 32-bit words."""
    sizes = tuple(sizes or array.shape[::-1])
    strides = [s // 16 for s in array.strides[::-1]]
    rank = len(sizes)
    w = [0] * 32
    w[0], w[1] = array.ctypes.data & 0xFFFFFFFF, array.ctypes.data >> 32
    w[2] = 2 | (rank - 1) << 4 | ELEMENT_TYPES[array.dtype.name] << 7 | swizzle << 13 | 1 << 18
    for d in range(1, rank):
        w[2 + d] = strides[d] & 0xFFFFFFFF
        w[7] |= (strides[d] >> 32) << 4 * (d - 1)
        w[14] |= (box[d] - 1) << 8 * (d - 1)
    for d in range(rank):
        w[8 + d] = sizes[d] - 1
    w[13] = (box[0] - 1) << 24
    for index, value in (words or {}).items():
        w[index] = value
    return struct.pack("<32I", *w)


def swizzle_address(address, mode: int):
    """Byte address in shared memory → where its byte lies: bits 4-6 exclusive-or bits 7-9, as many as the mode has."""
    return address ^ ((address >> 3) & (((1 << mode) - 1) << 4))


def box_places(box, itemsize: int, swizzle: int, offset: int = 0) -> np.ndarray:
    """Where each byte of a box lies in shared memory, counted from `offset`: a swizzled row fills its span."""
    inner = box[0] * itemsize
    row = np.arange(int(np.prod(box[1:])))[:, None] * (16 << swizzle if swizzle else inner)
    return swizzle_address((row + np.arange(inner)).reshape(-1) + SHARED + offset, swizzle) - SHARED - offset


def box_image(array: np.ndarray, box, coords, swizzle: int, offset: int = 0, before: int = 0xEE) -> np.ndarray:
    """Bytes that a load of the box at `coords` (innermost first) leaves in shared memory from `offset` on, where every
    byte was `before`.
    """
    tile = np.zeros(box[::-1], array.dtype)
    for index in np.ndindex(*box[::-1]):
        at = tuple(i + c for i, c in zip(index, coords[::-1], strict=True))
        if all(0 <= i < n for i, n in zip(at, array.shape, strict=True)):
            tile[index] = array[at]
    places = box_places(box, array.itemsize, swizzle, offset)
    image = np.full(shared_bytes(box, array.itemsize, swizzle), before, np.uint8)
    image[places] = tile.reshape(-1).view(np.uint8)
    return image


def shared_bytes(box, itemsize: int, swizzle: int) -> int:
    """Bytes of shared memory that a box spans."""
    return int(np.prod(box[1:])) * (16 << swizzle if swizzle else box[0] * itemsize)


# -- tcgen05 descriptors (facts/ptx.md §3.1, §3.2) ---------------------------------------------------------------------
LAYOUT_CODES = {0: 0, 1: 6, 2: 4, 3: 2}  # swizzle none, 32 B, 64 B, 128 B


def smem_descriptor(offset: int, lbo: int, sbo: int, swizzle: int) -> int:
    """Shared-memory descriptor of an operand at `offset` from the window's start; byte offsets."""
    start = (SHARED + offset) >> 4
    return start | (lbo >> 4) << 16 | (sbo >> 4) << 32 | 1 << 46 | LAYOUT_CODES[swizzle] << 61


def instruction_descriptor(
    n: int, m: int = 128, bf16=True, a_mn=False, b_mn=False, negate_a=False, negate_b=False
) -> int:
    """Instruction descriptor of kind::f16 with float32 accumulation."""
    kind = 1 if bf16 else 0
    flags = negate_a << 13 | negate_b << 14 | a_mn << 15 | b_mn << 16
    return 1 << 4 | kind << 7 | kind << 10 | flags | (n >> 3) << 17 | (m >> 4) << 24


ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
DEALLOC = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"


def with_tmem(body: str, columns: int = 512, slot: int = 0, free: bool = True) -> str:
    """`body` between an allocation by warp 0 (its base in %r150, this warp's lanes in %r151) and its end."""
    end = f"tcgen05.wait::ld.sync.aligned; bar.sync 0; @%p14 bra END; {DEALLOC} %r150, {columns}; END:" if free else ""
    return f"""setp.ge.u32 %p14, %tid, 32; @%p14 bra ALLOCATED; {ALLOC} [%s+{slot}], {columns};
ALLOCATED: bar.sync 0; ld.shared.b32 %r150, [%s+{slot}]; shr.u32 %r151, %tid, 5; and.b32 %r151, %r151, 3;
shl.b32 %r151, %r151, 21; add.u32 %r151, %r150, %r151;
{body}
{end}"""


def operand_layout(rows: int, k: int, mn_major: bool, swizzle: int):
    """Canonical layout of a 16-bit operand [rows, k] at a 1024-aligned base (facts/ptx.md §3.3).

    Returns the byte offset of every element, the size of the image, LBO, SBO, and the start of each step of 16 k.
    """
    mn, kk = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    span = 16 << swizzle
    steps = np.arange(0, k, 16)
    if not mn_major and swizzle == 0:
        sbo, lbo = 128, rows * 16
        linear, starts = mn % 8 * 16 + mn // 8 * sbo + kk // 8 * lbo + kk % 8 * 2, steps // 8 * lbo
    elif not mn_major:
        sbo, lbo, wide = 8 * span, 16, span // 2
        linear = mn % 8 * span + mn // 8 * sbo + kk % wide * 2 + kk // wide * rows * span
        starts = steps % wide * 2 + steps // wide * rows * span
    elif swizzle == 0:
        sbo, lbo = 128, rows * 16
        linear, starts = mn % 8 * 2 + mn // 8 * sbo + kk % 8 * 16 + kk // 8 * lbo, steps // 8 * lbo
    else:
        sbo, lbo, wide = 8 * span, k * span, span // 2
        linear, starts = mn % wide * 2 + mn // wide * lbo + kk % 8 * span + kk // 8 * sbo, steps // 8 * sbo
    nbytes = -(-(int(linear.max()) + 2) // 1024) * 1024
    return swizzle_address(linear, swizzle), nbytes, lbo, sbo, starts.tolist()


def operand_image(values: np.ndarray, mn_major: bool, swizzle: int) -> np.ndarray:
    """Bytes in shared memory of a 16-bit operand [rows, k]."""
    offsets, nbytes, *_ = operand_layout(*values.shape, mn_major, swizzle)
    image = np.zeros(nbytes // 2, np.uint16)
    image[offsets // 2] = values.view(np.uint16)
    return image.view(np.uint8)
