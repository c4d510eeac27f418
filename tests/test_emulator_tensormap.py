"""emulator/tensormap: the 128 bytes of a tensor map, decoded strictly."""

import struct

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import aligned, fails, run, tensor_map

from generator.emulator import Hazard, UnsupportedInstruction
from generator.emulator.tensormap import TensorMap, decode_tensor_map

DTYPES = [np.uint8, np.uint16, np.uint32, np.float16, np.float32, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (3, 32), (2, 5, 16), (2, 3, 4, 64), (2, 1, 3, 5, 16)])
def test_sizes_strides_and_boxes_of_every_rank(dtype, shape):
    array = aligned(shape, dtype)
    box = (16, *(min(n, 4) for n in shape[-2::-1]))
    found = decode_tensor_map(tensor_map(array, box))
    assert found.address == array.ctypes.data and found.element_bytes == array.itemsize and found.rank == len(shape)
    assert found.sizes == shape[::-1] and found.box == box and found.swizzle == 0
    assert found.strides == array.strides[::-1]
    assert found.box_bytes == np.prod(box) * array.itemsize
    whole = TensorMap(found.address, array.itemsize, found.sizes, found.strides, found.sizes, 0).part((0,) * len(shape))
    assert (whole.address, whole.nbytes, whole.shape) == (array.ctypes.data, array.nbytes, (*shape, array.itemsize))


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_swizzles(swizzle):
    array = aligned((8, 64), np.float16)
    assert decode_tensor_map(tensor_map(array, (8, 8), swizzle)).swizzle == swizzle


def test_strides_beyond_32_bits():
    array = aligned((2, 2, 2, 16), np.float16)
    raw = tensor_map(array, (16, 1, 1, 1), words={3: 0xFFFFFFFF, 4: 5, 5: 0, 7: 0xF0A})
    assert decode_tensor_map(raw).strides == (2, 0xAFFFFFFFF << 4, 5 << 4, 0xF << 36)


def test_the_largest_sizes_and_boxes():
    array = aligned((2, 16), np.uint8)
    found = decode_tensor_map(tensor_map(array, (256, 256), words={8: 0xFFFFFFFF, 9: 0xFFFFFFFF}))
    assert found.sizes == (2**32, 2**32) and found.box == (256, 256)


def test_tf32_and_the_bits_without_meaning():
    array = aligned((2, 16), np.float32)
    plain = struct.unpack("<32I", tensor_map(array, (16, 2)))
    expected = decode_tensor_map(tensor_map(array, (16, 2)))
    for word in (plain[2] | 1 << 21, plain[2] & ~(1 << 18)):
        assert decode_tensor_map(tensor_map(array, (16, 2), words={2: word})) == expected
    assert decode_tensor_map(tensor_map(array, (16, 2), words={2: plain[2] | 1 << 16})).element == "tf32"
    junk = {i: 0xDEADBEEF for i in range(15, 32)}
    assert decode_tensor_map(tensor_map(array, (16, 2), words=junk)) == expected


@pytest.mark.parametrize("bit", [0, 2, 3, 11, 12, 15, 19, 20, *range(22, 32)])
def test_unknown_bits_of_word_2_raise(bit):
    array = aligned((2, 16), np.float16)
    word = struct.unpack("<32I", tensor_map(array, (16, 2)))[2] ^ 1 << bit
    with pytest.raises(UnsupportedInstruction, match=f"word 2 is {word:#010x}"):
        decode_tensor_map(tensor_map(array, (16, 2), words={2: word}))


@pytest.mark.parametrize(
    "word, element, nbytes, swizzle",
    [(0x010, "u8", 1, 0), (0x090, "b16", 2, 0), (0x110, "b32", 4, 0), (0x190, "s32", 4, 0), (0x210, "u64", 8, 0),
     (0x290, "s64", 8, 0), (0x310, "f16", 2, 0), (0x390, "f32", 4, 0), (0x490, "f64", 8, 0), (0x510, "bf16", 2, 0),
     (0x10390, "tf32", 4, 0), (0x6310, "f16", 2, 3), (0x20310, "f16", 2, 0), (0x60310, "f16", 2, 0)],
)  # fmt: skip
def test_maps_of_the_driver(word, element, nbytes, swizzle):
    """Word 2 as cuTensorMapEncodeTiled of an H200's driver gives it for rank 2; the other words are the DSL's."""
    raw = tensor_map(aligned((32, 64), np.uint16), (16, 8), words={2: word, 16: 0x100, 18: 0x10})
    found = decode_tensor_map(raw)
    assert (found.element, found.element_bytes, found.swizzle, found.box) == (element, nbytes, swizzle, (16, 8))


