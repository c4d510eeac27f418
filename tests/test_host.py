"""emulator/host: the DSL's host function reaches the emulator, and nothing that it asks succeeds silently."""

import ctypes
import hashlib
import importlib.machinery
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from generator.compile import compile_kernel
from generator.dsl import HostFunction, TensorArgument, runtime_library
from generator.emulator import EmulatorError, host
from generator.emulator.tensormap import TensorMap, decode_tensor_map
from generator.plan import plan_kernel
from generator.spec import load_spec

CUBIN = b"\x7fELF" + struct.pack("<28xQQ16x", 64, 64)  # an ELF header and nothing else
PTX = ".visible .entry k(.param .u64 a, .param .b8 b[12]) { ret; }"


class Recorder:
    """A Gpu that keeps its launches; fail: an exception that a launch raises."""

    def __init__(self, params=(8, 12), fail=None, arch="sm_100a"):
        self.arch, self.fail, self.calls = arch, fail, []
        self._params = [SimpleNamespace(size=size) for size in params]

    def load_ptx(self, text):
        names = [line.split("(")[0].split()[-1] for line in text.splitlines() if ".entry" in line]
        return SimpleNamespace(kernels={name: SimpleNamespace(params=self._params) for name in names})

    def launch(self, module, kernel, **arguments):
        self.calls.append((kernel, arguments))
        if self.fail is not None:
            raise self.fail


@pytest.fixture(scope="module")
def runtime():
    """The library's functions, called as compiled code calls them."""
    host._install()
    return ctypes.CDLL(str(host.library_path()))


@pytest.fixture(scope="module")
def binary():
    return compile_kernel(plan_kernel(load_spec(head_dim=16, strategy="tiles")))


def call(runtime, name, *arguments):
    return getattr(runtime, f"emulated_{name}")(*(ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments))


def kernel_handle(runtime, name=b"k"):
    """Load CUBIN and take a kernel, as the DSL's load function does."""
    library, kernel = ctypes.c_uint64(), ctypes.c_uint64()
    assert call(runtime, "_cudaLibraryLoadData", ctypes.byref(library), CUBIN) == 0
    call(runtime, "_cudaLibraryGetKernel", ctypes.byref(kernel), library.value, name)
    return kernel.value


def config_of(grid=(3, 2, 1), block=(192, 1, 1), smem=4096, attributes=()):
    records = b"".join(struct.pack("<II16I", key, 0, *values, *[0] * (16 - len(values))) for key, values in attributes)
    table = ctypes.create_string_buffer(records or b"\0")
    config = struct.pack("<6IQQQI4x", *grid, *block, smem, 0, ctypes.addressof(table), len(attributes))
    return ctypes.create_string_buffer(config), table


def launch(runtime, kernel, **options):
    config, _table = config_of(**options)
    first, second = ctypes.c_uint64(0x1234), ctypes.create_string_buffer(bytes(range(12)))
    pointers = (ctypes.c_void_p * 2)(ctypes.addressof(first), ctypes.addressof(second))
    return call(runtime, "_cudaLaunchKernelEx", config, kernel, pointers)


def test_every_symbol_of_the_dsl_runtime_has_its_counterpart():
    theirs = {name for name in exported(runtime_library()) if not name.startswith(("_init", "_fini"))}
    ours = {name.removeprefix("emulated_") for name in exported(host.library_path()) if name.startswith("emulated_")}
    assert len(theirs) >= 61
    assert theirs <= ours, sorted(theirs - ours)


def exported(path):
    """Functions that an ELF-64 shared library defines."""
    image = path.read_bytes()
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQI", image, table + i * size) for i in range(count)]
    symbols = next(header for header in headers if header[1] == 11)
    strings = headers[symbols[6]][4]
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, section = struct.unpack_from("<IBxH", image, at)
        if section and info & 15 == 2:
            yield image[strings + name : image.index(0, strings + name)].decode()


