"""Binary + arrays -> arrays, on the backend "emulator" (CPU arrays) or "cuda" (CUDA tensors, or CPU arrays copied).

Both backends call the same compiled host function with the same descriptors; they differ in the runtime library that
it is linked with and in where the arrays are.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from .arrays import (
    DTYPES,
    CallError,
    Output,
    View,
    check_inputs,
    check_outputs,
    is_torch,
    merged_spans,
    output_layout,
)
from .budget import Budget
from .compile import Binary
from .dsl import HostFunction, Scalars, Traced, runtime_library
from .emulator import Gpu, Labels
from .emulator.host import HostError, attached, library_path, redirect

BACKENDS = ("emulator", "cuda")
EMULATED_SMS = 4  # few, so that the CTAs of a persistent kernel take turns at small sizes
Prepare = Callable[[Gpu, Sequence[Output]], None]
EMULATE = 'use backend="emulator" with CPU arrays'
_COMPUTE_CAPABILITY = {"sm_90a": (9, 0), "sm_100a": (10, 0)}


class RunError(RuntimeError):
    """A kernel could not be launched, or wrote where it must not."""


@dataclass(frozen=True)
class Run:
    """One observed call. outputs: o, then lse and m where the kernel has them; launches: the emulator's reports."""

    outputs: tuple[Output, ...]
    seconds: float
    launches: tuple[Any, ...]


def run_kernel(
    binary: Binary,
    *arrays: Any,
    scale: float | None = None,
    backend: str | None = None,
    out: Sequence[Any] | None = None,
    **named: Any,
) -> tuple[Any, ...]:
    """Attention of the arrays that the kernel takes, by position or by name; see arrays.check_inputs.

    scale: of the scores, default 1/sqrt(head_dim). backend: default by where the arrays are. out: CUDA tensors to write
    into, in the order of what is returned. Returns O [B, Sq, Hq, Dv] (float32 when unnormalized), then LSE and, when
    unnormalized, m, float32 [B, Hq, Sq], in the library of q.
    Raises CallError for arrays that the kernel was not built for, RunError when it cannot be launched or writes outside
    its outputs, EmulatorError for what the emulator refuses.
    """
    views = check_inputs(binary.spec, *arrays, **named)
    if _check_backend(backend, views) == "cuda" and views[0].device != "cpu":
        return _run_on_tensors(binary, views, _check_scale(binary, scale), out)
    if out is not None:
        raise CallError("out", "given", "is for CUDA tensors; q is on the CPU", "leave it out")
    run = run_observed(binary, *arrays, scale=scale, backend=backend, **named)
    for output in run.outputs:
        if output.outside():
            raise RunError(f"{binary.spec.name} wrote {output.outside()} elements outside {output.name}")
    return tuple(like(views[0].owner, output.array) for output in run.outputs)


def run_observed(
    binary: Binary,
    *arrays: Any,
    scale: float | None = None,
    backend: str | None = None,
    strict: bool = True,
    prepare: Prepare | None = None,
    trace: Any = None,
    sms: int = EMULATED_SMS,
    **named: Any,
) -> Run:
    """run_kernel on CPU arrays, with outputs that tell what was written; strict, trace: see Gpu. prepare: called with
    the Gpu and the outputs before the emulator runs. sms: multiprocessors of the emulated GPU, for a persistent kernel.
    For verification.
    """
    views = check_inputs(binary.spec, *arrays, **named)
    if views[0].device != "cpu":
        raise CallError("device", views[0].device, "only CPU arrays are observed", "pass NumPy arrays")
    scale = _check_scale(binary, scale)
    outputs = tuple(Output(*layout) for layout in output_layout(binary.spec, views[0]))
    backend = _check_backend(backend, views)
    emulate = partial(_run_emulated, strict=strict, prepare=prepare, trace=trace, sms=sms)
    execute = {"emulator": emulate, "cuda": _run_copied}[backend]
    _host_function(binary.host_object, binary.host_symbol, backend)  # loaded once a kernel, not timed
    start = time.perf_counter()
    launches = execute(binary, views, outputs, scale)
    return Run(outputs, time.perf_counter() - start, launches)


def _check_backend(backend: str | None, views: Sequence[View]) -> str:
    device = views[0].device
    if device != "cpu" and not device.startswith("cuda"):
        raise CallError("device", device, "arrays must be on the CPU or on a CUDA device", "move them")
    if backend is None:
        return "emulator" if device == "cpu" else "cuda"
    if backend not in BACKENDS:
        raise CallError("backend", backend, f"must be {' or '.join(BACKENDS)}", 'leave it out, or use "emulator"')
    if backend == "emulator" and device != "cpu":
        raise CallError(
            "backend", backend, f"the emulator reads CPU arrays; q is on {device}", "pass q.cpu(), k.cpu(), v.cpu()"
        )
    return backend


