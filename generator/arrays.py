"""What a caller hands in and gets back: NumPy and PyTorch arrays as plain views, checked, and guarded outputs.

PyTorch is never imported here: a tensor in hand proves that the caller has it.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from .dsl import TensorArgument
from .signature import AXIS_NAMES, Parameter, fixed_sizes, inputs, outputs, scratch
from .spec import KernelSpec, SpecError

ALIGNMENT = 16  # bytes, of a TMA tensor's address and of its strides (cuda.h, cuTensorMapEncodeTiled)
STRIDE_LIMIT = 1 << 40  # bytes (same source)
EXTENT_LIMIT = 1 << 31  # extents are int32 in the host function's descriptors
SEQUENCE_LIMIT = 1 << 30  # positions and their sums with a window (spec.WINDOW_MAX) are int32 in the kernel
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
    """One array, such as [B, S, H, D]; strides in elements; device "cpu" or "cuda:N"; owner keeps the memory alive."""

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


Views = tuple[View, ...]


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def view_of(name: str, array: Any) -> View:
    """The View of a NumPy array or a PyTorch tensor. Raises CallError for anything else."""
    if is_torch(array):
        kind, device = _torch_kind(array), _torch_device(array)
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


def _torch_kind(tensor: Any) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return _NAMES.get(kind, kind)


def _torch_device(tensor: Any) -> str:
    device = tensor.device
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def check_inputs(spec: KernelSpec, q: Any, k: Any, v: Any = None, k2: Any = None, v2: Any = None, **rows: Any) -> Views:
    """Views of a call's arrays, in the order of the kernel's signature, after checking them against the kernel.

    q [B, Sq, Hq, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv] (none with kv_shared); k2 and v2 [B, Skv2, Hkv, ...] of
    the second source; rows: seqlens and seqlens2 int32 [B], limit2 int32 [B, Sq], sink float32 [Hq]. Values of the
    integers are checked where they are on the CPU; a kernel takes lengths beyond 0 to Skv for the nearest of them.
    Raises CallError, which names the array, what it has, what is needed and the remedy.
    """
    given = {"q": q, "k": k, "v": v, "k2": k2, "v2": v2, **rows}
    _check_presence(spec, {name for name, array in given.items() if array is not None})
    views = {parameter.name: _checked(spec, parameter, given[parameter.name]) for parameter in inputs(spec)}
    _check_agreement(spec, views)
    _check_devices({name: view.device for name, view in views.items()})
    views = {name: check_strides(view) for name, view in views.items()}
    for name, most in (("seqlens", "k"), ("seqlens2", "k2"), ("limit2", None)):
        if name in views and views[name].device == "cpu":
            _check_values(views[name], views[most].shape[1] if most else None, most)
    return tuple(views.values())


_ABSENT = {  # why a kernel takes no such array, and how to build one that does
    "v": ("V is K's first {dv} columns (kv_shared)", "leave v out, or build a kernel without kv_shared"),
    "k2": ("the kernel was built for one KV source", "build one with kv_sources=2"),
    "v2": ("the kernel was built for one KV source", "build one with kv_sources=2"),
    "seqlens": ("the kernel was built without KV lengths", "build one with seqlens=True"),
    "seqlens2": ("the kernel was built without lengths of a second source", "use seqlens=True with kv_sources=2"),
    "limit2": ("the kernel was built without limits", "build one with kv_sources=2, limit2=True"),
    "sink": ("the kernel was built without sinks", "build one with sink=True"),
}
_MISSING = {  # what the kernel needs it for, and the way out
    "v": ("is V [B, Skv, Hkv, {dv}]", "pass it, or build a kernel with kv_shared=True"),
    "k2": ("is the second source's K [B, Skv2, Hkv, {d}]", "pass k2=, or build a kernel with kv_sources=1"),
    "v2": ("is the second source's V [B, Skv2, Hkv, {dv}]", "pass v2=, or build a kernel with kv_sources=1"),
    "seqlens": ("is the KV lengths, int32 [B]", "pass seqlens=, or build a kernel with seqlens=False"),
    "seqlens2": ("is the second source's KV lengths, int32 [B]", "pass seqlens2=, or build it with seqlens=False"),
    "limit2": ("is the keys of the second source that a query sees, int32 [B, Sq]", "pass limit2=, or build without"),
    "sink": ("is a logit a query head, float32 [Hq]", "pass sink=, or build a kernel with sink=False"),
}


def check_kinds(spec: KernelSpec, arrays: Mapping[str, Any]) -> None:
    """What check_inputs refuses of PyTorch tensors whose extents are not numbers yet: presence, dtypes, dimensions and
    devices. arrays: those that were given.
    """
    _check_presence(spec, set(arrays))
    for parameter in inputs(spec):
        tensor = arrays[parameter.name]
        _check_dtype(parameter.name, _torch_kind(tensor), parameter.dtype)
        _check_rank(parameter, tuple(tensor.shape))
    _check_devices({parameter.name: _torch_device(arrays[parameter.name]) for parameter in inputs(spec)})


def _check_presence(spec: KernelSpec, given: set[str]) -> None:
    """Every array that the kernel takes is there, and no other."""
    columns = {"d": spec.head_dim, "dv": spec.v_dim}
    wanted = {parameter.name for parameter in inputs(spec)}
    for name in ("v", "k2", "v2", "seqlens", "seqlens2", "limit2", "sink"):
        if name in wanted and name not in given:
            limit, remedy = _MISSING[name]
            raise CallError(name, None, f"the kernel needs it: {name} " + limit.format(**columns), remedy)
        if name in given and name not in wanted:
            limit, remedy = _ABSENT["v" if name == "v2" and spec.kv_sources == 2 else name]
            raise CallError(name, "given", limit.format(**columns), remedy)
    unknown = sorted(given - {"q", "k", *_ABSENT})
    if unknown:
        raise CallError(unknown[0], "given", "no kernel takes it", "see the names in the kernel's signature")


def _checked(spec: KernelSpec, parameter: Parameter, array: Any) -> View:
    view = view_of(parameter.name, array)
    _check_dtype(view.name, view.dtype, parameter.dtype)
    if spec.kv_shared and parameter.name == "k2" and view.shape[-1] != spec.head_dim:
        limit = f"must be as wide as k, {spec.head_dim} columns: V is a prefix of both (kv_shared)"
        raise CallError("k2.shape", view.shape, limit, "pad it, or use kernels of one source each")
    _check_shape(view, parameter, fixed_sizes(spec))
    return view


def _check_dtype(name: str, kind: str, wanted: str) -> None:
    if kind != wanted:
        spelled = {"bf16": "ml_dtypes.bfloat16 or torch.bfloat16", "fp16": "float16"}.get(wanted, wanted)
        remedy = f"convert it to {spelled}"
        if wanted in _NAMES.values() and kind in _NAMES.values():
            remedy += f', or build a kernel with dtype="{kind}"'
        raise CallError(f"{name}.dtype", kind, f"the kernel was built for {wanted}", remedy)


def _check_devices(devices: Mapping[str, str]) -> None:
    if len(set(devices.values())) > 1:
        *most, last = devices
        limit = f"{', '.join(most)} and {last} must be on one device"
        raise CallError("device", devices, limit, "move them to the same one")


def _check_rank(parameter: Parameter, shape: tuple[Any, ...]) -> None:
    if len(shape) != len(parameter.axes):
        count = {1: "one dimension", 2: "two dimensions", 4: "four dimensions"}[len(parameter.axes)]
        limit = f"must have {count} [{', '.join(_axis_names(parameter))}]"
        raise CallError(f"{parameter.name}.shape", shape, limit, "reshape it, for example with [None]")


def _axis_names(parameter: Parameter) -> list[str]:
    return [AXIS_NAMES.get(axis, axis).removesuffix("_v") for axis in parameter.axes]


def _check_shape(view: View, parameter: Parameter, fixed: Mapping[str, int]) -> None:
    _check_rank(parameter, view.shape)
    field, names = f"{view.name}.shape", _axis_names(parameter)
    for axis, extent in zip(names, view.shape, strict=True):
        most = SEQUENCE_LIMIT if axis == "sequence" else EXTENT_LIMIT - 1
        if not 1 <= extent <= most:
            limit = f"{axis} must be from 1 to {most}"
            raise CallError(field, view.shape, limit, "there is nothing to attend to in an empty array")
    columns = fixed.get(parameter.axes[-1])
    if columns is None or view.shape[-1] == columns:
        return
    limit = f"the kernel was built for {columns} columns"
    raise CallError(field, view.shape, limit, f"build a kernel with {parameter.axes[-1]}={view.shape[-1]}")


def _check_agreement(spec: KernelSpec, views: Mapping[str, View]) -> None:
    q, k = views["q"], views["k"]
    batches = {name: view.shape[0] for name, view in views.items() if name != "sink"}
    matrices = [name for name, view in views.items() if len(view.shape) == 4]
    if len({batches[name] for name in matrices}) > 1:
        value = {name: batches[name] for name in matrices}
        limit = f"{', '.join(matrices[:-1])} and {matrices[-1]} must have the same batch"
        raise CallError("batch", value, limit, "repeat or slice the odd one")
    for one, other in (("k", "v"), ("k2", "v2")):
        if other in views and views[one].shape[1:3] != views[other].shape[1:3]:
            value = {one: views[one].shape, other: views[other].shape}
            raise CallError(
                "shape", value, f"{one} and {other} must agree in sequence and heads", "slice the longer one"
            )
    if "k2" in views and views["k2"].shape[2] != k.shape[2]:
        value = {"k": k.shape[2], "k2": views["k2"].shape[2]}
        raise CallError("heads", value, "both KV sources must have the same heads", "repeat or slice the odd one")
    if q.shape[2] != k.shape[2] * spec.q_heads_per_kv:
        value, groups = {"q": q.shape[2], "k": k.shape[2]}, divmod(q.shape[2], k.shape[2])
        limit = f"the kernel was built for {spec.q_heads_per_kv} query head(s) a KV head"
        fitting = groups[0] > 0 and groups[1] == 0
        remedy = f"build one with q_heads_per_kv={groups[0]}" if fitting else "give q a multiple of k's heads"
        raise CallError("heads", value, limit, remedy)
    sizes = {"batch": q.shape[0], "queries": q.shape[1], "q_heads": q.shape[2]}
    for parameter in inputs(spec):
        if not parameter.matrix and views[parameter.name].shape != parameter.extents(sizes):
            needed = ", ".join(f"{AXIS_NAMES.get(axis, axis)} {sizes[axis]}" for axis in parameter.axes)
            limit = f"must have the extents of q: [{needed}]"
            raise CallError(f"{parameter.name}.shape", views[parameter.name].shape, limit, "slice or extend it")
    for axis, extent in (("batch", q.shape[0]), ("heads", q.shape[2])):
        if extent > GRID_LIMIT:
            raise CallError(f"q.{axis}", extent, f"a grid holds at most {GRID_LIMIT}", "split the call")


def _check_values(view: View, most: int | None, array: str | None) -> None:
    """Lengths from 0 to the tensor's; limits of at least 0 (more than there are keys simply hides none)."""
    values = np.asarray(view.owner)
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise CallError(view.name, low, "must not be negative", "0 hides every key")
    if most is not None and high > most:
        limit = f"is beyond {array}, which has {most} keys"
        raise CallError(view.name, high, limit, f"at most {most}, or a longer {array}")