@pytest.mark.parametrize("word, words", [(0x8310, "fill"), (0x0B20, "interleave"), (0x1320, "interleave")])
def test_maps_of_the_driver_that_are_refused(word, words):
    with pytest.raises(UnsupportedInstruction, match=words):
        decode_tensor_map(tensor_map(aligned((32, 64), np.uint16), (16, 8), words={2: word}))


@pytest.mark.parametrize("kind", [k for k in range(16) if k not in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10)])
def test_unknown_element_types_raise(kind):
    array = aligned((2, 16), np.uint8)
    with pytest.raises(UnsupportedInstruction, match=f"element type {kind}"):
        decode_tensor_map(tensor_map(array, (16, 2), words={2: 2 | 1 << 4 | kind << 7 | 1 << 18}))


@pytest.mark.parametrize("rank", [6, 7, 8])
def test_ranks_beyond_five_raise(rank):
    array = aligned((2, 16), np.uint8)
    with pytest.raises(UnsupportedInstruction, match=f"rank {rank}"):
        decode_tensor_map(tensor_map(array, (16, 2), words={2: 2 | rank - 1 << 4 | 1 << 18}))


@pytest.mark.parametrize("bit", range(24))
def test_element_strides_raise(bit):
    array = aligned((2, 16), np.uint8)
    with pytest.raises(UnsupportedInstruction, match="element strides"):
        decode_tensor_map(tensor_map(array, (16, 2), words={13: 15 << 24 | 1 << bit}))


@pytest.mark.parametrize("inner, swizzle, nbytes", [(4, 0, 8), (17, 0, 34), (24, 1, 48), (64, 2, 128), (128, 3, 256)])
def test_illegal_inner_boxes_raise(inner, swizzle, nbytes):
    array = aligned((2, 256), np.float16)
    with pytest.raises(UnsupportedInstruction, match=f"inner box of {nbytes} bytes"):
        decode_tensor_map(tensor_map(array, (inner, 2), swizzle))


# -- the part of a tensor under a box ----------------------------------------------------------------------------------
ROW = 128  # bytes; sequences of rows 10 to 13 and 13 to 20 in one array of them
MANY, MOST = 1 << 30, (1 << 31) - 1


@pytest.mark.parametrize("start, length", [(10, 3), (13, 7), (13, 40)])
@pytest.mark.parametrize("wraps", [False, True])
def test_one_map_for_sequences_of_any_length(start, length, wraps):
    """The first rows' dimension ends where the sequence does; others move back there, or around all 64 bits."""
    base, box = 0x7000_0000_0000, (64, 32)
    if wraps:
        back = (1 << 34) - ROW  # MANY times this is a multiple of 2**64, MANY rows short
        raw = TensorMap(base, 2, (64, MANY, MOST, MOST), (2, ROW, back, ROW), (*box, 1, 1), 0)
        coords = (0, MANY - length, MANY, start + length)
    else:
        raw = TensorMap(base - MANY * ROW, 2, (64, MANY, MOST), (2, ROW, ROW), (*box, 1), 0)
        coords = (0, MANY - length, start + length)
    part = raw.part(coords)
    rows = min(length, box[1])
    assert part.address == base + start * ROW and part.nbytes == rows * ROW
    assert part.shape[-3:] == (rows, 64, 2) and part.place[-2:] == (slice(0, rows), slice(0, 64))


def test_a_box_beside_its_tensor():
    tensor = TensorMap(0x1000, 2, (64, 9), (2, 128), (8, 4), 0)
    assert tensor.part((64, 0)) is None and tensor.part((-8, 0)) is None and tensor.part((0, 9)) is None
    part = tensor.part((-3, 7))
    assert (part.address, part.nbytes, part.shape) == (0x1000 + 7 * 128, 128 + 10, (2, 5, 2))
    assert part.place == (slice(0, 2), slice(3, 8))


