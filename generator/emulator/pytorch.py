"""PyTorch's CUDA device, for programs that put their tensors on one: the emulated Gpu, whose memory is the machine's.

While an emulator is attached, `device="cuda"`, `.cuda()` and `.to("cuda")` give tensors in ordinary memory, marked as
the device's. They answer `device` and `is_cuda` as a GPU's tensors would, what is computed from them is on the device
too, and PyTorch's own operations on them run on the CPU. Moving between host and device copies, so a program that
forgets to copy back sees the same stale values as on a GPU. `torch.cuda` answers for the one device.

Operators that were registered with torch.library for CUDA only (`custom_op(..., device_types="cuda")`) are called with
such tensors too. Fake tensors are left alone. CUDA graphs, memory statistics and generators of random numbers on the
device are not emulated: PyTorch's own error says so.

Sources: torch.overrides.TorchFunctionMode; the answers' names are those of torch.cuda in PyTorch 2.13.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

_MARK = "_on_emulated_gpu"
_GIB = 1 << 30


def redirections(torch: Any, attribute: Callable[[int], int]) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """(owner, name, what makes the replacement from what is there) for torch.cuda.

    attribute: a device attribute of the Gpu by its number in cudaDeviceAttr.
    """
    for name, answer in _torch_cuda(torch, attribute).items():
        yield torch.cuda, name, lambda _, answer=answer: answer


def during_backward(mode: Any) -> Callable[[Any], Any]:
    """What autograd's engine calls is the program's code; PyTorch lets its caller leave the mode first."""

    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def _engine_run_backward(*arguments: Any, **options: Any) -> Any:
            with mode:
                return theirs(*arguments, **options)

        return _engine_run_backward

    return make


def device_mode() -> Any:
    """The context in which tensors can be on the device."""
    import torch.utils._device  # of which torch does not import all by itself
    from torch.overrides import TorchFunctionMode

    class EmulatedDevice(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if _fake_mode_active(torch):
                return function(*arguments, **(options or {}))
            return _call(torch, self, function, arguments, options or {})

    return EmulatedDevice()


# --- tensors ---------------------------------------------------------------------------------------------------------


def on_device(torch: Any, value: Any) -> bool:
    """Whether this is a tensor that the program has put on the device."""
    return _plain(torch, value) and hasattr(value.untyped_storage(), _MARK)


def _plain(torch: Any, value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided


def _call(torch: Any, mode: Any, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return _attribute(torch, function, arguments)
    special = _METHODS.get(name)
    if special is not None and arguments and _plain(torch, arguments[0]):
        return special(torch, arguments, options)
    backend = _cuda_only_operator(torch, function)
    if backend is not None and any(on_device(torch, value) for value in _tensors((arguments, options))):
        with mode:  # the operator's body is the program's code
            return _marked(torch, backend(*arguments, **options))
    device = options.get("device")
    if device is None and function in torch.utils._device._device_constructors():
        device = torch.utils._device.CURRENT_DEVICE  # of `with torch.device(...)` or torch.set_default_device
    there = _is_cuda(torch, device)
    if there:
        options = {**options, "device": "cpu"}
    options = {key: value for key, value in options.items() if key != "pin_memory"}
    sources = device is None and any(on_device(torch, value) for value in _tensors((arguments, options)))
    result = function(*arguments, **options)
    return _marked(torch, result) if there or sources else result


def _attribute(torch: Any, function: Any, arguments: tuple[Any, ...]) -> Any:
    what = getattr(function.__self__, "__name__", "")
    if what in ("device", "is_cuda", "is_cpu") and on_device(torch, arguments[0]):
        return {"device": torch.device("cuda", 0), "is_cuda": True, "is_cpu": False}[what]
    result = function(*arguments)
    if what in ("grad", "data", "T", "mT", "H", "mH", "real", "imag") and on_device(torch, arguments[0]):
        _marked(torch, result)
    return result


def _cuda_only_operator(torch: Any, function: Any) -> Callable[..., Any] | None:
    """What an operator of torch.library does on CUDA, when it was registered for CUDA and not for the CPU."""
    name = getattr(function, "_qualified_op_name", None) or getattr(function, "_name", "")
    definition = torch._library.custom_ops.OPDEFS.get(name.removesuffix(".default")) if "::" in str(name) else None
    kernels = getattr(definition, "_backend_fns", {})
    return None if "cpu" in kernels else kernels.get("cuda")


def _marked(torch: Any, result: Any) -> Any:
    for value in _tensors(result):
        if _plain(torch, value):
            setattr(value.untyped_storage(), _MARK, True)
    return result


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif hasattr(value, "untyped_storage"):
        yield value


def _is_cuda(torch: Any, device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True  # a number is a CUDA device's
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _moved(torch: Any, tensor: Any, result: Any, to_device: bool) -> Any:
    """`result`, which is `tensor` or made from it, as a tensor of the device or the host."""
    if on_device(torch, tensor) != to_device and result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
        result = result.clone()
    return _marked(torch, result) if to_device else result


def _to_cuda(torch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return _moved(torch, arguments[0], arguments[0], True)


def _to_cpu(torch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return _moved(torch, arguments[0], arguments[0], False)


def _to(torch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    tensor, *rest = arguments
    there = on_device(torch, tensor)
    if rest and hasattr(rest[0], "untyped_storage"):
        there = on_device(torch, rest[0])
    elif rest and isinstance(rest[0], (str, int, torch.device)) and not isinstance(rest[0], bool):
        there, rest[0] = _is_cuda(torch, rest[0]), torch.device("cpu")
    elif options.get("device") is not None:
        there, options = _is_cuda(torch, options["device"]), {**options, "device": "cpu"}
    return _moved(torch, tensor, tensor.to(*rest, **options), there)


def _numpy(torch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if on_device(torch, arguments[0]) and not options.get("force") and not any(arguments[1:]):
        raise TypeError("a tensor on the emulated CUDA device: copy it to the host first, with .cpu()")
    return arguments[0].numpy(*arguments[1:], **options)


def _get_device(torch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    return 0 if on_device(torch, arguments[0]) else -1


_METHODS: dict[str, Callable[..., Any]] = {
    "cuda": _to_cuda,
    "cpu": _to_cpu,
    "to": _to,
    "numpy": _numpy,
    "get_device": _get_device,
    "pin_memory": lambda torch, arguments, options: arguments[0],
    "is_pinned": lambda torch, arguments, options: False,
    "record_stream": lambda torch, arguments, options: None,
}


def _fake_mode_active(torch: Any) -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


# --- torch.cuda ------------------------------------------------------------------------------------------------------


class Stream:
    """The emulated device's only stream: everything is synchronous."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """Keeps the time at which it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds of this machine's time."""
        if self._time is None or end._time is None:
            raise RuntimeError("both events must be recorded before calculating elapsed time")
        return 1e3 * (end._time - self._time)


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _torch_cuda(torch: Any, attribute: Callable[[int], int]) -> dict[str, Any]:
    major, minor, sms = attribute(75), attribute(76), attribute(16)
    properties = SimpleNamespace(
        name="Bespoke emulator",
        major=major,
        minor=minor,
        multi_processor_count=sms,
        warp_size=attribute(10),
        total_memory=_GIB,
        L2_cache_size=attribute(38),
        max_threads_per_block=attribute(1),
        max_threads_per_multi_processor=attribute(39),
        regs_per_multiprocessor=attribute(82),
        shared_memory_per_block=attribute(8),
        shared_memory_per_block_optin=attribute(97),
        shared_memory_per_multiprocessor=attribute(81),
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "Event": Event,
        "stream": _nothing,
        "device": _nothing,
        "is_current_stream_capturing": lambda: False,
    }
