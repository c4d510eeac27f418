"""How fast the emulator is: `python tests/emulator_speed.py`, on an otherwise idle machine.

Our head_dim 128 causal kernel and, where flash-attn-4 is installed, FlashAttention-4's, for sm_100a: one CTA, one head
and four heads, strict and fast. Compilation is left out: blocks become machine code at first sight
(`BESPOKE_NATIVE=always`; by default a block is compiled once it has cost as much), in a launch that is not timed, and
the best of three more counts. Where PyTorch and Triton are installed, the same attention through Triton's interpreter
in the same run. Then the five slowest instructions of a strict run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("BESPOKE_NATIVE", "always")

import generator
from generator.emulator import attached, gpu
from generator.emulator.gpu import LaunchCase
from generator.emulator.translate import Translator
from generator.run import run_observed
from generator.verify import random_inputs

SHAPES = {"one CTA": (1, 256, 4096), "one head": (1, 4096, 4096), "four heads": (4, 4096, 4096)}  # heads, Sq, Skv
STRICT_SHAPES = {"one head, 256": (1, 256, 256), "one head, 1024": (1, 1024, 1024)}
TRITON = """
import time, torch, triton, triton.language as tl
@triton.jit
def attend(Q, K, V, O, S, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    tile, head = tl.program_id(0), tl.program_id(1)
    rows, dims, keys = tile * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    base = head * S * D
    q = tl.load(Q + base + rows[:, None] * D + dims[None, :]).to(tl.float32)  # its dot takes bf16 for integers
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    for start in range(0, (tile + 1) * M, N):
        at = start + keys
        k = tl.load(K + base + at[:, None] * D + dims[None, :]).to(tl.float32)
        v = tl.load(V + base + at[:, None] * D + dims[None, :]).to(tl.float32)
        s = tl.where(rows[:, None] >= at[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        now = tl.maximum(top, tl.max(s, 1))
        p, keep = tl.exp2(s - now[:, None]), tl.exp2(top - now)
        total, top = total * keep + tl.sum(p, 1), now
        out = out * keep[:, None] + tl.dot(p, v)
    tl.store(O + base + rows[:, None] * D + dims[None, :], (out / total[:, None]).to(tl.bfloat16))
q, k, v = (torch.randn(1, HEADS, 4096, 128).bfloat16() for _ in range(3))
o = torch.empty_like(q)
for _ in range(2):
    start = time.perf_counter()
    attend[(32, HEADS)](q, k, v, o, 4096, 128**-0.5 * 1.4426950408889634, 128, 128, 128)
    seconds = time.perf_counter() - start
exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
assert (o.float() - exact).norm() / exact.norm() < 5e-3
print(seconds)
"""


@contextlib.contextmanager
def _best(seconds: list[float], case: LaunchCase) -> Iterator[None]:
    """An observer: the launch, and three times more with the clock."""
    yield
    for _ in range(3):
        start = time.perf_counter()
        opcodes, _ = case.run()
        seconds[:] = [min([time.perf_counter() - start, *seconds[:1]]), sum(opcodes.values())]


def ours(shape: tuple[int, int, int], strict: bool) -> tuple[float, int]:
    """Seconds and warp-instructions of our kernel."""
    kernel = generator.build(head_dim=128, causal=True, strategy="tiles")
    heads, q_len, k_len = shape
    inputs = random_inputs("bf16", (1, heads, heads, q_len, k_len), 128, 128, 0)
    launches = [run_observed(kernel.binary, *inputs, strict=strict).launches[0] for _ in range(4)][1:]
    return min(launch.seconds for launch in launches), launches[0].warp_instructions


def flash(shape: tuple[int, int, int], strict: bool) -> tuple[float, int]:
    """Those of FlashAttention-4's."""
    import foreign

    heads, q_len, k_len = shape
    found: list[float] = []
    module = foreign.load("foreign_fa4")
    with attached("sm_100a", strict, module.SMS) as device:
        foreign.forget_devices()
        device.observers.append(lambda case: _best(found, case))
        module.run(module.Attention("sm_100a", 128, q_len, k_len, heads, heads, causal=True))
    return found[0], int(found[1])


def triton_seconds(heads: int) -> float | None:
    """The same attention in Triton's interpreter, in a process of its own; None where it is not installed. Raises
    RuntimeError with the end of what that process said when it fails.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "attend.py"
        program.write_text(TRITON.replace("HEADS", str(heads)))
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Triton's interpreter failed: {done.stderr[-500:]}")
    return float(done.stdout)


def slowest(count: int = 5) -> list[tuple[str, float, int]]:
    """(opcode, seconds, calls) of our kernel, strict, one head of 1024 tokens, each instruction with a clock around."""
    spent, calls = Counter(), Counter()

    def clocked(entry: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = entry.run(*arguments)
            spent[entry.name] += time.perf_counter() - start
            calls[entry.name] += 1
            return result

        return run

    kernel = generator.build(head_dim=128, causal=True, strategy="tiles")
    (name,) = gpu._parse(kernel.ptx).kernels
    program = Translator(gpu._parse(kernel.ptx).kernels[name], True, clocked).translate()
    translate, gpu._translate = gpu._translate, lambda *_: program
    try:
        run_observed(kernel.binary, *random_inputs("bf16", (1, 1, 1, 1024, 1024), 128, 128, 0))
    finally:
        gpu._translate = translate
    return [(name, seconds, calls[name]) for name, seconds in spent.most_common(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("ours", "flash"), help="one of the two kernels")
    only = parser.parse_args().only
    kernels = {"ours": ours, "flash": flash}
    if only:
        kernels = {only: kernels[only]}
    elif subprocess.run([sys.executable, "-c", "import flash_attn.cute"], capture_output=True).returncode:
        del kernels["flash"]
    print(f"{'kernel':8}{'launch':16}{'mode':8}{'seconds':>9}{'M warp-instr/s':>16}")
    fast = {}
    for name, measure in kernels.items():
        for strict in (False, True):
            for label, shape in (SHAPES | (STRICT_SHAPES if strict else {})).items():
                seconds, count = measure(shape, strict)
                fast[name, label] = fast.get((name, label), seconds)
                mode = "strict" if strict else "fast"
                print(f"{name:8}{label:16}{mode:8}{seconds:9.3f}{count / seconds / 1e6:16.2f}", flush=True)
    peak = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"peak memory: {peak[0]:.2f} GiB, of a child process {peak[1]:.2f} GiB")
    for label, heads in (("one head", 1), ("four heads", 4)):
        theirs = triton_seconds(heads)
        if theirs is None:
            print("Triton's interpreter: PyTorch and Triton are not installed together")
            break
        ratios = ", ".join(f"{theirs / fast[name, label]:.1f} times as long as {name}" for name in kernels)
        print(f"Triton's interpreter, {label}: {theirs:.2f} s, {ratios} (fast)")
    for name, seconds, calls in slowest():
        print(f"slow: {name:70}{seconds:8.3f} s{calls:8} calls{1e6 * seconds / calls:9.1f} us each")


if __name__ == "__main__":
    main()
