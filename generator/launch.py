"""CUDA tensors -> CUDA tensors: what a call checks and prepares once, and the little that it does each time.

A call by PyTorch's current stream costs its host as much as a short kernel runs, so that everything which follows from
the tensors' shapes, strides, dtypes and device is kept: that they fit the kernel, the outputs' layout, and the host
function's arguments, ready in memory. What is left to a call like an earlier one: its addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from .arrays import ALIGNMENT, Views, check_inputs, check_scale, compact_strides, output_layout
from .compile import Binary
from .dsl import Call, HostFunction, Scalars, TensorArgument, runtime_library
from .emulator.host import library_path, redirect
from .signature import inputs

KNOWN_CALLS = 1024  # kinds of calls that a Launcher remembers, some 2 KB each
_COMPUTE_CAPABILITY = {"sm_90a": (9, 0), "sm_100a": (10, 0)}


class RunError(RuntimeError):
    """A kernel could not be launched, or wrote where it must not."""


# --- the device -------------------------------------------------------------------------------------------------------


def check_cuda(result: tuple[Any, ...]) -> Any:
    """The value of a cuda-python call. Raises RunError with CUDA's own words."""
    from cuda.bindings import runtime

    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        raise RunError(f"CUDA: {_error_name(int(error))}")
    return values[0] if values else None


def _error_name(status: int) -> str:
    from cuda.bindings import runtime

    return runtime.cudaError_t(status).name


@cache  # a device does not change; refusals are not kept
def check_device(arch: str, device: int = 0) -> None:
    """Raise RunError unless CUDA device `device` exists and can execute code for `arch`."""
    from cuda.bindings import runtime

    remedy = 'use backend="emulator" with CPU arrays'
    try:
        count = check_cuda(runtime.cudaGetDeviceCount())
    except (RunError, RuntimeError) as error:  # RuntimeError: cuda-python finds no driver library
        raise RunError(f"no CUDA device can be used ({error}); {remedy}") from None
    if count <= device:
        raise RunError(f"CUDA device {device} asked for, but there are {count}; {remedy}")
    attribute = runtime.cudaDeviceAttr
    major = check_cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, device))
    minor = check_cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, device))
    if (major, minor) != _COMPUTE_CAPABILITY[arch]:
        raise RunError(f"the kernel was built for {arch}, but CUDA device {device} is sm_{major}{minor}; {remedy}")


@cache
def multiprocessors(device: int) -> int:
    from cuda.bindings import runtime

    return check_cuda(runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, device))


# --- the host function ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def host_function(host_object: bytes, symbol: str, backend: str) -> HostFunction:
    """The object linked for "emulator" or "cuda"."""
    if backend == "emulator":
        return HostFunction(redirect(host_object), symbol, library_path())
    return HostFunction(host_object, symbol, runtime_library())


def scalars_of(binary: Binary, scale: float, sms: int) -> Scalars:
    """What the host function takes after its tensors: a persistent kernel also the CTAs that run at once, one an SM."""
    return (scale, sms) if binary.plan.persistent else (scale,)


def launch_views(binary: Binary, views: Views, scale: float, stream: int, device: int) -> None:
    """One launch on `device`, which must be current. Raises RunError."""
    function = host_function(binary.host_object, binary.host_symbol, "cuda")
    scalars = scalars_of(binary, scale, multiprocessors(device) if binary.plan.persistent else 0)
    _check_status(binary, function([view.argument() for view in views], scalars, stream, device))


def _check_status(binary: Binary, status: int) -> None:
    if status:
        raise RunError(f"{binary.spec.name}: the launch failed with CUDA error {_error_name(status)}")


