"""Stand-ins for the functions of cuda.bindings.driver and cuda.bindings.runtime that CuTe DSL programs call.

One device, one context, everything synchronous: what a program does with streams and events is accepted, memory it
allocates is host memory with bounds. Any other function of the two modules raises and says its name. Functions follow
cuda-python's convention: a tuple that begins with the error code.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .arrays import KnownArrays
from .encode import encode_tiled
from .gpu import Gpu
from .host import DEFAULT_SHARED_BYTES, ENCODE_LIMITS, HostError
from .targets import SMEM_LIMIT

CUDA_VERSION = 13000
L2_BYTES = 50 << 20
_FUNCTION = re.compile(r"cu(da)?[A-Z]\w*")


class CudaPython:
    """Replacements for both modules, by module and name; see `functions`."""

    def __init__(self, gpu: Gpu, arrays: KnownArrays, sms: int) -> None:
        self._gpu, self._arrays, self._sms = gpu, arrays, sms
        self._handles = itertools.count(0x20, 0x10)
        self._memory: dict[int, np.ndarray] = {}
        self._times: dict[int, float] = {}

    def functions(self, module: ModuleType) -> dict[str, Callable[..., tuple[Any, ...]]]:
        """A stand-in for every function of cuda.bindings.driver or cuda.bindings.runtime, by name."""
        driver = module.__name__.endswith("driver")
        success = module.CUresult.CUDA_SUCCESS if driver else module.cudaError_t.cudaSuccess
        answers = self._driver(module) if driver else self._runtime(module)
        found = {}
        for name in dir(module):
            if _FUNCTION.fullmatch(name) and not isinstance(getattr(module, name), type):
                found[name] = self._stand_in(f"{module.__name__}.{name}", answers.get(name), success)
        return found

    @staticmethod
    def _stand_in(name: str, answer: Callable[..., Any] | None, success: Any) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any, **options: Any) -> tuple[Any, ...]:
            if answer is None:
                raise HostError(f"{name} is not emulated")
            value = answer(*arguments, **options)
            return (success,) if value is None else (success, value)

        return call

    def attribute(self, attribute: Any, device: Any = 0) -> int:
        """A device attribute, by its number in cudaDeviceAttr and CUdevice_attribute, which agree."""
        major = int(re.match(r"sm_(\d+)\d", self._gpu.arch)[1])
        known = {
            **{1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: DEFAULT_SHARED_BYTES},
            **{10: 32, 12: 65536, 16: self._sms, 38: L2_BYTES, 39: 2048, 75: major, 76: 0},
            **{81: SMEM_LIMIT[self._gpu.arch] + 1024, 82: 65536, 95: 1, 97: SMEM_LIMIT[self._gpu.arch], 106: 32},
        }
        if int(attribute) not in known:
            raise HostError(f"device attribute {attribute!r} has no emulated value")
        return known[int(attribute)]

    def _driver(self, module: ModuleType) -> dict[str, Callable[..., Any]]:
        context, stream, event = module.CUcontext, module.CUstream, module.CUevent
        return {
            **dict.fromkeys(
                ("cuInit", "cuCtxSetCurrent", "cuCtxSynchronize", "cuCtxDestroy", "cuCtxPushCurrent")
                + ("cuDevicePrimaryCtxRelease", "cuStreamSynchronize", "cuStreamDestroy", "cuStreamQuery")
                + ("cuStreamWaitEvent", "cuEventSynchronize", "cuEventQuery", "cuEventDestroy"),
                _nothing,
            ),
            "cuDriverGetVersion": lambda: CUDA_VERSION,
            "cuDeviceGetCount": lambda: 1,
            "cuDeviceGet": lambda ordinal: module.CUdevice(_only_device(ordinal)),
            "cuDeviceGetName": lambda length, device: b"Bespoke emulator"[:length],
            "cuDeviceGetAttribute": self.attribute,
            "cuCtxGetCurrent": lambda: context(1),
            "cuCtxGetDevice": lambda *_: module.CUdevice(0),
            "cuCtxCreate": lambda *_: context(1),
            "cuCtxPopCurrent": lambda: context(1),
            "cuDevicePrimaryCtxRetain": lambda device: context(1),
            "cuStreamCreate": lambda *_: stream(next(self._handles)),
            "cuStreamCreateWithPriority": lambda *_: stream(next(self._handles)),
            "cuEventCreate": lambda *_: event(next(self._handles)),
            "cuEventRecord": self._record,
            "cuEventElapsedTime": self._elapsed,
            "cuMemAlloc": lambda size: module.CUdeviceptr(self._allocate(size)),
            "cuMemAllocAsync": lambda size, stream: module.CUdeviceptr(self._allocate(size)),
            "cuMemFree": self._free,
            "cuMemFreeAsync": self._free,
            "cuMemsetD8": lambda address, value, count: self._fill(address, value, count, np.uint8),
            "cuMemsetD8Async": lambda address, value, count, stream: self._fill(address, value, count, np.uint8),
            "cuMemsetD32": lambda address, value, count: self._fill(address, value, count, np.uint32),
            "cuMemsetD32Async": lambda address, value, count, stream: self._fill(address, value, count, np.uint32),
            **dict.fromkeys(("cuMemcpyHtoD", "cuMemcpyHtoDAsync"), self._to_device),
            **dict.fromkeys(("cuMemcpyDtoH", "cuMemcpyDtoHAsync"), self._to_host),
            **dict.fromkeys(("cuMemcpyDtoD", "cuMemcpyDtoDAsync"), self._on_device),
            "cuTensorMapEncodeTiled": lambda *arguments: _encode(module, *arguments),
            "cuGetErrorName": lambda error: str(error.name).encode(),
            "cuGetErrorString": lambda error: str(error.name).encode(),
        }

    def _runtime(self, module: ModuleType) -> dict[str, Callable[..., Any]]:
        stream, event = module.cudaStream_t, module.cudaEvent_t
        return {
            **dict.fromkeys(
                ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaStreamDestroy", "cudaStreamQuery")
                + ("cudaStreamWaitEvent", "cudaEventSynchronize", "cudaEventQuery", "cudaEventDestroy")
                + ("cudaGetLastError", "cudaPeekAtLastError", "cudaProfilerStart", "cudaProfilerStop")
                + ("cudaLibraryUnload",),
                _nothing,
            ),
            "cudaGetDeviceCount": lambda: 1,
            "cudaGetDevice": lambda: 0,
            "cudaSetDevice": lambda device: _only_device(device) and None,
            "cudaDriverGetVersion": lambda: CUDA_VERSION,
            "cudaRuntimeGetVersion": lambda: CUDA_VERSION,
            "cudaDeviceGetAttribute": self.attribute,
            "cudaGetDeviceProperties": lambda device: self._properties(module.cudaDeviceProp()),
            **dict.fromkeys(
                ("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaStreamCreateWithPriority"),
                lambda *_: stream(next(self._handles)),
            ),
            "cudaEventCreate": lambda *_: event(next(self._handles)),
            "cudaEventCreateWithFlags": lambda *_: event(next(self._handles)),
            "cudaEventRecord": self._record,
            "cudaEventElapsedTime": self._elapsed,
            "cudaMalloc": self._allocate,
            "cudaMallocAsync": lambda size, stream: self._allocate(size),
            "cudaFree": self._free,
            "cudaFreeAsync": self._free,
            "cudaMemset": lambda address, value, count: self._fill(address, value, count, np.uint8),
            "cudaMemsetAsync": lambda address, value, count, stream: self._fill(address, value, count, np.uint8),
            "cudaMemcpy": self._copy_by_kind,
            "cudaMemcpyAsync": self._copy_by_kind,
            "cudaGetErrorName": lambda error: str(error.name).encode(),
            "cudaGetErrorString": lambda error: str(error.name).encode(),
        }

    def _properties(self, properties: Any) -> Any:
        properties.name = b"Bespoke emulator".ljust(256, b"\0")
        properties.major, properties.minor = self.attribute(75), self.attribute(76)
        properties.multiProcessorCount = self._sms
        properties.warpSize = 32
        properties.sharedMemPerBlockOptin = SMEM_LIMIT[self._gpu.arch]
        return properties

    def _record(self, event: Any, *_: Any) -> None:
        self._times[int(event)] = time.perf_counter()

    def _elapsed(self, start: Any, end: Any) -> float:
        if int(start) not in self._times or int(end) not in self._times:
            raise HostError("the elapsed time of an event that was not recorded")
        return 1e3 * (self._times[int(end)] - self._times[int(start)])

    def _allocate(self, size: int) -> int:
        storage = np.empty(int(size) + 256, np.uint8)
        address = -(-storage.ctypes.data // 256) * 256
        self._memory[address] = storage
        name = f"device memory {len(self._memory)}, {int(size)} bytes"
        self._arrays.add_span(address, address + int(size), name, False)
        return address

    def _free(self, address: Any, *_: Any) -> None:
        if int(address) == 0:
            return
        if self._memory.pop(int(address), None) is None:
            raise HostError(f"{int(address):#x} is freed, which is no device memory, or is freed twice")
        self._gpu.gmem.remove(int(address))

    def _fill(self, address: Any, value: int, count: int, kind: type) -> None:
        size = int(count) * np.dtype(kind).itemsize
        low = self._device(address, size, "memset")
        np.frombuffer((ctypes.c_uint8 * size).from_address(low), kind)[:] = value
        self._note_written(low, size)

    def _to_device(self, target: Any, source: Any, size: int, *_: Any) -> None:
        ctypes.memmove(self._device(target, size, "copy to the device"), _address(source), int(size))
        self._note_written(int(target), int(size))

    def _to_host(self, target: Any, source: Any, size: int, *_: Any) -> None:
        ctypes.memmove(_address(target), self._device(source, size, "copy from the device"), int(size))

    def _on_device(self, target: Any, source: Any, size: int, *_: Any) -> None:
        low = self._device(source, size, "copy on the device")
        ctypes.memmove(self._device(target, size, "copy on the device"), low, int(size))
        self._note_written(int(target), int(size))

    def _copy_by_kind(self, target: Any, source: Any, size: int, kind: Any, *_: Any) -> None:
        ways = {1: self._to_device, 2: self._to_host, 3: self._on_device}
        if int(kind) not in ways:
            raise HostError(f"cudaMemcpy of kind {kind!r} is not emulated")
        ways[int(kind)](target, source, size)

    def _note_written(self, low: int, size: int) -> None:
        found = self._gpu.gmem.find(low, low + size)
        written = None if found is None else self._gpu.gmem.written.get(found[0])
        if written is not None:
            written[low - found[0] : low - found[0] + size] = 1

    def _device(self, address: Any, size: int, what: str) -> int:
        if int(size):
            self._gpu.gmem.require(int(address), int(address) + int(size), f"the program's {what}")
        return int(address)


def _encode(module, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill) -> Any:
    """cuTensorMapEncodeTiled: a CUtensorMap. L2 promotion is a hint."""
    rank = int(rank)
    sizes, strides, box, steps = ([int(x) for x in list(values or ())] for values in (sizes, strides, box, steps))
    if any(step != 1 for step in steps[:rank]) or int(interleave) or int(fill):
        raise HostError(ENCODE_LIMITS)
    raw = encode_tiled(int(kind), int(address), sizes[:rank], strides[: rank - 1], box[:rank], int(swizzle))
    found = module.CUtensorMap()
    found.opaque = [module.cuuint64_t(word) for word in struct.unpack("<16Q", raw)]
    return found


def _nothing(*_: Any, **__: Any) -> None:
    """Everything is synchronous: there is nothing to wait for, and nothing to select."""


def _only_device(ordinal: Any) -> int:
    if int(ordinal) != 0:
        raise HostError(f"device {int(ordinal)} asked for: the emulator has one, number 0")
    return 0


def _address(value: Any) -> int:
    """Host memory given as an address, as NumPy's `.ctypes` or as a buffer."""
    if hasattr(value, "data") and isinstance(value.data, int):
        return value.data
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    try:
        return int(value)
    except (TypeError, ValueError):
        return np.frombuffer(value, np.uint8).ctypes.data