# -- maps that a kernel cannot use -------------------------------------------------------------------------------------
LOAD = (
    "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s], [{map}, {{%r1, %r1}}], [%s+512]"
)
BODY = (
    "setp.eq.u32 %p1, %tid, 0; mov.u32 %r1, 0; @%p1 mbarrier.init.shared.b64 [%s+512], 1;\n@%p1 " + LOAD + ";// HERE\n"
)


def test_a_tensor_that_reaches_outside_its_array():
    array = aligned((8, 64), np.float16)
    long = tensor_map(array, (8, 9), sizes=(64, 9))
    fails(Hazard, BODY.format(map="%m"), "out of bounds", "sizes (64, 9)", m=long, known={"q": array})


def test_a_map_that_is_not_a_parameter():
    array = aligned((8, 64), np.float16)
    fails(Hazard, BODY.format(map="%array+8000"), "out of bounds", "its tensor map", array=array)
    fails(Hazard, BODY.format(map="%m+64"), "which is not a kernel parameter", m=tensor_map(array, (8, 8)), array=array)


def test_a_map_that_is_not_aligned():
    array = aligned((8, 64), np.float16)
    raw = tensor_map(array, (8, 8))
    fails(
        Hazard,
        BODY.format(map="%m+32"),
        "32 bytes beyond a multiple of 64",
        m=bytes(32) + raw + bytes(32),
        known={"q": array},
    )


def test_coordinates_must_match_the_rank():
    array = aligned((2, 8, 64), np.float16)
    fails(
        Hazard,
        BODY.format(map="%m"),
        "2 coordinates for a tensor map of rank 3",
        m=tensor_map(array, (8, 8, 2)),
        known={"q": array},
    )


def test_a_map_in_global_memory_may_be_one_that_the_kernel_wrote():
    """A map of another array and shape is copied to shared memory, changed field by field, and copied back."""
    x, y = aligned((16, 64), np.float16), aligned((8, 32), np.float32)
    x[:], y[:] = np.arange(1024).reshape(16, 64) / 8, np.arange(256).reshape(8, 32)
    first = np.frombuffer(tensor_map(x, (64, 4), 3), np.uint32)
    maps, out = aligned(32, np.uint32), aligned((4, 32), np.float32)
    maps[:] = first
    replaced = "".join(
        f"@%p1 tensormap.replace.tile.{field}.shared::cta.b1024.{kind} [%s+512], {value};"
        for field, kind, value in (
            ("global_address", "b64", "%y"), ("rank", "b32", "1"), ("elemtype", "b32", "7"),
            ("swizzle_mode", "b32", "0"),
            ("global_dim", "b32", "0, 32"), ("global_dim", "b32", "1, 7"), ("global_stride", "b64", "0, 128"),
            ("box_dim", "b32", "0, %r5"), ("box_dim", "b32", "1, 4"), ("element_stride", "b32", "0, 1"),
            ("interleave_layout", "b32", "0"), ("fill_mode", "b32", "0"),
        )
    )  # fmt: skip
    run(
        f"""setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+1024], 1; ld.global.b32 %r1, [%maps_g];
        st.shared.b32 [%s4+512], %r1; bar.sync 0; mov.u32 %r5, 32; {replaced} bar.sync 0;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%maps], [%s+512], 128;
        fence.proxy.tensormap::generic.acquire.gpu [%maps], 128; mov.u32 %r2, 0; mov.u32 %r3, 4;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+1024], 512;
        @%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%s], [%maps, {{%r2, %r3}}], [%s+1024];
        W: mbarrier.try_wait.parity.shared.b64 %p2, [%s+1024], 0; @!%p2 bra W;
        ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%s16]; mad.wide.u32 %d1, %tid, 16, %out;
        st.global.v4.b32 [%d1], {{%r6, %r7, %r8, %r9}};""",
        smem=2048, maps=maps, y=y, out=out,
    )  # fmt: skip
    assert (out[:3] == y[4:7]).all() and not out[3].any()  # the tensor has 7 rows
