"""The 128-byte tensor map that the driver or the DSL's host code packs, decoded strictly.

Both encodings are undocumented; they were found by varying one property at a time, in nvidia-cutlass-dsl 4.8.1 and in
the driver of an H200 (CUDA 13.0). Bits outside the table raise.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import UnsupportedInstruction

ELEMENTS = {
    **{0: "u8", 1: "b16", 2: "b32", 3: "s32", 4: "u64", 5: "s64"},
    **{6: "f16", 7: "f32", 9: "f64", 10: "bf16"},
}  # b16: u16 or s16; b32: u32, from the DSL's host code also s32; f32: or tf32, by bit 16
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 9: 8, 10: 2}
# Word 2: format (2 from the DSL, 0 from the driver), rank - 1, type, swizzle, tf32, L2 promotion (17, 18), 21.
KNOWN_W2 = 0xF | 0x7 << 4 | 0xF << 7 | 0x3 << 13 | 1 << 16 | 3 << 17 | 1 << 21


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor: `sizes` and `box` in elements, innermost first; `strides` in bytes, one a dimension."""

    address: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int  # 0 none, 1 32 B, 2 64 B, 3 128 B
    element: str = "u8"  # what it holds, as in ELEMENTS

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @cached_property
    def box_bytes(self) -> int:
        return math.prod(self.box) * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes from a row of the box to the next in shared memory: a swizzled row fills its span (seen on an H200)."""
        return 16 << self.swizzle if self.swizzle else self.box[0] * self.element_bytes

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes from the start of the box to its end in shared memory."""
        return math.prod(self.box[1:]) * self.row_bytes

    @cached_property
    def _chunks(self) -> dict[int, np.ndarray]:
        return {}

    def chunks_at(self, address: int) -> np.ndarray:
        """Index of each 16 bytes of the box at shared address `address`, in order; a swizzle moves them: chunk ^=
        (address >> 7) & (2^B - 1) (§5.5.7). Read-only.

        A row that is narrower than the span of its swizzle leaves the rest of the span alone (seen on an H200).
        """
        chunks = self._chunks.get(address)
        if chunks is None:
            rows = np.arange(self.shared_bytes // self.row_bytes)[:, None] * (self.row_bytes // 16)
            inner = np.arange(self.box[0] * self.element_bytes // 16)
            chunks = (address // 16 + rows + inner).reshape(-1)
            if self.swizzle:
                chunks ^= chunks >> 3 & (1 << self.swizzle) - 1
            chunks.flags.writeable = False
            self._chunks[address] = chunks
        return chunks

    def part(self, coords: tuple[int, ...], whole: bool = False) -> Part | None:
        """What of the box at `coords` (innermost first, may be negative) lies inside the tensor; None: nothing.

        `whole`: rows end at a multiple of 16 bytes, as those of a store do (seen on an H200).

        Addresses wrap at 64 bits: sizes and strides may describe far more than there is memory, and programs use that
        to let one map serve sequences of any length (the last dimension moves back what another one moved on).
        """
        low = [max(c, 0) for c in coords]
        sizes = self.sizes
        if whole:
            sizes = (-(-sizes[0] * self.element_bytes // 16) * 16 // self.element_bytes, *sizes[1:])
        shape = [min(c + b, n) - start for c, b, n, start in zip(coords, self.box, sizes, low, strict=True)]
        if min(shape) <= 0:
            return None
        address = (self.address + sum(c * s for c, s in zip(low, self.strides, strict=True))) % (1 << 64)
        nbytes = sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True)) + self.element_bytes
        place = tuple(slice(start - c, start - c + n) for start, c, n in zip(low, coords, shape, strict=True))
        return Part(address, nbytes, (*shape[::-1], self.element_bytes), (*self.strides[::-1], 1), place[::-1])


@dataclass(frozen=True)
class Part:
    """The part of a tensor under a box: [address, address + nbytes), u8 of `shape` and `strides`, its `place` in it."""

    address: int
    nbytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: tuple[slice, ...]

    def of(self, start: int, view: np.ndarray) -> np.ndarray:
        """These bytes as a strided view; `view` u8 begins at address `start`."""
        return np.ndarray(self.shape, np.uint8, view.data, self.address - start, self.strides)

    def write(self, start: int, view: np.ndarray, box: np.ndarray, combine=None) -> None:
        """Store this part of a whole box, u8 [extents of the box, element bytes].

        `combine`: (NumPy type, function of the old and the new values), to reduce instead.
        """
        destination, given = self.of(start, view), box[self.place]
        if combine is not None:
            dtype, function = combine
            old, new = (np.ascontiguousarray(a).reshape(-1).view(dtype) for a in (destination, given))
            given = np.ascontiguousarray(function(old, new, None)).view(np.uint8).reshape(given.shape)
        destination[...] = given


def decode_tensor_map(raw: bytes) -> TensorMap:
    """Decode a tensor map.

    Args:
        raw: 128 bytes as passed by value; only the first 60 carry information.
    Raises:
        UnsupportedInstruction: a bit outside the known table is set.
    """
    w = struct.unpack("<15I", raw[:60])
    if w[2] & 0xF not in (0, 2) or w[2] & ~KNOWN_W2 & 0xFFFFFFFF:
        raise UnsupportedInstruction(
            f"tensor map: word 2 is {w[2]:#010x}, with bits outside the known table (interleave, fill or a "
            "newer swizzle)"
        )
    rank, kind, swizzle = (w[2] >> 4 & 7) + 1, w[2] >> 7 & 15, w[2] >> 13 & 3
    if kind not in ELEMENT_BYTES or rank > 5:
        raise UnsupportedInstruction(f"tensor map: element type {kind} or rank {rank} is not known")
    if w[13] & 0xFFFFFF:
        raise UnsupportedInstruction(
            f"tensor map: element strides other than 1 are not supported (word 13 is {w[13]:#010x})"
        )
    size = ELEMENT_BYTES[kind]
    strides = (size, *((w[2 + d] | (w[7] >> 4 * (d - 1) & 15) << 32) * 16 for d in range(1, rank)))
    sizes = tuple(w[8 + d] + 1 for d in range(rank))
    box = ((w[13] >> 24) + 1, *((w[14] >> 8 * (d - 1) & 255) + 1 for d in range(1, rank)))
    element = "tf32" if w[2] >> 16 & 1 else ELEMENTS[kind]
    found = TensorMap(w[0] | w[1] << 32, size, sizes, strides, box, swizzle, element)
    inner = box[0] * size
    if inner % 16 or (swizzle and inner > 16 << swizzle):
        raise UnsupportedInstruction(
            f"tensor map: inner box of {inner} bytes is illegal with swizzle {16 << swizzle if swizzle else 'none'}"
        )
    return found
