"""Stands in for the DSL's runtime library, so that its unmodified host function launches on the emulator.

The DSL compiles a kernel's host function to x86 code, an object file that reaches CUDA through undefined C symbols.
`redirect` gives these symbols the names under which `host.c` exports them; the code itself stays as it is. Linked
against `library_path()` it calls into this module:

    with attached(gpu, ptx, cubin):
        ...call the host function...          # its launches arrive at gpu.launch(...)

attach.py does the same for whatever a program compiles, by renaming the symbols before the DSL links them.

An exception raised while answering a call (a hazard found by the emulator, say) cannot pass through compiled code. It
is kept, the call returns an error code, and `attached` raises it on the way out. A symbol that nobody implemented is
such an exception too: no call succeeds silently.

Why the names differ: the DSL's loader resolves a symbol in whichever library of the process has it first, so a second
library with the same names would serve either the emulator or the GPU, by the accident of loading order.

Sources: the calls and the launch configuration's layout were observed with nvidia-cutlass-dsl 4.8.1; enumeration
values are those of the CUDA 13 headers (cudaDeviceAttr, cudaFuncAttribute, cudaLaunchAttributeID).
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .encode import encode_tiled
from .errors import HostError, LaunchError
from .images import images_at
from .libraries import find_library
from .targets import SMEM_LIMIT

HOST_VERSION = 1  # of host.c
CUDA_SUCCESS = 0
CUDA_ERROR_UNKNOWN = 999
ENCODE_LIMITS = "cuTensorMapEncodeTiled: element strides, interleaving and fill values are not emulated"
DEFAULT_SHARED_BYTES = 48 * 1024  # what a kernel may use before it opts in to more

_ATTRIBUTE_MAX_OPTIN_SHARED = 97
_FUNCTION_STATIC_SHARED, _FUNCTION_MAX_DYNAMIC_SHARED, _FUNCTION_NON_PORTABLE_CLUSTER = 1, 8, 14
_LAUNCH_COOPERATIVE, _LAUNCH_CLUSTER, _LAUNCH_PROGRAMMATIC = 2, 4, 6
# L2 window, cluster scheduling, priority, memory synchronization domains, preferred cluster, shared memory carveout:
# they change when and where CTAs run, and launches run one after another.
_LAUNCH_WITHOUT_EFFECT = {1, 5, 8, 9, 10, 11, 14}


class RefusedLaunch(HostError, LaunchError):
    """More than the emulated device has."""


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class _LaunchConfig(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    ]


@dataclass
class _Kernel:
    name: str
    cubin_digest: str
    max_dynamic_shared: int = DEFAULT_SHARED_BYTES


@dataclass(frozen=True)
class Launch:
    """One launch as the host function asked for it; sizes in bytes, `params` one bytes object a `.param`."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem_bytes: int
    params: tuple[bytes, ...]
    cooperative: bool = False
    programmatic: bool = False


@dataclass
class Session:
    """What is attached: a Gpu and the PTX that its launches execute, by the digest of the cubin it was assembled to."""

    gpu: Any
    programs: dict[str, str]
    known: str = "known to the emulator"  # what the programs are, for messages
    error: BaseException | None = None
    launches: list[Launch] = field(default_factory=list)

    def ptx_of(self, kernel: _Kernel) -> str:
        """Raises HostError when the kernel's cubin is none of those attached."""
        if kernel.cubin_digest not in self.programs:
            raise HostError(f"{kernel.name} belongs to another cubin than {self.known}")
        return self.programs[kernel.cubin_digest]

    def run(self, module: Any, launch: Launch) -> None:
        """Execute one launch to its end."""
        self.gpu.launch(
            module,
            launch.kernel,
            grid=launch.grid,
            block=launch.block,
            cluster=launch.cluster,
            smem_bytes=launch.smem_bytes,
            params=list(launch.params),
            **{name: True for name in ("cooperative", "programmatic") if getattr(launch, name)},
        )


