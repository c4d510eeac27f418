"""When blocks become machine code, where it is kept, and what a machine hands to it.

A block is compiled once it has cost a good part of the time that compiling it will. The code lies in the user's cache
folder under a key that names everything it depends on, so that the next process begins with it. `BESPOKE_NATIVE` is
auto, off, or always (compile at first sight, and keep nothing).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .errors import LaunchError
from .native import BlockText, Native, Planner, register_places
from .symbolic import NotTraceable

BUFFERS, ADDRESSES, STRIDES, COUNT, DATA = 0, 512, 544, 576, 584  # places in the work memory, see `lower`
LANES = 16
SECONDS_A_LINE = 0.15e-3  # of a block's text; compiling it takes twice as long, but serves later processes too
PROGRAMS_KEPT = 256  # in the cache folder
WORTHWHILE = 12  # lines: a shorter block is not worth a call
_MAGIC = b"bespoke native 1\n"


def mode() -> str:
    """BESPOKE_NATIVE, "auto" where it is not set."""
    chosen = os.environ.get("BESPOKE_NATIVE") or "auto"
    if chosen not in ("auto", "off", "always"):
        raise LaunchError(f"BESPOKE_NATIVE is {chosen!r}: auto, off or always")
    return chosen


class HotBlocks:
    """The blocks of one program: `functions[block]` runs it for warps that have not diverged."""

    def __init__(self, program: Any, key: str, texts: list[BlockText], names: dict[str, Any], volatile: set[int]):
        """`key`: tells the program from every other. `names`: what its functions and constants are called."""
        self.program, self.texts, self.names = program, texts, names
        self.places = register_places(program.stored, program.paired, program.checked)
        self.volatile = {self.places[at] for index in volatile if (at := ("R", index, 0)) in self.places}
        self.key = key
        self.compiled: dict[int, _Compiled] = {}
        self.functions: list[Callable] = list(program.functions)
        chosen = mode()
        if chosen != "off":
            self._limit = 0.0 if chosen == "always" else SECONDS_A_LINE
            self._folder = _cache_folder() / self._digest() if chosen == "auto" else None
            stored = _entries(self._folder)
            for block, text in enumerate(texts):
                if sum(" = " in line for line in text.lines) >= WORTHWHILE:
                    self.functions[block] = self._watched(block, f"{block}" in stored)

    def _watched(self, block: int, stored: bool) -> Callable:
        """The block's function, until it has cost as much as compiling it: then it is compiled."""
        run, spent = self.program.functions[block], 0.0
        limit = 0.0 if stored else self._limit * len(self.texts[block].lines)

        def watched(m: Any, ws: Any) -> None:
            nonlocal spent
            if spent >= limit:
                self.functions[block] = self._native(block) or run
                self.functions[block](m, ws)
                return
            start = time.perf_counter()
            run(m, ws)
            spent += time.perf_counter() - start

        return watched

    # -- compiling -----------------------------------------------------------------------------------------------------
    def _native(self, block: int) -> Callable | None:
        path = None if self._folder is None else self._folder / f"{block}"
        read = _read(path)
        if read is None:
            program = self.program
            planner = Planner(self.texts[block], self.names, program.kernel.regs, self.places, self.volatile)
            try:
                with np.errstate(all="ignore"):
                    native = planner.plan(f"block_{block}")
            except NotTraceable:
                return None
            read = native, _assemble(native.ir)
            _write(path, *read)
        native, code = read
        if not native.regions:
            return None
        # Two threads may have compiled it: the first one stays, for its work memory is in use (Frames).
        return self.compiled.setdefault(block, _Compiled(block, native, code, self.names)).run

    def _digest(self) -> str:
        facts = (self.key, _this_package(), _host(), np.__version__, str(sorted(self.places.items())))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


