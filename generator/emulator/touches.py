"""Which global memory the warps of a launch touch, and what the lanes of each touch in shared memory.

`Touches.conflict` answers whether two warps touch the same bytes of global memory, one of them writing, so that the
order of the two could matter: the clocks (`order`, `races`) see shared and tensor memory only.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .memory import PARAM_BASE
from .ops.memory import shape_of, shared_offsets
from .ops.tma import _lanes, tensor_map
from .syntax import Instr

Runs = tuple[np.ndarray, np.ndarray]  # first and end of each stretch of bytes, apart and ascending
NOT_GLOBAL = ("shared", "shared::cta", "shared::cluster", "local", "param", "const")
WINDOWS = 1 << 32  # generic addresses below are shared or local memory
ATOMIC_BYTES = 16  # the widest
# What touches global memory, or hands work out, in a way that is not followed here.
UNKNOWN = ("multimem", "tensormap", "clusterlaunchcontrol", "fence.proxy.tensormap", "griddepcontrol", "discard")


class Touches:
    """Collected by a Recorder: stretches of global memory by (CTA, warp, written), shared accesses by warp and place in
    its log. `unknown`: something ran whose memory nobody knows.
    """

    def __init__(self):
        self.unknown = False
        self._global: dict[tuple[int, int, bool], list[tuple[int, int]]] = defaultdict(list)
        self.shared: dict[tuple[int, int], dict[int, tuple[np.ndarray, int, bool]]] = defaultdict(dict)

    def note(self, m, ws, active, instr: Instr, operands: tuple, first: int, log: dict) -> None:
        """An instruction ran, in CTAs numbered from `first` on; `log`: what each warp has run, this included."""
        words = instr.opcode.split(".")
        if words[0] in ("ld", "ldu", "st"):
            if words[1].startswith("shared"):
                self._note_shared(m, ws, active, instr, operands, first, log)
            elif not set(words) & set(NOT_GLOBAL):
                width, count = shape_of(instr)
                self._note(m, ws, active, first, operands[0], width * count, words[0] == "st")
        elif words[0] in ("atom", "red"):
            if not set(words) & set(NOT_GLOBAL):
                self._note(m, ws, active, first, operands[0], ATOMIC_BYTES, True)
        elif "tensor" in words and "global" in words and "prefetch" not in words:
            self._note_tensor(m, ws, active, instr, operands, first)
        elif instr.opcode.startswith(("cp.async.ca", "cp.async.cg")):
            self._note(m, ws, active, first, operands[1], operands[2], False)
        elif instr.opcode.startswith(("cp.async.bulk.", "cp.reduce.async.bulk.")) and "global" in words:
            written = words.index("global") < next((i for i, w in enumerate(words) if w.startswith("shared")), 0)
            if "prefetch" not in words:
                self._note(m, ws, active, first, operands[0 if written else 1], operands[2], written)
        elif instr.opcode.startswith(UNKNOWN):
            self.unknown = True

    def _note(self, m, ws, active, first: int, address, nbytes, written: bool) -> None:
        warps, ctas, _, (low, size) = _lanes(m, ws, active, (address, nbytes))
        for warp, cta, at, n in zip(*(x.tolist() for x in (warps, ctas, low, size)), strict=True):
            if WINDOWS <= at < PARAM_BASE and n:
                self._global[cta + first, warp, written].append((at, at + n))

    def _note_tensor(self, m, ws, active, instr, operands, first: int) -> None:
        """A tensor copy counts as touching the whole array."""
        address, _ = next(operand for operand in operands if isinstance(operand, tuple))
        written = instr.opcode.startswith("cp.reduce") or ".global.shared" in instr.opcode
        warps, ctas, _, (pointers,) = _lanes(m, ws, active, (address,))
        where = m.where(ws, instr)
        for warp, cta, pointer in set(zip(*(x.tolist() for x in (warps, ctas, pointers)), strict=True)):
            at = tensor_map(m, pointer, where).address
            found = m.gmem.find(at, at + 1)
            self.unknown = self.unknown or found is None
            if found is not None:
                self._global[cta + first, warp, written].append((found[0], found[0] + len(found[1])))

    def _note_shared(self, m, ws, active, instr, operands, first: int, log: dict) -> None:
        width, count = shape_of(instr)
        offsets = shared_offsets(m, ws, active, instr, operands[0], width * count)
        warps, ctas, lanes, (places,) = _lanes(m, ws, active, (offsets,))
        for warp, cta in set(zip(warps.tolist(), ctas.tolist(), strict=True)):
            mine = (warps == warp) & (ctas == cta)
            of_lanes = np.full(32, -1, np.int64)
            of_lanes[lanes[mine]] = places[mine]
            who = cta + first, warp
            self.shared[who][len(log[who]) - 1] = of_lanes, width * count, instr.opcode.startswith("st")

    def conflict(self) -> bool:
        """Whether two warps touch the same global memory, one of them writing. Writes of different CTAs count only
        where another one reads: nothing inside a CTA orders two CTAs, unless one reads what the other wrote.
        """
        runs = {key: merged(spans) for key, spans in self._global.items()}
        for (cta, warp, written), mine in runs.items():
            for (other_cta, other, reads_not), theirs in runs.items():
                both_write = written and reads_not
                apart = (cta, warp) != (other_cta, other) and (cta == other_cta or not both_write)
                if written and apart and meet(mine, theirs):
                    return True
        return self.unknown


def merged(spans: list[tuple[int, int]]) -> Runs:
    """The bytes of these stretches, as stretches that neither overlap nor touch."""
    low, high = np.array(sorted(set(spans)), np.uint64).T
    ends = np.maximum.accumulate(high)
    starts = np.concatenate([[True], low[1:] > ends[:-1]])
    return low[starts], ends[np.concatenate([starts[1:], [True]])]


def meet(one: Runs, other: Runs) -> bool:
    """Whether two sets of bytes have one in common."""
    at = np.searchsorted(other[1], one[0], "right")
    inside = at < len(other[0])
    return bool((other[0][at[inside]] < one[1][inside]).any())