def test_launch_arrives_with_its_configuration_and_parameters(runtime):
    gpu = Recorder()
    with host.attached(gpu, PTX, CUBIN) as session:
        attributes = [(4, (2, 1, 1)), (6, (1,)), (2, (0,))]
        assert launch(runtime, kernel_handle(runtime), attributes=attributes) == 0
    parameters = struct.pack("<Q", 0x1234), bytes(range(12))
    expected = host.Launch("k", (3, 2, 1), (192, 1, 1), (2, 1, 1), 4096, parameters, programmatic=True)
    assert session.launches == [expected]
    name, arguments = gpu.calls[0]
    assert name == "k"
    assert arguments["cluster"] == (2, 1, 1) and arguments["programmatic"] and "cooperative" not in arguments
    assert arguments["params"] == list(expected.params)


def test_a_cooperative_launch_and_hints_arrive(runtime):
    gpu = Recorder()
    with host.attached(gpu, PTX, CUBIN) as session:
        hints = [(i, (2, 1, 1)) for i in (1, 5, 6, 8, 9, 10, 11, 14)]
        assert launch(runtime, kernel_handle(runtime), attributes=[(2, (1,)), *hints]) == 0
    assert session.launches[0].cooperative and session.launches[0].cluster == (1, 1, 1)
    assert gpu.calls[0][1]["cooperative"] is True


@pytest.mark.parametrize("error", [ValueError("a hazard"), KeyboardInterrupt()])
def test_exception_of_a_launch_reaches_the_caller(runtime, error):
    with pytest.raises(type(error)) as caught, host.attached(Recorder(fail=error), PTX, CUBIN):
        assert launch(runtime, kernel_handle(runtime)) == host.CUDA_ERROR_UNKNOWN
        assert call(runtime, "_cudaGetDevice", ctypes.byref(ctypes.c_int())) == host.CUDA_ERROR_UNKNOWN  # it sticks
    assert caught.value is error


def test_exception_wins_over_the_error_that_its_code_causes(runtime):
    with pytest.raises(ValueError, match="a hazard"), host.attached(Recorder(fail=ValueError("a hazard")), PTX, CUBIN):
        raise RuntimeError(f"CUDA error {launch(runtime, kernel_handle(runtime))}")


@pytest.mark.parametrize("name", ["_cudaMalloc", "_cudaGraphLaunch", "CuteDSLRT_Function_Run"])
def test_unimplemented_symbol_is_an_error(runtime, name):
    message = f"called {name}, which the emulated CUDA runtime does not implement"
    with pytest.raises(host.HostError, match=message), host.attached(Recorder(), PTX, CUBIN):
        assert call(runtime, name, 0, 0) != 0


def test_call_while_nothing_is_attached_fails_and_says_so(runtime, capsys):
    assert call(runtime, "_cudaGetDevice", ctypes.byref(ctypes.c_int())) == host.CUDA_ERROR_UNKNOWN
    assert "_cudaGetDevice called outside of emulator.host.attached" in capsys.readouterr().err


