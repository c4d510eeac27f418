"""QuACK on the emulator through its own interface: norms, softmax, losses, selection, rotary embedding, GEMMs.

Random inputs, the same computation in float64. See foreign.py for what runs the cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SOURCE = "quack-kernels"
SMS = 4


@dataclass(frozen=True)
class Call:
    arch: str
    name: str
    run: Callable[[Any, Any], dict[str, float]]  # of torch and a function that makes random tensors on the device

    def __str__(self) -> str:
        return self.name


def run(case: Call) -> dict[str, float]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: str = "bfloat16") -> Any:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype)).cuda()

    return case.run(torch, random)


def exact(tensor: Any) -> Any:
    return tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)


def relative(given: Any, expected: Any) -> float:
    return float((given.detach().cpu().double() - expected).norm() / expected.norm())


def with_gradients(torch: Any, outputs: dict[str, Any], inputs: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Errors of outputs (given, expected), then of the gradients of inputs (given, exact) under a random one."""
    errors = {name: relative(given, expected) for name, (given, expected) in outputs.items()}
    given, expected = next(iter(outputs.values()))
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(given.dtype)
    given.backward(gradient.cuda())
    expected.backward(gradient.double())
    return errors | {f"d{name}": relative(x.grad, e.grad) for name, (x, e) in inputs.items()}


def rmsnorm(rows: int, columns: int, dtype: str = "bfloat16") -> Callable[[Any, Any], dict[str, float]]:
    def call(torch: Any, random: Any) -> dict[str, float]:
        from quack import rmsnorm

        x, w = random(rows, columns, dtype=dtype).requires_grad_(), random(columns, dtype="float32").requires_grad_()
        x64, w64 = exact(x), exact(w)
        expected = x64 * (x64.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w64
        return with_gradients(torch, {"y": (rmsnorm(x, w), expected)}, {"x": (x, x64), "w": (w, w64)})

    return call


def layernorm(torch: Any, random: Any) -> dict[str, float]:
    from quack.rmsnorm import layernorm_fwd

    x, w = random(33, 768), random(768, dtype="float32")
    y, rstd, mean = layernorm_fwd(x, w, return_rstd=True, return_mean=True)
    x64 = exact(x)
    center = x64 - x64.mean(-1, keepdim=True)
    scale = (center.square().mean(-1) + 1e-6).rsqrt()
    wanted = {"y": (y, center * scale[:, None] * exact(w)), "rstd": (rstd, scale), "mean": (mean, x64.mean(-1))}
    return {name: relative(*pair) for name, pair in wanted.items()}


def softmax(rows: int, columns: int) -> Callable[[Any, Any], dict[str, float]]:
    def call(torch: Any, random: Any) -> dict[str, float]:
        from quack import softmax

        x = random(rows, columns, dtype="float32").requires_grad_()
        x64 = exact(x)
        return with_gradients(torch, {"y": (softmax(x), x64.softmax(-1))}, {"x": (x, x64)})

    return call


def cross_entropy(columns: int) -> Callable[[Any, Any], dict[str, float]]:
    def call(torch: Any, random: Any) -> dict[str, float]:
        from quack import cross_entropy

        x = random(16, columns).requires_grad_()
        target = torch.randint(0, columns, (16,), generator=torch.Generator().manual_seed(2))
        x64 = exact(x)
        expected = torch.nn.functional.cross_entropy(x64, target, reduction="none")
        given = cross_entropy(x, target.cuda(), reduction="none")
        return with_gradients(torch, {"loss": (given, expected)}, {"x": (x, x64)})

    return call


def topk(torch: Any, random: Any) -> dict[str, float]:
    from quack.topk import topk

    x = random(17, 256, dtype="float32")
    values, indices = topk(x, 8)
    expected = exact(x).topk(8, -1)
    return {"values": relative(values, expected.values), "indices": relative(indices, expected.indices.double())}


def rotary(torch: Any, random: Any) -> dict[str, float]:
    from quack.rotary import apply_rotary_emb

    x, angle = random(2, 40, 3, 64), random(40, 32, dtype="float32")
    given = apply_rotary_emb(x, angle.cos(), angle.sin())
    x64, cosine, sine = exact(x), exact(angle).cos()[:, None], exact(angle).sin()[:, None]
    first, second = x64[..., :32], x64[..., 32:]
    expected = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    return {"y": relative(given, expected)}


def gemm(m: int, n: int, k: int, **options: Any) -> Callable[[Any, Any], dict[str, float]]:
    def call(torch: Any, random: Any) -> dict[str, float]:
        from quack.gemm_interface import gemm

        dtype = options.get("dtype", "bfloat16")
        a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype).mT
        bias = random(n) if options.get("bias") else None
        given = gemm(a, b, bias=bias, alpha=options.get("alpha", 1.0), tuned=False, split_k=options.get("split_k", 1))
        expected = options.get("alpha", 1.0) * exact(a) @ exact(b) + (0 if bias is None else exact(bias))
        return {"D": relative(given, expected)}

    return call


