"""Extended-precision integers: the carry flag of each thread (PTX ISA 9.1 §9.7.2)."""

from __future__ import annotations

import numpy as np

from ..errors import Hazard
from ..table import effect
from .integer import mul_hi_s32, mul_hi_s64, mul_hi_u32, mul_hi_u64

UNKNOWN = 2


def _flag(m) -> np.ndarray:
    """CC.CF of every thread, u8 [warp, CTA, 32 lanes], UNKNOWN until written; made when an instruction asks for it."""
    if not hasattr(m, "carry"):
        m.carry = np.full((m.n_warps, m.n_cta, 32), UNKNOWN, np.uint8)
    return m.carry


def _extended(subtract: bool, reads: bool, writes: bool, product=None):
    """a + b (+ carry) or a - b (- borrow); with `product` the first addend is the product of two operands."""

    def run(m, ws, active, instr, *operands):
        a, b = operands if product is None else (product(*operands[:2]), operands[2])
        flag = _flag(m)
        old = ws.get(flag)
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        a, b = np.asarray(a).view(unsigned), np.asarray(b).view(unsigned)
        if reads:
            bad = (
                ws.full(old == UNKNOWN) & (True if ws.mask is None else ws.mask) & (True if active is None else active)
            )
            if bad.any():
                raise Hazard(f"{m.where(ws, instr, bad)}: reads the carry flag, which no .cc instruction has written")
        carry = old.astype(unsigned) if reads else unsigned.type(0)
        first = a - b if subtract else a + b
        result = first - carry if subtract else first + carry
        if writes:
            out = (a < b) | (first < carry) if subtract else (first < a) | (result < first)
            out = ws.full(out)
            ws.put(flag, out if active is None else np.where(active, out, old))
        return result

    return run


for _types, _kind in (("u32,s32", "u"), ("u64,s64", "U")):
    _sig = f"{_kind}={_kind},{_kind}"
    effect(f"add.cc.{{{_types}}}", _sig, "9.7.2.1")(_extended(False, False, True))
    effect(f"addc.{{{_types}}}", _sig, "9.7.2.2")(_extended(False, True, False))
    effect(f"addc.cc.{{{_types}}}", _sig, "9.7.2.2")(_extended(False, True, True))
    effect(f"sub.cc.{{{_types}}}", _sig, "9.7.2.3")(_extended(True, False, True))
    effect(f"subc.{{{_types}}}", _sig, "9.7.2.4")(_extended(True, True, False))
    effect(f"subc.cc.{{{_types}}}", _sig, "9.7.2.4")(_extended(True, True, True))
for _type, _kind, _hi in (
    ("u32", "u", mul_hi_u32),
    ("s32", "s", mul_hi_s32),
    ("u64", "U", mul_hi_u64),
    ("s64", "S", mul_hi_s64),
):
    for _part, _product in (("lo", np.multiply), ("hi", _hi)):
        _sig = f"{_kind}={_kind},{_kind},{_kind}"
        effect(f"mad.{_part}.cc.{_type}", _sig, "9.7.2.5")(_extended(False, False, True, _product))
        effect(f"madc.{_part}.{_type}", _sig, "9.7.2.6")(_extended(False, True, False, _product))
        effect(f"madc.{_part}.cc.{_type}", _sig, "9.7.2.6")(_extended(False, True, True, _product))
