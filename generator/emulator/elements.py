"""Elements of an MMA operand: from the bytes of shared memory, or the words of tensor memory, to numbers.

A byte container (PTX ISA 9.1 §9.7.16.4, kinds f8f6f4 and mxf8f6f4) holds a 6-bit element in its bits 0-5 and a 4-bit
one in its bits 2-5. In shared memory sixteen of either stand packed at the start of 16 bytes, and the rest is padding.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .formats import bf16_to_f32, f16_to_f32
from .instruction import BITS

_SMALL = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
    "ue4m3": ml_dtypes.float8_e4m3fn,
}


def _table(name: str) -> np.ndarray:
    """Value of each byte; of the narrow formats only the low bits count."""
    bits = np.arange(256, dtype=np.uint8) & np.uint8((1 << BITS.get(name, 8)) - 1)
    values = bits.view(_SMALL[name]).astype(np.float32)
    return np.abs(values) if name == "ue4m3" else values


_VALUES = {name: _table(name) for name in _SMALL}


def numbers(name: str, bits: np.ndarray) -> np.ndarray:
    """Elements, each in an unsigned integer of its container's size → float32."""
    if name in ("f16", "bf16"):
        return (bf16_to_f32 if name == "bf16" else f16_to_f32)(np.ascontiguousarray(bits))
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if name in ("u8", "s8"):
        return bits.view(np.int8 if name == "s8" else np.uint8).astype(np.float32)
    return _VALUES[name][bits]


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Sixteen 6- or 4-bit elements at the start of each 16 bytes: u8 [..., 16] → u8 [..., 16], one a byte."""
    if bits == 4:
        pairs = data[..., :8]
        return np.stack([pairs & 15, pairs >> 4], -1).reshape(*data.shape[:-1], 16)
    b0, b1, b2 = (data[..., i:12:3] for i in range(3))
    four = (b0 & 63, b0 >> 6 | (b1 & 15) << 2, b1 >> 4 | (b2 & 3) << 4, b2 >> 2)
    return np.stack(four, -1).reshape(*data.shape[:-1], 16)


def contained(data: np.ndarray, bits: int) -> np.ndarray:
    """The same in byte containers, as tcgen05.cp writes them to tensor memory."""
    return unpacked(data, bits) << (2 if bits == 4 else 0)


def from_shared(data: np.ndarray, name: str, packed: bool) -> np.ndarray:
    """Chunks of shared memory, u8 [..., chunks, 16] → float32 [..., elements]."""
    bits = BITS[name]
    if packed:
        data = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], 32)
    elif bits < 8:
        data = unpacked(data, bits)
    words = data if bits <= 8 else np.ascontiguousarray(data).view(np.uint16 if bits == 16 else np.uint32)
    return numbers(name, words).reshape(*data.shape[:-2], -1)


def used_bytes(name: str, packed: bool) -> int:
    """Bytes of each 16 that hold elements."""
    return 2 * BITS[name] if BITS[name] < 8 and not packed else 16


def from_tensor(words: np.ndarray, name: str) -> np.ndarray:
    """Columns of tensor memory, u32 [..., columns] → float32 [..., elements]."""
    size = {16: np.uint16, 32: np.uint32}.get(BITS[name], np.uint8)
    parts = np.ascontiguousarray(words).view(size)
    return numbers(name, parts >> np.uint8(2) if name == "e2m1" else parts)
