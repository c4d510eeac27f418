"""Matrix products of a warpgroup (PTX ISA 9.1 §9.7.15): wgmma.mma_async, fence, commit_group, wait_group."""

from __future__ import annotations

from ..chains import form_of
from ..errors import Hazard, UnsupportedInstruction
from ..table import effect

_TYPES = {
    "16": ("f32.bf16.bf16", "f32.f16.f16", "f16.f16.f16"),
    "8": ("f32.tf32.tf32",),
    "32": tuple(f"{d}.{a}.{b}" for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
}
_INTEGERS = tuple(f"s32.{a}.{b}{end}" for a in ("s8", "u8") for b in ("s8", "u8") for end in ("", ".satfinite"))


def mma_async(m, ws, active, instr, d, a_registers, a, b, accumulate, scale_a=1, scale_b=1, *transposed):
    """Issue D = A·B (+ D). `d`, `a_registers`: register indices; `a`: a descriptor or four registers of A."""
    where = m.where(ws, instr, True if active is None else active)
    sixteen_bit = instr.opcode.endswith(("bf16", "f16.f16"))
    wanted = 0 if not sixteen_bit else 1 if a_registers else 2
    if len(transposed) != wanted:
        raise UnsupportedInstruction(
            f"PTX line {instr.line}: {instr.opcode} with {len(transposed)} transpose immediates, it takes {wanted}"
        )
    if scale_a not in (1, -1) or scale_b not in (1, -1) or any(t not in (0, 1) for t in transposed):
        raise Hazard(f"{where}: imm-scale must be 1 or -1, imm-trans 0 or 1")
    a_mn, b_mn = (False, *transposed) if wanted == 1 else transposed or (False, False)
    form = form_of(instr.opcode, scale_a, scale_b, bool(a_mn), bool(b_mn))
    if len(d) != form.registers:
        raise Hazard(f"{where}: D has {len(d)} registers, N = {form.n} takes {form.registers}")
    m.wgmma.issue(ws, active, d, form, a, b, accumulate, a_registers, where)


for _k, _types in _TYPES.items():
    for _type in _types:
        for _n in range(8, 257, 8):
            effect(
                f"wgmma.mma_async.sync.aligned.m64n{_n}k{_k}.{_type}",
                "*u=x,U,p,?k,?k,?k,?k",
                "9.7.15.5.2",
                in_flight=True,
            )(mma_async)


for _type in _INTEGERS:
    for _n in (8, 16, 24, *range(32, 257, 16)):
        effect(f"wgmma.mma_async.sync.aligned.m64n{_n}k32.{_type}", "*u=x,U,p", "9.7.15.5.2", in_flight=True)(mma_async)


@effect("wgmma.fence.sync.aligned", "=", "9.7.15.7.1")
def fence(m, ws, active, instr):
    """Orders what ordinary instructions did to registers before it and the wgmma after it."""
    m.wgmma.fence(ws, active, m.where(ws, instr, True if active is None else active))


@effect("wgmma.commit_group.sync.aligned", "=", "9.7.15.7.2")
def commit_group(m, ws, active, instr):
    m.wgmma.commit(ws, active, m.where(ws, instr, True if active is None else active))


@effect("wgmma.wait_group.sync.aligned", "=k", "9.7.15.7.3", starts_block=True, ends_block=True)
def wait_group(m, ws, active, instr, pending):
    """A block of its own: D is written to the registers' storage, of which no block may hold a view meanwhile."""
    where = m.where(ws, instr, True if active is None else active)
    if pending < 0:
        raise Hazard(f"{where}: wgmma.wait_group {pending}: the count must not be negative")
    m.wgmma.wait(ws, active, int(pending), where)
