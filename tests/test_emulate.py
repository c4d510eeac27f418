"""CuTe DSL programs as they are, on the emulator: by the command and by emulator.attached, and what goes wrong."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from typer.testing import CliRunner

from generator import cli
from generator.emulator import Deadlock, Hazard, LaunchError, attached
from generator.emulator.arrays import KnownArrays
from generator.emulator.gpu import Gpu
from generator.emulator.host import HostError
from generator.resources import checkout_root

PROGRAMS = checkout_root() / "tests" / "programs"
LAUNCHES = {  # program: (kernel, grid, block) of its launches, in order
    "vector_add": [("add_kernel", (8, 1, 1), (128, 1, 1))] * 2,
    "shared_reverse": [("reverse_kernel", (5, 1, 1), (64, 1, 1))],
    "tma_copy": [("copy_kernel", (3, 3, 1), (64, 1, 1))],
    "gemm_sm100": [("gemm_kernel", (2, 2, 1), (128, 1, 1))],
    "print_and_count": [("print_kernel", (3, 1, 1), (32, 1, 1))],
    "cluster_rank": [("rank_kernel", (6, 1, 1), (32, 1, 1))],
    "two_kernels": [("square_kernel", (11, 1, 1), (32, 1, 1)), ("sum_kernel", (4, 1, 1), (32, 1, 1))] * 2,
}


def load(name):
    """A program as a module; inside of `attached`, as decorators may ask the DSL for the architecture."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def emulate(*words, code=0):
    """The command in this process. Fails when the exit code is another one."""
    result = CliRunner().invoke(cli.app, ["emulate", *map(str, words)])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def written(folder, text, name="program.py"):
    path = folder / name
    path.write_text(text)
    return path


def summary(launch):
    return launch.kernel.removeprefix("kernel_cutlass_").split("_tensor")[0], launch.grid, launch.block


# --- programs that are right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHES)
def test_program_by_the_command(name, tmp_path):
    result = emulate("--json", tmp_path / "launches.json", PROGRAMS / f"{name}.py")
    assert f"{name}: " in result.stdout and "right" in result.stdout
    assert ("block 1 thread 8: -2.250000 is negative\n" in result.stdout) == (name == "print_and_count")
    facts = json.loads((tmp_path / "launches.json").read_text())
    assert (facts["arch"], facts["exit_code"], facts["error"]) == ("sm_100a", 0, None)
    assert len(facts["launches"]) == len(LAUNCHES[name])
    for launch, (kernel, grid, block) in zip(facts["launches"], LAUNCHES[name], strict=True):
        assert kernel in launch["kernel"] and kernel in result.stderr
        assert (tuple(launch["grid"]), tuple(launch["block"])) == (grid, block)
        assert launch["cluster"] == ([2, 1, 1] if name == "cluster_rank" else [1, 1, 1])
        assert launch["hazards"] == [] and launch["seconds"] > 0
        assert sum(launch["opcodes"].values()) == launch["warp_instructions"] > 0


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name != "gemm_sm100"])
def test_program_on_hopper_by_attached(name):
    with attached("sm_90a") as gpu:
        load(name).main()
    assert [(s[0] in k, *s[1:]) for s, (k, *_) in zip(map(summary, gpu.launches), LAUNCHES[name], strict=False)]
    assert [launch[1:] for launch in LAUNCHES[name]] == [summary(launch)[1:] for launch in gpu.launches]
    assert all(launch.hazards == () and launch.opcodes for launch in gpu.launches)


@pytest.mark.parametrize("case", ["tf32", "f16_half", "f16_64", "f8", "f8_64", "s8"])
@pytest.mark.parametrize("accumulation", ["fast", "exact"])
def test_gemm_of_every_kind(case, accumulation):
    with attached("sm_100a", accumulation=accumulation) as gpu:
        load("gemm_kinds_sm100").main(case, 128, 64, 128 if case == "tf32" else 256)
    (launch,) = gpu.launches
    kinds = {"tf32": "tf32", "s8": "i8"}
    assert any(f"kind::{kinds.get(case, 'f8f6f4' if case[1] == '8' else 'f16')}" in opcode for opcode in launch.opcodes)


@pytest.mark.parametrize("shape", [(128, 64, 64), (128, 128, 320), (256, 64, 128)])
def test_gemm_sizes(shape):
    with attached("sm_100a") as gpu:
        load("gemm_sm100").main(*shape)
    (launch,) = gpu.launches
    assert launch.tmem_columns == 64
    issued = sum(times for opcode, times in launch.opcodes.items() if opcode.startswith("tcgen05.mma"))
    assert issued == shape[0] // 128 * shape[1] // 64 * shape[2] // 16


