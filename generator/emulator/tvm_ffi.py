"""Functions compiled with --enable-tvm-ffi, whose host code is called through TVM FFI's calling convention.

Such a function takes DLPack tensors, or whatever TVM FFI converts to them, checks their device, dtype and layout in
compiled code, loads its cubin when first called and launches as any other host function does. What is changed while an
emulator is attached:

    spec.Tensor                       every tensor is on the device, as is every array of this machine's memory
    TVMFFIFunctionBuilder             so the compiled check of a tensor's device finds what it looks for
    TVMFFIJitCompiledFunctionBase     the host object is linked against host.c, as elsewhere
    TVMFFIJitCompiledFunction*        tensors of a call become known global memory; what the emulator found is raised

Source: nvidia-cutlass-dsl 4.8.1 with apache-tvm-ffi 0.1.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .arrays import KnownArrays
from .host import HostError, library_path, redirect

_CUDA = 2  # kDLCUDA
_ITEMS_LOOKED_AT = 1024  # of a tuple or list that is an argument


def replacements(session: Any, arrays: KnownArrays) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """(owner, name, what makes the replacement from what is there) for attach.py to put in place. Needs tvm_ffi."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _aot_support
    from cutlass._mlir._mlir_libs._cutlass_ir._execution_engine import BinaryExecutionEngine
    from cutlass.base_dsl.tvm_ffi_builder import spec
    from cutlass.base_dsl.tvm_ffi_builder.tvm_ffi_builder import TVMFFIFunctionBuilder
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    def create(_: Any) -> Callable[[Any], Any]:
        def _create_tvm_ffi_function(function: Any) -> Any:
            if function.engine is None:  # compiled for another machine
                return None
            options = {"format": "o", "opt_level": 3, "enable_pic": True}
            image = _aot_support.export_module_to_bytes(function.ir_module, **options)
            function.engine = BinaryExecutionEngine(redirect(image), [str(library_path())], True)
            entry = function.engine.lookup(f"__tvm_ffi_{function.function_name}")
            found = provider.tvm_ffi.Function.__from_extern_c__(entry, keep_alive_object=function.engine)
            function.linked_with_emulator = True
            return found

        return _create_tvm_ffi_function

    yield spec.Tensor, "__init__", _on_the_device
    yield TVMFFIFunctionBuilder, "load_dltensor_device_type", lambda _: lambda builder, tensor: builder.i32(_CUDA)
    yield provider.TVMFFIJitCompiledFunctionBase, "_create_tvm_ffi_function", create
    for caller in (provider.TVMFFIJitCompiledFunction, provider.TVMFFIJitCompiledFunctionWithKwargs):
        yield caller, "__call__", lambda theirs: _raising(theirs, session, arrays)


def _on_the_device(theirs: Callable[..., None]) -> Callable[..., None]:
    def __init__(tensor: Any, *arguments: Any, **options: Any) -> None:
        options["device_type"] = "cuda"
        theirs(tensor, *arguments, **options)

    return __init__


def _raising(theirs: Callable[..., Any], session: Any, arrays: KnownArrays) -> Callable[..., Any]:
    def __call__(function: Any, *arguments: Any, **options: Any) -> Any:
        if not hasattr(function, "linked_with_emulator"):
            raise HostError("the function was compiled while no emulator was attached: compile it inside")
        for value in (*arguments, *options.values()):
            _register(value, arrays)
        try:
            result = theirs(function, *arguments, **options)
        except Exception:
            session.raise_error()
            raise
        session.raise_error()
        return result

    return __call__


def _register(value: Any, arrays: KnownArrays) -> None:
    """Make the arrays among a call's arguments known, those in tuples and lists too."""
    if isinstance(value, (tuple, list)):
        for item in value[:_ITEMS_LOOKED_AT]:
            _register(item, arrays)
    elif hasattr(value, "__dlpack__") and not hasattr(value, "load_dltensor"):  # the DSL's tensors are known already
        arrays.add(value)