def check_strides(view: View) -> View:
    """The view with a usable stride where an extent of 1 leaves it open (NumPy and PyTorch put anything there)."""
    name, size = view.name, view.item_bytes
    compact = view.shape[-1]
    strides = [compact if extent == 1 else stride for extent, stride in zip(view.shape, view.strides, strict=True)]
    strides[-1] = view.strides[-1] if view.shape[-1] > 1 else 1
    remedy = f"pass a contiguous copy of {name}"
    matrix = len(view.shape) == 4
    if strides[-1] != 1:
        what = "head_dim" if matrix else "the last dimension"
        raise CallError(f"{name}.strides", view.strides, f"{what} must be contiguous (stride 1)", remedy)
    alignment = ALIGNMENT if matrix else size
    for axis, stride in zip(_AXES[:3], strides[:-1], strict=False):
        span = stride * size
        if span <= 0 or span >= STRIDE_LIMIT or span % alignment:
            limit = f"the {axis} stride ({span} bytes) must be a positive multiple of {alignment} bytes below 2^40"
            raise CallError(f"{name}.strides", view.strides, limit, remedy)
    if view.address % alignment:
        limit = f"must be aligned to {alignment} bytes"
        raise CallError(f"{name} address", f"{view.address:#x}", limit, remedy)
    if view.strides == tuple(strides):
        return view
    return View(name, view.shape, tuple(strides), view.dtype, size, view.address, view.device, view.owner)


