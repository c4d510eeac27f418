"""Emitted file -> Binary: PTX, cubin and what a launch really asks for, with no GPU.

Every fact of a Binary is read from what was compiled. Shared memory, threads and the grid's shape come from the
compiled host function, which is called once with placeholder tensors and a runtime that only records its launch;
TMEM columns come from the PTX, registers and spills from the cubin. `check_budget` compares them with the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .cache import cache_dir, cache_key, read_entry, require_cache, write_entry
from .cubin import read_cubin
from .dsl import CompileError, HostFunction, Scalars, TensorArgument, Traced, check_dsl, host_cpu, trace_kernel
from .emit import emit_kernel, kernel_path, write_text
from .emulator.host import Launch, attached, library_path, redirect
from .layout import Plan
from .resources import VERSION
from .signature import fixed_sizes, signature
from .spec import KernelSpec

__all__ = ["Binary", "CompileError", "check_budget", "compile_kernel"]

_WAIT = "wgmma.wait_group"
_ENTRY_FORMAT = 2


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. Bytes and columns a CTA, registers and spill bytes a thread."""

    plan: Plan
    source_path: Path
    ptx: str
    cubin: bytes
    host_object: bytes  # x86 ELF object of the DSL's host function, for this machine's processor
    host_symbol: str
    kernel_name: str  # the entry's name in PTX and cubin
    smem_bytes: int  # dynamic shared memory of a launch
    threads: int
    cluster: tuple[int, int, int]
    tmem_columns: int  # allocated by tcgen05.alloc
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    wgmma_waits: int  # in the machine code
    dsl: dict[str, str]  # distribution -> version
    seconds: float  # that tracing and compiling took, when it was done
    cached: bool  # read from the cache

    @property
    def spec(self) -> KernelSpec:
        return self.plan.spec

    @property
    def tile_n(self) -> int:
        return self.plan.tile_n

    @property
    def skip_log2(self) -> float:
        return self.plan.skip_log2

    @property
    def spills(self) -> int:
        """Bytes a thread that go to local memory and back, counted once an instruction: 0 is what we want."""
        return self.spill_store_bytes + self.spill_load_bytes


def compile_kernel(
    plan: Plan, source: str | Path | None = None, *, use_cache: bool = True, lineinfo: bool = False
) -> Binary:
    """Compile the emitted file `source` (None: emit it into the cache folder) and check it against plan.budget.

    lineinfo: the PTX says which line of the file each instruction comes from, for the emulator's messages.
    Raises CompileError when it does not compile or does not match the plan, DslVersionError when the DSL is missing or
    untested, OutputError or CacheError when a folder cannot be written.
    """
    path = Path(source).resolve() if source is not None else emit_to_cache(plan)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CompileError(f"{path}: cannot be read: {error.strerror}") from None
    versions = check_dsl()
    key = _key(plan.spec, text, versions, path if lineinfo else None)
    entry = read_entry(key) if use_cache else None
    if use_cache and not entry:
        require_cache(key)
    binary = _from_entry(plan, path, entry) if entry else _compile(plan, path, versions, lineinfo)
    if path.read_bytes() != text:
        raise CompileError(f"{path}: the file changed while it was being compiled; compile it again")
    check_budget(binary)
    if use_cache and not binary.cached:
        write_entry(key, _to_entry(binary))
    return binary


def emit_to_cache(plan: Plan) -> Path:
    """Emit into a folder of the cache that is named by the text, so that no two texts share a path."""
    text = emit_kernel(plan)
    folder = cache_dir() / "sources" / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = kernel_path(plan, folder)
    current = path.is_file() and path.read_bytes() == text.encode()
    return path if current else write_text(path, text)