def _check_scale(binary: Binary, scale: float | None) -> float:
    if scale is None:
        return binary.spec.head_dim**-0.5
    limit = "must be a positive finite number (the row maximum is taken before scaling)"
    remedy = "leave it out for 1/sqrt(head_dim)"
    try:
        value = ctypes.c_float(scale).value  # as the kernel will see it
    except TypeError:
        raise CallError("scale", scale, limit, remedy) from None
    if not (0 < value < math.inf):
        raise CallError("scale", scale, limit, remedy)
    return value


def like(q: Any, array: np.ndarray) -> Any:
    """The array in q's library. The memory is shared: an Output's storage lives as long as a view of it."""
    if not is_torch(q):
        return array
    import torch

    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _scalars(binary: Binary, scale: float, sms: int) -> Scalars:
    """What the host function takes after its tensors: a persistent kernel also the CTAs that run at once, one an SM."""
    return (scale, sms) if binary.plan.persistent else (scale,)


@lru_cache(maxsize=64)
def _host_function(host_object: bytes, symbol: str, backend: str) -> HostFunction:
    if backend == "emulator":
        return HostFunction(redirect(host_object), symbol, library_path())
    return HostFunction(host_object, symbol, runtime_library())


# --- the emulator ---------------------------------------------------------------------------------------------------


def _run_emulated(
    binary: Binary,
    views: Sequence[View],
    outputs: Sequence[Output],
    scale: float,
    strict: bool,
    prepare: Prepare | None,
    trace: Any,
    sms: int,
) -> tuple[Any, ...]:
    gpu = Gpu(arch=binary.spec.arch, strict=strict, trace=trace)
    gpu.labels = _labels(binary.plan.budget)
    _emulate(gpu, binary, views, outputs, _scalars(binary, scale, sms), prepare)
    return tuple(gpu.launches)


def run_program(traced: Traced, arch: str, views: Sequence[View], outputs: Sequence[Output]) -> Sequence[Output]:
    """A traced launch without a scale on CPU arrays, in the emulator, strict. Returns the outputs; raises RunError when
    it writes outside of them.
    """
    _emulate(Gpu(arch=arch, strict=True), traced, views, outputs, (), None)
    for output in outputs:
        if output.outside():
            raise RunError(f"{traced.host_symbol} wrote {output.outside()} elements outside {output.name}")
    return outputs


def _emulate(
    gpu: Gpu,
    program: Binary | Traced,
    views: Sequence[View],
    outputs: Sequence[Output],
    scalars: Scalars,
    prepare: Prepare | None,
) -> None:
    """Call the program's host function with its launches executed by the Gpu."""
    for names, address, size in merged_spans(views):
        gpu.add_array((address, size), name=names, initialized=True)
    for output in outputs:
        gpu.add_array((output.array.ctypes.data, output.array.nbytes), name=output.name, initialized=False)
    if prepare is not None:
        prepare(gpu, outputs)
    arguments = [view.argument() for view in (*views, *(output.view() for output in outputs))]
    function = _host_function(program.host_object, program.host_symbol, "emulator")
    with attached(gpu, program.ptx, program.cubin):
        status = function(arguments, scalars)
        if status:
            raise HostError(f"the host function returned CUDA error {status}")


def _labels(budget: Budget) -> Labels:
    """The budget's names for shared-memory offsets and TMEM columns, for the emulator's messages."""
    bars = [
        (bar.offset + 8 * stage, 8, f"{bar.name}[{stage}]" if bar.stages > 1 else bar.name)
        for bar in budget.mbarriers
        for stage in range(bar.stages)
    ]
    buffers = []
    for buffer in budget.buffers:
        if buffer.name != "barriers":
            for stage in range(buffer.stages):
                name = f"{buffer.name}[{stage}]" if buffer.stages > 1 else buffer.name
                buffers.append((buffer.offset + stage * buffer.stage_bytes, buffer.stage_bytes, name))
    return Labels([*bars, *buffers], [(r.column, r.columns, r.name) for r in budget.regions])


# --- a GPU ----------------------------------------------------------------------------------------------------------


