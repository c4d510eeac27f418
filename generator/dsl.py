"""Imports the CuTe DSL for the kernels made here: its versions, tracing a kernel file, calling compiled host functions.

(emulator/attach.py does for programs that bring the DSL themselves.)

Nothing is imported from the DSL until it is needed, so that planning and emitting work without it. How a kernel gets
from a file to a launch:

    trace_kernel     file -> PTX, cubin, and the host function as an x86 object file (the DSL's ahead-of-time export)
    HostFunction     links that object with a runtime library (the DSL's: GPU; the emulator's: no GPU) and calls it

The object is linked twice at most, once a backend, and neither `CUTE_DSL_LIBS` nor a new trace is needed to switch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import linecache
import platform
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .signature import Parameter, fixed_sizes, signature
from .spec import KernelSpec, SpecError

TESTED_SERIES = "4.8"
_REQUIREMENT = f"nvidia-cutlass-dsl=={TESTED_SERIES}.*"
_DISTRIBUTION = "nvidia-cutlass-dsl"
_PARTS = ("libs-base", "libs-core", "libs-cu12", "libs-cu13")  # what the meta-distribution draws in

_PREFIX = "kernel"  # of the exported symbols
_TMA_ALIGNMENT = 16  # bytes: of a tensor's address and of its strides (cuTensorMapEncodeTiled)


class DslVersionError(SpecError):
    """The DSL is missing, or of a series that this version was not tested with."""


class CompileError(RuntimeError):
    """An emitted kernel does not compile, or does not compile to what its Budget says."""


def dsl_versions() -> dict[str, str]:
    """Installed distributions that make up the DSL, name -> version."""
    found = {}
    for name in (_DISTRIBUTION, *(f"{_DISTRIBUTION}-{part}" for part in _PARTS)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_dsl() -> dict[str, str]:
    """dsl_versions(), after checking them. Raises DslVersionError when the DSL is missing or untested."""
    versions = dsl_versions()
    remedy = f'pip install "{_REQUIREMENT}"'
    version = versions.get(_DISTRIBUTION)
    if version is None:
        raise DslVersionError(_DISTRIBUTION, "not installed", f"{TESTED_SERIES}.x is needed to compile", remedy)
    if version.split(".")[:2] != TESTED_SERIES.split("."):
        raise DslVersionError(_DISTRIBUTION, version, f"tested with {TESTED_SERIES}.x only", remedy)
    return versions


def host_cpu() -> str:
    """What the host object depends on: the DSL compiles it for the very processor that it runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = sorted({line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part")})
    return f"{platform.machine()} {hashlib.sha256(''.join(facts).encode()).hexdigest()}"


@dataclass(frozen=True)
class Traced:
    """What the DSL made of one kernel file."""

    ptx: str
    cubin: bytes
    host_object: bytes  # x86 ELF object: the host function, with the cubin inside
    host_symbol: str  # the host function's name in it


Scalars = Sequence[float | int]  # Float32 and Int32 arguments, after the tensors


def trace_kernel(source: Path, spec: KernelSpec, scalars: Scalars, lineinfo: bool = False) -> Traced:
    """trace_launch of an attention kernel, with numbers of the types that its host function takes."""
    return trace_launch(source, spec.arch, signature(spec), fixed_sizes(spec), lineinfo, scalars)


def trace_launch(
    source: Path,
    arch: str,
    parameters: Sequence[Parameter],
    sizes: Mapping[str, int],
    lineinfo: bool = False,
    scalars: Scalars = (),
) -> Traced:
    """Import an emitted file, trace its `launch` and compile it for arch. Raises CompileError, DslVersionError.

    parameters: launch's tensors; numbers of the types of `scalars` and a stream follow. sizes: extents that are fixed.
    lineinfo: with `.loc` directives in the PTX.
    """
    check_dsl()
    import cutlass
    from cutlass import cute
    from cutlass.base_dsl.ast_helpers import DSLOptimizationWarning
    from cutlass.base_dsl.compiler import DumpDir, GenerateLineInfo, GPUArch, KeepCUBIN, KeepPTX
    from cutlass.cute.runtime import make_fake_stream

    _load_runtime_globally()
    module_name = f"bespoke_kernel_{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory(prefix="bespoke-") as folder:
        options = (GPUArch(arch), KeepPTX(), KeepCUBIN(), DumpDir(folder), GenerateLineInfo(lineinfo))
        compiler = cute.compile[options]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DSLOptimizationWarning)  # "very slow to compile": it is not
                module = _import_file(source, module_name)
                # Arguments stand for any tensor of the specification: extents and strides stay open.
                arguments = open_arguments(parameters, sizes)
                arguments += [(cutlass.Int32 if isinstance(x, int) else cutlass.Float32)(x) for x in scalars]
                arguments.append(make_fake_stream())
                compiled = compiler(module.launch, *arguments, no_jit_engine=True)
            host_object = compiled.dump_to_object(_PREFIX)
        except Exception as error:
            raise CompileError(f"{source}: {type(error).__name__}: {error}") from error
        finally:
            sys.modules.pop(module_name, None)
        ptx, cubin = compiled.artifacts.PTX, compiled.artifacts.CUBIN
    return Traced(ptx, cubin, host_object, f"_mlir_{_PREFIX}__mlir_ciface_{compiled.function_name}")


def _import_file(source: Path, module_name: str) -> Any:
    """The DSL reads functions' source through inspect, so the module must be a file's and be registered.

    Its code is compiled here and now: the interpreter's byte code cache tells files apart by second and size only.
    """
    spec = importlib.util.spec_from_file_location(module_name, source)
    module = importlib.util.module_from_spec(spec)
    code = compile(source.read_bytes(), str(source), "exec")
    linecache.checkcache(str(source))
    sys.modules[module_name] = module
    exec(code, module.__dict__)
    return module


def open_arguments(parameters: Sequence[Parameter], sizes: Mapping[str, int]) -> list[Any]:
    """Compile-time stand-ins for tensors: extents and strides stay open, but for the columns and the last stride.

    sizes: extents of the axes that are fixed.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_tensor

    dtypes = {
        "bf16": cutlass.BFloat16,
        "fp16": cutlass.Float16,
        "float32": cutlass.Float32,
        "int32": cutlass.Int32,
    }

    def argument(parameter: Parameter) -> Any:
        dtype, rank = dtypes[parameter.dtype], len(parameter.axes)
        align = _TMA_ALIGNMENT if parameter.matrix else dtype.width // 8
        step = align * 8 // dtype.width
        strides = tuple(cute.sym_int64(divisibility=step) for _ in range(rank - 1))
        extents = tuple(cute.sym_int() for _ in range(min(rank, 3)))
        shape = (*extents, sizes[parameter.axes[3]]) if parameter.matrix else extents
        return make_fake_tensor(dtype, shape, (*strides, 1), assumed_align=align)

    return [argument(parameter) for parameter in parameters]


def runtime_library() -> Path:
    """The DSL's own runtime library, which calls the CUDA driver."""
    check_dsl()
    import cutlass  # noqa: F401  (its import chooses between the CUDA flavours that are installed)
    from cutlass.base_dsl.env_manager import get_prefix_dsl_libs

    for path in (get_prefix_dsl_libs("CUTE_DSL") or "").split(":"):
        if path.endswith("libcute_dsl_runtime.so"):
            return Path(path)
    raise CompileError(f"the DSL's runtime library is missing: pip install --force-reinstall '{_REQUIREMENT}'")


def _load_runtime_globally() -> None:
    """Exporting an object resolves its symbols once, in the libraries of the process; nothing is called."""
    ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)


