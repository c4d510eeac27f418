"""Bit fields, funnel shifts, byte permutation and small dot products (PTX ISA 9.1 §9.7.1, §9.7.8.7, §9.7.9.7)."""

from __future__ import annotations

import numpy as np

from ..table import alu

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64


# -- funnel shifts, §9.7.8.7 -------------------------------------------------------------------------------------------
def _funnel(left: bool, wrap: bool):
    """The pair b:a shifted by c (mod 32, or at most 32); left keeps the high word, right the low one."""

    def run(a, b, c):
        both = (b.astype(U64) << U64(32)) | a
        count = (c & U32(31) if wrap else np.minimum(c, U32(32))).astype(U64)
        return ((both << count) >> U64(32)).astype(U32) if left else (both >> count).astype(U32)

    return run


for _side in "lr":
    for _mode in ("wrap", "clamp"):
        alu(f"shf.{_side}.{_mode}.b32", "u=u,u,u", "9.7.8.7")(_funnel(_side == "l", _mode == "wrap"))


# -- bytes, §9.7.9.7 ---------------------------------------------------------------------------------------------------
@alu("prmt.b32", "u=u,u,u", "9.7.9.7")
def prmt(a, b, selector):
    both = (b.astype(U64) << U64(32)) | a
    result = U32(0)
    for i in range(4):
        code = (selector >> U32(4 * i)) & U32(15)
        byte = ((both >> ((code & U32(7)) * U32(8)).astype(U64)) & U64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        result = result | (np.where(code & U32(8), sign, byte) << U32(8 * i))
    return result


def _selected(table):
    """prmt with a mode: the low two bits of the selector choose one of four fixed selectors."""
    codes = np.array([int(code, 16) for code in table], U32)
    return lambda a, b, selector: prmt(a, b, codes[selector & U32(3)])


for _mode, _codes in {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}.items():
    alu(f"prmt.b32.{_mode}", "u=u,u,u", "9.7.9.7")(_selected(_codes))


# -- bit fields, §9.7.1.14 to §9.7.1.22 --------------------------------------------------------------------------------
@alu("bfe.u32", "u=u,u,u", "9.7.1.19")
def bfe_u32(a, position, length):
    position, length = position & U32(255), length & U32(255)
    shifted = np.where(position > 31, U32(0), a >> np.minimum(position, U32(31)))
    return np.where(length > 31, shifted, shifted & ((U32(1) << np.minimum(length, U32(31))) - U32(1)))


@alu("clz.b32", "u=u", "9.7.1.15")
def clz(a):
    return np.where(a == 0, U32(32), U32(31) - np.log2(np.maximum(a, 1).astype(np.float64)).astype(U32))


@alu("popc.b32", "u=u", "9.7.1.14")
def popc(a):
    return np.bitwise_count(a).astype(U32)


@alu("brev.b32", "u=u", "9.7.1.18")
def brev(a):
    a = ((a >> U32(1)) & U32(0x55555555)) | ((a & U32(0x55555555)) << U32(1))
    a = ((a >> U32(2)) & U32(0x33333333)) | ((a & U32(0x33333333)) << U32(2))
    a = ((a >> U32(4)) & U32(0x0F0F0F0F)) | ((a & U32(0x0F0F0F0F)) << U32(4))
    return a.byteswap()


def _bits_of(a) -> int:
    return a.dtype.itemsize * 8


def _field(a, position, length):
    """bfe: bits [position, position + length) of a, sign-extended for signed types by the field's top bit, or by the
    operand's own where the field leaves it (position and length count modulo 256)."""
    width, dtype = _bits_of(a), a.dtype.type
    position, length = (position & U32(255)).astype(S64), (length & U32(255)).astype(S64)
    unsigned = a.view(f"u{width // 8}")
    one = unsigned.dtype.type(1)
    top = np.minimum(position + length - 1, width - 1)
    shifted = np.where(position >= width, 0, unsigned >> np.minimum(position, width - 1).astype(unsigned.dtype))
    mask = np.where(
        length >= width, ~unsigned.dtype.type(0), (one << np.minimum(length, width - 1).astype(one.dtype)) - one
    )
    result = shifted & mask
    if dtype(0).dtype.kind == "i":
        sign = (unsigned >> np.maximum(top, 0).astype(unsigned.dtype)) & one != 0
        sign = sign & (length != 0)
        have = np.clip(np.minimum(length, width - position), 0, width)  # bits the field takes from the operand
        fill = np.where(have >= width, 0, ~unsigned.dtype.type(0) << np.minimum(have, width - 1).astype(unsigned.dtype))
        result = np.where(sign, result | fill, result)
    return result.astype(unsigned.dtype).view(a.dtype)


alu("bfe.s32", "s=s,u,u", "9.7.1.19")(_field)
alu("bfe.u64", "U=U,u,u", "9.7.1.19")(_field)
alu("bfe.s64", "S=S,u,u", "9.7.1.19")(_field)


@alu("bfi.b32", "u=u,u,u,u", "9.7.1.20")
@alu("bfi.b64", "U=U,U,u,u", "9.7.1.20")
def bfi(a, b, position, length):
    """The low `length` bits of a replace those of b from `position` on."""
    dtype, width = a.dtype.type, _bits_of(a)
    position, length = (position & U32(255)).astype(S64), (length & U32(255)).astype(S64)
    ones = np.where(length >= width, ~dtype(0), (dtype(1) << np.minimum(length, width - 1).astype(dtype)) - dtype(1))
    at = np.minimum(position, width - 1).astype(dtype)
    mask = np.where(position >= width, dtype(0), ones << at)
    return (b & ~mask) | ((a << at) & mask)


def _mask(wrap: bool):
    """bmsk: b ones from bit a on (both modulo 32, or both at most 32)."""

    def run(a, b):
        at, length = ((x & U32(31) if wrap else np.minimum(x, U32(32))).astype(U64) for x in (a, b))
        return (((U64(1) << length) - U64(1)) << at).astype(U32)

    return run


alu("bmsk.wrap.b32", "u=u,u", "9.7.1.22")(_mask(True))
alu("bmsk.clamp.b32", "u=u,u", "9.7.1.22")(_mask(False))


@alu("clz.b64", "u=U", "9.7.1.15")
def clz64(a):
    high, low = (a >> U64(32)).astype(U32), a.astype(U32)
    return np.where(high == 0, U32(32) + clz(low), clz(high))


@alu("popc.b64", "u=U", "9.7.1.14")
def popc64(a):
    return np.bitwise_count(a).astype(U32)


@alu("brev.b64", "U=U", "9.7.1.18")
def brev64(a):
    return (brev(a.astype(U32)).astype(U64) << U64(32)) | brev((a >> U64(32)).astype(U32))


def _highest(shift: bool):
    """bfind: position of the highest bit that differs from the sign; none gives all ones; .shiftamt counts from it."""

    def run(a):
        width = _bits_of(a)
        x = a.view(f"u{width // 8}")
        x = np.where(a < 0, ~x, x) if a.dtype.kind == "i" else x
        zeros = clz(x) if width == 32 else clz64(x)
        return np.where(x == 0, ~U32(0), zeros if shift else U32(width - 1) - zeros)

    return run


for _type, _kind in (("u32", "u"), ("s32", "s"), ("u64", "U"), ("s64", "S")):
    alu(f"bfind.{_type}", f"u={_kind}", "9.7.1.16")(_highest(False))
    alu(f"bfind.shiftamt.{_type}", f"u={_kind}", "9.7.1.16")(_highest(True))


@alu("fns.b32", "u=u,u,s", "9.7.1.17")
def fns(mask, base, offset):
    """The |offset|-th set bit of `mask` from `base` on, upward for a positive offset, downward for a negative one;
    offset 0: `base` itself if set. All ones if there is none."""
    mask, base, offset = (
        np.broadcast_to(x, np.broadcast_shapes(*map(np.shape, (mask, base, offset)))) for x in (mask, base, offset)
    )
    found = np.full(mask.shape, ~U32(0))
    for step in (1, -1):
        wanted = np.where(offset == 0, 1, np.abs(offset.astype(S64)))
        count = np.zeros(mask.shape, S64)
        for distance in range(32):
            at = base.astype(S64) + step * distance
            inside = (at >= 0) & (at < 32) & ((distance == 0) | (offset != 0))
            isset = inside & ((mask >> np.clip(at, 0, 31).astype(U32)) & U32(1) != 0)
            count += isset
            mine = (offset >= 0) if step > 0 else (offset < 0)
            found = np.where(isset & mine & (count == wanted), at.astype(U32), found)
    return found


def _extend(wrap: bool):
    """szext: the low b bits of a (b modulo 32, or at most 32), by sign or zero."""

    def run(a, b):
        count = (b & U32(31) if wrap else np.minimum(b, U32(32))).astype(S64)
        up = (
            a.astype(S64) << (S64(64) - count)
            if a.dtype.kind == "i"
            else a.astype(U64) << (S64(64) - count).astype(U64)
        )
        down = up >> np.minimum(S64(64) - count, 63).astype(up.dtype)
        return np.where(count == 0, 0, down).astype(a.dtype)

    return run


for _mode in ("clamp", "wrap"):
    alu(f"szext.{_mode}.u32", "u=u,u", "9.7.1.21")(_extend(_mode == "wrap"))
    alu(f"szext.{_mode}.s32", "s=s,u", "9.7.1.21")(_extend(_mode == "wrap"))


# -- dot products, §9.7.1.23, §9.7.1.24 --------------------------------------------------------------------------------
def _lanes_of(x, dtype, first: int, count: int):
    bits = np.dtype(dtype).itemsize * 8
    unsigned = np.dtype(f"u{bits // 8}").type
    return [(x >> U32(bits * i)).astype(unsigned).view(dtype).astype(S64) for i in range(first, first + count)]


for _a, _ta in (("u32", U8), ("s32", S8)):
    for _b, _tb in (("u32", U8), ("s32", S8)):
        _kind = "u" if _a == _b == "u32" else "s"
        _dtype = U32 if _kind == "u" else S32

        def dp4a(a, b, c, ta=_ta, tb=_tb, dtype=_dtype):
            terms = zip(_lanes_of(a, ta, 0, 4), _lanes_of(b, tb, 0, 4), strict=True)
            return (sum(x * y for x, y in terms) + c.astype(S64)).astype(dtype)

        alu(f"dp4a.{_a}.{_b}", f"{_kind}=u,u,{_kind}", "9.7.1.23")(dp4a)
        for _half, _first in (("lo", 0), ("hi", 2)):
            _wide = U16 if _a == "u32" else S16

            def dp2a(a, b, c, ta=_wide, tb=_tb, dtype=_dtype, first=_first):
                terms = zip(_lanes_of(a, ta, 0, 2), _lanes_of(b, tb, first, 2), strict=True)
                return (sum(x * y for x, y in terms) + c.astype(S64)).astype(dtype)

            alu(f"dp2a.{_half}.{_a}.{_b}", f"{_kind}=u,u,{_kind}", "9.7.1.24")(dp2a)
