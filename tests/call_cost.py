"""What a call costs its host, in microseconds: `python tests/call_cost.py [--calls N]`, on an otherwise idle machine.

With a GPU of sm_90a or sm_100a: the head_dim 128 causal kernel called directly, as an operator and in a function that
torch.compile made of it, then, where they are installed, FlashAttention-4 and PyTorch's attention through cuDNN and
through its own FlashAttention. Calls are queued without waiting for the GPU, fewer at a time than its queue holds, and
only the queueing is timed.

Without one: the same calls on CPU tensors with nothing behind them. The host function is a C function that returns, and
PyTorch's current device and stream are constants; everything else is what a CUDA tensor's call executes. "new shapes"
is a call of lengths that were never seen, which is checked and prepared from nothing.

The least of several rounds, and their median.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import generator
from generator import launch
from generator.kernel import Kernel

ARCHS = {(9, 0): "sm_90a", (10, 0): "sm_100a"}
ROUNDS, HEADS, HEAD_DIM = 15, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="in a round")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    kernel = built() if on_gpu else launching_nothing(built())
    place = torch.cuda.get_device_name() if on_gpu else "no GPU: nothing is launched"
    print(f"{kernel.spec.name}, {options.tokens} tokens, {place}; microseconds a call: least, median")
    device = "cuda" if on_gpu else "cpu"
    shape = (1, options.tokens, HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
    cases = ours(kernel, tensors) | (others(tensors) if on_gpu else {})
    for name, call in cases.items():
        report(name, call, options.calls, on_gpu)
    report("new shapes", growing(kernel, device), options.calls, on_gpu)


def built() -> Kernel:
    arch = ARCHS[torch.cuda.get_device_capability()] if torch.cuda.is_available() else "sm_90a"
    return generator.build(arch=arch, head_dim=HEAD_DIM, causal=True)


def launching_nothing(kernel: Kernel) -> Kernel:
    """The kernel, called with CPU tensors as with a GPU's."""
    returning = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("labs", ctypes.CDLL(None)))
    function = SimpleNamespace(entry=returning, loaded=lambda device: True)
    launch.check_device = lambda arch, device: None
    launch.multiprocessors = lambda device: 132
    launch.host_function = lambda host_object, symbol, backend: function
    torch.cuda.current_device = lambda: 0
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    kernel.run = launch.Launcher(kernel.binary)
    return kernel


def ours(kernel: Kernel, tensors: list[Any]) -> dict[str, Callable[[], Any]]:
    backend = "inductor" if tensors[0].is_cuda else "eager"
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v), fullgraph=True, backend=backend)
    return {
        "kernel(q, k, v)": lambda: kernel(*tensors),
        "kernel.op(q, k, v)": lambda: kernel.op(*tensors),
        f"torch.compile, {backend}": lambda: compiled(*tensors),
    }


def others(tensors: list[Any]) -> dict[str, Callable[[], Any]]:
    """Those that are installed and take such tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    cases: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func

        cases["FlashAttention-4"] = lambda: flash_attn_func(*tensors, causal=True)
    by_head = [x.transpose(1, 2) for x in tensors]
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("Flash", SDPBackend.FLASH_ATTENTION)):

        def attend(backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*by_head, is_causal=True)

        cases[f"PyTorch, {name}, chosen by a context manager"] = attend
    cases["PyTorch, its own choice"] = lambda: scaled_dot_product_attention(*by_head, is_causal=True)
    return cases


def growing(kernel: Kernel, device: str) -> Callable[[], Any]:
    """One query and one more key each time, as in decoding."""
    tokens = 32768
    q, k, v = (torch.zeros(1, length, HEADS, HEAD_DIM, device=device).bfloat16() for length in (1, tokens, tokens))
    lengths = itertools.cycle(range(1, tokens + 1))

    def call() -> Any:
        keys = next(lengths)
        return kernel(q, k[:, :keys], v[:, :keys])

    return call


def report(name: str, call: Callable[[], Any], calls: int, on_gpu: bool) -> None:
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    with torch.inference_mode():
        for _ in range(20):
            call()
        rounds = []
        for _ in range(ROUNDS):
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - start) / calls * 1e6)
        wait()
    print(f"{name:45} {min(rounds):7.1f} {statistics.median(rounds):7.1f}")


if __name__ == "__main__":
    main()
