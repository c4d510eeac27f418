"""Runs what a CuTe DSL program compiles on the emulator, the program unmodified.

    with attached("sm_100a") as gpu:
        compiled = cute.compile(host_function, from_dlpack(a), ...)     # NumPy or CPU torch arrays
        compiled(from_dlpack(a), ...)                                   # executes the kernels' PTX
        host_function(from_dlpack(a), ...)                              # so does an implicit compilation
    gpu.launches                                                        # one report a launch

Inside the block the DSL is changed in these places, all of them put back at its end:

    Compiler.jit            links host code against host.c: symbols of the DSL's runtime library get the prefix
                            `emulated_`, so the DSL's own library may be loaded in the same process, before or after;
                            and learns which PTX belongs to which cubin
    CompileOptions          keeps the PTX of each compilation, in a temporary folder
    envar                   compiles for the Gpu's architecture, with line information if asked for; no compiled code is
                            taken from the disk
    _Tensor, _Pointer       arrays become known global memory
    BaseDSL                 holds Ctrl-C back while it traces and compiles
    JitCompiledFunction     checks that a call's tensors are of the dtypes and static extents that were compiled for,
                            and raises what the emulator found, instead of a CUDA error code
    HardwareInfo            answers without a driver
    cuda.bindings           see cuda_python.py
    torch                   see pytorch.py
    compiled for TVM FFI    see tvm_ffi.py

What was compiled outside cannot be called inside, or the other way around: its host code is linked with the other
library. Sources: nvidia-cutlass-dsl 4.8.1, whose private names these are; a name that is missing is an error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import pytorch, tvm_ffi
from .arrays import KnownArrays, place_on_device
from .cuda_python import L2_BYTES, CudaPython
from .errors import EmulatorError, LaunchError
from .gpu import Gpu, LaunchReport
from .host import HostError, Launch, Session, cubin_digest, library_path, runtime_symbols, serving
from .images import cubins_of
from .imports import when_imported
from .interrupt import interrupt_held_back

DEFAULT_SMS = 4
_TESTED = "nvidia-cutlass-dsl 4.8"

# PTX by cubin digest, of everything compiled while attached. It outlives a session, as compiled functions do.
_programs: dict[str, str] = {}
_active = threading.Lock()


@contextmanager
def attached(
    arch: str = "sm_100a",
    strict: bool = True,
    sms: int = DEFAULT_SMS,
    lineinfo: bool = False,
    accumulation: str = "fast",
    trace: Any = None,
    allow_uninitialized: bool = False,
    warnings: bool = False,
    schedules: int = 1,
    schedule_seed: int = 0,
) -> Iterator[Gpu]:
    """What this thread compiles and calls through the CuTe DSL inside the block runs on the Gpu that it yields.

    arch: "sm_90a" or "sm_100a". strict, accumulation, trace, allow_uninitialized, warnings, schedules, schedule_seed:
    see Gpu.
    sms: multiprocessors that the device says it has; few of them make a persistent kernel loop. lineinfo: compile with
    line information, so that messages name lines of the program. Raises HostError when one is attached already, when
    the DSL is missing or has changed; LaunchError for bad arguments. What the emulator finds is raised by the call of
    the compiled function.
    """
    if isinstance(sms, bool) or not isinstance(sms, int) or sms < 1:
        raise LaunchError(f"sms is {sms!r}: at least 1 multiprocessor")
    gpu = Gpu(arch, strict, accumulation, trace, schedules, schedule_seed)
    gpu.allow_uninitialized, gpu.warnings = allow_uninitialized, warnings
    if not _active.acquire(blocking=False):
        raise HostError("an emulator is attached already: leave its block first")
    try:
        with ExitStack() as stack:
            session = _Attachment(gpu, _programs, _KNOWN)
            with interrupt_held_back():  # it imports the DSL
                _redirect_the_dsl(stack, session, sms, lineinfo)
            stack.enter_context(serving(session))
            yield gpu
    finally:
        _active.release()


_KNOWN = "compiled while an emulator was attached, so its PTX is unknown: compile inside `with emulator.attached(...)`"


class _Attachment(Session):
    """A Session that reports failed launches too."""

    def run(self, module: Any, launch: Launch) -> None:
        start = time.perf_counter()
        try:
            super().run(module, launch)
        except EmulatorError as error:
            facts = (launch.kernel, launch.grid, launch.block, launch.smem_bytes, time.perf_counter() - start)
            report = LaunchReport(*facts, 0, Counter(), 0, cluster=launch.cluster, hazards=(str(error),))
            self.gpu.launches.append(report)
            raise

    def raise_error(self) -> None:
        """Raise what answering the last calls met, once: the emulated device recovers."""
        error, self.error = self.error, None
        if error is not None:
            raise error from None


def _redirect_the_dsl(stack: ExitStack, session: _Attachment, sms: int, lineinfo: bool) -> None:
    try:
        from cuda.bindings import driver, runtime
        from cutlass import cute  # noqa: F401  (makes the DSL's singleton)
        from cutlass.base_dsl.compiler import CompileOptions, Compiler, KeepPTX
        from cutlass.base_dsl.dsl import BaseDSL, DSLSingletonMeta
        from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule
        from cutlass.base_dsl.jit_executor import JitCompiledFunction, JitExecutor
        from cutlass.cute import runtime as cute_runtime
        from cutlass.utils import HardwareInfo
    except ImportError as error:
        raise HostError(f"the CuTe DSL cannot be imported ({error}); tested with {_TESTED}") from None
    arch = session.gpu.arch
    arrays = KnownArrays(session.gpu)
    folder = tempfile.mkdtemp(prefix="bespoke-ptx-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    _set_environment(stack, "CUTE_DSL_ARCH", arch)
    for dsl in list(DSLSingletonMeta._instances.values()):
        _replace(stack, dsl.envar, "arch", lambda _: arch)
        _replace(stack, dsl.envar, "shared_libs", lambda _: str(library_path()))  # part of the key of compiled code
        _replace(stack, dsl.envar, "disable_file_caching", lambda _: True)
        if lineinfo:
            _replace(stack, dsl.envar, "lineinfo", lambda _: True)
    cuda_python = CudaPython(session.gpu, arrays, sms)
    when_imported(stack, "torch", lambda torch: _redirect_torch(stack, torch, cuda_python))
    for module in (driver, runtime):
        for name, function in cuda_python.functions(module).items():
            _replace(stack, module, name, lambda _, function=function: function)
    linker = _Linker(session, folder, KeepPTX)
    stack.callback(linker.release)
    _replace(stack, CompileOptions, "apply_envar_settings", linker.keep_ptx)
    _replace(stack, Compiler, "jit", linker.jit)
    _replace(stack, cute_runtime._Tensor, "__init__", lambda theirs: _registering_tensor(theirs, arrays))
    _replace(stack, cute_runtime._Pointer, "__init__", lambda theirs: _registering_pointer(theirs, arrays))
    _replace(stack, BaseDSL, "_build_jit_function", _remembering)
    for native in ("generate_original_ir", "compile_and_cache"):
        _replace(stack, BaseDSL, native, interrupt_held_back())
    _replace(stack, ExternalBinaryModule, "__init__", lambda _: _refuse_object_file)
    _replace(stack, JitCompiledFunction, "__call__", _checking_arguments)
    for caller in (JitCompiledFunction, JitExecutor):
        _replace(stack, caller, "run_compiled_program", lambda theirs: _raising(theirs, session))
    if find_spec("tvm_ffi") is not None:
        for owner, name, make in tvm_ffi.replacements(session, arrays):
            _replace(stack, owner, name, make)
    for name, answer in _hardware(sms).items():
        _replace(stack, HardwareInfo, name, lambda _, answer=answer: answer)


def _redirect_torch(stack: ExitStack, torch: Any, cuda_python: CudaPython) -> None:
    for owner, name, make in pytorch.redirections(torch, cuda_python.attribute):
        _replace(stack, owner, name, make)
    mode = stack.enter_context(pytorch.device_mode())
    _replace(stack, torch.autograd, "_engine_run_backward", pytorch.during_backward(mode))


def _replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """owner.name = make(what it is), until the stack unwinds."""
    if not hasattr(owner, name):
        raise HostError(f"the CuTe DSL has no {getattr(owner, '__name__', owner)}.{name}: tested with {_TESTED}")
    theirs = getattr(owner, name)
    setattr(owner, name, make(theirs))
    stack.callback(setattr, owner, name, theirs)


def _set_environment(stack: ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    os.environ[name] = value
    stack.callback(os.environ.pop, name, None) if before is None else stack.callback(
        os.environ.__setitem__, name, before
    )


class _Linker:
    """What replaces the DSL's last steps: the PTX is kept, and host code is linked against host.c."""

    def __init__(self, session: _Attachment, folder: str, keep_option: type) -> None:
        self._session, self._folder, self._keep_option = session, folder, keep_option
        self._options: Any = None  # of the compilation under way
        self._kept: list[Any] = []  # options switched on here

    def release(self) -> None:
        """`cute.compile` holds its options: switch off what was switched on."""
        for keep in self._kept:
            keep.value = False

    def keep_ptx(self, theirs: Callable[..., None]) -> Callable[..., None]:
        def apply_envar_settings(options: Any, envar: Any, function_name: str) -> None:
            theirs(options, envar, function_name)
            keep = options.options[self._keep_option]
            if not keep.value:  # the program does not keep it for itself
                keep.value = True
                self._kept.append(keep)
            if any(keep is mine for mine in self._kept):  # options are applied more than once
                name = hashlib.sha256(function_name.encode()).hexdigest()[:16]  # file names are limited, names are not
                arch = options.gpu_arch or envar.arch
                options._set_artifact_dump_paths(keep, self._folder, name, arch, "ptx", "full_ptx_path")
            self._options = options

        return apply_envar_settings

    def jit(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        def jit(compiler: Any, module: Any, opt_level: int = 2, shared_libs: Any = ()) -> Any:
            self._learn(module)
            renamed = _rename_symbols(module)
            try:
                engine = theirs(compiler, module, opt_level, [str(library_path())])
                engine.linked_with_emulator = True
                return engine
            finally:  # the module is also exported and cached
                for operation, attribute, before in renamed:
                    operation.attributes[attribute] = before

        return jit

    def _learn(self, module: Any) -> None:
        """Note which PTX the module's cubins were assembled from."""
        digests = {cubin_digest(cubin) for image in _images_in(module) for cubin in cubins_of(image)}
        if not digests - set(self._session.programs):
            return
        path = getattr(self._options, "full_ptx_path", None)
        if path and os.path.exists(path):  # otherwise loading the cubin will say that its PTX is unknown
            self._session.programs.update(dict.fromkeys(digests, Path(path).read_text()))


def _images_in(module: Any) -> Iterator[bytes]:
    """Constants of an LLVM-dialect module that hold a cubin or a fat binary."""
    for operation in module.body.operations:
        if operation.operation.name == "llvm.mlir.global" and "value" in operation.attributes:
            value = getattr(operation.attributes["value"], "value_bytes", b"")
            if value[:4] in (b"\x7fELF", b"\x50\xed\x55\xba"):
                yield value


def _rename_symbols(module: Any) -> list[tuple[Any, str, Any]]:
    """Give each use of a runtime symbol its emulated name. Returns what to put back: operation, attribute, value."""
    from cutlass._mlir import ir

    symbols, changed = runtime_symbols(), []
    places = {"llvm.func": "sym_name", "llvm.call": "callee", "llvm.mlir.addressof": "global_name"}

    def visit(operation: Any) -> Any:
        attribute = places.get(operation.name)
        if attribute is not None and attribute in operation.attributes:
            before = operation.attributes[attribute]
            if before.value in symbols:
                make = ir.StringAttr.get if attribute == "sym_name" else ir.FlatSymbolRefAttr.get
                changed.append((operation, attribute, before))
                operation.attributes[attribute] = make(f"emulated_{before.value}", module.context)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return changed


def _registering_tensor(theirs: Callable[..., None], arrays: KnownArrays) -> Callable[..., None]:
    def __init__(tensor: Any, array: Any, *arguments: Any, **options: Any) -> None:
        arrays.add(array)
        theirs(tensor, array, *arguments, **options)
        place_on_device(tensor._dlpack_data)

    return __init__


def _registering_pointer(theirs: Callable[..., None], arrays: KnownArrays) -> Callable[..., None]:
    def __init__(pointer: Any, address: Any, *arguments: Any, **options: Any) -> None:
        theirs(pointer, address, *arguments, **options)
        arrays.add_pointed_to(int(address))

    return __init__


def _raising(theirs: Callable[..., Any], session: _Attachment) -> Callable[..., Any]:
    def run_compiled_program(caller: Any, exe_args: Any) -> Any:
        engine = getattr(caller, "engine", None) or caller.jit_module.engine
        if not hasattr(engine, "linked_with_emulator"):
            raise HostError("the function was compiled while no emulator was attached: compile it inside")
        try:
            result = theirs(caller, exe_args)
        except Exception:
            session.raise_error()
            raise
        session.raise_error()
        return result

    return run_compiled_program


def _refuse_object_file(module: Any, file_path: str, *_: Any, **__: Any) -> None:
    raise HostError(
        f"{file_path} was compiled ahead of time, so its PTX is unknown: compile inside "
        "(a library that keeps compiled functions on the disk must be told not to, QuACK by QUACK_CACHE_ENABLED=0)"
    )


def _remembering(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def _build_jit_function(dsl: Any, *arguments: Any) -> Any:
        compiled = theirs(dsl, *arguments)
        compiled.compiled_for = tuple(map(_tensor_type, arguments[-2] or ()))  # dynamic_args; dynamic_kwargs is last
        return compiled

    return _build_jit_function


def _checking_arguments(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The DSL hands over whatever tensor a call brings; one of another type than was compiled for is read wrongly."""

    def __call__(compiled: Any, *arguments: Any, **options: Any) -> Any:
        for position, (wanted, given) in enumerate(zip(getattr(compiled, "compiled_for", ()), arguments, strict=False)):
            difference = _difference(wanted, _tensor_type(given))
            if difference:
                raise LaunchError(f"argument {position} of {compiled.function_name}: {difference}")
        return theirs(compiled, *arguments, **options)

    return __call__


@dataclass(frozen=True)
class _TensorType:
    """What a function is compiled for: extents and strides that are open are None."""

    dtype: str
    shape: tuple[int | None, ...]
    stride: tuple[int | None, ...]
    given: tuple[tuple[Any, ...], tuple[Any, ...]]  # shape and stride, all of them


def _tensor_type(argument: Any) -> _TensorType | None:
    """None for what is no tensor: numbers, pointers, streams, classes of the program's own."""
    if not all(hasattr(argument, name) for name in ("dynamic_shapes_mask", "dynamic_strides_mask", "element_type")):
        return None
    shape, stride = tuple(argument.shape), tuple(argument.stride)
    fixed = [
        tuple(None if open_ or not isinstance(x, int) else x for x, open_ in zip(values, mask, strict=True))
        for values, mask in ((shape, argument.dynamic_shapes_mask), (stride, argument.dynamic_strides_mask))
    ]
    return _TensorType(argument.element_type.__name__, *fixed, (shape, stride))


def _difference(wanted: _TensorType | None, given: _TensorType | None) -> str | None:
    if wanted is None or given is None:
        return None
    if wanted.dtype != given.dtype:
        return f"compiled for {wanted.dtype}, called with {given.dtype}"
    if len(wanted.shape) != len(given.shape):
        return f"compiled for {len(wanted.shape)} dimensions, called with {len(given.shape)}"
    for what, fixed, values in zip(("shape", "stride"), (wanted.shape, wanted.stride), given.given, strict=True):
        if any(mine is not None and mine != theirs for mine, theirs in zip(fixed, values, strict=True)):
            shown = ", ".join("?" if extent is None else str(extent) for extent in fixed)
            return f"compiled for {what} ({shown}), called with {values}"
    return None


def _hardware(sms: int) -> dict[str, Callable[..., Any]]:
    """Methods of cutlass.utils.HardwareInfo."""

    def __init__(info: Any, device_id: int = 0) -> None:
        if device_id != 0:
            raise ValueError(f"Device ID {device_id} is out of range for device count 1")
        info.device_id = device_id

    return {
        "__init__": __init__,
        "get_max_active_clusters": lambda info, cluster_size, stream=None: max(1, sms // cluster_size),
        "get_l2_cache_size_in_bytes": lambda info: L2_BYTES,
        "get_device_multiprocessor_count": lambda info: sms,
    }
