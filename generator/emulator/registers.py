"""setmaxnreg: how many registers a thread each warp holds, against the pool of its CTA (PTX ISA 9.1 §9.7.19.5).

The pool is what the CTA was launched with. That number is the compiler's; PTX only bounds it: .maxnreg says it, else
the CTAs that .minnctapersm wants on a multiprocessor share its 65536 registers. A warp that never executes setmaxnreg
counts only where .maxnreg says what it has. An increase to fewer registers than a warp has is an illegal instruction on
an H200. Increases that wait for others' decreases are fine in any order, so it is
the end that is checked: more than the pool then means that some increase never returned.

The warps of a warpgroup must execute the same setmaxnreg. One that leaves a warp with what it has changes nothing, and
is not counted: FlashAttention-4's backward with D 256 repeats setmaxnreg.dec 32 in two warps of four; `advice` says so.
"""

from __future__ import annotations

import numpy as np

from .errors import Hazard

POOL = 65536  # 32-bit registers of a multiprocessor, CUDA programming guide, table 27
PER_THREAD = 255


class RegisterPool:
    """Registers a thread by warp, int [n_warps, n_cta]; 0 where nothing says how many."""

    def __init__(self, machine):
        self.machine = machine
        directives = machine.program.kernel.directives
        declared = int(directives.get("maxnreg", 0))
        share = POOL // max(int(directives.get("minnctapersm", 1)), 1)
        self.pool = declared * machine.n_warps * 32 if declared else share
        self.most = declared or min(share // (machine.n_warps * 32) // 8 * 8, PER_THREAD)  # at launch
        # ptxas gives every thread its share where .minnctapersm says what that is: 168 of 384 threads, 128 of 512
        self.launched = declared or (self.most if "minnctapersm" in directives else 0)
        shape = (machine.n_warps, machine.n_cta)
        self.count = np.full(shape, declared)
        self.changes = np.zeros(shape, np.int64)  # how often each warp's count changed,
        self.repeats = np.zeros(shape, np.int64)  # and how often a setmaxnreg left it as it was
        self.line = np.zeros(shape, np.int64)

    def set(self, ws, active, instr, count: int) -> None:
        m = self.machine
        if active is not None and not ws.full(active).all():
            raise Hazard(f"{m.where(ws, instr, active)}: {instr.opcode} is executed by part of a warp")
        held = self.count[ws.index]
        if ".dec." in instr.opcode and (np.where(held == 0, self.most, held) < count).any():
            most = int(np.where(held == 0, self.most, held).min())
            raise Hazard(f"{m.where(ws, instr)}: setmaxnreg.dec to {count} registers of a warp that has at most {most}")
        has = np.where(held == 0, self.launched, held)
        if ".inc." in instr.opcode and (has > count).any():
            raise Hazard(f"{m.where(ws, instr)}: setmaxnreg.inc to {count} registers of a warp that has {has.max()}")
        self.changes[ws.index] += held != count
        self.repeats[ws.index] += held == count
        self.count[ws.index] = count
        self.line[ws.index] = instr.line

    def check_exit(self) -> None:
        if not self.changes.any():
            return
        m, whole = self.machine, self.machine.n_warps // 4 * 4
        groups = [x[:whole].reshape(-1, 4, m.n_cta) for x in (self.count, self.changes, self.repeats)]
        *apart, repeated = ((x != x[:, :1]).any(axis=1) for x in groups)
        uneven = np.logical_or(*apart)
        if repeated.any() and m.races and m.races.advice:
            group, cta = (int(i) for i in np.argwhere(repeated)[0])
            m.races.advice.repeated_setmaxnreg(group, cta)
        if uneven.any():
            group, cta = (int(i) for i in np.argwhere(uneven)[0])
            lines = self.line[4 * group : 4 * group + 4, cta].tolist()
            raise Hazard(
                f"CTA {m.name_cta(cta)}: the warps of warpgroup {group} executed different setmaxnreg, last at PTX "
                f"lines {lines} (0: none): all four must execute the same one"
            )
        held = self.count.sum(axis=0) * 32
        if (held > self.pool).any():
            cta = int(np.argmax(held))
            shares = ", ".join(f"{4 * i}: {n}" for i, n in enumerate(self.count[::4, cta].tolist()) if n)
            line = int(self.line[np.argmax(self.count[:, cta]), cta])
            raise Hazard(
                f"PTX line {line} (setmaxnreg), CTA {m.name_cta(cta)}: the warps end up with {held[cta]} registers of "
                f"a pool of {self.pool} (registers a thread from warp {shares}): some setmaxnreg.inc never returns; "
                "ask for less there, or give more back elsewhere (setmaxnreg.dec)"
            )
