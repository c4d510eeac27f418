"""launch.py and operators.py on a GPU: numbers, streams, threads, CUDA graphs and torch.compile with CUDA tensors."""

import threading

import numpy as np
import pytest

import generator
from generator.arrays import CallError
from generator.reference import attention

torch = pytest.importorskip("torch")

ARCHS = {(9, 0): "sm_90a", (10, 0): "sm_100a"}
ARCH = ARCHS.get(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ARCH is None, reason="needs a GPU of sm_90a or sm_100a")]


@pytest.fixture(scope="module")
def kernel():
    return generator.build(arch=ARCH, head_dim=64, q_heads_per_kv=2, causal=True)


def tensors_of(queries=200, keys=300, seed=0):
    random = torch.Generator("cuda").manual_seed(seed)
    shapes = ((2, queries, 4, 64), (2, keys, 2, 64), (2, keys, 2, 64))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=random) for shape in shapes]


def check(outputs, tensors, scale=0.125):
    exact = attention(*(x.float().cpu().numpy().astype(np.float64) for x in tensors), scale, causal=True)
    np.testing.assert_allclose(outputs[0].float().cpu().numpy(), exact.o, atol=2e-2)
    np.testing.assert_allclose(outputs[1].cpu().numpy(), exact.lse, atol=1e-4)


def test_repeated_calls(kernel):
    calls = [(tensors_of(seed=seed, keys=300 + seed % 2), scale) for seed, scale in enumerate((None, 0.3, None, 0.05))]
    results = [kernel(*tensors, scale=scale) for tensors, scale in calls]
    for (tensors, scale), outputs in zip(calls, results, strict=True):
        check(outputs, tensors, scale or 0.125)


def test_alignment_is_checked_on_each_call(kernel):
    q, k, v = tensors_of()
    kernel(q, k, v)
    raw = torch.zeros(q.numel() + 8, device="cuda", dtype=q.dtype)
    with pytest.raises(CallError, match="^q address = .*: must be aligned to 16 bytes"):
        kernel(raw[1 : 1 + q.numel()].view(q.shape), k, v)


def test_the_current_stream_orders_it(kernel):
    tensors = tensors_of()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clocks; a launch on another stream would read ones
        for tensor, values in zip(later := [torch.ones_like(x) for x in tensors], tensors, strict=True):
            tensor.copy_(values)
        outputs = kernel(*later)
    stream.synchronize()
    check(outputs, tensors)


def test_threads(kernel):
    results = {}

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            tensors = tensors_of(seed=seed)
            results[seed] = [(tensors, kernel(*tensors)) for _ in range(50)][::10]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for tensors, outputs in (pair for pairs in results.values() for pair in pairs):
        check(outputs, tensors)


@pytest.mark.parametrize("through", ["call", "op"])
def test_cuda_graph(kernel, through):
    """Captured once, after one call that loads the kernel; replayed on other values."""
    call = kernel if through == "call" else kernel.op
    tensors = tensors_of()
    call(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*tensors)
    for seed in (1, 2):
        for tensor, values in zip(tensors, tensors_of(seed=seed), strict=True):
            tensor.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        check(outputs, tensors)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(kernel, mode):
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: kernel(q * 2, k, v, scale=0.0625), fullgraph=True, mode=mode)
    for seed in range(4):
        tensors = tensors_of(seed=seed)
        check([x.clone() for x in compiled(*tensors)], tensors)


def test_pytorch_finds_nothing_wrong_with_the_operator(kernel):
    assert set(torch.library.opcheck(kernel.op, tuple(tensors_of())).values()) == {"SUCCESS"}
