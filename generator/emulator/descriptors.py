"""Shared-memory and instruction descriptors of the tensor core, decoded strictly (PTX ISA 9.1 §9.7.16.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import Hazard, UnsupportedInstruction
from .memory import WINDOW_BASE

SHARED_RESERVED = 3 << 14 | 3 << 30 | 0xFF << 53
IDESC_RESERVED = 1 << 3 | 1 << 6 | 1 << 23 | 1 << 29


@dataclass(frozen=True)
class Operand:
    """An MMA operand in shared memory: indices of its 16-byte chunks.

    K-major: `chunks` [rows, 2], along k; MN-major: [k, chunks along the rows].
    """

    chunks: np.ndarray
    mn_major: bool
    low: int  # shared offsets that the tile spans, in bytes
    high: int


_operands: dict[tuple, Operand] = {}
ATOM_32B = 1  # swizzle code: 128 bytes, in units of 32


def shared_operand(
    descriptor: int, rows: int, mn_major: bool, where: str, bits: int = 16, chunks_of_k: int = 2
) -> Operand:
    """Decode a shared-memory descriptor (§9.7.16.4.1, Table 40) of an operand of `rows` rows and 32 bytes of k.

    `bits`: of an element; `chunks_of_k`: 16-byte chunks along k, 1 for a copy that is narrower than an MMA's operand.
    """
    key = (descriptor, rows, mn_major, bits, chunks_of_k)
    if key in _operands:
        return _operands[key]
    start, lbo, sbo = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor & SHARED_RESERVED:
        raise Hazard(
            f"{where}: shared-memory descriptor {descriptor:#018x}: a reserved bit (14, 15, 30, 31, 53-60) is set"
        )
    if descriptor >> 46 & 7 != 1:
        raise Hazard(f"{where}: shared-memory descriptor {descriptor:#018x}: bits 46-48 must be 0b001")
    if descriptor >> 49 & 7:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: a base offset other than 0 is not supported"
        )
    if descriptor >> 52 & 1:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: absolute leading-dimension mode is not supported"
        )
    code = descriptor >> 61
    if code not in (0, ATOM_32B, 2, 4, 6):
        raise Hazard(f"{where}: shared-memory descriptor {descriptor:#018x}: swizzle mode {code} does not exist")
    if (code == ATOM_32B) != (mn_major and bits == 32):
        raise Hazard(
            f"{where}: shared-memory descriptor {descriptor:#018x}: 32-bit MN-major operands, and no others, take "
            "the 128-byte swizzle with 32-byte atoms (mode 1)"
        )
    if mn_major and rows % (128 // max(bits, 8)):
        raise Hazard(f"{where}: an MN-major operand of {bits}-bit elements has {rows} rows, not whole 16-byte chunks")
    if code == ATOM_32B:
        chunks = _tile_atom_32b(start, lbo, sbo, rows)
    else:
        swizzle = {0: 0, 2: 3, 4: 2, 6: 1}[code]
        chunks = _tile(start, lbo, sbo, swizzle, rows, mn_major, max(bits, 8), chunks_of_k)
    found = _operands[key] = Operand(chunks, mn_major, int(chunks.min()) * 16, int(chunks.max() + 1) * 16)
    return found


def _tile(
    start: int, lbo: int, sbo: int, bits: int, rows: int, mn_major: bool, size: int = 16, chunks_of_k: int = 2
) -> np.ndarray:
    """Chunks of a tile of `rows` rows and 32 bytes of k in a canonical layout (§9.7.16.3.3, §9.7.15.5.1.2), swizzled by
    `bits` bits of the address; elements of `size` bits.
    """
    span = 16 << bits
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(chunks_of_k)[None]
        linear = start + row % 8 * (span if bits else 16) + row // 8 * sbo + chunk * (16 if bits else lbo)
    else:
        k, group = np.arange(256 // size)[:, None], np.arange(rows * size // 128)[None]
        if bits:
            wide = span // 16
            linear = start + group % wide * 16 + group // wide * lbo + k % 8 * span + k // 8 * sbo
        else:
            linear = start + group * sbo + k % 8 * 16 + k // 8 * lbo
    address = linear ^ ((linear >> 3) & (((1 << bits) - 1) << 4))
    return (address - WINDOW_BASE) >> 4


def _tile_atom_32b(start: int, lbo: int, sbo: int, rows: int) -> np.ndarray:
    """Chunks of an MN-major tile of `rows` rows and 8 k of 32-bit elements: four k of 128 bytes make an atom."""
    k, group = np.arange(8)[:, None], np.arange(rows // 4)[None]
    linear = start + group % 8 * 16 + group // 8 * lbo + k % 4 * 128 + k // 4 * sbo
    return ((linear ^ (linear >> 2 & 0x60)) - WINDOW_BASE) >> 4


WGMMA_RESERVED = 3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52
_wgmma_operands: dict[tuple[int, int, bool, int], Operand] = {}


def wgmma_operand(descriptor: int, rows: int, mn_major: bool, size: int, where: str) -> Operand:
    """Decode the matrix descriptor (§9.7.15.5.1.2.2) of an operand of `rows` rows and 32 bytes of k.

    Only elements of `size` 2 bytes may be MN-major.
    """
    key = (descriptor, rows, mn_major, size)
    if key in _wgmma_operands:
        return _wgmma_operands[key]
    if descriptor & WGMMA_RESERVED:
        raise Hazard(
            f"{where}: matrix descriptor {descriptor:#018x}: a reserved bit (14, 15, 30, 31, 46-48, 52-61) is set"
        )
    if descriptor >> 49 & 7:
        raise UnsupportedInstruction(
            f"{where}: matrix descriptor {descriptor:#018x}: a base offset other than 0 is not supported"
        )
    if mn_major and size != 2:
        raise Hazard(f"{where}: only 16-bit operands of wgmma may be MN-major")
    start, lbo, sbo = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    chunks = _tile(start, lbo, sbo, (0, 3, 2, 1)[descriptor >> 62], rows, mn_major)
    found = _wgmma_operands[key] = Operand(chunks, mn_major, int(chunks.min()) * 16, int(chunks.max() + 1) * 16)
    return found


@dataclass(frozen=True)
class Shape:
    """What an instruction descriptor (§9.7.16.4.2, Table 42) says; `m`: rows of D that one CTA holds."""

    m: int
    n: int
    a_bf16: bool
    b_bf16: bool
    a_mn: bool
    b_mn: bool
    a_sign: int
    b_sign: int
    group: int = 1  # CTAs that share the product; each brings its rows of A and N / group rows of B


_shapes: dict[tuple[int, int], Shape] = {}


def is_common(idesc: int, group: int) -> bool:
    """A dense kind::f16 with 128 rows a CTA, whole 16 columns and float32 D: what the fast way through knows."""
    n = idesc >> 17 & 63
    return (
        not idesc & 7
        and not idesc >> 30
        and (idesc >> 4 & 3, idesc >> 24 & 31) == (1, 8 * group)
        and (n > 0 and n % (2 * group) == 0 and n <= 32)
    )


def decode_idesc(idesc: int, group: int, where: str) -> Shape:
    """Decode an instruction descriptor that `is_common`, for cta_group::1 or ::2."""
    if (idesc, group) in _shapes:
        return _shapes[idesc, group]
    if idesc & IDESC_RESERVED:
        raise Hazard(
            f"{where}: instruction descriptor {idesc:#010x}: bit 3, 6, 23 or 29 is set, which kind::f16 reserves"
        )
    if (idesc >> 7 & 7) > 1 or (idesc >> 10 & 7) > 1:
        raise Hazard(f"{where}: instruction descriptor {idesc:#010x}: kind::f16 takes f16 or bf16 operands")
    shape = Shape(
        ((idesc >> 24 & 31) << 4) // group,
        (idesc >> 17 & 63) << 3,
        bool(idesc >> 7 & 1),
        bool(idesc >> 10 & 1),
        bool(idesc >> 15 & 1),
        bool(idesc >> 16 & 1),
        -1 if idesc >> 13 & 1 else 1,
        -1 if idesc >> 14 & 1 else 1,
        group,
    )
    _shapes[idesc, group] = shape
    return shape