@pytest.mark.parametrize("sms", [1, 3, 16])
def test_multiprocessors_are_what_was_asked_for(sms):
    with attached("sm_100a", sms=sms) as gpu:
        load("two_kernels").main()
        from cutlass.utils import HardwareInfo

        assert HardwareInfo().get_max_active_clusters(2) == max(1, sms // 2)
    assert gpu.launches[1].grid == (sms, 1, 1)


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    emulate(PROGRAMS / "vector_add.py")
    with attached("sm_100a"):
        load("two_kernels").main()
    module = load("vector_add")
    module.cute.compile(module.add, *module.tensors(*[np.zeros(5, np.float32)] * 3))
    assert list(tmp_path.iterdir()) == []


def test_command_hands_arguments_to_the_program():
    assert emulate("--sms", "2", PROGRAMS / "vector_add.py", "77", "5").stdout == "vector_add: 77 elements are right\n"


def test_command_in_a_process_of_its_own(tmp_path):
    path = written(tmp_path, "import sys, helper\nprint(sys.argv[1:], __name__, helper.NAME)\n")
    written(tmp_path, "NAME = 'next to it'\n", "helper.py")
    words = [sys.executable, "-m", "generator", "emulate", str(path), "--json", "-x"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=checkout_root(), check=True)
    assert done.stdout == "['--json', '-x'] __main__ next to it\n" and done.stderr == ""


def test_two_attachments_one_after_the_other():
    """What was compiled inside the first may be called inside the second; each has its own launches and arrays."""
    with attached("sm_100a") as first:
        module = load("vector_add")
        a, b, c = (np.full(5, value, np.float32) for value in (1, 2, 0))
        compiled = module.cute.compile(module.add, *module.tensors(a, b, c))
        compiled(*module.tensors(a, b, c))
    with attached("sm_100a") as second:
        d = np.zeros(5, np.float32)
        compiled(*module.tensors(a, c, d))
    assert (c == 3).all() and (d == 4).all()
    assert len(first.launches) == len(second.launches) == 1


def test_everything_is_put_back():
    import cuda.bindings.driver as driver
    from cutlass import cute
    from cutlass.base_dsl.compiler import Compiler
    from cutlass.utils import HardwareInfo

    before = (Compiler.jit, driver.cuInit, HardwareInfo.__init__, cute.runtime._Tensor.__init__)
    with pytest.raises(ZeroDivisionError), attached("sm_100a"):
        assert before[0] is not Compiler.jit and before[1] is not driver.cuInit
        raise ZeroDivisionError
    assert before == (Compiler.jit, driver.cuInit, HardwareInfo.__init__, cute.runtime._Tensor.__init__)


def test_device_memory_of_the_program(tmp_path):
    """Allocated, copied to, used by a kernel through its address, copied back and freed."""
    with attached("sm_100a") as gpu:
        module = load("shared_reverse")
        from cuda.bindings import runtime
        from cutlass import Float32, cute
        from cutlass.cute.runtime import make_ptr

        kind = runtime.cudaMemcpyKind
        x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
        there = [runtime.cudaMalloc(x.nbytes)[1] for _ in range(2)]
        runtime.cudaMemcpy(there[0], x.ctypes.data, x.nbytes, kind.cudaMemcpyHostToDevice)
        pointers = [make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=16) for address in there]
        module.reverse(*pointers, 128, 2.0)
        runtime.cudaMemcpy(y.ctypes.data, there[1], y.nbytes, kind.cudaMemcpyDeviceToHost)
        assert (y == x.reshape(2, 64)[:, ::-1].ravel() * 2).all()
        with pytest.raises(Hazard, match="the program's copy from the device: .*out of bounds"):
            runtime.cudaMemcpy(y.ctypes.data, there[1], y.nbytes + 1, kind.cudaMemcpyDeviceToHost)
        assert runtime.cudaFree(there[0])[0] == 0
        with pytest.raises(HostError, match="freed twice"):
            runtime.cudaFree(there[0])
        with pytest.raises(Hazard, match="out of bounds"):
            module.reverse(*pointers, 128, 2.0)
    assert len(gpu.launches) == 2