# Undefined symbols of a host object that are the linker's or the C library's (a compiler may copy with a call).
_NOT_OF_THE_RUNTIME = {"_GLOBAL_OFFSET_TABLE_", "memcpy", "memmove", "memset"}
_OF_TVM_FFI = "TVMFFI"  # what names of its library begin with; it needs no CUDA

# Handles outlive a session: the compiled host function keeps them in its own static memory.
_libraries: dict[int, str] = {}
_kernels: dict[int, _Kernel] = {}
_handles = itertools.count(0x1000, 0x10)
_thread = threading.local()
_HANDLERS: dict[str, Callable[[Session, Any], None]] = {}


def library_path() -> Path:
    """The compiled host.c. Raises EmulatorError when the package was not built."""
    return find_library("_host")


@contextmanager
def attached(gpu: Any, ptx: str, cubin: bytes) -> Iterator[Session]:
    """Host functions called by this thread inside the block run on `gpu` (emulator.Gpu), executing `ptx`.

    Raises on exit whatever was raised while a call was answered; HostError for a call that must be refused.
    """
    gpu.load_ptx(ptx)
    known = f"the attached one ({len(cubin)} bytes): what would be emulated is not what was compiled"
    with serving(Session(gpu, {cubin_digest(cubin): ptx}, known)) as session:
        yield session


@contextmanager
def serving(session: Session) -> Iterator[Session]:
    """`session` answers the calls that host functions of this thread make inside the block."""
    _install()
    stack = _thread.__dict__.setdefault("sessions", [])
    stack.append(session)
    try:
        yield session
    except Exception:
        if session.error is not None:  # the caller saw only an error code; this is what it stands for
            raise session.error from None
        raise
    finally:
        stack.pop()
    if session.error is not None:
        raise session.error


def cubin_digest(cubin: bytes) -> str:
    """What a cubin is known by."""
    return hashlib.sha256(cubin).hexdigest()


def runtime_symbols() -> frozenset[str]:
    """Names of the DSL's runtime library that host.c exports with the prefix `emulated_`."""
    _install()
    return frozenset(_exported)


def redirect(host_object: bytes) -> bytes:
    """The ELF-64 object file with each undefined symbol of the DSL's runtime renamed to its emulated counterpart.

    Only names change: a string table with the new names is appended and the symbols point into it. Raises HostError
    when the object needs a symbol that the emulated runtime does not export.
    """
    _install()
    image = bytearray(host_object)
    (section_table,) = struct.unpack_from("<Q", image, 0x28)
    section_size, section_count = struct.unpack_from("<HH", image, 0x3A)
    headers = [section_table + i * section_size for i in range(section_count)]
    # A section header: name u32, type u32, flags, address, offset, size u64, link u32. Type 2 is the symbol table.
    symbols_header = next(at for at in headers if struct.unpack_from("<I", image, at + 4)[0] == 2)
    symbols, symbols_size, link = struct.unpack_from("<QQI", image, symbols_header + 0x18)
    strings, strings_size = struct.unpack_from("<QQ", image, headers[link] + 0x18)
    table = bytearray(image[strings : strings + strings_size])
    for at in range(symbols + 24, symbols + symbols_size, 24):  # the first symbol is a null entry
        name_at, section = struct.unpack_from("<IxxH", image, at)
        name = table[name_at : table.index(0, name_at)].decode()
        if section != 0 or name in _NOT_OF_THE_RUNTIME or name.startswith(_OF_TVM_FFI):
            continue
        if name not in _exported:
            raise HostError(f"the host function needs {name!r}, which the emulated CUDA runtime does not export")
        struct.pack_into("<I", image, at, len(table))
        table += f"emulated_{name}".encode() + b"\0"
    struct.pack_into("<QQ", image, headers[link] + 0x18, len(image), len(table))
    return bytes(image + table)


