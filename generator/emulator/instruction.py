"""Instruction descriptors of tcgen05.mma, of every kind, decoded strictly (PTX ISA 9.1 §9.7.16.4.2, Tables 42-44)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .datapath import Datapath
from .errors import Hazard, UnsupportedInstruction

_F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
TYPES = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": _F8F6F4,
    "i8": {0: "u8", 1: "s8"},
    "mxf8f6f4": _F8F6F4,
    "mxf4": {1: "e2m1"},
    "mxf4nvf4": {1: "e2m1"},
}
RESULTS = {"f16": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}, "f8f6f4": {0: "f16", 1: "f32"}, "i8": {2: "s32"}}
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4, "u8": 8, "s8": 8}
SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")


@dataclass(frozen=True)
class Instruction:
    """What the opcode and the descriptor say of one tcgen05.mma.

    `m`, `n`, `k`: extents of the whole product; `blocks`: scale factors along k, none for 0; `sf_a`, `sf_b`: the byte
    of a column at which they start.
    """

    kind: str
    m: int
    n: int
    a: str
    b: str
    d: str
    a_mn: bool
    b_mn: bool
    a_sign: int
    b_sign: int
    saturate: bool
    group: int  # CTAs that share the product
    stationary: bool  # .ws
    blocks: int = 0
    scale: str = ""  # "ue8m0" or "ue4m3"
    sf_a: int = 0
    sf_b: int = 0

    @property
    def k(self) -> int:
        """Elements along k: 32 bytes, where 6- and 4-bit elements of kinds f8f6f4 and mxf8f6f4 take a byte each."""
        return {"f16": 16, "tf32": 8, "mxf4": 64, "mxf4nvf4": 64}.get(self.kind, 32)

    @property
    def packed(self) -> bool:
        """4-bit elements lie two to a byte."""
        return self.kind in ("mxf4", "mxf4nvf4")

    @property
    def rows(self) -> int:
        """Rows of A and D that one CTA holds."""
        return self.m // self.group

    def datapath(self, half: int) -> Datapath:
        """Where D lies; `half` of every 32 lanes counts where only 16 are used."""
        if self.rows == 64 and self.group == 1 and not self.stationary:
            return Datapath(64, 1, half)
        return Datapath(self.rows, 128 // self.rows)


def decode_instruction(idesc: int, kind: str, group: int, stationary: bool, blocks: int, where) -> Instruction:
    """Decode a descriptor. `blocks`: scale factors along k that the opcode asks for, 0 without .block_scale.

    Raises:
        Hazard: a field that the kind does not allow, or an extent that it does not have.
        UnsupportedInstruction: sparsity, or a .ws shift.
    """
    try:
        return _decode(idesc, kind, group, stationary, blocks)
    except Hazard as error:
        raise Hazard(f"{where}: instruction descriptor {idesc:#010x}: {error}") from None
    except UnsupportedInstruction as error:
        raise UnsupportedInstruction(f"{where}: instruction descriptor {idesc:#010x}: {error}") from None


@cache
def _decode(idesc: int, kind: str, group: int, stationary: bool, blocks: int) -> Instruction:
    if idesc & 7:
        raise UnsupportedInstruction("sparse products are not supported")
    types = []
    for side, shift in (("A", 7), ("B", 10)):
        code = idesc >> shift & 7
        if code not in TYPES[kind]:
            allowed = ", ".join(f"{name} ({n})" for n, name in TYPES[kind].items())
            raise Hazard(f"kind::{kind} takes {allowed} as {side}, not type {code}")
        types.append(TYPES[kind][code])
    a_sign, b_sign = (-1 if idesc >> bit & 1 else 1 for bit in (13, 14))
    a_mn, b_mn = bool(idesc >> 15 & 1), bool(idesc >> 16 & 1)
    if kind == "i8" and (a_sign, b_sign) != (1, 1):
        raise Hazard("kind::i8 cannot negate")
    for name, mn in zip(types, (a_mn, b_mn), strict=True):
        if mn and BITS[name] < 8:
            raise Hazard(f"an operand of type {name} must be K-major")
    m, n = (idesc >> 24 & 31) << 4, (idesc >> 17 & 63) << 3
    _check_extents(kind, m, n, group, stationary)
    shared = (kind, m, n, *types)
    flags = (a_mn, b_mn, a_sign, b_sign)
    if kind in SCALED:
        return _decode_scaled(idesc, shared, flags, group, blocks)
    if idesc >> 6 & 1 or idesc >> 23 & 1 or idesc >> 29 & 1 or (idesc >> 3 & 1 and kind != "i8"):
        raise Hazard(f"bit 3, 6, 23 or 29 is set, which kind::{kind} reserves")
    if idesc >> 30:
        if stationary:
            raise UnsupportedInstruction("a maximum shift of .ws is not supported")
        raise Hazard("bits 30-31 are a shift, which only .ws has")
    result = RESULTS[kind].get(idesc >> 4 & 3)
    if result is None:
        allowed = ", ".join(f"{name} ({code})" for code, name in RESULTS[kind].items())
        raise Hazard(f"kind::{kind} has D of type {allowed}, not {idesc >> 4 & 3}")
    if result == "f16" and kind == "f16" and "bf16" in types:
        raise Hazard("D of type f16 takes operands of type f16")
    return Instruction(*shared, result, *flags, bool(idesc >> 3 & 1), group, stationary)


def _decode_scaled(idesc: int, shared: tuple, flags: tuple, group: int, blocks: int) -> Instruction:
    kind = shared[0]
    if idesc >> 3 & 1 or idesc >> 6 & 1 or idesc >> 31:
        raise Hazard(f"bit 3, 6 or 31 is set, which kind::{kind} reserves")
    scale = "ue8m0" if idesc >> 23 & 1 else "ue4m3"
    if scale == "ue4m3" and (kind != "mxf4nvf4" or blocks != 4):
        raise Hazard(f"kind::{kind} with {blocks} scale factors along k takes them as ue8m0, not ue4m3")
    sf_a, sf_b = idesc >> 29 & 3, idesc >> 4 & 3
    for side, byte in (("A", sf_a), ("B", sf_b)):
        if byte % blocks:
            raise Hazard(f"scale-factor id {byte} of {side}: {blocks} scale factors along k start at a multiple of it")
    return Instruction(*shared, "f32", *flags, False, group, False, blocks, scale, sf_a, sf_b)


def _check_extents(kind: str, m: int, n: int, group: int, stationary: bool) -> None:
    if stationary:
        rows, columns = (32, 64, 128), (64, 128, 256)
    elif kind in SCALED:
        rows, columns = ((128,), range(8, 257, 8)) if group == 1 else ((128, 256), range(16, 257, 16))
    elif kind == "i8":
        rows = (64, 128) if group == 1 else (128, 256)
        least = 32 if group == 2 else 8 if m == 64 else 16
        columns = (*((8, 24) if least == 8 else ()), *range(max(least, 16), 257, 32 if group == 2 else 16))
    else:
        rows, columns = ((64, 128), range(8, 257, 8)) if group == 1 else ((128, 256), range(16, 257, 16))
    form = f"kind::{kind} with cta_group::{group}{' and .ws' if stationary else ''}"
    if m not in rows:
        raise Hazard(f"M = {m}: {form} has M = {' or '.join(map(str, rows))}")
    if n not in columns:
        listed = ", ".join(map(str, columns)) if len(columns) < 5 else f"a multiple of {columns[-1] - columns[-2]}"
        raise Hazard(f"N = {n}: {form} and M = {m} has N = {listed} from {min(columns)} to {max(columns)}")
