"""The driver's cuTensorMapEncodeTiled: a tensor's description into the 128 bytes that tensormap.py decodes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .errors import LaunchError

# CUtensorMapDataType (cuda.h) -> element type in the map, bytes, whether it is tf32.
_TYPES = {
    **{0: (0, 1, 0), 1: (1, 2, 0), 2: (2, 4, 0), 3: (3, 4, 0), 4: (4, 8, 0), 5: (5, 8, 0)},
    **{6: (6, 2, 0), 7: (7, 4, 0), 8: (9, 8, 0), 9: (10, 2, 0), 11: (7, 4, 1)},
}
_BOX_LIMIT = 256


def encode_tiled(
    data_type: int, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """A tensor map: sizes and box in elements, innermost first; strides in bytes, of dimensions 1 and up.

    Raises LaunchError for what the driver refuses (its manual's conditions) or the emulator cannot decode.
    """
    rank = len(sizes)
    if data_type not in _TYPES:
        raise LaunchError(f"cuTensorMapEncodeTiled: data type {data_type} is not emulated")
    kind, element_bytes, tf32 = _TYPES[data_type]
    if not 1 <= rank <= 5:
        raise LaunchError(f"cuTensorMapEncodeTiled: rank {rank}: 1 to 5")
    if address % 16 or any(stride % 16 or not 0 < stride < 1 << 40 for stride in strides):
        raise LaunchError("cuTensorMapEncodeTiled: the address and the strides must be multiples of 16 bytes")
    if not all(0 < size <= 1 << 32 for size in sizes) or not all(0 < extent <= _BOX_LIMIT for extent in box):
        raise LaunchError(f"cuTensorMapEncodeTiled: sizes {tuple(sizes)} or box {tuple(box)} are out of range")
    inner = box[0] * element_bytes
    if inner % 16 or not 0 <= swizzle <= 3 or (swizzle and inner > 16 << swizzle):
        raise LaunchError(f"cuTensorMapEncodeTiled: an inner box of {inner} bytes is illegal with swizzle {swizzle}")
    words = [0] * 32
    words[0], words[1] = address & 0xFFFFFFFF, address >> 32
    words[2] = 2 | rank - 1 << 4 | kind << 7 | swizzle << 13 | tf32 << 16 | 1 << 18
    for i, stride in enumerate(strides):
        words[3 + i] = stride >> 4 & 0xFFFFFFFF
        words[7] |= (stride >> 36) << 4 * i
    for i, size in enumerate(sizes):
        words[8 + i] = size - 1
    words[13] = box[0] - 1 << 24
    words[14] = sum(extent - 1 << 8 * i for i, extent in enumerate(box[1:]))
    return struct.pack("<32I", *words)