def static_shared_bytes(ptx: str) -> int:
    """Bytes of statically sized `.shared` variables in a PTX module (the dynamic array is `.extern`, with no size)."""
    widths = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
    pattern = r"^\s*(?:\.visible\s+|\.weak\s+)?\.shared\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+[\w$.]+(?:\[(\d+)\])?\s*;"
    return sum(widths[kind] * int(count or 1) for kind, count in re.findall(pattern, ptx, re.MULTILINE))


# --- how a call gets here -------------------------------------------------------------------------------------------


def _answers(*symbols: str) -> Callable[[Callable[[Session, Any], None]], Callable[[Session, Any], None]]:
    def register(handler: Callable[[Session, Any], None]) -> Callable[[Session, Any], None]:
        for symbol in symbols:
            if symbol in _HANDLERS:
                raise ValueError(f"{symbol} is answered twice")
            _HANDLERS[symbol] = handler
        return handler

    return register


@ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(ctypes.c_uint64))
def _dispatch(symbol: int, arguments: Any) -> int:
    sessions = _thread.__dict__.get("sessions")
    if not sessions:  # nothing to keep an exception in: an error code is all that the caller can get
        print(f"bespoke host: {_symbols[symbol]} called outside of emulator.host.attached", file=sys.stderr)
        return CUDA_ERROR_UNKNOWN
    session = sessions[-1]
    try:
        if session.error is not None:
            return CUDA_ERROR_UNKNOWN  # as in CUDA, an error sticks
        name = _symbols[symbol]
        handler = _HANDLERS.get(name)
        if handler is None:
            raise HostError(f"the host function called {name}, which the emulated CUDA runtime does not implement")
        handler(session, arguments)
    except BaseException as error:  # KeyboardInterrupt too: it must not vanish in compiled code
        session.error = error
        return CUDA_ERROR_UNKNOWN
    return CUDA_SUCCESS


_symbols: list[str] = []  # by index, as host.c numbers them
_exported: set[str] = {  # and what host.c answers by itself
    *("cuda_dialect_get_error_name", "CuteDSLRT_GetErrorName", "CuteDSLRT_GetErrorString"),
    *("cuda_dialect_unload_library_once", "CuteDSLRT_TVMFFISetRaisedCudaError"),
}
_install_lock = threading.Lock()


def _install() -> None:
    with _install_lock:
        if _symbols:
            return
        library = ctypes.CDLL(str(library_path()))
        _check_version(library)
        library.bespoke_host_symbol_name.restype = ctypes.c_char_p
        names = [library.bespoke_host_symbol_name(i).decode() for i in range(library.bespoke_host_symbol_count())]
        unknown = sorted(set(_HANDLERS) - set(names))
        if unknown:
            raise HostError(f"host.py answers {', '.join(unknown)}, which {library_path().name} does not export")
        library.bespoke_host_install(_dispatch)
        _symbols.extend(names)
        _exported.update(names)


def _check_version(library: Any) -> None:
    """A library of another version would be called with arguments that it does not expect. Raises HostError."""
    version = getattr(library, "bespoke_host_version", None)
    found = "of an earlier version" if version is None else f"of version {version()}"
    if version is None or version() != HOST_VERSION:
        raise HostError(
            f"{library_path()} is {found}, this package needs version {HOST_VERSION}: build it again "
            "(pip install -e .), which compiles emulator/host.c"
        )


def _write(address: int, kind: Any, value: int) -> None:
    ctypes.cast(address, ctypes.POINTER(kind))[0] = value


def _signed(argument: int) -> int:
    """A C int passed in a register: its low 32 bits."""
    return ctypes.c_int32(argument & 0xFFFFFFFF).value


# --- the calls ------------------------------------------------------------------------------------------------------


@_answers("_cudaGetDeviceCount")
def _get_device_count(session: Session, arguments: Any) -> None:
    _write(arguments[0], ctypes.c_int32, 1)