def check_budget(binary: Binary) -> None:
    """Raise CompileError that names each figure in which the compiled kernel differs from its plan."""
    budget = binary.plan.budget
    wrong = [
        f"{name}: the compiled kernel has {actual}, the plan {planned}"
        for name, actual, planned in (
            ("dynamic shared memory (bytes)", binary.smem_bytes, budget.smem_total),
            ("TMEM allocation (columns)", binary.tmem_columns, budget.tmem_columns),
            ("threads", binary.threads, budget.threads),
            ("architecture", _target(binary.ptx), binary.plan.arch.name),
        )
        if actual != planned
    ]
    if wrong:
        raise CompileError(f"{binary.source_path}: does not match its plan: " + "; ".join(wrong))
    if is_serialized(binary):
        raise CompileError(
            f"{binary.source_path}: ptxas found no registers for wgmma that overlap, and waits {binary.wgmma_waits} "
            f"times where the source waits {binary.ptx.count(_WAIT)} times: correct, but slow; use another tile_n, "
            "or fewer rows (tile_m)"
        )


def is_serialized(binary: Binary) -> bool:
    """Whether ptxas waits for most products that the source does not wait for (its note C7511, or C7510): it does so
    where registers are too few, and where the ways of roles with different setmaxnreg meet again. One wait more than
    the source's is usual.
    """
    products, asked = binary.ptx.count("wgmma.mma_async"), binary.ptx.count(_WAIT)
    added = binary.wgmma_waits - asked
    return added > 1 and 2 * added > products - asked


def _compile(plan: Plan, path: Path, versions: dict[str, str], lineinfo: bool) -> Binary:
    start = time.perf_counter()
    traced = trace_kernel(path, plan.spec, scalars(plan, 1.0, 1, 1), lineinfo)
    kernel_name = _only(rf"\.entry\s+([\w$]*{plan.kernel_name}[\w$]*)", traced.ptx, "attention kernels", path)
    launch = _probe_launch(plan, traced, path)
    facts = read_cubin(traced.cubin, kernel_name)
    return Binary(
        plan=plan,
        source_path=path,
        **vars(traced),
        kernel_name=kernel_name,
        smem_bytes=launch.smem_bytes,
        threads=launch.block[0] * launch.block[1] * launch.block[2],
        cluster=launch.cluster,
        tmem_columns=allocated_columns(traced.ptx),
        **vars(facts),
        dsl=versions,
        seconds=time.perf_counter() - start,
        cached=False,
    )


def scalars(plan: Plan, scale: float, ctas: int, splits: int) -> Scalars:
    """What the host function takes after its tensors: the scale, a persistent kernel also how many CTAs run at once,
    and one with split_kv the shares of a query tile's keys.
    """
    return (scale, *([ctas] if plan.persistent else []), *([splits] if plan.spec.split_kv else []))


class _LaunchProbe:
    """A Gpu (see emulator/host.py) on which every kernel is known and takes no parameters, and nothing runs."""

    def __init__(self, arch: str, ptx: str) -> None:
        self.arch = arch
        self._kernels = {name: SimpleNamespace(params=[]) for name in re.findall(r"\.entry\s+([\w$]+)", ptx)}

    def load_ptx(self, text: str) -> Any:
        return SimpleNamespace(kernels=self._kernels)

    def launch(self, *arguments: Any, **named: Any) -> None:
        pass


def _probe_launch(plan: Plan, traced: Traced, path: Path) -> Launch:
    """What the host function asks of a launch. It only computes with the tensors' descriptors, so any address does."""
    spec = plan.spec
    sizes = fixed_sizes(spec) | {"batch": 1, "queries": 1, "keys": 1, "keys2": 1, "kv_heads": 1, "parts": 1}
    sizes["q_heads"] = spec.q_heads_per_kv
    shapes = [parameter.extents(sizes) for parameter in signature(spec)]
    tensors = [TensorArgument(0x10000, shape, _compact_strides(shape)) for shape in shapes]
    with attached(_LaunchProbe(spec.arch, traced.ptx), traced.ptx, traced.cubin) as session:
        function = HostFunction(redirect(traced.host_object), traced.host_symbol, library_path())
        wanted = 2 if spec.split_kv else 1  # keys in two parts are combined by a launch of its own
        status = function(tensors, scalars(plan, 1.0, plan.ctas, wanted))
    count = len(session.launches)
    if status or count != wanted:
        raise CompileError(f"{path}: the host function made {count} launches (expected {wanted}) and returned {status}")
    return session.launches[0]


def _compact_strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides


def allocated_columns(ptx: str) -> int:
    """TMEM columns that the kernel's tcgen05.alloc instructions ask for, 0 when it has none.

    A column count arrives as an immediate or in a register that one `mov` sets. Raises CompileError when it cannot be
    read, or when there is more than one allocation.
    """
    operands = re.findall(r"tcgen05\.alloc\.[\w.:]+\s+\[[^\]]*\],\s*([%\w]+)\s*;", ptx)
    if len(operands) != len(re.findall(r"^[^/\n]*\btcgen05\.alloc\.", ptx, re.MULTILINE)) or len(operands) > 1:
        raise CompileError(f"expected one tcgen05.alloc that can be read, found operands {operands}")
    if not operands:
        return 0
    operand = operands[0]
    if operand.startswith("%"):
        values = set(re.findall(rf"\bmov\.[bus]32\s+{re.escape(operand)},\s*(\w+)\s*;", ptx))
        writes = re.findall(rf"^\s*(?:@!?%\w+\s+)?[\w.:]+\s+{re.escape(operand)}\s*,", ptx, re.MULTILINE)
        if len(values) != 1 or len(writes) != 1:
            raise CompileError(f"tcgen05.alloc takes its column count from {operand}, which is not one constant")
        operand = values.pop()
    try:
        return int(operand, 0)
    except ValueError:
        raise CompileError(f"tcgen05.alloc takes its column count from {operand}, which is no constant") from None


def _target(ptx: str) -> str:
    return _only(r"^\.target\s+(\w+)", ptx, "targets", "PTX")


def _only(pattern: str, ptx: str, what: str, where: object) -> str:
    found = re.findall(pattern, ptx, re.MULTILINE)
    if len(found) != 1:
        raise CompileError(f"{where}: the PTX has {len(found)} {what} (expected 1): {', '.join(found)}")
    return found[0]


# --- the cache's view of a Binary -----------------------------------------------------------------------------------

_MEMBERS = {"ptx": "kernel.ptx", "cubin": "kernel.cubin", "host_object": "host.o"}
_NOT_STORED = {"plan", "source_path", "cached", *_MEMBERS}


def _key(spec: KernelSpec, source: bytes, versions: dict[str, str], named: Path | None) -> str:
    """named: the file that line information names; None for a kernel that carries none."""
    return cache_key(
        {
            "format": _ENTRY_FORMAT,
            "bespoke": VERSION,
            "spec": spec.digest,
            "arch": spec.arch,
            "source": hashlib.sha256(source).hexdigest(),
            "dsl": versions,
            "cpu": host_cpu(),
            **({"lineinfo": str(named)} if named else {}),
        }
    )


def _to_entry(binary: Binary) -> dict[str, bytes]:
    facts = {f.name: getattr(binary, f.name) for f in dataclasses.fields(binary) if f.name not in _NOT_STORED}
    members = {file: getattr(binary, name) for name, file in _MEMBERS.items()}
    members["kernel.ptx"] = binary.ptx.encode()
    return {**members, "facts.json": json.dumps(facts, indent=1).encode()}


def _from_entry(plan: Plan, path: Path, entry: dict[str, bytes]) -> Binary:
    facts: dict[str, Any] = json.loads(entry["facts.json"])
    facts["cluster"] = tuple(facts["cluster"])
    stored = {name: entry[file] for name, file in _MEMBERS.items()} | {"ptx": entry["kernel.ptx"].decode()}
    return Binary(plan=plan, source_path=path, cached=True, **stored, **facts)
