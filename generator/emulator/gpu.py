"""The device a program sees: arrays in global memory, loaded modules, launches split into waves of CTAs."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from . import processes
from .accumulate import MODES
from .advice import Advice
from .errors import Hazard, LaunchError
from .labels import Labels
from .lineinfo import name_sources, naming_sources
from .machine import Machine
from .memory import GlobalMemory
from .parse import parse_ptx
from .repeat import check_schedules, repeat
from .schedule import Schedule
from .syntax import Module
from .targets import SMEM_LIMIT
from .targets import check as check_target
from .trace import Tracer
from .translate import Program, Translator
from .variables import ModuleVariables

SM_COUNT = {"sm_90a": 132, "sm_100a": 148}  # multiprocessors of H200 and B200
SM_SMEM = 228 << 10  # bytes of shared memory a multiprocessor, CUDA programming guide, table 27
GRID_LIMIT = (2**31 - 1, 65535, 65535)  # CUDA programming guide, table 27
MAX_CLUSTER = 16  # CTAs a cluster, the non-portable limit, CUDA programming guide, thread block clusters
CANCELLING_WAVE = 4  # the same where CTAs cancel the launch of others, so that some are left to cancel
WAVE = 32  # CTAs that run together: wide enough to amortize NumPy's cost a call, small enough for the cache


@dataclass(frozen=True)
class LaunchReport:
    """What one launch did. `opcodes` counts warp-instructions by opcode; `tmem_columns` is the peak a CTA; `hazards`
    are messages: a launch that was cut short has the one that ended it, and no counts. `schedules`: how often it ran;
    `seconds` covers all of them, the counts one.

    loaded_bytes, stored_bytes: what bulk copies brought to and from shared memory, boxes as a whole; a multicast counts
    in every CTA that it reaches. mma_flop: 2·m·n·k of every tcgen05.mma, wgmma and mma.sync. model: of a traced launch,
    what the trace's clock says, see trace.summary.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    seconds: float
    warp_instructions: int
    opcodes: Counter
    tmem_columns: int
    cluster: tuple[int, int, int] = (1, 1, 1)
    hazards: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # of a Gpu that was asked for them
    loaded_bytes: int = 0
    stored_bytes: int = 0
    mma_flop: int = 0
    model: dict[str, Any] | None = None
    printed: str = ""  # by the kernel's printf, which also goes to the standard output
    schedules: int = 1


def _bind_params(program: Program, params) -> dict:
    declared = program.kernel.params
    size = max((p.offset + p.size for p in declared), default=0)
    raw = bytearray(size)
    for given, param in zip(params, declared, strict=True):
        raw[param.offset : param.offset + param.size] = given
    values = [np.frombuffer(raw, np.dtype(kind), 1, offset)[0] for offset, kind in program.params]
    return {"bytes": bytes(raw), "values": values}