class _Compiled:
    """One block's machine code in this process."""

    def __init__(self, block: int, native: Any, code: bytes, names: dict[str, Any]):
        self.views, self.units = native.views, native.units
        loops = {symbol: inner_loop(*loop) for symbol, loop in native.loops.items()}
        self._code = code, _work_memory([data for _, data in loops.values()])
        self.work = self._code[1].ctypes.data
        self.engine = _load(code, {symbol: function for symbol, (function, _) in loops.items()})
        prototype = ctypes.PYFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 5)
        mine = dict(names)
        for region in range(native.regions):
            mine[f"N{region}"] = prototype(self.engine.get_function_address(f"block_{block}_{region}"))
        text = (
            f"def native_{block}(m, ws):\n    R, D, P, ix, put = m.registers, m.defined, m.params, ws.index, ws.put\n"
            f"    Q = m.wgmma.busy\n    A, X, _ = m.frames.of(ws, {block})\n"
        )
        text += "".join(f"    {line}\n" for line in native.text.split("\n"))
        exec(compile(text, f"<native block {block}>", "exec"), mine)
        self.run = mine[f"native_{block}"]


class Frames:
    """What native blocks of one machine are called with: addresses of registers, parameters and scratch memory."""

    def __init__(self, machine: Any):
        self.machine = machine
        hot = self.hot = machine.program.hot
        table = np.zeros(len(hot.places), np.int64)
        for (space, index, half), place in hot.places.items():
            array = machine.defined[index] if space == "D" else machine.registers[index]
            table[place] = (array[half] if isinstance(array, tuple) else array).ctypes.data
        params = np.array([int(p) & 0xFFFFFFFFFFFFFFFF for p in machine.params], np.uint64)
        self._table, self._params = table, params
        self._scratch = np.zeros(0, np.uint8)
        self._units = 0
        self._known: dict[Any, tuple] = {}

    def of(self, ws: Any, block: int) -> tuple[tuple, list[np.ndarray], Any]:
        """Arguments of the block's regions for these warps, the views of the scratch memory that its text uses, and
        what must stay alive meanwhile."""
        return self._known.get((ws, block)) or self._make(ws, block)

    def _make(self, ws: Any, block: int) -> tuple[tuple, list[np.ndarray], Any]:
        compiled = self.hot.compiled[block]
        if self._units < compiled.units:  # blocks that are being executed go on with the memory that they have
            self._units = max(each.units for each in list(self.hot.compiled.values()))
            rows = self.machine.n_warps * self.machine.n_cta
            self._scratch = np.zeros(self._units * rows * 128 + 64, np.uint8)
            self._known.clear()
        warps, ctas = ws.flat_pairs()
        rows = (warps * self.machine.n_cta + ctas).astype(np.int32)
        start = -self._scratch.ctypes.data % 64
        unit, n = 128 * len(rows), len(rows)
        views = []
        for first, kind, count in compiled.views:
            size = np.dtype(kind).itemsize * 32 * n
            at = start + first * unit
            if count:
                flat = self._scratch[at : at + count * unit].view(kind).reshape(count, *ws.lead, 32)
            else:
                flat = self._scratch[at : at + size].view(kind).reshape(*ws.lead, 32)
            views.append(flat)
        scratch, work = self._scratch.ctypes.data + start, compiled.work
        arguments = (n, rows.ctypes.data, self._table.ctypes.data, scratch, self._params.ctypes.data, work)
        known = self._known[ws, block] = arguments, views, (rows, self._scratch)
        return known


# -- LLVM --------------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _target() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(llvm.get_host_cpu_name(), features, opt=1, jit=True)


def _assemble(text: str) -> bytes:
    from llvmlite import binding as llvm

    machine = _target()
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    return machine.emit_object(module)


def _work_memory(data: list[int]) -> np.ndarray:
    """What `lower` describes, for the loops that have these data pointers."""
    raw = np.zeros(DATA + 8 * len(data) + 64, np.uint8)
    work = raw[-raw.ctypes.data % 64 :]
    work[ADDRESSES:STRIDES].view(np.int64)[:] = work.ctypes.data + BUFFERS + 128 * np.arange(4)
    work[COUNT:DATA].view(np.int64)[:] = LANES
    work[DATA : DATA + 8 * len(data)].view(np.int64)[:] = data
    return work


