"""launch.py: calls of one kind share what was checked and prepared, and nothing else.

No GPU is needed: the host function is linked with the emulator, or replaced by one that notes what it is given, and a
stand-in for PyTorch has a current device and stream. What is left out is PyTorch's own part of a CUDA tensor.
"""

import ctypes
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import generator
from generator import launch
from generator.arrays import CallError, check_inputs
from generator.emulator import Gpu
from generator.emulator.host import attached
from generator.launch import Launcher, RunError
from generator.reference import attention
from generator.verify import random_inputs

torch = pytest.importorskip("torch")

SMS = 4


class Device:
    """What a Launcher asks of PyTorch, with CPU memory; outputs: as they were allocated, by this thread."""

    def __init__(self):
        self.mine = threading.local()
        self.current, self.stream, self.entered = 0, 0, []
        self.cuda = SimpleNamespace(current_device=lambda: self.current, device=self.enter)
        self._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda index: self.stream)

    def enter(self, index):
        self.entered.append(index)
        return nullcontext()

    def empty(self, *arguments, **options):
        tensor = torch.full(*arguments, torch.nan, **options)
        gpu = getattr(self.mine, "gpu", None)
        if gpu is not None:
            size = tensor.numel() * tensor.element_size()
            gpu.add_array((tensor.data_ptr(), size), name=f"output {tensor.data_ptr():#x}", initialized=False)
        return tensor


class Recorder:
    """In place of a HostFunction: notes addresses, scale and stream of each launch, as they are when it returns."""

    def __init__(self, status=0):
        self.status, self.launches, self.loads, self.inside = status, [], [], lambda: None
        self.entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.called)

    def loaded(self, device):
        return device in self.loads

    def load(self, device):
        self.loads.append(device)
        return 0

    def called(self, address):
        q, k, v, o, lse, scale, stream, result = (ctypes.c_void_p * 8).from_address(address)
        self.inside()
        addresses = [ctypes.c_uint64.from_address(pointer).value for pointer in (q, k, v, o, lse)]
        scale, stream = ctypes.c_float.from_address(scale).value, ctypes.c_uint64.from_address(stream).value
        self.launches.append((addresses, scale, stream))
        ctypes.c_int32.from_address(result).value = self.status


@pytest.fixture(scope="module")
def kernel():
    return generator.build(head_dim=32, q_heads_per_kv=2, causal=True, strategy="tiles")


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(launch, "check_device", lambda arch, index: None)
    monkeypatch.setattr(launch, "multiprocessors", lambda index: SMS)
    return Device()


@pytest.fixture
def emulated(device, monkeypatch):
    """(binary) -> a Launcher whose calls the emulator executes, after noting the inputs' memory."""
    linked = launch.host_function
    monkeypatch.setattr(launch, "host_function", lambda code, symbol, _: linked(code, symbol, "emulator"))

    def prepared(binary):
        launcher = Launcher(binary)
        launcher._torch = device

        def call(arrays, scale=None):
            with on_emulator(binary, device, arrays):
                return launcher(arrays, scale)

        return launcher, call

    return prepared


@contextmanager
def on_emulator(binary, device, arrays):
    gpu = Gpu(arch=binary.spec.arch, strict=True)
    for name, tensor in arrays.items():
        reached = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        gpu.add_array((tensor.data_ptr(), reached * tensor.element_size()), name=name, initialized=True)
    device.mine.gpu = gpu
    with attached(gpu, binary.ptx, binary.cubin):
        yield


@pytest.fixture
def recorded(device, kernel, monkeypatch):
    """(a Launcher of the kernel, the Recorder that it calls)."""
    recorder = Recorder()
    monkeypatch.setattr(launch, "host_function", lambda code, symbol, backend: recorder)
    launcher = Launcher(kernel.binary)
    launcher._torch = device
    return launcher, recorder


def tensors_of(*shape, seed=0, head_dim=32):
    """q, k, v by name, of verify.random_inputs."""
    arrays = random_inputs("bf16", shape, head_dim, head_dim, seed=seed)
    return {name: torch.from_numpy(x.astype(np.float32)).bfloat16() for name, x in zip("qkv", arrays, strict=True)}


def exact(arrays, scale, **options):
    return attention(*(x.float().numpy().astype(np.float64) for x in arrays.values()), scale, **options)


SHAPES = [(2, 4, 2, 70, 150), (1, 2, 1, 1, 33)]