def gemm_act(activation: str) -> Callable[[Any, Any], dict[str, float]]:
    def call(torch: Any, random: Any) -> dict[str, float]:
        from quack.gemm_interface import gemm_act

        a, b, c = random(200, 128), random(256, 128).mT, random(200, 256)
        before, after = gemm_act(a, b, C=c, activation=activation, tuned=False)
        expected = exact(a) @ exact(b) + exact(c)
        applied = {"relu": lambda x: x.relu(), "gelu_tanh_approx": lambda x: torch.nn.functional.gelu(
            x, approximate="tanh"), "swiglu": lambda x: torch.nn.functional.silu(x[:, ::2]) * x[:, 1::2]}  # fmt: skip
        return {"before": relative(before, expected), "after": relative(after, applied[activation](expected))}

    return call


def gemm_varlen(torch: Any, random: Any) -> dict[str, float]:
    from quack.gemm_interface import gemm

    ends = (0, 100, 130, 330)
    a, b = random(330, 128), random(3, 128, 128).mT
    given = gemm(a, b, cu_seqlens_m=torch.tensor(ends, dtype=torch.int32, device="cuda"), tuned=False)
    spans = [slice(*ends[i : i + 2]) for i in range(3)]
    return {"D": relative(given, torch.cat([exact(a)[s] @ exact(b)[i] for i, s in enumerate(spans)]))}


CALLS = {
    "rmsnorm forward and backward, 33 × 1024": rmsnorm(33, 1024),
    "rmsnorm forward and backward, 4 × 4096, float32": rmsnorm(4, 4096, "float32"),
    "rmsnorm forward and backward, 3 × 32768 (clusters)": rmsnorm(3, 32768),
    "layernorm forward, 33 × 768": layernorm,
    "softmax forward and backward, 20 × 1000": softmax(20, 1000),
    "softmax forward and backward, 2 × 65536 (clusters)": softmax(2, 65536),
    "cross entropy forward and backward, 16 × 1000": cross_entropy(1000),
    "cross entropy forward and backward, 16 × 50272 (clusters)": cross_entropy(50272),
    "topk 8 of 256, 17 rows": topk,
    "rotary embedding, 2 × 40 × 3 × 64": rotary,
    "GEMM 256 × 256 × 128": gemm(256, 256, 128),
    "GEMM 200 × 264 × 136, float16": gemm(200, 264, 136, dtype="float16"),
    "GEMM 512 × 512 × 128": gemm(512, 512, 128),
    "GEMM 128 × 256 × 64, bias, alpha 0.5": gemm(128, 256, 64, bias=True, alpha=0.5),
    "GEMM 128 × 128 × 512, split K 2": gemm(128, 128, 512, split_k=2),
    "GEMM + C, relu": gemm_act("relu"),
    "GEMM + C, gelu": gemm_act("gelu_tanh_approx"),
    "GEMM + C, swiglu": gemm_act("swiglu"),
    "GEMM, three row groups (varlen)": gemm_varlen,
}
CASES = [Call(arch, name, call) for arch in ("sm_90a", "sm_100a") for name, call in CALLS.items()]
