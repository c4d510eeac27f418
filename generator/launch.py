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

from .arrays import (
    ALIGNMENT,
    Views,
    check_inputs,
    check_outputs,
    check_scale,
    compact_strides,
    output_layout,
    scratch_layout,
    view_of,
)
from .compile import Binary, scalars
from .dsl import Call, HostFunction, Scalars, TensorArgument, runtime_library
from .emulator.host import library_path, redirect
from .signature import inputs
from .split import splits_of

KNOWN_CALLS = 1024  # kinds of calls that a Launcher remembers, some 2 KB each
EMULATE = 'use backend="emulator" with CPU arrays'
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
        count = check_cuda(runtime.cudaGetDeviceCount())
    except (RunError, RuntimeError) as error:  # RuntimeError: cuda-python finds no driver library
        raise RunError(f"no CUDA device can be used ({error}); {remedy}") from None
    if count <= device:
        raise RunError(f"CUDA device {device} asked for, but there are {count}; {remedy}")
    attribute = runtime.cudaDeviceAttr
    major = check_cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, device))
    minor = check_cuda(runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, device))
    return major, minor


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


def shares_of(binary: Binary, views: Views, sms: int) -> int:
    """To how many CTAs a call shares out the keys of a query tile on a GPU of so many SMs; 1 without split_kv."""
    return splits_of(binary.plan, {view.name: view.shape for view in views}, sms) if binary.spec.split_kv else 1


def launch_views(binary: Binary, views: Views, scale: float, splits: int, stream: int, device: int) -> None:
    """One launch on `device`, which must be current; views: of inputs, outputs and scratch. Raises RunError."""
    function = host_function(binary.host_object, binary.host_symbol, "cuda")
    numbers = scalars(binary.plan, scale, multiprocessors(device) if binary.plan.persistent else 0, splits)
    _check_status(binary, function([view.argument() for view in views], numbers, stream, device))


def _check_status(binary: Binary, status: int) -> None:
    if status:
        raise RunError(f"{binary.spec.name}: the launch failed with CUDA error {_error_name(status)}")


def launch_into(binary: Binary, views: Views, scale: float, out: Sequence[Any]) -> tuple[Any, ...]:
    """One launch on PyTorch's current stream that writes into these tensors, which are returned. Nothing is prepared
    for later calls. Raises CallError for outputs that are not the kernel's, RunError.
    """
    import torch

    device = views[0].owner.device
    index = device.index or 0
    check_device(binary.spec.arch, index)
    written = check_outputs(binary.spec, views[0], out)
    splits = shares_of(binary, views, multiprocessors(index))
    layout = scratch_layout(binary.spec, views[0], splits)
    for name, extents, kind in layout:
        written.append(view_of(name, torch.empty(extents, dtype=torch_dtype(kind), device=device)))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        launch_views(binary, [*views, *written], scale, splits, stream, index)
    return tuple(out)


# --- PyTorch's tensors ------------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> Any:
    """PyTorch's for one of arrays.DTYPES."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[name]


@dataclass(frozen=True)
class _Ready:
    """What calls of one kind share. outputs and scratch: shape and dtype of each; tensors: descriptors, but for their
    addresses.

    idle: the arguments that no call is using. A call takes one out and puts it back, so that threads never share one
    and there are as many as calls were ever under way at once; a list's pop and append are atomic.
    """

    function: HostFunction
    device: Any
    index: int
    outputs: tuple[tuple[tuple[int, ...], Any], ...]
    scratch: tuple[tuple[tuple[int, ...], Any], ...]
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
        scratch = [empty(shape, dtype=dtype, device=device) for shape, dtype in ready.scratch]
        for tensor in (*outputs, *scratch):
            addresses.append(tensor.data_ptr())
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
        sms = multiprocessors(index)
        splits = shares_of(binary, views, sms)
        layouts = output_layout(binary.spec, views[0]), scratch_layout(binary.spec, views[0], splits)
        returned, kept = (tuple((shape, torch_dtype(kind)) for _, shape, kind in layout) for layout in layouts)
        tensors = [(view.shape, view.strides) for view in views]
        tensors += [(shape, compact_strides(shape)) for shape, _ in (*returned, *kept)]
        numbers = scalars(binary.plan, 1.0, sms, splits)
        ready = _Ready(function, device, index, returned, kept, tuple(tensors), numbers)
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