# --- what a repeated call computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"strategy": "tiles"}, {"arch": "sm_90a"}, {"strategy": "two_tiles"}], ids=str)
def test_repeated_calls_compute_attention_of_their_own_arrays(emulated, fields):
    """New memory and values, another scale, another kind of call and the first again; persistent kernels too."""
    binary = generator.build(head_dim=32, q_heads_per_kv=2, causal=True, **fields).binary
    launcher, call = emulated(binary)
    kept = []
    for seed, (shape, scale) in enumerate([(0, None), (0, None), (1, 0.3), (0, 0.5), (1, None)]):
        arrays = tensors_of(*SHAPES[shape], seed=seed)
        o, lse = call(arrays, scale)
        kept.append((o, lse, exact(arrays, scale or 32**-0.5, causal=True)))
        assert o.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    for o, lse, wanted in kept:  # none was written over by a later call
        np.testing.assert_allclose(o.float().numpy(), wanted.o, atol=2e-2)
        np.testing.assert_allclose(lse.numpy(), wanted.lse, atol=1e-4)
    assert len(launcher._known) == 2


def test_same_shapes_with_other_strides_are_another_call(emulated, kernel):
    launcher, call = emulated(kernel.binary)
    arrays = tensors_of(*SHAPES[0])
    by_head = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in arrays.items()}
    assert by_head["q"].stride() != arrays["q"].stride()
    (o, lse), (o_by_head, lse_by_head) = call(arrays), call(by_head)
    assert torch.equal(o, o_by_head) and torch.equal(lse, lse_by_head)
    assert len(launcher._known) == 2


def test_an_extent_of_one_leaves_its_stride_open(emulated, kernel):
    arrays = tensors_of(1, 2, 1, 1, 33)
    odd = {"q": arrays["q"].as_strided((1, 1, 2, 32), (3, 5, 32, 1))} | {name: arrays[name] for name in "kv"}
    for one, other in zip(emulated(kernel.binary)[1](odd), emulated(kernel.binary)[1](arrays), strict=True):
        assert torch.equal(one, other)


def test_every_operand_has_its_place(emulated):
    kernel = generator.build(head_dim=16, kv_sources=2, seqlens=True, limit2=True, sink=True)
    arrays = tensors_of(2, 2, 2, 20, 40, head_dim=16)
    second = tensors_of(2, 2, 2, 20, 24, seed=1, head_dim=16)
    arrays |= {"k2": second["k"], "v2": second["v"]}
    arrays["limit2"] = torch.arange(40, dtype=torch.int32).reshape(2, 20)
    arrays["seqlens2"] = torch.tensor([24, 3], dtype=torch.int32)
    arrays["sink"] = torch.tensor([0.5, -1.0])
    arrays["seqlens"] = torch.tensor([7, 40], dtype=torch.int32)
    expected = kernel.run(arrays)
    _, call = emulated(kernel.binary)
    for _ in range(2):
        for ours, theirs in zip(call(arrays), expected, strict=True):
            assert torch.equal(ours, theirs)


# --- what is checked each time ----------------------------------------------------------------------------------------


def shifted(tensor, elements):
    """A copy that begins `elements` past an address that 16 bytes divide."""
    raw = torch.zeros(tensor.numel() + 32, dtype=tensor.dtype)
    start = -(raw.data_ptr() // tensor.element_size()) % (16 // tensor.element_size()) + elements
    return raw[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_alignment_is_checked_on_each_call(recorded, name):
    launcher, recorder = recorded
    arrays = tensors_of(*SHAPES[0])
    launcher(arrays)
    launcher(arrays | {name: shifted(arrays[name], 8)})
    with pytest.raises(CallError, match=f"^{name} address = .*: must be aligned to 16 bytes; pass a contiguous copy"):
        launcher(arrays | {name: shifted(arrays[name], 4)})
    assert len(recorder.launches) == 2 and len(launcher._known) == 1


REFUSED = {
    "dtype": lambda x: x | {"q": x["q"].float()},
    "other dtype": lambda x: x | {"k": x["k"].half()},
    "dimensions": lambda x: x | {"v": x["v"][0]},
    "columns": lambda x: x | {"k": x["k"].repeat(1, 1, 1, 2)},
    "empty": lambda x: x | {"q": x["q"][:, :0]},
    "batch": lambda x: x | {"k": x["k"][:1]},
    "sequence": lambda x: x | {"v": x["v"][:, 1:]},
    "heads": lambda x: x | {"q": x["q"][:, :, :2]},
    "last stride": lambda x: x | {"q": x["q"].repeat(1, 1, 1, 2)[..., ::2]},
    "odd stride": lambda x: x | {"k": torch.zeros(2, 150, 2, 33).bfloat16()[..., :32]},
    "no stride": lambda x: x | {"k": x["k"][:1].expand(2, 150, 2, 32)},
    "missing": lambda x: {"q": x["q"], "k": x["k"]},
    "no k": lambda x: x | {"k": None},
    "unasked": lambda x: x | {"sink": torch.zeros(4)},
    "unknown": lambda x: x | {"mask": torch.zeros(4)},
    "for another": lambda x: {"q": x["q"], "k": x["k"], "sink": torch.zeros(4)},
    "no tensor": lambda x: x | {"k": [1]},
    "elsewhere": lambda x: x | {"v": x["v"].to("meta")},
}


@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_check_inputs_refuses_in_its_words(recorded, kernel, case, known):
    launcher, recorder = recorded
    good = tensors_of(*SHAPES[0])
    if known:
        launcher(good)
    refused = REFUSED[case](good)
    with pytest.raises(CallError) as wanted:
        check_inputs(kernel.spec, **refused)
    for _ in range(2):
        with pytest.raises(CallError) as caught:
            launcher(refused)
        assert str(caught.value) == str(wanted.value)
    assert len(recorder.launches) == len(launcher._known) == known


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), 1e-60, "large"])
def test_scale_is_checked_on_each_call(recorded, scale):
    launcher, recorder = recorded
    launcher(tensors_of(*SHAPES[0]))
    with pytest.raises(CallError, match="^scale = .*: must be a positive finite number"):
        launcher(tensors_of(*SHAPES[0]), scale)
    assert len(recorder.launches) == 1