# --- calling a compiled host function ---------------------------------------------------------------------------------


class TensorArgument:
    """The descriptor by which a host function takes a tensor: address, extents (int32), strides (int64, elements).

    What the trace fixed is left out: the extent of D, and the stride 1 of the last mode. value: the ctypes structure,
    whose `address` may be set again.
    """

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        extents = shape[:3]  # [B, S, H, (D)], [B, H, Sq] or fewer
        self.value = _descriptor(len(extents), len(strides) - 1)(address, tuple(extents), tuple(strides[:-1]))


@lru_cache(maxsize=16)  # a ctypes class costs as much as a launch
def _descriptor(extents: int, strides: int) -> Any:
    fields = [
        ("address", ctypes.c_void_p),
        ("shape", ctypes.c_int32 * extents),
        ("strides", ctypes.c_int64 * strides),
    ]
    return type("Descriptor", (ctypes.Structure,), {"_fields_": fields})


class HostFunction:
    """A host object linked with one runtime library.

    Linking needs no device; `load` (the first call on a device does it) hands the cubin to the runtime library.
    """

    def __init__(self, host_object: bytes, symbol: str, library: Path) -> None:
        check_dsl()
        from .emulator.interrupt import interrupt_held_back

        with interrupt_held_back():
            import cutlass  # noqa: F401  (its import loads the extension below)
            from cutlass._mlir._mlir_libs._cutlass_ir._execution_engine import BinaryExecutionEngine

            self._engine = BinaryExecutionEngine(host_object, [str(library)], True)
        self._symbol = symbol
        self._handle = ctypes.pointer(ctypes.c_void_p())  # to the loaded library
        self._devices: set[int] = set()
        self._loading = threading.Lock()

    def loaded(self, device: int) -> bool:
        return device in self._devices

    def load(self, device: int = 0) -> int:
        """Load the cubin and set the kernel's attributes on `device`, once. Returns a CUDA error code, 0: success."""
        with self._loading:
            error = ctypes.c_int32(0)
            if device in self._devices:
                return 0
            if not self._devices:
                self._call(f"_mlir_{_PREFIX}_cuda_init", self._handle, error)
            if error.value == 0:
                self._call(f"_mlir_{_PREFIX}_cuda_load_to_device", self._handle, ctypes.c_int32(device), error)
            if error.value == 0:
                self._devices.add(device)
            return error.value

    def __call__(self, tensors: Sequence[TensorArgument], scalars: Scalars, stream: int = 0, device: int = 0) -> int:
        """Launch on `device`, which must be current. Returns a CUDA error code, 0 for success.

        scalars: of the types that the function was traced with.
        """
        status = 0 if self.loaded(device) else self.load(device)
        return status or Call(self, tensors, scalars, stream)()

    @cached_property
    def entry(self) -> Any:
        """The launching function, which takes the address of an array of pointers to its arguments."""
        return self._lookup(self._symbol)

    def _lookup(self, symbol: str) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.lookup(symbol))

    def _call(self, symbol: str, *values: Any) -> None:
        pointers = _pointers(values)
        self._lookup(symbol)(ctypes.addressof(pointers))