def test_questions_to_cuda_python():
    with attached("sm_90a", sms=7):
        from cuda.bindings import driver, runtime

        assert driver.cuDeviceGetCount() == (0, 1)
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        assert driver.cuDeviceGetAttribute(attribute, driver.cuDeviceGet(0)[1]) == (0, 9)
        assert runtime.cudaGetDeviceProperties(0)[1].multiProcessorCount == 7
        start, end = (runtime.cudaEventCreate()[1] for _ in range(2))
        for event in (start, end):
            runtime.cudaEventRecord(event, 0)
        assert runtime.cudaEventElapsedTime(start, end)[1] >= 0
        with pytest.raises(HostError, match=r"cuda.bindings.driver.cuGraphCreate is not emulated"):
            driver.cuGraphCreate(0)
        with pytest.raises(HostError, match="device 1 asked for: the emulator has one"):
            runtime.cudaSetDevice(1)
        with pytest.raises(HostError, match="has no emulated value"):
            runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrTextureAlignment, 0)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_overlapping_views_are_one_region():
    gpu = Gpu("sm_100a")
    arrays = KnownArrays(gpu)
    whole = np.zeros(100, np.float32)
    left, right = whole[:60], whole[40:]
    for array in (left, right, left):
        arrays.add(array)
    ((address, size, name, _),) = gpu.gmem.regions
    assert (address, size, name) == (whole.ctypes.data, 400, "right or left")
    arrays.add(whole)
    assert len(gpu.gmem.regions) == 1


def test_strided_and_reversed_views_end_where_their_elements_end():
    gpu = Gpu("sm_100a")
    arrays = KnownArrays(gpu)
    whole = np.zeros((10, 8), np.float32)
    arrays.add(whole[2:4, 1:3][::-1])
    ((address, size, _, _),) = gpu.gmem.regions
    assert (address, size) == (whole[2:, 1:].ctypes.data, (8 + 2) * 4)


# --- programs that are wrong -----------------------------------------------------------------------------------------


def wrong_add(sizes=(200, 200, 200), blocks=2, dtype=np.float32):
    module = load("vector_add")
    a, b, result = (np.ones(size, dtype) for size in sizes)
    compiled = module.cute.compile(module.add_with_blocks, *module.tensors(*[np.ones(9, np.float32)] * 3), 1)
    compiled(*module.tensors(a, b, result), blocks)


def test_array_that_is_too_small_is_named():
    with attached("sm_100a") as gpu, pytest.raises(Hazard, match=r"st\.global.*'result', 400 bytes, which ends \+0"):
        wrong_add((200, 200, 100))
    (launch,) = gpu.launches
    assert "out of bounds" in launch.hazards[0] and launch.grid == (2, 1, 1)


def test_the_device_recovers_from_a_hazard():
    with attached("sm_100a") as gpu:
        with pytest.raises(Hazard):
            wrong_add((200, 200, 100))
        wrong_add()
    assert [len(launch.hazards) for launch in gpu.launches] == [1, 0]


OTHER_ARRAYS = {  # what a call brings to a function compiled for float32 [9, 4], the first extent open
    "compiled for Float32, called with Float64": np.zeros((9, 4)),
    "compiled for 2 dimensions, called with 1": np.zeros(9, np.float32),
    "compiled for shape": np.zeros((9, 5), np.float32),
    "compiled for stride": np.zeros((9, 8), np.float32)[:, ::2],
}


@pytest.mark.parametrize("message", OTHER_ARRAYS)
def test_array_of_another_kind_than_compiled_for(message):
    with attached("sm_100a") as gpu:
        module = load("vector_add")
        from cutlass.cute.runtime import from_dlpack

        given = from_dlpack(np.zeros((9, 4), np.float32)).mark_compact_shape_dynamic(mode=0)
        compiled = module.cute.compile(module.add, given, given, given)
        compiled(given, given, given)
        with pytest.raises(LaunchError, match=rf"argument 1 of \w+: {message}"):
            compiled(given, from_dlpack(OTHER_ARRAYS[message]), given)
    assert len(gpu.launches) == 1


def test_wrong_dtype_behind_a_pointer_is_out_of_bounds():
    with attached("sm_100a"), pytest.raises(Hazard, match="'half', 128 bytes"):
        module = load("shared_reverse")
        half, y = np.ones(64, np.float16), np.zeros(64, np.float32)
        module.reverse(module.pointer(half), module.pointer(y), 64, 1.0)


