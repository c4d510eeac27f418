"""Functions compiled with --enable-tvm-ffi on the emulator, called with NumPy arrays."""

import importlib.util

import numpy as np
import pytest

from generator.emulator import Hazard, attached
from generator.emulator.host import HostError
from generator.resources import checkout_root

pytest.importorskip("tvm_ffi")
PROGRAM = checkout_root() / "tests" / "programs" / "vector_add.py"


def load():
    spec = importlib.util.spec_from_file_location("vector_add", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given(module, kind):
    """What the function is compiled for: tensors of one size, of any size, or tensors that do not exist."""
    from cutlass import Float32, cute
    from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor

    tensor = from_dlpack(np.zeros(200, np.float32), enable_tvm_ffi=True)
    return {
        "static": tensor,
        "dynamic": from_dlpack(np.zeros(9, np.float32), enable_tvm_ffi=True).mark_layout_dynamic(),
        "fake": make_fake_compact_tensor(Float32, (cute.sym_int(),)),
    }[kind]


@pytest.mark.parametrize("kind", ["static", "dynamic", "fake"])
def test_numbers_and_what_the_compiled_code_checks(kind):
    with attached("sm_90a") as gpu:
        module = load()
        compiled = module.cute.compile(module.add, *[given(module, kind)] * 3, options="--enable-tvm-ffi")
        a, b, c = (np.arange(200, dtype=np.float32) + i for i in range(3))
        for _ in range(2):  # the cubin is loaded once
            compiled(a, b, c)
            assert np.array_equal(c, a + b)
            a += 1
        with pytest.raises((ValueError, TypeError), match="dtype"):
            compiled(a, b, np.zeros(200))
        if kind != "dynamic":  # in which each extent is open
            with pytest.raises(ValueError, match=r"shape\[0\]"):
                compiled(a, b, np.zeros(100, np.float32))
    assert [(launch.grid, launch.hazards) for launch in gpu.launches] == [((2, 1, 1), ())] * 2


def test_compiled_for_global_memory():
    """As on a GPU: an array of this machine stands for one in device memory, not for one anywhere."""
    with attached("sm_90a"):
        module = load()
        from cutlass.cute.runtime import from_dlpack

        assert [str(from_dlpack(np.zeros(3), enable_tvm_ffi=ffi).memspace) for ffi in (False, True)] == ["gmem"] * 2
        assert module.cute.AddressSpace.gmem == given(module, "fake").memspace


def test_hazard_is_raised_by_the_call_and_the_device_recovers():
    with attached("sm_90a") as gpu:
        module = load()
        compiled = module.cute.compile(module.add, *[given(module, "dynamic")] * 3, options="--enable-tvm-ffi")
        a, small = np.ones(200, np.float32), np.ones(100, np.float32)
        with pytest.raises(Hazard, match="'small', 400 bytes, which ends"):
            compiled(a, a, small)
        c = np.zeros(200, np.float32)
        compiled(a, a, c)
        assert (c == 2).all()
    assert [len(launch.hazards) for launch in gpu.launches] == [1, 0]


def test_compiled_outside_cannot_be_called_inside():
    module = load()
    compiled = module.cute.compile(module.add, *[given(module, "fake")] * 3, options="--enable-tvm-ffi")
    a = np.ones(5, np.float32)
    with attached("sm_90a"), pytest.raises(HostError, match="compiled while no emulator was attached"):
        compiled(a, a, a)


def test_object_file_is_refused(tmp_path):
    with attached("sm_90a"):
        module = load()
        compiled = module.cute.compile(module.add, *[given(module, "fake")] * 3, options="--enable-tvm-ffi")
        path = tmp_path / "add.o"
        compiled.export_to_c(str(path), function_name="add")
        with pytest.raises(HostError, match="add.o was compiled ahead of time, so its PTX is unknown"):
            module.cute.runtime.load_module(str(path), enable_tvm_ffi=True)


def test_compiled_inside_cannot_be_called_outside(capfd):
    with attached("sm_90a"):
        module = load()
        compiled = module.cute.compile(module.add, *[given(module, "static")] * 3, options="--enable-tvm-ffi")
    a = np.ones(200, np.float32)
    with pytest.raises(Exception, match="999|device_type"):
        compiled(a, a, a)