def _cuda(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call. Raises RunError with CUDA's own words."""
    from cuda.bindings import runtime

    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        raise RunError(f"CUDA: {_error_name(int(error))}")
    return values[0] if values else None


def _error_name(status: int) -> str:
    from cuda.bindings import runtime

    return runtime.cudaError_t(status).name


def check_device(arch: str, device: int = 0, remedy: str = EMULATE) -> None:
    """Raise RunError unless CUDA device `device` exists and can execute code for `arch`. remedy: what else to do."""
    found = compute_capability(device, remedy)
    if found != _COMPUTE_CAPABILITY[arch]:
        major, minor = found
        raise RunError(f"the kernel was built for {arch}, but CUDA device {device} is sm_{major}{minor}; {remedy}")


def device_arch(device: int = 0, remedy: str = EMULATE) -> str:
    """The architecture of the vocabulary whose code CUDA device `device` executes. Raises RunError for none."""
    major, minor = compute_capability(device, remedy)
    for arch, capability in _COMPUTE_CAPABILITY.items():
        if capability == (major, minor):
            return arch
    known = " and ".join(_COMPUTE_CAPABILITY)
    raise RunError(f"CUDA device {device} is sm_{major}{minor}, and kernels are built for {known}; {remedy}")


@cache  # a device does not change; refusals are not kept
def compute_capability(device: int = 0, remedy: str = EMULATE) -> tuple[int, int]:
    """(major, minor) of a CUDA device. Raises RunError when there is no such device."""
    from cuda.bindings import runtime

    try:
        count = _cuda(runtime.cudaGetDeviceCount())
    except (RunError, RuntimeError) as error:  # RuntimeError: cuda-python finds no driver library
        raise RunError(f"no CUDA device can be used ({error}); {remedy}") from None
    if count <= device:
        raise RunError(f"CUDA device {device} asked for, but there are {count}; {remedy}")
    attribute = runtime.cudaDeviceAttr
    major = _cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, device))
    minor = _cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, device))
    return major, minor


@cache
def _multiprocessors(device: int) -> int:
    from cuda.bindings import runtime

    return _cuda(runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, device))


def _launch_on_device(binary: Binary, views: Sequence[View], scale: float, stream: int, device: int) -> None:
    function = _host_function(binary.host_object, binary.host_symbol, "cuda")
    scalars = _scalars(binary, scale, _multiprocessors(device) if binary.plan.persistent else 0)
    status = function([view.argument() for view in views], scalars, stream, device)
    if status:
        raise RunError(f"{binary.spec.name}: the launch failed with CUDA error {_error_name(status)}")


def _run_on_tensors(
    binary: Binary, views: Sequence[View], scale: float, out: Sequence[Any] | None = None
) -> tuple[Any, ...]:
    """CUDA tensors in, CUDA tensors out, on PyTorch's current stream; nothing is copied or waited for."""
    import torch

    from .arrays import view_of

    device = views[0].owner.device
    check_device(binary.spec.arch, device.index or 0)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
    layout = output_layout(binary.spec, views[0])
    if out is None:
        outputs = [torch.empty(shape, dtype=kinds[dtype], device=device) for _, shape, dtype in layout]
        written = [view_of(name, tensor) for (name, _, _), tensor in zip(layout, outputs, strict=True)]
    else:
        outputs, written = list(out), check_outputs(binary.spec, views[0], out)
    arguments = [*views, *written]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _launch_on_device(binary, arguments, scale, stream, device.index or 0)
    return tuple(outputs)


def _run_copied(binary: Binary, views: Sequence[View], outputs: Sequence[Output], scale: float) -> tuple[Any, ...]:
    """CPU arrays on device 0: copied there, and the outputs back with their guard regions."""
    check_device(binary.spec.arch)
    from cuda.bindings import runtime

    kind = runtime.cudaMemcpyKind
    spans = [(low, high - low) for low, high in (view.span for view in views)]
    spans += [(output.storage.ctypes.data, output.storage.nbytes) for output in outputs]
    copies: list[int] = []
    try:
        for address, size in spans:
            copies.append(int(_cuda(runtime.cudaMalloc(size))))
            _cuda(runtime.cudaMemcpy(copies[-1], address, size, kind.cudaMemcpyHostToDevice))
        arguments = [_moved(view, copy) for view, copy in zip(views, copies, strict=False)]
        returned = list(zip(outputs, copies[len(views) :], strict=True))
        arguments += [output.view(copy + output.offset_bytes, "cuda:0") for output, copy in returned]
        _launch_on_device(binary, arguments, scale, 0, 0)
        _cuda(runtime.cudaDeviceSynchronize())
        for output, copy in returned:
            size = output.storage.nbytes
            _cuda(runtime.cudaMemcpy(output.storage.ctypes.data, copy, size, kind.cudaMemcpyDeviceToHost))
    finally:
        for copy in copies:
            runtime.cudaFree(copy)
    return ()


def _moved(view: View, address: int) -> View:
    return View(view.name, view.shape, view.strides, view.dtype, view.item_bytes, address, "cuda:0", view.owner)