# --- PyTorch's tensors ------------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> Any:
    """PyTorch's for one of arrays.DTYPES."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[name]


@dataclass(frozen=True)
class _Ready:
    """What calls of one kind share. outputs: shape and dtype of each; tensors: descriptors, but for their addresses.

    idle: the arguments that no call is using. A call takes one out and puts it back, so that threads never share one
    and there are as many as calls were ever under way at once; a list's pop and append are atomic.
    """

    function: HostFunction
    device: Any
    index: int
    outputs: tuple[tuple[tuple[int, ...], Any], ...]
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    scalars: Scalars
    idle: list[Call] = field(default_factory=list)

    def take(self) -> Call:
        try:
            return self.idle.pop()
        except IndexError:
            return Call(self.function, [TensorArgument(0, *tensor) for tensor in self.tensors], self.scalars)


class Launcher:
    """Calls a kernel with CUDA tensors, on PyTorch's current stream; nothing is copied or waited for. Thread-safe.

    A call like an earlier one allocates its outputs with torch.empty, writes addresses, scale and stream and calls the
    host function, which is all that a CUDA graph captures; the first on a device loads the kernel there.
    """

    def __init__(self, binary: Binary) -> None:
        import torch

        self._torch, self._binary = torch, binary
        parameters = inputs(binary.spec)
        self._names = tuple(parameter.name for parameter in parameters)
        self._masks = tuple(ALIGNMENT - 1 if parameter.matrix else 3 for parameter in parameters)  # int32 and float32
        self._known: dict[Any, _Ready] = {}
        self._growing = threading.Lock()

    def __call__(self, arrays: Mapping[str, Any], scale: float | None = None) -> tuple[Any, ...]:
        """The outputs, contiguous, for tensors by name (see arrays.check_inputs). Raises CallError and RunError."""
        spec = self._binary.spec
        key = self._key(arrays)
        ready = self._known.get(key)
        views = check_inputs(spec, **arrays) if ready is None else ()
        value = check_scale(spec, scale)
        if ready is None:
            ready = self._prepare(key, views)
        addresses = []
        for name, mask in zip(self._names, self._masks, strict=True):
            address = arrays[name].data_ptr()
            if address & mask:
                check_inputs(spec, **arrays)  # names it and what it needs
            addresses.append(address)
        empty, device = self._torch.empty, ready.device
        outputs = tuple([empty(shape, dtype=dtype, device=device) for shape, dtype in ready.outputs])
        for output in outputs:
            addresses.append(output.data_ptr())
        current = self._torch.cuda.current_device()
        if current == ready.index:
            status = self._launch(ready, addresses, value)
        else:
            with self._torch.cuda.device(ready.index):
                status = self._launch(ready, addresses, value)
        _check_status(self._binary, status)
        return outputs

    def _key(self, arrays: Mapping[str, Any]) -> Any:
        """What a call's preparation depends on; None for arrays that cannot be the kernel's."""
        if len(arrays) != len(self._names):
            return None
        try:
            tensors = [arrays[name] for name in self._names]
            return tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors])
        except (KeyError, AttributeError):
            return None

    def _prepare(self, key: Any, views: Views) -> _Ready:
        """For tensors that were checked. Raises RunError when their device cannot run the kernel."""
        binary, torch = self._binary, self._torch
        device = views[0].owner.device
        index = device.index or 0
        check_device(binary.spec.arch, index)
        function = host_function(binary.host_object, binary.host_symbol, "cuda")
        if not function.loaded(index):
            with torch.cuda.device(index):
                _check_status(binary, function.load(index))
        layout = [(shape, torch_dtype(dtype)) for _, shape, dtype in output_layout(binary.spec, views[0])]
        tensors = [(view.shape, view.strides) for view in views]
        tensors += [(shape, compact_strides(shape)) for shape, _ in layout]
        scalars = scalars_of(binary, 1.0, multiprocessors(index) if binary.plan.persistent else 0)
        ready = _Ready(function, device, index, tuple(layout), tuple(tensors), scalars)
        if key is not None:
            with self._growing:
                while len(self._known) >= KNOWN_CALLS:
                    del self._known[next(iter(self._known))]  # the oldest
                self._known[key] = ready
        return ready

    def _launch(self, ready: _Ready, addresses: Sequence[int], scale: float) -> int:
        """Returns a CUDA error code, 0 for success."""
        call = ready.take()
        for descriptor, address in zip(call.descriptors, addresses, strict=True):
            descriptor.address = address
        call.scalars[0].value = scale
        call.stream.value = self._torch._C._cuda_getCurrentRawStream(ready.index)  # as Triton asks: no Stream is made
        status = call()
        ready.idle.append(call)
        return status
