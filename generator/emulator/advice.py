"""Warnings: what the PTX ISA asks for and silicon is known to do without. Collected only if asked for.

Kernels in wide use leave out the tcgen05 fences around thread synchronization, and read what a tcgen05.ld delivers
without tcgen05.wait::ld: a true register dependency is honoured. An mbarrier's initialization reaches the asynchronous
proxy and other CTAs in practice without fence.mbarrier_init. All three may cease to hold; none is a hazard here.
Sources: PTX ISA 9.1 §9.7.16.6.4 (tcgen05 fences), §9.7.16.8.5 (wait::ld), §9.7.13.4 (fence.mbarrier_init).
"""

from __future__ import annotations

import numpy as np


class Advice:
    """The warnings of one wave; `found` holds each sentence once."""

    def __init__(self, machine, found: dict[str, None]):
        self.machine, self.found = machine, found
        shape = (machine.n_warps, machine.n_cta)
        self.accessed = np.zeros(shape, np.int64)  # PTX line of a tcgen05.ld or .st with no fence::before since
        self.acquired = np.zeros(shape, np.int64)  # PTX line of a wait or barrier with no fence::after since
        self.unfenced_inits: dict[int, int] = {}  # slot → PTX line of an mbarrier.init with no fence.mbarrier_init

    def warn(self, text: str) -> None:
        self.found.setdefault(text)

    def line(self, line: int) -> str:
        return self.machine.races.line(line)

    # -- tcgen05 fences ------------------------------------------------------------------------------------------------
    def released(self, warps, ctas, instr) -> None:
        """These warps arrive somewhere."""
        lines = self.accessed[warps, ctas]
        for line in np.unique(lines[lines > 0]).tolist():
            self.warn(
                f"PTX line {instr.line} ({instr.opcode}): signals after a tcgen05 operation ({self.line(line)}) with "
                "no tcgen05.fence::before_thread_sync between: insert one before the signal"
            )
        self.accessed[warps, ctas] = 0

    def acquires(self, warps, ctas, line: int) -> None:
        """These warps are through a wait or a barrier."""
        self.acquired[warps, ctas] = line

    def fenced(self, warps, ctas, before: bool) -> None:
        (self.accessed if before else self.acquired)[warps, ctas] = 0

    def tensor(self, warps, ctas, instr, accesses: bool) -> None:
        """A tcgen05 operation of these warps; `accesses`: a load or store, which no commit will cover."""
        lines = self.acquired[warps, ctas]
        for line in np.unique(lines[lines > 0]).tolist():
            self.warn(
                f"PTX line {instr.line} ({instr.opcode}): a tcgen05 operation after a wait ({self.line(line)}) with no "
                "tcgen05.fence::after_thread_sync between: insert one after the wait"
            )
        self.acquired[warps, ctas] = 0
        if accesses:
            self.accessed[warps, ctas] = instr.line

    # -- loads that are used before their wait -------------------------------------------------------------------------
    def used_early(self, sites) -> None:
        """An instruction needs what the loads of these numbers deliver, and no tcgen05.wait::ld came between."""
        for line, number in self.machine.program.load_sites.items():
            if number in sites:
                self.warn(
                    f"{self.line(line)}: its registers are used before tcgen05.wait::ld, which only the register "
                    "dependency excuses: insert tcgen05.wait::ld.sync.aligned before the first use"
                )

    # -- registers of wgmma --------------------------------------------------------------------------------------------
    def accumulator_set(self, instr) -> None:
        self.warn(
            f"PTX line {instr.line} ({instr.opcode}): constants were moved into its registers after the last "
            "wgmma.fence: insert wgmma.fence.sync.aligned between"
        )

    # -- registers of a warpgroup --------------------------------------------------------------------------------------
    def repeated_setmaxnreg(self, group: int, cta: int) -> None:
        self.warn(
            f"CTA {self.machine.name_cta(cta)}: some warps of warpgroup {group} repeat a setmaxnreg that changes "
            "nothing, and others do not: let all four execute the same (PTX ISA 9.1 §9.7.19.5)"
        )

    # -- initializations -----------------------------------------------------------------------------------------------
    def initialized(self, slot: int, line: int) -> None:
        self.unfenced_inits[slot] = line

    def initialized_by_all(self, instr, lanes: int) -> None:
        self.warn(
            f"PTX line {instr.line} ({instr.opcode}): {lanes} lanes initialize the same mbarrier, and to do so with a "
            "live one is undefined: elect one"
        )

    def fenced_inits(self) -> None:
        self.unfenced_inits.clear()

    def used_by_others(self, slot: int, instr_text: str) -> None:
        """The asynchronous proxy or another CTA uses an mbarrier."""
        line = self.unfenced_inits.pop(slot, None)
        if line is not None:
            self.warn(
                f"{self.line(line)}: initializes the {self.machine.mbarriers.name(slot)}, which {instr_text} with no "
                "fence.mbarrier_init between: insert fence.mbarrier_init.release.cluster after the initialization, "
                "before the barrier that follows it"
            )