class Call:
    """A call of a host function, with arguments in memory of its own, which can be written and called again.

    descriptors: of the tensors, each with an `address`; scalars and stream: ctypes numbers, each with a `value`. For a
    device on which the function was loaded. By one thread at a time.
    """

    __slots__ = ("descriptors", "scalars", "stream", "_result", "_pointers", "_address", "_entry", "_function")

    def __init__(
        self, function: HostFunction, tensors: Sequence[TensorArgument], scalars: Scalars, stream: int = 0
    ) -> None:
        self.descriptors = tuple(tensor.value for tensor in tensors)
        self.scalars = tuple((ctypes.c_int32 if isinstance(x, int) else ctypes.c_float)(x) for x in scalars)
        self.stream = ctypes.c_void_p(stream)
        self._result = ctypes.c_int32(0)
        self._pointers = _pointers((*self.descriptors, *self.scalars, self.stream, self._result))
        self._address = ctypes.addressof(self._pointers)
        self._function, self._entry = function, function.entry  # the function's code lives as long as the function

    def __call__(self) -> int:
        """Launch. Returns a CUDA error code, 0 for success."""
        self._result.value = 0
        self._entry(self._address)
        return self._result.value


def _pointers(values: Sequence[Any]) -> Any:
    """What every exported function takes: an array of pointers to its arguments, the result last."""
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