@_answers("_cudaGetDevice")
def _get_device(session: Session, arguments: Any) -> None:
    _write(arguments[0], ctypes.c_int32, 0)


@_answers("_cudaDeviceGetAttribute")
def _get_device_attribute(session: Session, arguments: Any) -> None:
    """(int *value, attribute, device)"""
    attribute = _signed(arguments[1])
    if attribute != _ATTRIBUTE_MAX_OPTIN_SHARED:
        raise HostError(f"_cudaDeviceGetAttribute: device attribute {attribute} has no emulated value")
    _write(arguments[0], ctypes.c_int32, _max_shared(session))


@_answers("_cudaLibraryLoadData")
def _load_library(session: Session, arguments: Any) -> None:
    """(library *, image, …): the image must be the cubin that the attached PTX was assembled to."""
    images = images_at(ctypes.string_at, arguments[1])
    attached = [digest for digest in map(cubin_digest, images) if digest in session.programs]
    if not attached:
        sizes = [len(image) for image in images]
        raise HostError(f"the host function loads {sizes} bytes of cubin, none of them {session.known}")
    handle = next(_handles)
    _libraries[handle] = attached[0]
    _write(arguments[0], ctypes.c_uint64, handle)


@_answers("cuda_dialect_init_library_once")
def _load_library_once(session: Session, arguments: Any) -> None:
    """(library *, cudaError_t (*init)(library *), cudaError_t (*load)(library *, device))"""
    library = ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_uint64))
    if library[0]:
        return
    initialize = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(arguments[1])
    load_to_device = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)(arguments[2])
    code = initialize(arguments[0]) or load_to_device(arguments[0], 0)
    if code:
        library[0] = 0
        raise session.error or HostError(f"loading the cubin failed with CUDA error {code}")


@_answers("_cudaLibraryUnload")
def _unload_library(session: Session, arguments: Any) -> None:
    if _libraries.pop(arguments[0], None) is None:
        raise HostError(f"_cudaLibraryUnload: {arguments[0]:#x} is no loaded library")


@_answers("_cudaLibraryGetKernel")
def _get_kernel(session: Session, arguments: Any) -> None:
    """(kernel *, library, name)"""
    name = ctypes.string_at(arguments[2]).decode()
    digest = _libraries.get(arguments[1])
    if digest is None:
        raise HostError(f"_cudaLibraryGetKernel: {arguments[1]:#x} is no loaded library")
    kernel = _Kernel(name, digest)
    kernels = session.gpu.load_ptx(session.ptx_of(kernel)).kernels
    if name not in kernels:
        raise HostError(f"_cudaLibraryGetKernel: the PTX has no kernel {name!r}; it has {', '.join(kernels)}")
    handle = next(_handles)
    _kernels[handle] = kernel
    _write(arguments[0], ctypes.c_uint64, handle)


@_answers("_cuKernelGetAttribute")
def _get_kernel_attribute(session: Session, arguments: Any) -> None:
    """(int *value, attribute, kernel, device)"""
    attribute = _signed(arguments[1])
    if attribute != _FUNCTION_STATIC_SHARED:
        raise HostError(f"_cuKernelGetAttribute: function attribute {attribute} has no emulated value")
    _write(arguments[0], ctypes.c_int32, static_shared_bytes(session.ptx_of(_kernel(arguments[2]))))


@_answers("_cudaKernelSetAttributeForDevice", "_cudaFuncSetAttribute")
def _set_kernel_attribute(session: Session, arguments: Any) -> None:
    """(kernel, attribute, value[, device])"""
    kernel, attribute, value = _kernel(arguments[0]), _signed(arguments[1]), _signed(arguments[2])
    if attribute == _FUNCTION_MAX_DYNAMIC_SHARED:
        limit = _max_shared(session) - static_shared_bytes(session.ptx_of(kernel))
        if not 0 <= value <= limit:
            raise RefusedLaunch(f"{kernel.name}: dynamic shared memory of up to {value} bytes asked for; limit {limit}")
        kernel.max_dynamic_shared = value
    elif attribute != _FUNCTION_NON_PORTABLE_CLUSTER:  # cluster sizes above 8 are the emulator's to accept or refuse
        raise HostError(f"{kernel.name}: function attribute {attribute} has no emulated meaning")