REFUSED = {
    "no kernel 'other'": lambda r: kernel_handle(r, b"other"),
    "device attribute 16 has no": lambda r: call(r, "_cudaDeviceGetAttribute", ctypes.byref(ctypes.c_int()), 16, 0),
    "function attribute 4 has no emulated value": lambda r: call(
        r, "_cuKernelGetAttribute", ctypes.byref(ctypes.c_int()), 4, kernel_handle(r), 0
    ),
    "up to 232449 bytes asked for; limit 232448": lambda r: call(
        r, "_cudaKernelSetAttributeForDevice", kernel_handle(r), 8, 232449, 0
    ),
    "function attribute 3 has no emulated meaning": lambda r: call(r, "_cudaFuncSetAttribute", kernel_handle(r), 3, 1),
    "launched with 49153 bytes of dynamic shared memory; limit 49152": lambda r: launch(
        r, kernel_handle(r), smem=49153
    ),
    "launch attribute 3 has no emulated meaning": lambda r: launch(r, kernel_handle(r), attributes=[(3, (1,))]),
    "0x7 is no kernel handle": lambda r: launch(r, 7),
    "0x7 is no loaded library": lambda r: call(r, "_cudaLibraryGetKernel", ctypes.byref(ctypes.c_uint64()), 7, b"k"),
    "none of them the attached": lambda r: call(
        r, "_cudaLibraryLoadData", ctypes.byref(ctypes.c_uint64()), CUBIN[:-1] + b"\1"
    ),
    "neither ELF nor a fat binary": lambda r: call(
        r, "_cudaLibraryLoadData", ctypes.byref(ctypes.c_uint64()), b"//PTX".ljust(64)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_request(runtime, message):
    with pytest.raises(host.HostError, match=message), host.attached(Recorder(), PTX, CUBIN):
        REFUSED[message](runtime)


def encode(runtime, data_type=9, sizes=(64, 300, 3), strides=(128, 1 << 37), box=(64, 128, 1), swizzle=3, fill=0):
    """The driver's call for a tensor at 0x7F0012345600; returns its result and the 128 bytes."""
    target = ctypes.create_string_buffer(128)
    rank = len(sizes)
    wide = [(ctypes.c_uint64 * len(values))(*values) for values in (sizes, strides)]
    narrow = [(ctypes.c_uint32 * rank)(*values) for values in (box, [1] * rank)]
    last = (0, swizzle, 0, fill)
    return call(
        runtime, "_cuTensorMapEncodeTiled", target, data_type, rank, 0x7F0012345600, *wide, *narrow, *last
    ), target.raw


def test_tensor_map_of_the_driver_s_encode_call(runtime):
    with host.attached(Recorder(), PTX, CUBIN):
        status, raw = encode(runtime)
        assert status == 0
        flat = decode_tensor_map(encode(runtime, 7, (100,), (), (4,), 0)[1])
    expected = TensorMap(0x7F0012345600, 2, (64, 300, 3), (2, 128, 1 << 37), (64, 128, 1), 3, "bf16")
    assert decode_tensor_map(raw) == expected
    assert flat == TensorMap(0x7F0012345600, 4, (100,), (4,), (4,), 0, "f32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_type": 13}, "data type 13 is not emulated"),
        ({"strides": (120, 1 << 20)}, "multiples of 16 bytes"),
        ({"box": (64, 257, 1)}, "out of range"),
        ({"sizes": (64, 0, 3)}, "out of range"),
        ({"box": (128, 1, 1)}, "an inner box of 256 bytes is illegal with swizzle 3"),
        ({"box": (4, 1, 1), "swizzle": 0}, "an inner box of 8 bytes"),
        ({"swizzle": 4}, "illegal with swizzle 4"),
        ({"fill": 1}, "fill values are not emulated"),
    ],
)
def test_tensor_map_that_the_driver_refuses(runtime, options, message):
    with pytest.raises(EmulatorError, match=message), host.attached(Recorder(), PTX, CUBIN):
        encode(runtime, **options)


def test_opting_in_to_shared_memory_raises_the_limit_of_a_launch(runtime):
    with host.attached(Recorder(), PTX, CUBIN) as session:
        kernel = kernel_handle(runtime)
        assert call(runtime, "_cudaKernelSetAttributeForDevice", kernel, 8, 232448, 0) == 0
        assert launch(runtime, kernel, smem=232448) == 0
    assert session.launches[0].smem_bytes == 232448


def test_kernel_of_another_cubin_is_refused(runtime):
    with host.attached(Recorder(), PTX, CUBIN):
        kernel = kernel_handle(runtime)
    message = "k belongs to another cubin"
    with pytest.raises(host.HostError, match=message), host.attached(Recorder(), PTX, CUBIN + b"\0"):
        launch(runtime, kernel)


def test_unknown_architecture_has_no_shared_memory_limit(runtime):
    message = "shared memory limit of 'sm_120a' unknown"
    with pytest.raises(host.HostError, match=message), host.attached(Recorder(arch="sm_120a"), PTX, CUBIN):
        call(runtime, "_cudaDeviceGetAttribute", ctypes.byref(ctypes.c_int()), 97, 0)


