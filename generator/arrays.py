"""What a caller hands in and gets back: NumPy and PyTorch arrays as plain views, checked, and guarded outputs.

PyTorch is never imported here: a tensor in hand proves that the caller has it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from .dsl import TensorArgument
from .spec import KernelSpec, SpecError

ALIGNMENT = 16  # bytes, of a TMA tensor's address and of its strides (cuda.h, cuTensorMapEncodeTiled)
STRIDE_LIMIT = 1 << 40  # bytes (same source)
EXTENT_LIMIT = 1 << 31  # extents are int32 in the host function's descriptors
GRID_LIMIT = 65535  # y and z of a grid (CUDA programming guide): query heads and batch

DTYPES: dict[str, Any] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_NAMES = {"bfloat16": "bf16", "float16": "fp16"}
_AXES = ("batch", "sequence", "heads", "head_dim")

# Quiet NaNs that no instruction produces: an element that still holds one was not written.
_POISON = {"bf16": 0x7FE5, "fp16": 0x7EA5, "float32": 0x7FE5A5A5}
_GUARD_BYTES = 4096


class CallError(SpecError):
    """A kernel was called with arrays that it was not built for."""


@dataclass(frozen=True)
class View:
    """One array: [B, S, H, D]; strides in elements; device "cpu" or "cuda:N"; owner keeps the memory alive."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    item_bytes: int
    address: int
    device: str
    owner: Any

    @property
    def span(self) -> tuple[int, int]:
        """First byte and first byte past the last one that the view reaches."""
        last = sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True))
        return self.address, self.address + (last + 1) * self.item_bytes

    def argument(self) -> TensorArgument:
        return TensorArgument(self.address, self.shape, self.strides)


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def view_of(name: str, array: Any) -> View:
    """The View of a NumPy array or a PyTorch tensor. Raises CallError for anything else."""
    if is_torch(array):
        kind = str(array.dtype).removeprefix("torch.")
        device = "cpu" if array.device.type == "cpu" else f"{array.device.type}:{array.device.index or 0}"
        strides, address, size = tuple(array.stride()), array.data_ptr(), array.element_size()
    elif isinstance(array, np.ndarray):
        kind, device, size = array.dtype.name, "cpu", array.itemsize
        if any(stride % size for stride in array.strides):
            raise CallError(name, array.strides, "has byte strides that are no whole elements", "pass a copy")
        strides, address = tuple(stride // size for stride in array.strides), array.ctypes.data
    else:
        limit = "must be a NumPy array or a PyTorch tensor"
        raise CallError(name, type(array).__name__, limit, "convert it, for example with numpy.asarray")
    shape = tuple(int(extent) for extent in array.shape)
    return View(name, shape, strides, _NAMES.get(kind, kind), size, address, device, array)


def check_inputs(spec: KernelSpec, q: Any, k: Any, v: Any) -> tuple[View, View, View]:
    """Views of Q [B, Sq, Hq, D], K [B, Skv, Hkv, D], V [B, Skv, Hkv, Dv], after checking them against the kernel.

    Raises CallError, which names the array, what it has, what is needed and the remedy.
    """
    views = [view_of(name, array) for name, array in (("q", q), ("k", k), ("v", v))]
    for view, columns in zip(views, (spec.head_dim, spec.head_dim, spec.v_dim), strict=True):
        _check_dtype(view, spec.dtype)
        _check_shape(view, columns)
    _check_agreement(spec, *views)
    devices = {view.name: view.device for view in views}
    if len(set(devices.values())) > 1:
        raise CallError("device", devices, "q, k and v must be on one device", "move them to the same one")
    return tuple(_check_strides(view) for view in views)


def _check_dtype(view: View, wanted: str) -> None:
    if view.dtype != wanted:
        spelled = {"bf16": "ml_dtypes.bfloat16 or torch.bfloat16", "fp16": "float16"}[wanted]
        remedy = f"convert it to {spelled}"
        if view.dtype in _NAMES.values():
            remedy += f', or build a kernel with dtype="{view.dtype}"'
        raise CallError(f"{view.name}.dtype", view.dtype, f"the kernel was built for {wanted}", remedy)


def _check_shape(view: View, columns: int) -> None:
    if len(view.shape) != 4:
        limit = "must have four dimensions [batch, sequence, heads, head_dim]"
        raise CallError(f"{view.name}.shape", view.shape, limit, "reshape it, for example with [None]")
    for axis, extent in zip(_AXES, view.shape, strict=True):
        if not 1 <= extent < EXTENT_LIMIT:
            limit = f"{axis} must be from 1 to {EXTENT_LIMIT - 1}"
            raise CallError(f"{view.name}.shape", view.shape, limit, "there is nothing to attend to in an empty array")
    if view.shape[3] != columns:
        limit = f"the kernel was built for {columns} columns"
        raise CallError(f"{view.name}.shape", view.shape, limit, f"build a kernel with head_dim={view.shape[3]}")


def _check_agreement(spec: KernelSpec, q: View, k: View, v: View) -> None:
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        value = {view.name: view.shape[0] for view in (q, k, v)}
        raise CallError("batch", value, "q, k and v must have the same batch", "repeat or slice the odd one")
    if k.shape[1:3] != v.shape[1:3]:
        value = {"k": k.shape, "v": v.shape}
        raise CallError("shape", value, "k and v must agree in sequence and heads", "slice the longer one")
    if q.shape[2] != k.shape[2] * spec.q_heads_per_kv:
        value, groups = {"q": q.shape[2], "k": k.shape[2]}, divmod(q.shape[2], k.shape[2])
        limit = f"the kernel was built for {spec.q_heads_per_kv} query head(s) a KV head"
        fitting = groups[0] > 0 and groups[1] == 0
        remedy = f"build one with q_heads_per_kv={groups[0]}" if fitting else "give q a multiple of k's heads"
        raise CallError("heads", value, limit, remedy)
    for axis, extent in (("batch", q.shape[0]), ("heads", q.shape[2])):
        if extent > GRID_LIMIT:
            raise CallError(f"q.{axis}", extent, f"a grid holds at most {GRID_LIMIT}", "split the call")


def _check_strides(view: View) -> View:
    """The view with a usable stride where an extent of 1 leaves it open (NumPy and PyTorch put anything there)."""
    name, step = view.name, ALIGNMENT // view.item_bytes
    compact = view.shape[3]
    strides = [compact if extent == 1 else stride for extent, stride in zip(view.shape, view.strides, strict=True)]
    strides[3] = view.strides[3] if view.shape[3] > 1 else 1
    remedy = f"pass a contiguous copy of {name}"
    if strides[3] != 1:
        raise CallError(f"{name}.strides", view.strides, "head_dim must be contiguous (stride 1)", remedy)
    for axis, stride in zip(_AXES[:3], strides[:3], strict=True):
        size = stride * view.item_bytes
        if size <= 0 or size >= STRIDE_LIMIT or stride % step:
            limit = f"the {axis} stride ({size} bytes) must be a positive multiple of {ALIGNMENT} bytes below 2^40"
            raise CallError(f"{name}.strides", view.strides, limit, remedy)
    if view.address % ALIGNMENT:
        limit = f"must be aligned to {ALIGNMENT} bytes"
        raise CallError(f"{name} address", f"{view.address:#x}", limit, remedy)
    return View(name, view.shape, tuple(strides), view.dtype, view.item_bytes, view.address, view.device, view.owner)


class Output:
    """An output that knows whether it was written, and nothing around it.

    A compact array between two guard regions; array and guards start as one NaN pattern. storage: the whole, as
    unsigned integers; array: the output itself, a view into it.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: str) -> None:
        self.name, self.dtype, self.shape = name, dtype, tuple(shape)
        bits = np.dtype(f"u{DTYPES[dtype].itemsize}")
        self._guard = _GUARD_BYTES // bits.itemsize
        length = prod(shape) + 2 * self._guard
        raw = np.empty(length + 128 // bits.itemsize, bits)
        start = -raw.ctypes.data % 128 // bits.itemsize
        self.storage = raw[start : start + length]
        self.storage[:] = _POISON[dtype]
        self._bits = self.storage[self._guard : -self._guard]
        self.array = self._bits.view(DTYPES[dtype]).reshape(shape)

    @property
    def offset_bytes(self) -> int:
        """From the start of storage to the array."""
        return self._guard * self.storage.itemsize

    def unwritten(self) -> int:
        """Elements that still hold the initial pattern."""
        return int(np.count_nonzero(self._bits == _POISON[self.dtype]))

    def outside(self) -> int:
        """Elements of the guard regions that changed."""
        guards = (self.storage[: self._guard], self.storage[-self._guard :])
        return sum(int(np.count_nonzero(guard != _POISON[self.dtype])) for guard in guards)

    def view(self, address: int | None = None, device: str = "cpu") -> View:
        """As a kernel argument; address: of a copy of the array on a device."""
        strides = tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        where = self.array.ctypes.data if address is None else address
        return View(self.name, self.shape, strides, self.dtype, self.array.itemsize, where, device, self)


def output_layout(spec: KernelSpec, q: View) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of what a kernel returns: O [B, Sq, Hq, Dv], and LSE and m [B, Hq, Sq] where it has them."""
    batch, queries, heads, _ = q.shape
    outputs = [("o", (batch, queries, heads, spec.v_dim), "float32" if spec.unnormalized else spec.dtype)]
    names = [name for name, wanted in (("lse", spec.lse), ("m", spec.unnormalized)) if wanted]
    return outputs + [(name, (batch, heads, queries), "float32") for name in names]


def merged_spans(views: Sequence[View]) -> list[tuple[str, int, int]]:
    """(names, address, bytes) of the memory that views reach, overlapping ones joined (slices of a packed QKV)."""
    merged: list[tuple[str, int, int]] = []
    for low, high, name in sorted((*view.span, view.name) for view in views):
        if merged and low < merged[-1][1] + merged[-1][2]:
            names, start, size = merged.pop()
            merged.append((f"{names}+{name}", start, max(size, high - start)))
        else:
            merged.append((name, low, high - low))
    return merged