@_answers("_cuTensorMapEncodeTiled")
def _encode_tensor_map(session: Session, arguments: Any) -> None:
    """(map *, type, rank, address, sizes *, strides *, box *, element strides *, interleave, swizzle, L2, fill)"""
    rank = _signed(arguments[2])
    if not 1 <= rank <= 5:
        raise HostError(f"cuTensorMapEncodeTiled: rank {rank}: 1 to 5")
    sizes, strides = (ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_uint64)) for i in (4, 5))
    box, steps = (ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_uint32)) for i in (6, 7))
    if any(steps[i] != 1 for i in range(rank)) or _signed(arguments[8]) or _signed(arguments[11]):
        raise HostError(ENCODE_LIMITS)
    tensor_map = encode_tiled(
        _signed(arguments[1]), arguments[3], sizes[:rank], strides[: rank - 1], box[:rank], _signed(arguments[9])
    )
    ctypes.memmove(arguments[0], tensor_map, len(tensor_map))


@_answers("_cudaLaunchKernelEx")
def _launch(session: Session, arguments: Any) -> None:
    """(const cudaLaunchConfig_t *, kernel, void **parameters)"""
    config = ctypes.cast(arguments[0], ctypes.POINTER(_LaunchConfig)).contents
    kernel = _kernel(arguments[1])
    module = session.gpu.load_ptx(session.ptx_of(kernel))
    if config.smem_bytes > kernel.max_dynamic_shared:
        raise RefusedLaunch(
            f"{kernel.name}: launched with {config.smem_bytes} bytes of dynamic shared memory; "
            f"limit {kernel.max_dynamic_shared}"
        )
    pointers = ctypes.cast(arguments[2], ctypes.POINTER(ctypes.c_uint64))
    sizes = [parameter.size for parameter in module.kernels[kernel.name].params]
    launch = Launch(
        kernel=kernel.name,
        grid=tuple(config.grid),
        block=tuple(config.block),
        smem_bytes=config.smem_bytes,
        params=tuple(ctypes.string_at(pointers[i], size) for i, size in enumerate(sizes)),
        **_attributes(kernel.name, config),
    )
    session.launches.append(launch)
    session.run(module, launch)


def _attributes(kernel: str, config: _LaunchConfig) -> dict[str, Any]:
    """`cluster`, `cooperative` and `programmatic` (it may overlap the launch before it) of a launch."""
    found: dict[str, Any] = {"cluster": (1, 1, 1)}
    for i in range(config.attribute_count):
        attribute = config.attributes[i]
        if attribute.id == _LAUNCH_CLUSTER:
            found["cluster"] = tuple(attribute.value[:3])
        elif attribute.id == _LAUNCH_COOPERATIVE:
            found["cooperative"] = bool(attribute.value[0])
        elif attribute.id == _LAUNCH_PROGRAMMATIC:
            found["programmatic"] = bool(attribute.value[0])
        elif attribute.id not in _LAUNCH_WITHOUT_EFFECT:
            raise HostError(f"{kernel}: launch attribute {attribute.id} has no emulated meaning")
    return found


def _kernel(handle: int) -> _Kernel:
    if handle not in _kernels:
        raise HostError(f"{handle:#x} is no kernel handle of the emulated CUDA runtime")
    return _kernels[handle]


def _max_shared(session: Session) -> int:
    arch = session.gpu.arch
    if arch not in SMEM_LIMIT:
        raise HostError(f"shared memory limit of {arch!r} unknown; known: {', '.join(SMEM_LIMIT)}")
    return SMEM_LIMIT[arch]
