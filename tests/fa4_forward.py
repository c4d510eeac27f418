"""FlashAttention-4's forward kernels on the emulator: compiled and called as they are, compared with float64.

Used by test_emulate.py where flash-attn-4 is installed. Its interface wants CUDA tensors: it runs under PyTorch's fake
tensors up to its cute.compile call, which tells what it compiles and with which arguments.
"""

import contextlib
import os
import sys
from unittest import mock

import numpy as np

from generator.emulator import attached


class Stopped(Exception):
    """Raised in place of the interface's compilation."""


def forward(arch, head_dim, causal, seqlen_q, seqlen_k, heads, kv_heads, window=(None, None)):
    """Relative error of O, largest error of LSE and the launches, for random inputs of one batch in bf16."""
    import torch
    from cutlass import cute

    torch.manual_seed(0)
    shapes = [(1, seqlen_q, heads), (1, seqlen_k, kv_heads), (1, seqlen_k, kv_heads)]
    q, k, v = (torch.randn(*shape, head_dim).to(torch.bfloat16) for shape in shapes)
    out = torch.full_like(q, float("nan"))
    lse = torch.full((1, heads, seqlen_q), float("nan"))
    with environment(FLASH_ATTENTION_ARCH=arch, FLASH_ATTENTION_NUM_SMS="16"), attached(arch, sms=16) as gpu:
        function, arguments = intercept(q, k, causal, window)
        from flash_attn.cute.cute_dsl_utils import to_cute_tensor

        tensors = [to_cute_tensor(x, enable_tvm_ffi=False) for x in (q, k, v, out)]
        tensors.append(to_cute_tensor(lse, assumed_align=4, enable_tvm_ffi=False))
        import cuda.bindings.driver as cuda

        arguments = [*tensors, head_dim**-0.5, *arguments[6:-1], cuda.CUstream(0)]
        cute.compile(function, *arguments)(*arguments)
    expected, expected_lse = attention(q, k, v, causal, window)
    error = (out.double() - expected).norm() / expected.norm()
    return float(error), float((lse - expected_lse).abs().max()), gpu.launches


def intercept(q, k, causal, window):
    """What the interface hands to cute.compile."""
    sys.modules.setdefault("quack.autotuner", mock.MagicMock())  # it asks for a device when it is imported
    import torch
    from flash_attn.cute import interface
    from torch._subclasses.fake_tensor import FakeTensorMode

    interface._get_device_arch.cache_clear()  # asked once a process
    seen = []

    def stop(function, *arguments, **_):
        seen.append((function, arguments))
        raise Stopped

    with FakeTensorMode(), mock.patch.object(interface.cute, "compile", stop), contextlib.suppress(Stopped):
        fake_q, fake_k = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (q, k))
        left, right = window
        interface._flash_attn_fwd(
            *(fake_q, fake_k, fake_k),
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            return_lse=True,
        )
    return seen[0]


def attention(q, k, v, causal, window):
    import torch

    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * q.shape[3] ** -0.5
    rows, columns = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])[None]
    left, right = window
    visible = torch.ones_like(rows + columns, dtype=torch.bool)
    if causal:
        visible &= columns <= rows
    if left is not None:
        visible &= columns >= rows - left
    if right is not None:
        visible &= columns <= rows + right
    scores = scores.masked_fill(~visible, -np.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2)), scores.logsumexp(-1)


@contextlib.contextmanager
def environment(**values):
    with mock.patch.dict(os.environ, values):
        yield