@dataclass(frozen=True)
class LaunchCase:
    """One launch of a Gpu: what it needs to be executed, as often as wanted. Memory is the Gpu's, see `Snapshot`."""

    gpu: Gpu
    text: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem_bytes: int
    params: tuple[bytes, ...]
    cooperative: bool = False  # every CTA runs at the same time as the others
    programmatic: bool = False  # it may overlap the launch before it

    @property
    def labels(self) -> Labels:
        """Names of places in the kernel's memory, as far as the Gpu was told any."""
        return self.gpu.labels.get(self.kernel, Labels())

    def run(
        self, schedule: Schedule | None = None, text: str | None = None, program: Program | None = None
    ) -> tuple[Counter, int]:
        """Execute the launch, or another PTX `text` or `program` in its place, under a schedule: by default the
        deterministic one. Returns warp-instructions by opcode, and TMEM columns.

        Raises:
            LaunchError, Hazard, Deadlock, UnsupportedInstruction: see `errors`.
        """
        own = schedule is None and text is None and program is None
        program = program or _translate(text or self.text, self.kernel, self.gpu.strict)
        if self.programmatic and not any(i.opcode == "griddepcontrol.wait" for i in program.kernel.instrs):
            raise Hazard(
                f"{self.kernel}: launched so that it may overlap the launch before it (programmatic stream "
                "serialization), and never waits for it: insert griddepcontrol.wait before the first use of what that "
                "one writes"
            )
        total = program.static_shared + self.smem_bytes
        if total > SMEM_LIMIT[self.gpu.arch]:
            raise LaunchError(
                f"{self.kernel} asks for {total} bytes of shared memory a CTA, {self.gpu.arch} has "
                f"{SMEM_LIMIT[self.gpu.arch]}"
            )
        values = _bind_params(program, self.params) | self._module_state()
        schedule = schedule or Schedule()
        ctas = _by_cluster(self.grid, self.cluster, schedule)
        size = self.cluster[0] * self.cluster[1] * self.cluster[2]
        clusters = [ctas[i : i + size] for i in range(0, len(ctas), size)]
        n = processes.wanted(program, len(clusters), self.gpu.gmem) if own and not self.cooperative else 1
        with np.errstate(all="ignore"), _blas().limit(limits=1):
            shares = [partial(self._run_clusters, program, clusters[i::n], values, schedule) for i in range(n)]
            results = processes.run_shares(shares, self.gpu.gmem) if n > 1 else None
            results = results or [self._run_clusters(program, clusters, values, schedule)]
        executed = sum(blocks for blocks, *_ in results)
        columns = max(peak for _, peak, *_ in results)
        for _, _, work, warned in results:
            self.gpu.work.update(work)
            self.gpu.warned.update(warned)
        opcodes: Counter = Counter()
        for block in np.flatnonzero(executed).tolist():
            times = int(executed[block])
            for opcode, n in program.opcode_counts[block].items():
                opcodes[opcode] += n * times
        return opcodes, columns

    def _run_clusters(
        self, program: Program, clusters: list, values: dict, schedule: Schedule
    ) -> tuple[np.ndarray, int, Counter, dict[str, None]]:
        """Run these clusters to their end, a wave at a time: warps by block, TMEM columns, work, warnings."""
        warned: dict[str, None] = {}
        waiting = values["waiting"] = deque(clusters)
        cancels = any(i.opcode.startswith("clusterlaunchcontrol.try_cancel") for i in program.kernel.instrs)
        size = self.cluster[0] * self.cluster[1] * self.cluster[2]
        wave = len(clusters) if self.cooperative else max((CANCELLING_WAVE if cancels else WAVE) // size, 1)
        executed, columns, work = np.zeros(len(program.blocks), np.int64), 0, Counter()
        while waiting:
            here = [cta for _ in range(min(wave, len(waiting))) for cta in waiting.popleft()]
            machine = Machine(
                *(program, here, self.grid, self.block, self.smem_bytes, values),
                *(self.gpu.gmem, self.labels, self.cluster, self.gpu.accumulation, self.gpu.strict, schedule),
            )
            machine.allow_uninitialized = self.gpu.allow_uninitialized
            machine.fuses = self.gpu.schedules == 1
            if self.gpu.warnings and machine.races:
                machine.races.advice = Advice(machine, warned)
            machine.run()
            executed += machine.executed
            work.update(machine.work)
            columns = max(columns, int(machine.tmem.peak.max(initial=0)))
        return executed, columns, work, warned

    def _module_state(self) -> dict:
        variables = _parse(self.text).variables
        addresses = self.gpu.variables.of(self.text, variables)
        constants = [
            (addresses[v.name], addresses[v.name] + v.nbytes) for v in variables.values() if v.space == "const"
        ]
        self.gpu.printed.clear()
        return {"variables": addresses, "constants": constants, "printed": self.gpu.printed}


Observer = Callable[[LaunchCase], AbstractContextManager[None]]


def _by_cluster(grid: tuple[int, int, int], cluster: tuple[int, int, int], schedule: Schedule) -> list:
    """Block indices cluster by cluster, as scheduled, by rank within each (x fastest)."""

    def walk(extents):
        return [(x, y, z) for z in range(extents[2]) for y in range(extents[1]) for x in range(extents[0])]

    corners = walk([g // c for g, c in zip(grid, cluster, strict=True)])
    return [
        tuple(c * n + i for c, n, i in zip(corner, cluster, inner, strict=True))
        for corner in schedule.order(corners)
        for inner in walk(cluster)
    ]


def _matrix_flop(opcodes: Counter) -> int:
    """FLOP of wgmma, of which each warp executes a quarter, and mma.sync."""
    total = 0
    for opcode, times in opcodes.items():
        shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode) if opcode.startswith(("wgmma.mma", "mma.")) else None
        if shape:
            warps = 4 if opcode.startswith("wgmma") else 1
            total += 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * times // warps
    return total


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """BLAS threads that spin cost far more than they bring: tiles are small and test runs fill the cores already."""
    return ThreadpoolController().select(user_api="blas")


@lru_cache(maxsize=64)
def _parse(text: str) -> Module:
    return parse_ptx(text)


@lru_cache(maxsize=64)
def _translate(text: str, name: str, strict: bool) -> Program:
    return Translator(_parse(text).kernels[name], strict).translate()


class Gpu:
    """An emulated GPU of one architecture.

    Args:
        arch: "sm_100a" or "sm_90a".
        strict: every check is on. False is the fast mode: the same results for a right kernel, but no check of
            uninitialized reads, asynchronous use or fences. Bounds, mbarrier counts and deadlocks are always checked.
        accumulation: how tensor cores add up products: "fast", in float32 by BLAS, or "exact", each instruction by the
            alignment-and-truncation model of `accumulate`.
        trace: a Tracer, or the file that its launches are traced into, see `Tracer`.
        schedules: each launch is repeated so many times on the same inputs: in the deterministic schedule, then under
            the seeds from `schedule_seed` on. That its result depends on the schedule is a Hazard.

    `allow_uninitialized`, False at first: kernels may compute on registers and shared memory that were never written,
    as they do on rows beyond the end of a tensor. Such memory is poison (NaN), so what comes of it shows if it is used.
    `warnings`, False at first: launch reports also say what the ISA asks for and silicon does without, see `advice`.
    """

    def __init__(
        self,
        arch: str = "sm_100a",
        strict: bool = True,
        accumulation: str = "fast",
        trace: Tracer | str | Path | None = None,
        schedules: int = 1,
        schedule_seed: int = 0,
    ):
        if arch not in SMEM_LIMIT:
            raise LaunchError(f"arch is {arch!r}: the emulator knows {', '.join(SMEM_LIMIT)}")
        if not isinstance(strict, bool):
            raise LaunchError(f"strict is {strict!r}: True or False")
        if accumulation not in MODES:
            raise LaunchError(f"accumulation is {accumulation!r}: one of {', '.join(MODES)}")
        check_schedules(schedules, schedule_seed)
        self.arch, self.strict, self.accumulation = arch, strict, accumulation
        self.allow_uninitialized = self.warnings = False
        self.warned: dict[str, None] = {}  # by the launch under way
        self.schedules, self.schedule_seed = schedules, schedule_seed
        self.gmem = GlobalMemory()
        self.variables = ModuleVariables(self.gmem)
        self.printed: list[str] = []  # by the launch under way
        self.labels: dict[str, Labels] = {}  # by kernel
        self.launches: list[LaunchReport] = []
        self.work: Counter[str] = Counter()  # of the present launch, see LaunchReport
        self.observers: list[Observer] = []  # each surrounds every launch
        self.tracer = trace if isinstance(trace, Tracer) or trace is None else Tracer(trace)
        self._texts: dict[int, str] = {}
        self._keep: list[object] = []

    def add_array(self, array, name: str = "array", initialized: bool = True) -> None:
        """Make an array legal for kernels to touch: a NumPy array, or (address, bytes). It must outlive the launches.

        An array that is not `initialized` (an output) may not be read before a kernel has written it.
        """
        if isinstance(array, tuple):
            address, nbytes = array
        else:
            low, high = np.lib.array_utils.byte_bounds(array)
            address, nbytes = low, high - low
            self._keep.append(array)
        self.gmem.add(address, nbytes, name, initialized)

    def load_ptx(self, text: str) -> Module:
        """Parse a module (once a text)."""
        with naming_sources(text):
            module = _parse(text)
        if module.target != self.arch:
            raise LaunchError(f"the PTX targets {module.target}, this GPU is {self.arch}")
        with naming_sources(text):
            check_target(module)
        self._texts[id(module)] = text
        return module

    def launch(
        self,
        module: Module,
        kernel: str,
        grid,
        block,
        cluster=(1, 1, 1),
        smem_bytes: int = 0,
        params: list[bytes] = (),
        cooperative: bool = False,
        programmatic: bool = False,
    ) -> LaunchReport:
        """Run a kernel to its end.

        Args:
            grid, block, cluster: three extents each.
            smem_bytes: dynamic shared memory a CTA.
            params: the bytes of each parameter, in order.
            cooperative: every CTA runs at the same time, so that a barrier of the whole grid is possible.
            programmatic: it may overlap the launch before it, and must wait for that by griddepcontrol.wait.
        Raises:
            LaunchError: limits or parameters do not fit. Hazard, Deadlock, UnsupportedInstruction: see `errors`.
        """
        with naming_sources(self._texts.get(id(module), "")):
            shape = tuple(grid), tuple(block), tuple(cluster)
            report = self._launch(module, kernel, *shape, smem_bytes, params, cooperative, programmatic)
        if report.hazards or report.warnings:
            text = self._texts[id(module)]
            said = [tuple(name_sources(x, text) for x in found) for found in (report.hazards, report.warnings)]
            report = replace(report, hazards=said[0], warnings=said[1])
            self.launches[-1] = report
        return report

    def _launch(
        self, module, kernel, grid, block, cluster, smem_bytes, params, cooperative, programmatic
    ) -> LaunchReport:
        self._check_launch(module, kernel, grid, block, cluster, smem_bytes, params)
        if cooperative:
            self._check_resident(kernel, grid, block, smem_bytes)
        facts = (kernel, grid, block, cluster, smem_bytes, tuple(params), cooperative, programmatic)
        case = LaunchCase(self, self._texts[id(module)], *facts)
        self.warned.clear()
        start = time.perf_counter()
        with ExitStack() as around:
            for observer in self.observers:
                around.enter_context(observer(case))
            case._module_state()  # its variables are global memory that every schedule starts from
            named = {instr.opcode for instr in module.kernels[kernel].instrs}
            try:
                result = repeat(partial(self._execute, case), self.gmem, named, self.schedules, self.schedule_seed)
            finally:
                print(end="".join(self.printed))
            (opcodes, columns), model, work = result
        report = LaunchReport(
            *(kernel, grid, block, smem_bytes, time.perf_counter() - start, sum(opcodes.values()), opcodes, columns),
            cluster=cluster,
            printed="".join(self.printed),
            schedules=self.schedules,
            warnings=tuple(self.warned),
            model=model,
            **work,
        )
        self.launches.append(report)
        return report

    def _execute(self, case: LaunchCase, schedule: Schedule | None) -> tuple:
        """Run a case once; the deterministic schedule is the one that is traced, and whose output is printed.
        Returns opcodes and columns, model, work.
        """
        self.work, printed = Counter(), list(self.printed)
        traced = self.tracer is not None and schedule is None
        result, model = self.tracer.run(case, _parse) if traced else (case.run(schedule), None)
        if schedule is not None:
            self.printed[:] = printed
        return result, model, Counter({"mma_flop": _matrix_flop(result[0])}) + self.work

    def _check_resident(self, kernel, grid, block, smem_bytes: int) -> None:
        """A cooperative launch must fit on the device at once (the registers of the compiled kernel are not known)."""
        each = min(2048 // (block[0] * block[1] * block[2]), 32, SM_SMEM // (smem_bytes + 1024))
        count = grid[0] * grid[1] * grid[2]
        if count > each * SM_COUNT[self.arch]:
            raise LaunchError(
                f"cooperative launch of {kernel}: {count} CTAs of {block} threads, {each * SM_COUNT[self.arch]} fit on "
                f"{self.arch} at once"
            )

    def _check_launch(self, module, kernel, grid, block, cluster, smem_bytes, params) -> None:
        if kernel not in module.kernels:
            raise LaunchError(f"the module has no kernel {kernel!r}, only {', '.join(module.kernels)}")
        if min(cluster) < 1 or cluster[0] * cluster[1] * cluster[2] > MAX_CLUSTER:
            raise LaunchError(f"cluster {cluster}: 1 to {MAX_CLUSTER} CTAs")
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise LaunchError(f"grid {grid} is not a multiple of cluster {cluster}")
        if min(block) < 1 or block[0] * block[1] * block[2] > 1024:
            raise LaunchError(f"block {block}: 1 to 1024 threads a CTA")
        if min(grid) < 1:
            raise LaunchError(f"grid {grid}: every extent must be at least 1")
        if any(extent > limit for extent, limit in zip(grid, GRID_LIMIT, strict=True)):
            raise LaunchError(f"grid {grid}: at most {GRID_LIMIT} CTAs")
        wanted = module.kernels[kernel].directives.get("reqntid")
        if wanted and tuple(int(x) for x in wanted.split(",")) != (*block,)[: wanted.count(",") + 1]:
            raise LaunchError(f"block {block}: the kernel was compiled for .reqntid {wanted}")
        declared = module.kernels[kernel].params
        if len(params) != len(declared):
            raise LaunchError(f"{kernel} takes {len(declared)} parameters, {len(params)} were given")
        for given, param in zip(params, declared, strict=True):
            if len(given) != param.size:
                raise LaunchError(f"parameter {param.name} has {param.size} bytes, {len(given)} were given")
