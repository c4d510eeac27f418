"""Questions about addresses: which state space, which CTA (PTX ISA 9.1 §9.7.9.19, §9.7.9.23, §9.7.9.24)."""

from __future__ import annotations

import numpy as np

from ..cluster import OFFSET_MASK, RANK_SHIFT
from ..memory import LOCAL_BASE, PARAM_BASE
from ..table import effect

_RANKS_BEYOND = 0x7F  # what higher ranks become: of no cluster, and no local memory's address


@effect("mapa{,.shared::cluster}.u32", "u=u,u", "9.7.9.23")
@effect("mapa{,.shared::cluster}.u64", "U=U,u", "9.7.9.23")
def mapa(m, ws, active, instr, address, rank):
    """The same shared address in another CTA of the cluster; where there is no such CTA, an access will say so."""
    kind = np.asarray(address).dtype.type
    rank = np.minimum(rank, np.uint32(_RANKS_BEYOND)).astype(kind)
    return (address & kind(OFFSET_MASK)) | (rank << kind(RANK_SHIFT))


@effect("getctarank{,.shared::cluster}.u32", "u=u", "9.7.9.24")
@effect("getctarank{,.shared::cluster}.u64", "u=U", "9.7.9.24")
def getctarank(m, ws, active, instr, address):
    """The rank of the CTA that a shared::cluster address lies in."""
    return (np.asarray(address) >> np.asarray(address).dtype.type(RANK_SHIFT)).astype(np.uint32)


@effect("isspacep.{global,const,local,param,param::entry,shared,shared::cta,shared::cluster}", "p=U", "9.7.9.19")
def isspacep(m, ws, active, instr, address):
    """Whether a generic address lies in a state space."""
    address = np.asarray(address)
    shared, param = address < np.uint64(LOCAL_BASE), address >= np.uint64(PARAM_BASE)
    local = ~shared & (address < np.uint64(1 << 32))
    space = instr.opcode.split(".")[1]
    if space in ("shared", "shared::cta") and m.cluster.size > 1:
        return shared & ((address >> np.uint64(RANK_SHIFT)) == m.cluster.rank(ws.cta).astype(np.uint64))
    if space.startswith("shared"):
        return shared
    constant = np.zeros(address.shape, bool)
    for low, high in m.constants:
        constant = constant | (address >= low) & (address < high)
    found = {"local": local, "param": param, "param::entry": param, "const": constant}
    return found.get(space, ~(shared | local | param | constant))
