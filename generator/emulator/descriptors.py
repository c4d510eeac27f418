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

    K-major: `chunks` [rows, 2] of eight k each; MN-major: [16 k, rows / 8] of eight rows each.
    """

    chunks: np.ndarray
    mn_major: bool
    low: int  # shared offsets that the tile spans, in bytes
    high: int


_operands: dict[tuple[int, int, bool], Operand] = {}


def shared_operand(descriptor: int, rows: int, mn_major: bool, where: str) -> Operand:
    """Decode a shared-memory descriptor (§9.7.16.4.1, Table 40) of a 16-bit operand of `rows` rows and 16 k."""
    key = (descriptor, rows, mn_major)
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
    bits = {0: 0, 2: 3, 4: 2, 6: 1}.get(descriptor >> 61)
    if bits is None:
        raise UnsupportedInstruction(
            f"{where}: shared-memory descriptor {descriptor:#018x}: swizzle mode {descriptor >> 61} is not supported"
        )
    chunks = _tile(start, lbo, sbo, bits, rows, mn_major)
    found = _operands[key] = Operand(chunks, mn_major, int(chunks.min()) * 16, int(chunks.max() + 1) * 16)
    return found


def _tile(start: int, lbo: int, sbo: int, bits: int, rows: int, mn_major: bool) -> np.ndarray:
    """Chunks of a tile of `rows` rows and 32 bytes of k in a canonical layout (§9.7.16.3.3, §9.7.15.5.1.2), swizzled by
    `bits` bits of the address.
    """
    span = 16 << bits
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(2)[None]
        linear = start + row % 8 * (span if bits else 16) + row // 8 * sbo + chunk * (16 if bits else lbo)
    else:
        k, group = np.arange(16)[:, None], np.arange(rows // 8)[None]
        if bits:
            wide = span // 2 // 8
            linear = start + group % wide * 16 + group // wide * lbo + k % 8 * span + k // 8 * sbo
        else:
            linear = start + group * sbo + k % 8 * 16 + k // 8 * lbo
    address = linear ^ ((linear >> 3) & (((1 << bits) - 1) << 4))
    return (address - WINDOW_BASE) >> 4


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


def decode_idesc(idesc: int, group: int, where: str) -> Shape:
    """Decode the instruction descriptor of kind::f16 with float32 accumulation, for cta_group::1 or ::2."""
    if (idesc, group) in _shapes:
        return _shapes[idesc, group]
    if idesc & IDESC_RESERVED:
        raise Hazard(
            f"{where}: instruction descriptor {idesc:#010x}: bit 3, 6, 23 or 29 is set, which kind::f16 reserves"
        )
    if idesc & 7 or idesc >> 4 & 3 != 1 or idesc >> 30:
        raise UnsupportedInstruction(
            f"{where}: instruction descriptor {idesc:#010x}: only dense float32 accumulation is supported"
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
    if shape.m != 128:
        found = f"M = {shape.m * group} with cta_group::{group}"
        raise UnsupportedInstruction(f"{where}: {found}: only M = 128 a CTA is supported so far")
    if not 16 <= shape.n <= 256 or shape.n % (16 * group):
        found = f"N = {shape.n} with M = {128 * group}"
        raise Hazard(f"{where}: {found}: N must be a multiple of {16 * group} from {16 * group} to 256")
    _shapes[idesc, group] = shape
    return shape