def test_a_device_that_cannot_run_it_is_refused_each_time(recorded, monkeypatch):
    launcher, recorder = recorded

    def refuse(arch, index):
        raise RunError(f"built for {arch}")

    monkeypatch.setattr(launch, "check_device", refuse)
    for _ in range(2):
        with pytest.raises(RunError, match="built for sm_100a"):
            launcher(tensors_of(*SHAPES[0]))
    assert not recorder.launches and not launcher._known


def test_a_failed_launch_says_which_error(recorded):
    launcher, recorder = recorded
    recorder.status = 719
    message = "fmha_sm100_d32_gqa2_causal_tiles: the launch failed with CUDA error cudaErrorLaunchF"
    with pytest.raises(RunError, match=message):
        launcher(tensors_of(*SHAPES[0]))
    recorder.status = 0
    launcher(tensors_of(*SHAPES[0]))


# --- what a launch is given -------------------------------------------------------------------------------------------


def test_addresses_scale_and_stream_are_those_of_the_call(recorded, device):
    launcher, recorder = recorded
    for scale, device.stream in ((0.25, 0x1230), (0.5, 0x4560)):
        arrays = tensors_of(*SHAPES[0])
        outputs = launcher(arrays, scale)
        wanted = [tensor.data_ptr() for tensor in (*arrays.values(), *outputs)]
        assert recorder.launches[-1] == (wanted, scale, device.stream)
    assert recorder.loads == [0]


def test_another_current_device_is_left_for_the_call(recorded, device):
    launcher, recorder = recorded
    launcher(tensors_of(*SHAPES[0]))
    assert device.entered == [0]  # to load the kernel
    device.current = 1
    launcher(tensors_of(*SHAPES[0]))
    assert device.entered == [0, 0] and len(recorder.launches) == 2


def test_what_is_remembered_is_bounded(recorded, monkeypatch):
    monkeypatch.setattr(launch, "KNOWN_CALLS", 3)
    launcher, recorder = recorded
    for keys in (1, 2, 3, 1, 4, 5, 6, 1, 2):
        launcher(tensors_of(1, 2, 1, 1, keys))
    assert len(launcher._known) == 3 and len(recorder.launches) == 9
    assert [key[1][0][1] for key in launcher._known] == [6, 1, 2]


def test_calls_at_the_same_time_share_no_memory(recorded):
    """Four threads are inside the host function at once; what each was given is read after all have written."""
    launcher, recorder = recorded
    together = threading.Barrier(4)
    recorder.inside = lambda: together.wait(20)
    given, failed = [], []

    def work(seed):
        arrays = tensors_of(*SHAPES[0], seed=seed)
        try:
            for turn in range(3):
                outputs = launcher(arrays, 0.1 + seed + turn)
                given.append(([tensor.data_ptr() for tensor in (*arrays.values(), *outputs)], outputs))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(addresses for addresses, *_ in recorder.launches) == sorted(addresses for addresses, _ in given)
    assert len({scale for _, scale, _ in recorder.launches}) == 6  # 0.1 + 0 to 5
    (ready,) = launcher._known.values()
    assert len(ready.idle) == 4


def test_threads_compute_their_own(emulated, kernel):
    _, call = emulated(kernel.binary)
    results = {}

    def work(seed):
        arrays = tensors_of(*SHAPES[0], seed=seed)
        results[seed] = [(arrays, call(arrays)) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2]
    for arrays, (o, _) in (pair for pairs in results.values() for pair in pairs):
        np.testing.assert_allclose(o.float().numpy(), exact(arrays, 32**-0.5, causal=True).o, atol=2e-2)