def test_static_shared_bytes():
    dynamic = ".extern .shared .align 1024 .b8 dynamic[];"
    ptx = f".shared .align 16 .b8 a[100];\n\t.shared .b64 b;\n{dynamic}\n.shared .f32 c[3];"
    assert host.static_shared_bytes(ptx) == 100 + 8 + 12


def test_missing_library_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [".nowhere.so"])
    with pytest.raises(EmulatorError, match=r"_host.nowhere.so is missing .*\(pip install -e \.\)"):
        host.library_path()


HOST_TEXTS = {1: "117ebcb9d557278b"}


def test_a_changed_host_library_has_another_version():
    """A library that was not built again is found out by its version, so each text of host.c has one of its own."""
    text = Path(host.__file__).with_name("host.c").read_text()
    assert f"#define HOST_VERSION {host.HOST_VERSION} " in text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert HOST_TEXTS.get(host.HOST_VERSION) == digest, "raise HOST_VERSION in host.c and host.py, and add its digest"


@pytest.mark.parametrize("library, found", [
    (SimpleNamespace(), "is of an earlier version"),
    (SimpleNamespace(bespoke_host_version=lambda: 99), "is of version 99"),
])  # fmt: skip
def test_a_stale_library_is_refused(monkeypatch, library, found):
    monkeypatch.setattr(host, "_symbols", [])
    monkeypatch.setattr(host.ctypes, "CDLL", lambda path: library)
    with pytest.raises(host.HostError, match=rf"_host.* {found}, this package needs version 1: build it again .pip"):
        host.runtime_symbols()


def test_redirect_changes_names_only(binary):
    redirected = host.redirect(binary.host_object)
    original = len(binary.host_object)
    differences = sum(a != b for a, b in zip(binary.host_object, redirected[:original], strict=True))
    assert b"emulated__cudaLaunchKernelEx\0" in redirected[original:]
    assert 0 < differences < 12 * 16  # name offsets of some ten symbols, and the string table's header


def test_redirect_refuses_an_unknown_symbol(binary):
    unknown = binary.host_object.replace(b"\0_cudaLibraryLoadData\0", b"\0_cudaLibraryLoadDatX\0")
    with pytest.raises(host.HostError, match="needs '_cudaLibraryLoadDatX'"):
        host.redirect(unknown)


def test_dsl_host_function_launches_here(binary):
    """Grid, block and bytes as the kernel's design says; tensor addresses arrive unchanged in the tensor maps."""
    shapes = [(2, 300, 3, 16), (2, 200, 3, 16), (2, 200, 3, 16), (2, 300, 3, 16), (2, 3, 300)]
    tensors = [TensorArgument(0x10000 * (i + 1), shape, compact(shape)) for i, shape in enumerate(shapes)]
    with host.attached(Recorder(params=(128,)), binary.ptx, binary.cubin) as session:
        function = HostFunction(host.redirect(binary.host_object), binary.host_symbol, host.library_path())
        assert function(tensors, (0.25,)) == 0
    (seen,) = session.launches
    assert (seen.grid, seen.block, seen.cluster) == ((3, 3, 2), (192, 1, 1), (1, 1, 1))
    assert seen.smem_bytes == binary.smem_bytes
    assert struct.unpack_from("<Q", seen.params[0])[0] == 0x10000


def test_a_second_library_with_the_dsl_runtime_in_one_process(binary):
    """Linked against the DSL's own runtime, the same object reaches the driver (here: none), not the emulator."""
    driver = HostFunction(binary.host_object, binary.host_symbol, runtime_library())
    if driver.load() == 0:
        pytest.skip("a CUDA driver is present and took the cubin")
    with host.attached(Recorder(params=()), binary.ptx, binary.cubin):
        emulated = HostFunction(host.redirect(binary.host_object), binary.host_symbol, host.library_path())
        assert emulated.load() == 0


def compact(shape):
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides
