"""Binary + arrays -> arrays, on the backend "emulator" (CPU arrays) or "cuda" (CUDA tensors, or CPU arrays copied).

Both backends call the same compiled host function with the same descriptors; they differ in the runtime library that
it is linked with and in where the arrays are. launch.py is the part that a GPU's tensors take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .arrays import (
    DTYPES,
    CallError,
    Output,
    View,
    check_inputs,
    check_scale,
    is_torch,
    merged_spans,
    output_layout,
    scratch_layout,
)
from .budget import Budget
from .compile import Binary, scalars
from .dsl import Scalars, Traced
from .emulator import Gpu, Labels
from .emulator.host import HostError, attached
from .launch import (
    Launcher,
    RunError,
    check_cuda,
    check_device,
    host_function,
    launch_into,
    launch_views,
    multiprocessors,
    shares_of,
)
from .split import SPLITS_MAX

BACKENDS = ("emulator", "cuda")
EMULATED_SMS = 4  # few, so that the CTAs of a persistent kernel take turns at small sizes
Prepare = Callable[[Gpu, Sequence[Output]], None]


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
        if out is not None:
            return launch_into(binary, views, check_scale(binary.spec, scale), out)
        return Launcher(binary)({view.name: view.owner for view in views}, scale)
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
    splits: int | None = None,
    **named: Any,
) -> Run:
    """run_kernel on CPU arrays, with outputs that tell what was written; strict, trace: see Gpu. prepare: called with
    the Gpu and the outputs before the emulator runs. sms: multiprocessors of the emulated GPU, for a persistent kernel.
    splits: shares of a query tile's keys, for a kernel with split_kv; None: as many as a call there has. For
    verification.
    """
    views = check_inputs(binary.spec, *arrays, **named)
    if views[0].device != "cpu":
        raise CallError("device", views[0].device, "only CPU arrays are observed", "pass NumPy arrays")
    if splits is not None and not 1 <= splits <= SPLITS_MAX:
        raise CallError("splits", splits, f"must be from 1 to {SPLITS_MAX}", "leave it out")
    scale = check_scale(binary.spec, scale)
    outputs = tuple(Output(*layout) for layout in output_layout(binary.spec, views[0]))
    backend = _check_backend(backend, views)
    emulate = partial(_run_emulated, strict=strict, prepare=prepare, trace=trace, sms=sms, splits=splits)
    execute = {"emulator": emulate, "cuda": partial(_run_copied, splits=splits)}[backend]
    host_function(binary.host_object, binary.host_symbol, backend)  # loaded once a kernel, not timed
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


def like(q: Any, array: np.ndarray) -> Any:
    """The array in q's library. The memory is shared: an Output's storage lives as long as a view of it."""
    if not is_torch(q):
        return array
    import torch

    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


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
    splits: int | None,
) -> tuple[Any, ...]:
    gpu = Gpu(arch=binary.spec.arch, strict=strict, trace=trace)
    gpu.labels[binary.kernel_name] = _labels(binary.plan.budget)
    splits = splits or shares_of(binary, views, sms)
    kept = [Output(*layout) for layout in scratch_layout(binary.spec, views[0], splits)]
    _emulate(gpu, binary, views, (*outputs, *kept), scalars(binary.plan, scale, sms, splits), prepare)
    check_scratch(binary, kept)
    return tuple(gpu.launches)


def check_scratch(binary: Binary, kept: Sequence[Output]) -> None:
    """Raises RunError when something around scratch memory was written."""
    for output in kept:
        if output.outside():
            raise RunError(f"{binary.spec.name} wrote {output.outside()} elements outside {output.name}")


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
    numbers: Scalars,
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
    function = host_function(program.host_object, program.host_symbol, "emulator")
    with attached(gpu, program.ptx, program.cubin):
        status = function(arguments, numbers)
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


def _run_copied(
    binary: Binary, views: Sequence[View], outputs: Sequence[Output], scale: float, splits: int | None
) -> tuple[Any, ...]:
    """CPU arrays on device 0: copied there, and the outputs back with their guard regions."""
    check_device(binary.spec.arch)
    from cuda.bindings import runtime

    splits = splits or shares_of(binary, views, multiprocessors(0))
    kept = [Output(*layout) for layout in scratch_layout(binary.spec, views[0], splits)]
    outputs = (*outputs, *kept)

    kind = runtime.cudaMemcpyKind
    spans = [(low, high - low) for low, high in (view.span for view in views)]
    spans += [(output.storage.ctypes.data, output.storage.nbytes) for output in outputs]
    copies: list[int] = []
    try:
        for address, size in spans:
            copies.append(int(check_cuda(runtime.cudaMalloc(size))))
            check_cuda(runtime.cudaMemcpy(copies[-1], address, size, kind.cudaMemcpyHostToDevice))
        arguments = [_moved(view, copy) for view, copy in zip(views, copies, strict=False)]
        returned = list(zip(outputs, copies[len(views) :], strict=True))
        arguments += [output.view(copy + output.offset_bytes, "cuda:0") for output, copy in returned]
        launch_views(binary, arguments, scale, splits, 0, 0)
        check_cuda(runtime.cudaDeviceSynchronize())
        for output, copy in returned:
            size = output.storage.nbytes
            check_cuda(runtime.cudaMemcpy(output.storage.ctypes.data, copy, size, kind.cudaMemcpyDeviceToHost))
    finally:
        for copy in copies:
            runtime.cudaFree(copy)
    check_scratch(binary, kept)
    return ()


def _moved(view: View, address: int) -> View:
    return View(view.name, view.shape, view.strides, view.dtype, view.item_bytes, address, "cuda:0", view.owner)
