"""CTAs in several processes: the same bits, counts and reports as in one."""

import numpy as np
import pytest
from ptx_kernels import ptx, run

import generator
from generator.emulator import processes
from generator.emulator.errors import LaunchError
from generator.emulator.memory import GlobalMemory
from generator.emulator.parse import parse_ptx
from generator.run import run_observed
from generator.verify import random_inputs


@pytest.fixture(scope="module")
def kernel():
    return generator.build(head_dim=16, strategy="tiles")  # a CTA a query tile


def test_a_launch_in_two_processes_is_the_launch_in_one(kernel, monkeypatch):
    inputs = random_inputs("bf16", (1, 9, 9, 40, 150), 16, 16, seed=2)
    found, forks = [], []
    fork = processes._fork
    monkeypatch.setattr(processes, "_fork", lambda *arguments: forks.append(1) or fork(*arguments))
    for number in ("1", "2"):
        monkeypatch.setenv("BESPOKE_PROCESSES", number)
        observed = run_observed(kernel.binary, *inputs)
        (launch,) = observed.launches
        outputs = [(output.array.tobytes(), output.unwritten(), output.outside()) for output in observed.outputs]
        found.append((outputs, launch.opcodes, launch.warp_instructions, launch.tmem_columns))
    assert found[0] == found[1]
    assert len(forks) == 1


def memory(*arrays: np.ndarray, initialized=True) -> GlobalMemory:
    gmem = GlobalMemory()
    for number, array in enumerate(arrays):
        gmem.add(array.ctypes.data, array.nbytes, f"array {number}", initialized)
    return gmem


def test_stores_of_every_share_arrive():
    a, b = np.zeros(100, np.uint8), np.arange(50, dtype=np.uint32)
    gmem = memory(a, b)

    def share(number):
        def work():
            a[number::3] = number + 1
            b[10 * number] += 1000
            return number

        return work

    assert processes.run_shares([share(n) for n in range(3)], gmem) == [0, 1, 2]
    np.testing.assert_array_equal(a, np.arange(100) % 3 + 1)
    expected = np.arange(50)
    expected[[0, 10, 20]] += 1000
    np.testing.assert_array_equal(b, expected)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_share_that_raises_puts_memory_back(failing):
    a = np.zeros(8, np.uint8)

    def share(number):
        def work():
            a[number] = 1
            if number == failing:
                raise ValueError
            return number

        return work

    assert processes.run_shares([share(0), share(1)], memory(a)) is None
    assert not a.any()


def test_what_was_written_of_outputs_arrives():
    out = np.zeros(8, np.uint8)
    gmem = memory(out, initialized=False)
    (written,) = gmem.written.values()

    def share(number):
        def work():
            written[number] = 1

        return work

    processes.run_shares([share(0), share(5)], gmem)
    assert written.tolist() == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mma.sync", 2),
        ("mma.sync; atom.shared.add.u32", 2),
        ("mma.sync; atom.global.add.u32", 1),
        ("mma.sync; red.global.add.u32", 1),
        ("mma.sync; ld.acquire.gpu.global.u32", 1),
        ("mma.sync; fence.acq_rel.gpu", 1),
        ("mma.sync; fence.acq_rel.cta", 2),
        ("add.u32", 1),
    ],
)
def test_kernels_whose_ctas_speak_to_each_other_stay_in_one_process(body, expected, monkeypatch):
    monkeypatch.setenv("BESPOKE_PROCESSES", "2")

    class Program:
        kernel = parse_ptx(ptx("")).kernels["k"]

    instr = Program.kernel.instrs[0]
    Program.kernel.instrs[:] = [instr._replace(opcode=name.strip()) for name in body.split(";")]
    assert processes.wanted(Program, 100, GlobalMemory()) == expected
    assert processes.wanted(Program, 7, GlobalMemory()) == 1


def test_a_number_of_processes_that_is_none(monkeypatch):
    monkeypatch.setenv("BESPOKE_PROCESSES", "many")
    with pytest.raises(LaunchError, match="BESPOKE_PROCESSES is 'many': a number from 1 on"):
        run("mov.u32 %r1, 0;")


def test_only_the_main_thread_forks(monkeypatch):
    """Seen in the suite: three threads launched at once, and a child of one waited for a lock that another had held."""
    import threading
    from types import SimpleNamespace

    monkeypatch.setenv("BESPOKE_PROCESSES", "4")
    instruction = SimpleNamespace(opcode="wgmma.mma_async.sync.aligned")
    program = SimpleNamespace(kernel=SimpleNamespace(instrs=[instruction]))
    found = []

    def ask():
        found.append(processes.wanted(program, 64, SimpleNamespace(regions=[])))

    ask()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [4, 1]