def check_scale(spec: KernelSpec, scale: float | None) -> float:
    """The scale of the scores as the kernel sees it, None for 1/sqrt(head_dim). Raises CallError."""
    if scale is None:
        return spec.head_dim**-0.5
    limit = "must be a positive finite number (the row maximum is taken before scaling)"
    remedy = "leave it out for 1/sqrt(head_dim)"
    try:
        value = ctypes.c_float(scale).value
    except TypeError:
        raise CallError("scale", scale, limit, remedy) from None
    if not (0 < value < math.inf):
        raise CallError("scale", scale, limit, remedy)
    return value


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
        strides = compact_strides(self.shape)
        where = self.array.ctypes.data if address is None else address
        return View(self.name, self.shape, strides, self.dtype, self.array.itemsize, where, device, self)


def compact_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In elements, of a contiguous array."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def output_layout(spec: KernelSpec, q: View) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of what a kernel returns: O [B, Sq, Hq, Dv], and LSE and m [B, Hq, Sq] where it has them."""
    batch, queries, heads, _ = q.shape
    sizes = fixed_sizes(spec) | {"batch": batch, "queries": queries, "q_heads": heads}
    return [(parameter.name, parameter.extents(sizes), parameter.dtype) for parameter in outputs(spec)]


def scratch_layout(spec: KernelSpec, q: View, splits: int) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of the memory that a call needs beside its outputs; none without split_kv, and of no parts
    where the keys are not shared out, for then the kernel stores its outputs itself.
    """
    batch, queries, heads, _ = q.shape
    parts = batch * splits if splits > 1 else 0
    sizes = fixed_sizes(spec) | {"parts": parts, "queries": queries, "q_heads": heads}
    return [(parameter.name, parameter.extents(sizes), parameter.dtype) for parameter in scratch(spec)]


def check_outputs(spec: KernelSpec, q: View, given: Sequence[Any]) -> list[View]:
    """Views of arrays that a call is to write into, in the order of output_layout. Raises CallError."""
    layout = output_layout(spec, q)
    names = ", ".join(name for name, _, _ in layout)
    if len(given) != len(layout):
        raise CallError("out", f"{len(given)} arrays", f"must be {len(layout)}: {names}", "pass one for each")
    views = []
    for (name, shape, dtype), array in zip(layout, given, strict=True):
        view = view_of(name, array)
        _check_dtype(name, view.dtype, dtype)
        if view.shape != tuple(shape):
            raise CallError(
                f"{name}.shape", view.shape, f"of these inputs it is {tuple(shape)}", "pass one of that shape"
            )
        if view.device != q.device:
            raise CallError("device", view.device, f"{name} must be where q is, on {q.device}", "move it there")
        views.append(check_strides(view))
    return views


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