def test_pointer_into_no_array_is_out_of_bounds():
    with attached("sm_100a"), pytest.raises(Hazard, match="out of bounds"):
        module = load("shared_reverse")
        from cutlass import Float32, cute
        from cutlass.cute.runtime import make_ptr

        nowhere = make_ptr(Float32, 0x1000, cute.AddressSpace.gmem, assumed_align=4)
        module.reverse(nowhere, nowhere, 64, 1.0)


@pytest.mark.parametrize("blocks", [0, -1])
def test_empty_grid(blocks):
    with attached("sm_100a") as gpu, pytest.raises(LaunchError, match="every extent must be at least 1|at most"):
        wrong_add(blocks=blocks)
    assert "grid" in gpu.launches[0].hazards[0]


LAUNCH = """
from cutlass import cute

@cute.kernel
def nothing():
    pass

@cute.jit
def main():
    nothing().launch({})

main()
"""
REFUSED = {
    "grid=(1, 1, 1), block=(2048, 1, 1)": "block (2048, 1, 1): 1 to 1024 threads a CTA",
    "grid=(0, 1, 1), block=(32, 1, 1)": "grid (0, 1, 1): every extent must be at least 1",
    "grid=(1, 1, 1), block=(32, 1, 1), smem=300000": "with 300000 bytes of dynamic shared memory; limit 232448",
}


@pytest.mark.parametrize("launch", REFUSED)
def test_launch_beyond_limits(launch, tmp_path):
    result = emulate(written(tmp_path, LAUNCH.format(launch)), code=1)
    assert REFUSED[launch] in " ".join((result.stderr + result.stdout).split())


HANGS = """
import cutlass
from cutlass import cute

@cute.kernel
def waits():
    bar = cutlass.memory.SmemAllocator().allocate_array(cutlass.Int64, 1)
    if cute.arch.thread_idx()[0] == 0:
        cute.arch.mbarrier_init(bar, 2)
    cute.arch.sync_threads()
    cute.arch.mbarrier_wait(bar, 0)

@cute.jit
def main():
    waits().launch(grid=(1, 1, 1), block=(32, 1, 1))

main()
"""


def test_hang_is_a_deadlock_that_names_the_line(tmp_path):
    path = written(tmp_path, HANGS)
    result = emulate("--json", tmp_path / "launches.json", path, code=1)
    line = HANGS.splitlines().index("main()") + 1
    assert f"{path}:{line}: Deadlock: " in result.stderr.replace("\n", "")
    (launch,) = json.loads((tmp_path / "launches.json").read_text())["launches"]
    assert len(launch["hazards"]) == 1 and launch["warp_instructions"] == 0
    with pytest.raises(Deadlock), attached("sm_100a"):
        runpy_main(path)


def runpy_main(path):
    import runpy

    runpy.run_path(str(path), run_name="__main__")


ENDS = {  # program: (exit code, what stderr says)
    "1 / 0": (1, "ZeroDivisionError: division by zero"),
    "def": (1, "SyntaxError"),
    "import sys; sys.exit(3)": (1, "the program exited with 3"),
    "import sys; sys.exit('no')": (1, "the program exited with 'no'"),
    "import sys; sys.exit(0)": (0, ""),
    "from cuda.bindings import driver; driver.cuGraphCreate(0)": (2, "program.py:1: HostError: cuda.bindings.driver"),
}


@pytest.mark.parametrize("text", ENDS)
def test_program_that_ends_badly(text, tmp_path):
    code, message = ENDS[text]
    result = emulate(written(tmp_path, text + "\n"), code=code)
    assert message in result.stderr and "runpy" not in result.stderr


def test_exact_accumulation():
    result = emulate("--accumulation", "exact", PROGRAMS / "gemm_sm100.py")
    assert result.stdout.startswith("gemm_sm100: ")


def test_hazard_that_the_program_swallows_still_counts(tmp_path):
    swallowed = HANGS.replace("\nmain()\n", "\ntry:\n    main()\nexcept RuntimeError:\n    print('went on')\n")
    result = emulate(written(tmp_path, swallowed), code=1)
    assert result.stdout == "went on\n" and "waiting at PTX line" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "nowhere.py: no such program"),
        ([PROGRAMS], "no such program"),
        (["--arch", "sm_80", PROGRAMS / "vector_add.py"], "arch is 'sm_80': the emulator knows sm_90a, sm_100a"),
        (["--accumulation", "best", PROGRAMS / "vector_add.py"], "accumulation is 'best': one of fast, exact"),
        (["--sms", "0", PROGRAMS / "vector_add.py"], "--sms"),
        ([], "Missing argument"),
    ],
)
def test_bad_command_line(words, message):
    assert message in emulate(*words, code=2).stderr