def _load(code: bytes, loops: dict[str, int]) -> Any:
    """An engine that holds the code, its inner loops resolved."""
    from llvmlite import binding as llvm

    for symbol, function in loops.items():
        llvm.add_symbol(symbol, function)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target.__wrapped__())  # it takes the target over
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def inner_loop(name: str, types: str) -> tuple[int, int]:
    """Address of the loop with which a ufunc computes these types (NumPy type characters), and of the loop's data.

    Source: NumPy's C API, PyUFuncObject.
    """
    ufunc = getattr(np, name)
    numbers = bytes(np.dtype(t).num for t in types)
    head = object.__basicsize__
    counts = (ctypes.c_int * 4).from_address(id(ufunc) + head)
    functions, data, ntypes, _, label, kinds = _Fields.from_address(id(ufunc) + head + 16).values()
    if counts[2] != len(types) or ctypes.string_at(label) != name.encode():
        raise RuntimeError(f"NumPy {np.__version__} keeps its ufuncs otherwise than this emulator knows")
    listed = ctypes.string_at(kinds, ntypes * len(types))
    known = [listed[at : at + len(types)] for at in range(0, len(listed), len(types))]
    if numbers not in known:
        raise KeyError(f"{name} has no loop for {types}")
    at = 8 * known.index(numbers)
    function, context = (ctypes.c_void_p.from_address(table + at).value for table in (functions, data))
    return function, context or 0


class _Fields(ctypes.Structure):
    _fields_ = [
        ("functions", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("ntypes", ctypes.c_int),
        ("reserved", ctypes.c_int),
        ("name", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
    ]

    def values(self) -> tuple:
        return tuple(getattr(self, name) for name, _ in self._fields_)


# -- on disk -----------------------------------------------------------------------------------------------------------
def _cache_folder() -> Path:
    """native/ in the folder of BESPOKE_CACHE, else in bespoke/ of the user's cache folder."""
    chosen = os.environ.get("BESPOKE_CACHE")
    if chosen:
        return Path(chosen) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bespoke" / "native"


@lru_cache(maxsize=1)
def _this_package() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _host() -> str:
    """The processor and the compiler, found without loading the compiler."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags", "Features"))]
    except OSError:
        facts = [platform.processor()]
    return f"{version('llvmlite')} {platform.machine()} {facts}"


def _entries(folder: Path | None) -> set[str]:
    try:
        return set() if folder is None else set(os.listdir(folder))
    except OSError:
        return set()


def _write(path: Path | None, native: Any, code: bytes) -> None:
    """Atomically; a cache that cannot be written is no cache."""
    if path is None:
        return
    facts = {name: getattr(native, name) for name in ("text", "views", "units", "loops", "regions")}
    head = json.dumps(facts).encode()
    body = len(head).to_bytes(8, "little") + head + code
    with contextlib.suppress(OSError):
        if not path.parent.exists():
            _make_room(path.parent.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)


def _make_room(folder: Path) -> None:
    """Programs that were compiled longest ago go."""
    with contextlib.suppress(OSError):
        kept = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime)
        for entry in kept[: max(0, len(kept) + 1 - PROGRAMS_KEPT)]:
            shutil.rmtree(entry, ignore_errors=True)


def _read(path: Path | None) -> tuple[Any, bytes] | None:
    """None for an entry that is missing or damaged."""
    try:
        raw = path.read_bytes() if path is not None else b""
    except OSError:
        return None
    body = raw[len(_MAGIC) + 32 :]
    if not raw.startswith(_MAGIC) or hashlib.sha256(body).digest() != raw[len(_MAGIC) : len(_MAGIC) + 32]:
        return None
    size = int.from_bytes(body[:8], "little")
    facts = json.loads(body[8 : 8 + size])
    loops = {symbol: tuple(value) for symbol, value in facts.pop("loops").items()}
    return Native(ir="", loops=loops, **facts), body[8 + size :]
