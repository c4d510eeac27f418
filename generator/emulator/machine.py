"""The machine that runs one wave of CTAs: registers, program counters, the scheduler, and the deadlock report.

Warps that stand at the same block run as one NumPy operation, across CTAs. A warp whose wait failed sleeps until some
mbarrier of its CTA completes a phase. Asynchronous work completes only when nothing else can run: as late as the waits
of the program allow.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque

import numpy as np

from .agents import AsyncQueue
from .barriers import Mbarriers, NamedBarriers
from .cluster import CLUSTER_BARRIER, RANK_SHIFT, Cluster
from .errors import Hazard
from .hot import Frames
from .labels import Labels
from .memory import GlobalMemory, SharedMemory, TensorMemory
from .ops.tma import check_bulk_at_exit
from .races import Races
from .registers import RegisterPool
from .schedule import Schedule
from .scheduler import Scheduler
from .syntax import Instr
from .tensorcore import TensorCore
from .translate import Program
from .warpgroup import Warpgroups
from .warps import LANES, Warps

AWAKE, ANY_SLOT = -1, -2  # in Machine.wakes
REGISTER_DTYPE = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Where:
    """Formats as "PTX line 12 (st.shared.b32), CTA (0, 1, 0), warp 3, lane 5, address 0x440"."""

    __slots__ = ("machine", "ws", "instr", "lanes", "address", "phase")

    def __init__(self, machine: Machine, ws: Warps, instr: Instr, lanes, address, phase: str = ""):
        self.machine, self.ws, self.instr, self.lanes, self.address = machine, ws, instr, lanes, address
        self.phase = phase

    def __str__(self) -> str:
        lanes = np.asarray(self.lanes)
        cta, warp, lane = self.ws.where(lanes)
        text = f"PTX line {self.instr.line} ({self.instr.opcode}), CTA {self.machine.name_cta(cta)}"
        text += f", warp {warp}, lane {lane}"
        if self.address is not None:
            at = int(np.argmax(self.ws.full(lanes).reshape(-1)))
            text += f", address {int(self.ws.full(self.address).reshape(-1)[at]):#x}"
        return text + self.phase

    def during(self, phase: str) -> Where:
        return Where(self.machine, self.ws, self.instr, self.lanes, self.address, f", {phase}")


class Machine:
    """One wave: `ctas` are (x, y, z) block indices that run together."""

    allow_uninitialized = False  # see Gpu

    def __init__(
        self,
        program: Program,
        ctas: list[tuple[int, int, int]],
        grid,
        block,
        smem_bytes: int,
        params: dict,
        gmem: GlobalMemory,
        labels: Labels,
        cluster: tuple[int, int, int] = (1, 1, 1),
        accumulation: str = "fast",
        strict: bool = True,
        schedule: Schedule | None = None,
    ):
        self.strict = strict
        self.accumulation = accumulation
        # MMAs onto one accumulator that are complete at the same time are one product. How many, and so the rounding,
        # is the schedule's: not where several schedules are compared bit by bit.
        self.fuses = True
        self.program, self.gmem, self.labels = program, gmem, labels
        self.n_cta = len(ctas)
        self.grid, self.block = grid, block
        self.threads = block[0] * block[1] * block[2]
        self.n_warps = -(-self.threads // 32)
        self.cluster = Cluster(cluster, self.n_cta, self.n_warps)
        self.smem = SharedMemory(self.n_cta, program.static_shared + smem_bytes, strict)
        self.tmem = TensorMemory(self.n_cta, strict)
        self.mbarriers = Mbarriers(self.n_cta, labels)
        self.named = NamedBarriers(self.n_cta)
        self.queue = AsyncQueue(self)
        self.tensor_core = TensorCore(self)
        self.wgmma = Warpgroups(self)
        self.races = Races(self) if strict else None
        self.pool = RegisterPool(self) if strict else None
        self.stores: list[tuple] = []  # tcgen05.st that no wait::st has covered yet
        self.bulk: dict[tuple[int, int, int], list[list]] = {}  # bulk groups by (warp, CTA, lane); the last is open
        self.work: Counter[str] = Counter()  # bytes that bulk copies move, and FLOP of tcgen05.mma: see LaunchReport
        self.sources: Counter[tuple[int, int, int]] = Counter()  # (CTA, first, end) chunk of bulk stores under way
        self.params_maps: dict[int, object] = {}  # tensor maps by address, as they were when last used
        self.param_bytes = params["bytes"]
        self.params = params["values"]
        self.variables: dict[str, np.uint64] = params["variables"]  # addresses of the module's
        self.constants = params["constants"]  # [first, end) of those in constant memory
        self.printed: list[str] = params["printed"]
        self.waiting: deque[list[tuple[int, int, int]]] = params["waiting"]  # clusters that have not started
        self.block_ids = np.array(ctas, np.uint32).reshape(-1, 3)
        self.special = self._specials(smem_bytes)
        self._make_registers()
        shape = (self.n_warps, self.n_cta)
        self.pc = np.zeros(shape, np.int32)
        self.lane_pc = np.zeros((*shape, 32), np.int32)
        self.diverged = np.zeros(shape, bool)
        self.barred = np.zeros(shape, bool)
        self.barred_on = np.zeros(shape, np.int8)
        self.barred_line = np.zeros(shape, np.int32)
        self.stalled = np.full(shape, -1, np.int32)  # block whose wait failed, until a phase completes in the CTA
        self.wakes = np.full(shape, AWAKE, np.int32)  # the mbarrier whose next phase ends that sleep
        self.wait_slot = np.zeros(shape, np.int32)
        self.wait_parity = np.zeros(shape, np.int8)
        self.wait_line = np.zeros(shape, np.int32)
        self.last_run = np.zeros(shape, np.int64)  # step at which each warp last ran
        self.schedule = schedule or Schedule()
        self.steps = self.idle = 0  # scheduler steps; those since a block ran that others can notice
        self.together = -1  # the block to which all warps of the present batch went, -1 if they parted
        self.steady = True  # since the present batch was chosen, nobody fell asleep, was barred or woken
        self.executed = np.zeros(len(program.blocks), np.int64)
        self._retire_missing_lanes()
        self.scheduler = Scheduler(self)
        self.frames = None if program.hot is None else Frames(self)

    def _make_registers(self) -> None:
        shape = (self.n_warps, self.n_cta, 32)
        self.registers: dict[int, object] = {}
        for index, reg in self.program.stored.items():
            if index in self.program.paired:
                self.registers[index] = (np.empty(shape, np.uint32), np.empty(shape, np.uint32))
            else:
                self.registers[index] = np.empty(shape, REGISTER_DTYPE[reg.bits])
        self.accumulators = {d: np.empty((len(d), *shape), np.uint32) for d in self.program.accumulators}
        for d, block in self.accumulators.items():
            self.registers.update(zip(d, block, strict=True))
        self.defined = {index: np.zeros(shape, bool) for index in self.program.checked}

    def _retire_missing_lanes(self) -> None:
        """A last warp that is not full: its missing lanes have exited."""
        spare = self.n_warps * 32 - self.threads
        if spare:
            self.lane_pc[-1, :, 32 - spare :] = len(self.program.blocks)
            self.diverged[-1] = True

    def _specials(self, smem_bytes: int) -> dict:
        bx, by, _ = self.block
        thread = lambda ws: (ws.warp * 32 + LANES).astype(np.uint32)  # noqa: E731
        ids = {
            "tid.x": lambda ws: thread(ws) % np.uint32(bx),
            "tid.y": lambda ws: thread(ws) // np.uint32(bx) % np.uint32(by),
            "tid.z": lambda ws: thread(ws) // np.uint32(bx * by),
            "laneid": lambda ws: LANES,
            "warpid": lambda ws: ws.warp.astype(np.uint32),
            "nwarpid": lambda ws: np.uint32(self.n_warps),
            "smid": lambda ws: ws.cta.astype(np.uint32),  # every CTA of a wave has a multiprocessor to itself
            "nsmid": lambda ws: np.uint32(self.n_cta),
            "is_explicit_cluster": lambda ws: np.uint32(self.cluster.size > 1),
            **{name: lambda ws: np.uint32(0) for name in ("gridid", "clock_hi", "globaltimer_hi")},
            "lanemask_eq": lambda ws: np.uint32(1) << LANES,
            "lanemask_lt": lambda ws: (np.uint32(1) << LANES) - np.uint32(1),
            "lanemask_le": lambda ws: (np.uint32(2) << LANES) - np.uint32(1),
            "lanemask_gt": lambda ws: ~((np.uint32(2) << LANES) - np.uint32(1)),
            "lanemask_ge": lambda ws: ~((np.uint32(1) << LANES) - np.uint32(1)),
            "dynamic_smem_size": lambda ws: np.uint32(smem_bytes),
            "total_smem_size": lambda ws: np.uint32(smem_bytes + self.program.static_shared),
            "cluster_ctarank": lambda ws: self.cluster.rank(ws.cta).astype(np.uint32),
            "cluster_nctarank": lambda ws: np.uint32(self.cluster.size),
        }
        ticks = itertools.count(1)  # time passes with every look at a clock: monotonic, and the same in every run
        for name in ("clock", "clock64", "globaltimer", "globaltimer_lo"):
            ids[name] = lambda ws: np.uint32(next(ticks))
        for i, axis in enumerate("xyz"):
            extent = np.uint32(self.cluster.shape[i])
            ids[f"ctaid.{axis}"] = lambda ws, i=i: self.block_ids[ws.cta, i]
            ids[f"clusterid.{axis}"] = lambda ws, i=i, n=extent: self.block_ids[ws.cta, i] // n
            ids[f"cluster_ctaid.{axis}"] = lambda ws, i=i, n=extent: self.block_ids[ws.cta, i] % n
            ids[f"nctaid.{axis}"] = lambda ws, i=i: np.uint32(self.grid[i])
            ids[f"nclusterid.{axis}"] = lambda ws, i=i, n=extent: np.uint32(self.grid[i]) // n
            ids[f"cluster_nctaid.{axis}"] = lambda ws, n=extent: n
            ids[f"ntid.{axis}"] = lambda ws, i=i: np.uint32(self.block[i])
        return ids

    def window(self, ws: Warps, address):
        """A shared symbol's address as its own CTA sees it: inside a cluster it carries the CTA's rank."""
        if self.cluster.size == 1:
            return address
        return address | (self.cluster.rank(ws.cta) << RANK_SHIFT).astype(address.dtype)

    # -- where things happen, for messages -----------------------------------------------------------------------------
    def where(self, ws: Warps, instr: Instr, lanes=True, address=None) -> Where:
        """Where the first lane in `lanes` stands, spelled out only if a message needs it."""
        return Where(self, ws, instr, lanes, address)

    def at(self, instr: Instr, warp: int, cta: int, lane: int | None = None) -> str:
        """The same for one warp or lane."""
        text = f"PTX line {instr.line} ({instr.opcode}), CTA {self.name_cta(cta)}, warp {warp}"
        return text if lane is None else f"{text}, lane {lane}"

    def name_cta(self, cta: int) -> str:
        return "(" + ", ".join(str(int(i)) for i in self.block_ids[cta]) + ")"

    def check_overwrite(self, ctas: np.ndarray, chunks: np.ndarray, where) -> None:
        """Somebody writes these 16-byte chunks of shared memory: nothing asynchronous may still have to read them."""
        if not self.strict:
            return
        self.tensor_core.check_overwrite(ctas, chunks, where)
        self.wgmma.check_overwrite(ctas, chunks, where)
        for (cta, first, end), count in self.sources.items():
            if count and ((ctas == cta) & (chunks >= first) & (chunks < end)).any():
                raise Hazard(
                    f"{where}: overwrites {self.labels.shared_at(first * 16)}, the source of a bulk store that may not "
                    "have been read: commit it and wait (cp.async.bulk.wait_group.read) first"
                )

    def check_register(self, ws: Warps, shadow, name: str, instr: Instr) -> None:
        if self.allow_uninitialized:
            return
        bad = ~np.asarray(shadow)
        if ws.mask is not None:
            bad = bad & ws.mask
        if bad.any():
            raise Hazard(f"{self.where(ws, instr, bad)}: reads register {name}, which was never written on this path")

    # -- control flow --------------------------------------------------------------------------------------------------
    def goto(self, ws: Warps, target: int) -> None:
        if ws.mask is None:
            self.pc[ws.index] = self.together = target
        elif not ws.is_arm:
            self._move_lanes(ws, target)

    def branch(self, ws: Warps, condition, target: int, after: int) -> None:
        if ws.mask is not None:
            self._move_lanes(ws, np.where(condition, target, after))
            return
        c = np.asarray(condition)
        true = np.count_nonzero(c)
        if true == 0 or true == c.size:
            self.pc[ws.index] = self.together = target if true else after
            return
        if self.program.blocks[after].arm_of == target and self.schedule.gathers:
            arm = self.scheduler.arm(ws, c)
            if arm is not None:
                self.scheduler.run_arm(ws, arm, after, target)
                return
        taken, every = c.any(axis=-1), c.all(axis=-1)
        self.pc[ws.index] = np.where(every, target, after)
        split = taken != every
        if split.any():
            split = np.broadcast_to(split, ws.lead)
            warps, ctas = ws.flat_pairs()
            at = (warps[split.reshape(-1)], ctas[split.reshape(-1)])
            self.lane_pc[at] = np.where(ws.full(c), target, after)[split]
            self.diverged[at] = True
            low, high = min(target, after), max(target, after)
            self.pc[at] = high if self.program.joins[low, high] else low

    def _move_lanes(self, ws: Warps, target) -> None:
        """Lanes of diverged warps go on; the next block of each warp is one that no other lane still leads to."""
        ws.put(self.lane_pc, target)
        lanes = self.lane_pc[ws.index]
        low, high = lanes.min(axis=-1), lanes.max(axis=-1)
        self.pc[ws.index] = np.where(self.program.joins[low, high], high, low)
        self.diverged[ws.index] = low != high
        several = ((lanes != low[..., None]) & (lanes != high[..., None])).any(axis=-1)
        if several.any():
            warps, ctas = ws.flat_pairs()
            for warp, cta in zip(warps[several.reshape(-1)], ctas[several.reshape(-1)], strict=True):
                places = np.unique(self.lane_pc[warp, cta])
                waits = self.program.joins[np.ix_(places, places)].any(axis=1)
                self.pc[warp, cta] = places[~waits][0]

    # -- waiting -------------------------------------------------------------------------------------------------------
    def stall(self, ws: Warps, failed: np.ndarray, slot, parity, instr: Instr) -> None:
        """Warps with a lane in `failed` sleep at this block until a phase completes in their CTA."""
        self.steady = False
        waits_for = slot if ws.mask is None else ANY_SLOT  # lanes of a diverged warp may wait for several
        every = np.count_nonzero(failed) == failed.size
        which = every or np.broadcast_to(failed.any(axis=-1) if failed.ndim else failed, ws.lead)
        for array, value in (
            (self.stalled, self.current),
            (self.wait_slot, slot),
            (self.wakes, waits_for),
            (self.wait_parity, parity),
            (self.wait_line, instr.line),
        ):
            array[ws.index] = value if every else np.where(which, value, array[ws.index])

    def wake(self, slot: int, ctas: np.ndarray) -> None:
        """A phase of this mbarrier completed in these CTAs: who sleeps on it looks again."""
        if not len(ctas):
            return
        wakes = self.wakes[:, ctas]
        woken = (wakes == slot) | (wakes == ANY_SLOT)
        if np.count_nonzero(woken):
            self.steady = False
            self.stalled[:, ctas] = np.where(woken, -1, self.stalled[:, ctas])
            self.wakes[:, ctas] = np.where(woken, AWAKE, wakes)

    def bar(self, ws: Warps, barrier: int, count: int | None, instr: Instr, blocking: bool) -> None:
        expected = self.n_warps * 32 if count is None else count
        unique, lanes = ws.lanes_by_cta(None)
        where = self.where(ws, instr)
        self.steady = False
        if blocking:
            self.barred[ws.index] = True
            self.barred_on[ws.index] = barrier
            self.barred_line[ws.index] = instr.line
        done = self.named.arrive(barrier, unique, lanes, expected, where)
        if self.races:
            self.races.bar_arrive(ws, barrier, instr)
        if len(done):
            if self.races:
                self.races.bar_done(barrier, done)
            self.barred[:, done] &= self.barred_on[:, done] != barrier

    @staticmethod
    def _running(ws: Warps, lanes) -> np.ndarray:
        return ws.full(lanes).reshape(-1, 32)

    def exited(self) -> np.ndarray:
        """bool [warp, CTA, 32]: lanes that have left, or that the last warp lacks."""
        end = len(self.program.blocks)
        return np.where(self.diverged[..., None], self.lane_pc == end, (self.pc == end)[..., None])

    def cluster_arrive(self, ws: Warps, lanes, instr: Instr) -> None:
        self.cluster.arrive(*ws.flat_pairs(), self._running(ws, lanes), self.where(ws, instr, lanes))
        if self.races:
            self.races.cluster_arrive(ws, instr)
        self.settle_clusters()

    def cluster_wait(self, ws: Warps, lanes, instr: Instr) -> None:
        self.steady = False
        warps, ctas = ws.flat_pairs()
        must = self.cluster.waits(warps, ctas, self._running(ws, lanes), self.where(ws, instr, lanes))
        if self.races:
            self.races.cluster_wait(warps[~must], ctas[~must], instr.line)
        self.barred[warps[must], ctas[must]] = True
        self.barred_on[warps[must], ctas[must]] = CLUSTER_BARRIER
        self.barred_line[warps[must], ctas[must]] = instr.line

    def settle_clusters(self) -> bool:
        """Let the warps of complete cluster barriers go on."""
        done = self.cluster.settle(self.exited())
        if len(done):
            self.steady = False
            if self.races:
                self.races.cluster_done_in(done)
            self.barred[:, done] &= self.barred_on[:, done] != CLUSTER_BARRIER
        return len(done) > 0

    # -- running -------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Run every warp to its exit.

        Raises:
            Deadlock: nothing can run; the message lists who waits for what.
            Hazard: see `errors`.
        """
        self.scheduler.run()
        self.queue.drain()
        self.tensor_core.flush()
        self._check_exit()

    def _check_exit(self) -> None:
        check_bulk_at_exit(self)
        self.wgmma.check_exit()
        if self.pool:
            self.pool.check_exit()
        self.mbarriers.check_exit()
        leaked = np.nonzero(self.tmem.allocated.any(axis=0))[0]
        if len(leaked):
            cta = int(leaked[0])
            columns = int(self.tmem.allocated[:, cta].sum())
            message = f"CTA {self.name_cta(cta)} exits with {columns} TMEM columns still allocated"
            raise Hazard(f"{message}: tcgen05.dealloc is missing")

    def report_deadlock(self) -> str:
        """Who waits for what, by CTA; CTAs that stand alike are reported once."""
        exit_block = len(self.program.blocks)
        lines = ["deadlock: no warp can run and no asynchronous operation is under way"]
        seen = set()
        for cta in range(self.n_cta):
            here = []
            for warp in range(self.n_warps):
                if self.pc[warp, cta] == exit_block:
                    here.append((warp, "exited"))
                elif self.barred[warp, cta] and self.barred_on[warp, cta] == CLUSTER_BARRIER:
                    here.append((warp, f"waiting at PTX line {self.barred_line[warp, cta]} for the cluster barrier"))
                elif self.barred[warp, cta]:
                    b = int(self.barred_on[warp, cta])
                    here.append(
                        (
                            warp,
                            f"waiting at PTX line {self.barred_line[warp, cta]} for named barrier {b}: "
                            f"{self.named.arrived[b, cta]} of {self.named.expected[b, cta]} threads arrived",
                        )
                    )
                else:
                    slot, parity = int(self.wait_slot[warp, cta]), int(self.wait_parity[warp, cta])
                    here.append(
                        (
                            warp,
                            f"waiting at PTX line {self.wait_line[warp, cta]} for parity {parity} of the "
                            f"{self.mbarriers.describe(slot, cta)}",
                        )
                    )
            key = tuple(here)
            if key in seen:
                continue
            seen.add(key)
            lines.append(f"  CTA {self.name_cta(cta)}:")
            for text, group in itertools.groupby(here, key=lambda item: item[1]):
                numbers = [str(w) for w, _ in group]
                lines.append(f"    warp{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {text}")
        return "\n".join(lines)