@pytest.mark.parametrize("options", [{"sms": 0}, {"sms": True}, {"sms": 1.5}, {"arch": "sm_120a"}, {"strict": 3}])
def test_bad_arguments_of_attached(options):
    with pytest.raises(LaunchError), attached(**options):
        pass


def test_one_emulator_at_a_time():
    with attached("sm_100a"), pytest.raises(HostError, match="attached already"), attached("sm_90a"):
        pass


def test_compiled_for_another_architecture():
    with attached("sm_90a"):
        module = load("vector_add")
        arrays = [np.zeros(5, np.float32) for _ in range(3)]
        compiled = module.cute.compile(module.add, *module.tensors(*arrays))
    with attached("sm_100a"), pytest.raises(LaunchError, match="the PTX targets sm_90a, this GPU is sm_100a"):
        compiled(*module.tensors(*arrays))


def test_compiled_outside_cannot_be_called_inside():
    module = load("vector_add")
    arrays = [np.zeros(5, np.float32) for _ in range(3)]
    compiled = module.cute.compile(module.add, *module.tensors(*arrays))
    message = "compiled while no emulator was attached"
    with attached("sm_100a"), pytest.raises(HostError, match=message):
        compiled(*module.tensors(*arrays))


def test_compiled_inside_cannot_be_called_outside(capfd):
    with attached("sm_100a"):
        module = load("vector_add")
        arrays = [np.zeros(5, np.float32) for _ in range(3)]
        compiled = module.cute.compile(module.add, *module.tensors(*arrays))
        compiled(*module.tensors(*arrays))
    with pytest.raises(Exception, match="999|Unknown|unknown"):
        compiled(*module.tensors(*arrays))
    assert "_cudaLaunchKernelEx called outside of emulator" in capfd.readouterr().err


# --- foreign kernels -------------------------------------------------------------------------------------------------


FA4_SWEPT = ("D 192/128, B 1, H 1/1, S 200×300, causal", "D 96", "D 256", "pack_gqa=True", "varlen")  # like others
FA4_CASES = [  # words that choose a case of foreign_fa4.py, CTAs a cluster
    ("sm_90a", "D 64, B 1, H 2/1, S 200×300", 1),
    ("sm_90a", "D 128, B 1, H 2/1, S 200×300, causal", 1),
    ("sm_90a", "D 192/128, B 1, H 1/1, S 200×300, causal", 1),
    ("sm_90a", "D 64, B 1, H 1/1, S 130×400, window (64, 0), sinks", 1),
    ("sm_90a", "D 128, B 1, H 2/1, S 100×150 + 1×300 + 200×200, causal, varlen", 1),
    ("sm_100a", "D 64, B 1, H 2/1, S 200×300", 1),
    ("sm_100a", "D 96, B 1, H 2/1, S 200×300, causal", 1),
    ("sm_100a", "D 192/128, B 1, H 1/1, S 200×300", 1),
    ("sm_100a", "D 128, B 1, H 1/1, S 300×300, window (100, 0)", 1),
    ("sm_100a", "D 128, B 1, H 4/1, S 100×200, causal, pack_gqa=True", 1),
    ("sm_100a", "D 128, B 1, H 1/1, S 512×512", 2),
    ("sm_100a", "D 256, B 1, H 1/1, S 256×256", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, words, cluster",
    [pytest.param(*case, marks=[pytest.mark.sweep] * any(word in case[1] for word in FA4_SWEPT)) for case in FA4_CASES],
)
def test_flash_attention_4(arch, words, cluster):
    """Through its own interface, on random inputs: what foreign.py runs for docs/foreign.md."""
    if not all(list(metadata.distributions(name=name)) for name in ("flash-attn-4", "triton")):
        pytest.skip("flash-attn-4 is not installed (pip install flash-attn-4 triton, with CPU PyTorch)")
    sys.path.insert(0, str(checkout_root() / "tests"))
    import foreign

    module = foreign.load("foreign_fa4")
    (case,) = (case for case in module.CASES if (case.arch, str(case)) == (arch, words))
    row = foreign.run(module, case)
    assert not row.failure and not row.hazard
    assert row.errors["O"] < 4e-3 and row.errors["LSE"] < 1e-4
    assert [(launch.cluster[0], launch.hazards) for launch in row.launches] == [(cluster, ())]
