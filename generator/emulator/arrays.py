"""Makes the arrays that a program hands to its kernels known global memory, under the names that the program gives
them.

A NumPy array or CPU torch tensor is legal from its first to its last element. Views that overlap become one region. A
raw pointer says nothing about bounds: the array that it points into is looked for among the variables of the calling
frames; when there is none, the pointer stays unknown and an access through it is out of bounds.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .gpu import Gpu

_NAMES_IN_MESSAGES = 4
_ITEMS_LOOKED_AT = 64  # of a list or dict in a variable
_CPU, _CUDA = 1, 2  # DLDeviceType


class KnownArrays:
    """The arrays of one program on one Gpu. They are kept alive: a freed address could come back as another array."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._alive: list[Any] = []
        self._spans: set[tuple[int, int]] = set()

    def add(self, array: Any) -> None:
        """Register an array that a program turns into a tensor.

        One that is elsewhere than in this machine's memory (a fake, say, to compile with) stays unknown.
        """
        span = span_of(array)
        if span is None:
            if type(array).__module__.startswith("torch"):
                return
            try:
                array = np.from_dlpack(array)
            except (AttributeError, BufferError, RuntimeError, TypeError):
                return
            span = span_of(array)
        self._alive.append(array)
        if span not in self._spans:
            self._spans.add(span)
            self.add_span(*span, _name_in_callers(array) or f"array {len(self._spans)}, {_describe(array)}")

    def add_pointed_to(self, address: int) -> None:
        """Register the array that holds this address, if a variable of a calling frame refers to one."""
        if address == 0 or self._gpu.gmem.find(address, address + 1) is not None:
            return
        found = {}
        for frame, name, value in _variables():
            span = span_of(value)
            if span is not None and span[0] <= address < span[1]:
                found.setdefault(frame, (name, value))
        if found:
            name, value = list(found.values())[-1]  # the outermost: the program's name for it, not a helper's
            self._alive.append(value)
            self.add_span(*span_of(value), name)

    def add_span(self, low: int, high: int, name: str, initialized: bool = True) -> None:
        """Make [low, high) legal; what it overlaps becomes one region with it."""
        gmem, names = self._gpu.gmem, [name]
        at = max(0, bisect.bisect(gmem.starts, low) - 1)
        overlapping = [r for r in gmem.regions[at:] if r[0] < high and low < r[0] + r[1]]
        if any(start <= low and high <= start + size for start, size, *_ in overlapping):
            return
        for start, size, other, _ in overlapping:
            gmem.remove(start)
            low, high = min(low, start), max(high, start + size)
            names += [word for word in other.split(" or ") if word not in names]
        gmem.add(low, high - low, " or ".join(names[:_NAMES_IN_MESSAGES]), initialized)


def span_of(value: Any) -> tuple[int, int] | None:
    """[low, high) addresses of a NumPy array's or a CPU torch tensor's elements; None for anything else."""
    if isinstance(value, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(value)
        return int(low), int(high)
    torch = sys.modules.get("torch")
    if torch is None or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None  # a fake tensor, which has no memory, is of another type
    with torch._C.DisableTorchFunction():  # pytorch.py lets tensors say that they are on the device
        if value.device.type != "cpu" or value.layout is not torch.strided:
            return None
        low = value.data_ptr()
        last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.stride(), strict=True))
        return low, low + (last + 1 if value.numel() else 0) * value.element_size()


def place_on_device(capsule: Any) -> None:
    """Let a DLPack capsule of an array in this machine's memory say that it is in the memory of CUDA device 0.

    The DSL takes the address space of a tensor from it, so that code is compiled that a GPU's tensor would get.
    DLManagedTensor begins with the data pointer and the device (i32 type, i32 number); a versioned one has a u32
    major and minor version, two pointers and u64 flags before that.
    """
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    name = api.PyCapsule_GetName(capsule)
    offset = {b"dltensor": 8, b"dltensor_versioned": 40}[name]
    device = (ctypes.c_int32 * 2).from_address(api.PyCapsule_GetPointer(capsule, name) + offset)
    if device[0] == _CPU:
        device[0] = _CUDA


def _describe(array: Any) -> str:
    return f"{str(array.dtype).removeprefix('torch.')}{list(array.shape)}"


def _name_in_callers(array: Any) -> str | None:
    """The outermost variable that is this array, or one with the same elements (a detached tensor, say)."""
    span, names, items = span_of(array), {}, {}
    for frame, name, value in _variables():
        same = type(value) is type(array) and value.shape == array.shape and span_of(value) == span
        if value is array or same:
            (items if "[" in name else names).setdefault(frame, name)
    found = names or items
    return list(found.values())[-1] if found else None


def _variables() -> Iterator[tuple[int, str, Any]]:
    """(depth, name, value) of the callers' variables, inner frames first; items of their lists and dicts too."""
    frame, depth = sys._getframe(2), 0
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(("cutlass.", "runpy", __package__)):
            for name, value in list(frame.f_locals.items()):
                yield depth, name, value
                if type(value) in (list, tuple) and len(value) <= _ITEMS_LOOKED_AT:
                    yield from ((depth, f"{name}[{i}]", item) for i, item in enumerate(value))
                elif type(value) is dict and len(value) <= _ITEMS_LOOKED_AT and not name.startswith("__"):
                    yield from ((depth, f"{name}[{key!r}]", item) for key, item in list(value.items()))
        frame, depth = frame.f_back, depth + 1
