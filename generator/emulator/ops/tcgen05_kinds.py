"""tcgen05.mma of the kinds besides f16, weight stationary, and with block scaling (PTX ISA 9.1 §9.7.16.10.9)."""

from __future__ import annotations

from ..errors import UnsupportedInstruction
from ..table import effect
from .tcgen05 import mma

_USES = ("discard", "lastuse", "fill", "use")
_A = "{," + ",".join(f".collector::a::{use}" for use in _USES) + "}"
_B = "{," + ",".join(f".collector::b{n}::{use}" for n in range(4) for use in _USES) + "}"
_SCALED = {  # suffix → scale factors along k
    "mxf8f6f4": {"": 1, ".scale_vec::1X": 1, ".block32": 1},
    "mxf4": {"": 2, ".scale_vec::2X": 2, ".block32": 2},
    "mxf4nvf4": {".scale_vec::2X": 2, ".block32": 2, ".scale_vec::4X": 4, ".block16": 4},
}

effect(f"tcgen05.mma.cta_group::{{1,2}}.kind::{{tf32,f8f6f4,i8}}{_A}", "=a,x,U,u,?*u,?p,?k", "9.7.16.10.9.1")(mma)


@effect(f"tcgen05.mma.ws.cta_group::1.kind::{{f16,tf32,f8f6f4,i8}}{_B}", "=a,x,U,u,?p,?U", "9.7.16.10.9.3")
def mma_ws(m, ws, active, instr, d, a, b, idesc, accumulate=True, zero_columns=0):
    """Weight stationary: the same product, on data paths of 32, 64 or 128 rows."""
    if ws.full(zero_columns).any():
        raise UnsupportedInstruction(f"PTX line {instr.line}: a zero-column mask is not supported")
    mma(m, ws, active, instr, d, a, b, idesc, None, accumulate)


def _block_scaled(blocks: int):
    def run(m, ws, active, instr, d, a, b, idesc, scale_a, scale_b, accumulate=True):
        mma(m, ws, active, instr, d, a, b, idesc, None, accumulate, 0, (scale_a, scale_b), blocks)

    return run


for _kind, _suffixes in _SCALED.items():
    for _suffix, _blocks in _suffixes.items():
        _name = f"tcgen05.mma.cta_group::{{1,2}}.kind::{_kind}.block_scale{_suffix}{_A}"
        effect(_name, "=a,x,U,u,a,a,?p", "9.7.16.10.9.1")(_block_scaled(_blocks))
