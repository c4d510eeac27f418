"""FlashAttention-4 on the emulator through its own interface: random inputs against float64, forward and backward.

The program is what a user writes for a GPU: `flash_attn_func` on CUDA tensors. See foreign.py for what runs the cases,
test_emulate.py for the marked test that runs a few.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

SOURCE = "flash-attn-4"
SMS = 16


@dataclass(frozen=True)
class Attention:
    """One call. lengths: (Sq, Skv) of each batch element of a call with cu_seqlens; otherwise all are q_len, k_len."""

    arch: str
    head_dim: int
    q_len: int = 256
    k_len: int = 256
    heads: int = 1
    kv_heads: int = 1
    head_dim_v: int | None = None
    batch: int = 1
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    sink: bool = False
    softcap: float = 0.0
    dtype: str = "bfloat16"
    lengths: tuple[tuple[int, int], ...] = ()
    used: tuple[int, ...] = ()  # seqused_k
    page_size: int = 0
    score_mod: str = ""
    backward: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # for the interface, as they are

    @property
    def v_dim(self) -> int:
        return self.head_dim_v or self.head_dim

    def __str__(self) -> str:
        shown = f"D {self.head_dim}" + (f"/{self.v_dim}" if self.head_dim_v else "")
        sizes = " + ".join(f"{q}×{k}" for q, k in self.lengths) or f"{self.q_len}×{self.k_len}"
        shown += f", B {self.batch}, H {self.heads}/{self.kv_heads}, S {sizes}"
        facts = ["causal"] * self.causal + [f"window {self.window}"] * (self.window != (None, None))
        facts += ["sinks"] * self.sink + [f"softcap {self.softcap:g}"] * bool(self.softcap)
        facts += [self.dtype] * (self.dtype != "bfloat16") + ["varlen"] * bool(self.lengths)
        facts += [f"seqused {self.used}"] * bool(self.used) + [f"pages of {self.page_size}"] * bool(self.page_size)
        facts += [self.score_mod] * bool(self.score_mod) + ["backward"] * self.backward
        facts += [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([shown, *facts])


def run(case: Attention) -> dict[str, float]:
    """Errors by output: relative L2 of O (and of dQ, dK, dV), largest absolute error of LSE."""
    import torch
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype).cuda()

    tokens = [sum(column) for column in zip(*case.lengths, strict=True)] if case.lengths else None
    q_shape, k_shape = ((n,) for n in tokens) if tokens else ((case.batch, n) for n in (case.q_len, case.k_len))
    q, k = random(*q_shape, case.heads, case.head_dim), random(*k_shape, case.kv_heads, case.head_dim)
    v = random(*k_shape, case.kv_heads, case.v_dim)
    options = dict(case.options, causal=case.causal, window_size=case.window, softcap=case.softcap, return_lse=True)
    if case.sink:
        options["learnable_sink"] = random(case.heads)
    if case.score_mod:
        options["score_mod"] = _SCORE_MODS[case.score_mod][0]()
    inputs = [x.requires_grad_() for x in (q, k, v)] if case.backward else [q, k, v]
    if case.lengths:
        for name, column in zip("qk", zip(*case.lengths, strict=True), strict=True):
            ends = torch.tensor((0, *column)).cumsum(0).to(torch.int32).cuda()
            options |= {f"cu_seqlens_{name}": ends, f"max_seqlen_{name}": max(column)}
    if case.used:
        options["seqused_k"] = torch.tensor(case.used, dtype=torch.int32, device="cuda")
    if case.page_size:
        inputs[1:], options["page_table"] = _paged(torch, k, v, case.page_size, generator)
    varlen = case.lengths or case.used or case.page_size
    out, lse = (flash_attn_varlen_func if varlen else flash_attn_func)(*inputs, **options)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    sink = options["learnable_sink"].cpu().double() if case.sink else None
    expected, expected_lse = reference(case, *exact, sink)
    errors = {"O": _relative(out, expected), "LSE": _largest(lse, expected_lse)}
    if case.backward:
        gradient = random(*out.shape)
        out.backward(gradient)
        expected.backward(gradient.cpu().double())
        errors |= {f"d{n}": _relative(x.grad, e.grad) for n, x, e in zip("QKV", inputs, exact, strict=True)}
    return errors


def _paged(torch: Any, k: Any, v: Any, size: int, generator: Any) -> tuple[list[Any], Any]:
    """K and V in pages of a pool in random order, and the table of pages."""
    batch, pages = k.shape[0], k.shape[1] // size
    table = torch.randperm(batch * pages, generator=generator)
    place = torch.argsort(table)
    pools = [x.reshape(batch * pages, size, *x.shape[2:])[place.cuda()].contiguous() for x in (k, v)]
    return pools, table.reshape(batch, pages).to(torch.int32).cuda()


def _relative(given: Any, expected: Any) -> float:
    return float((given.detach().cpu().double() - expected).norm() / expected.norm())


def _largest(given: Any, expected: Any) -> float:
    """Rows that see nothing have LSE -inf on both sides."""
    given = given.detach().cpu().double()
    same = (given == expected) | (given.isinf() & expected.isinf())
    return float((given - expected).abs().where(~same, 0 * expected.where(~same, 0 * given)).max())


def reference(case: Attention, q: Any, k: Any, v: Any, sink: Any = None) -> tuple[Any, Any]:
    """O and LSE in float64, laid out as the interface returns them."""
    import torch

    if case.lengths:
        parts, at = [], [0, 0]
        for sizes in case.lengths:
            qs, ks = (slice(start, start + n) for start, n in zip(at, sizes, strict=True))
            parts.append(_one(case, q[qs], k[ks], v[ks], sink))
            at = [start + n for start, n in zip(at, sizes, strict=True)]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], -1)
    used = case.used or (k.shape[1],) * k.shape[0]
    parts = [_one(case, q[b], k[b, :n], v[b, :n], sink) for b, n in enumerate(used)]
    return torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts])


def _one(case: Attention, q: Any, k: Any, v: Any, sink: Any) -> tuple[Any, Any]:
    """One batch element: q [Sq, H, D] → O [Sq, H, Dv], LSE [H, Sq]."""
    import torch

    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    rows, columns = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])[None]
    if case.score_mod:
        scores = _SCORE_MODS[case.score_mod][1](scores, rows, columns)
    diagonal = rows + k.shape[0] - q.shape[0]
    left, right = case.window
    right = 0 if case.causal else right
    hidden = torch.zeros(scores.shape[1:], dtype=torch.bool)
    if left is not None:
        hidden |= columns < diagonal - left
    if right is not None:
        hidden |= columns > diagonal + right
    scores = scores.masked_fill(hidden, -torch.inf)
    joined = scores if sink is None else torch.cat([scores, sink[:, None, None].expand(-1, q.shape[0], 1)], -1)
    lse = joined.logsumexp(-1)
    weights = (scores - lse.where(lse.isfinite(), 0 * lse)[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)), lse


def _relative_bias() -> Any:
    from cutlass import cute

    @cute.jit
    def score_mod(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        difference = (q_idx - kv_idx).to(score.dtype)
        return score - difference * difference * 1e-4

    return score_mod


_SCORE_MODS = {"distance bias": (_relative_bias, lambda s, i, j: s - ((i - j) ** 2) * 1e-4)}


def forwards(arch: str) -> list[Attention]:
    """What an architecture's forward kernels have in common, each case two to six tiles."""
    base = Attention(arch, 128)
    dims = [replace(base, head_dim=d, q_len=200, k_len=300, heads=2) for d in (64, 96, 128)]
    cases = [replace(case, causal=causal) for case in dims for causal in (False, True)]
    cases += [
        replace(base, head_dim=192, head_dim_v=128, q_len=200, k_len=300, causal=causal) for causal in (False, True)
    ]
    cases += [replace(base, head_dim=256, q_len=200, k_len=300, causal=causal) for causal in (False, True)]
    windows = [(100, 0), (100, 50), (None, 40), (70, None)]
    cases += [replace(base, q_len=300, k_len=300, window=window) for window in windows]
    cases += [replace(base, head_dim=64, q_len=130, k_len=400, window=(64, 0), sink=True)]
    cases += [replace(base, heads=2, sink=True), replace(base, heads=2, sink=True, causal=True)]
    cases += [replace(base, softcap=15.0), replace(base, dtype="float16", causal=True)]
    cases += [
        replace(base, heads=h, kv_heads=1, q_len=100, k_len=200, causal=True, options={"pack_gqa": pack})
        for h, pack in ((4, True), (4, False), (3, None), (8, True))
    ]
    varlen = ((100, 150), (1, 300), (200, 200))
    cases += [replace(base, lengths=varlen, heads=2, causal=causal) for causal in (False, True)]
    cases += [replace(base, batch=2, used=(77, 256)), replace(base, batch=2, page_size=128, k_len=384)]
    cases += [replace(base, batch=2, page_size=16, used=(200, 256), q_len=1, heads=8)]
    cases += [replace(base, score_mod="distance bias")]
    return cases


def backwards(arch: str) -> list[Attention]:
    base = Attention(arch, 128, backward=True)
    cases = [replace(base, head_dim=d, causal=c) for d in (64, 128) for c in (False, True)]
    cases += [replace(base, heads=2, q_len=150, k_len=200, causal=True), replace(base, window=(64, 0))]
    cases += [replace(base, head_dim=192, head_dim_v=128), replace(base, head_dim=96), replace(base, head_dim=256)]
    return cases


CASES = [
    *forwards("sm_90a"),
    *forwards("sm_100a"),
    Attention("sm_100a", 128, q_len=512, k_len=512),  # a CTA pair
    Attention("sm_100a", 128, q_len=512, k_len=512, causal=True),
    Attention("sm_100a", 256, q_len=256, k_len=256),
    Attention("sm_100a", 128, q_len=64, k_len=1024, heads=2, options={"num_splits": 3}),
    Attention("sm_100a", 64, q_len=1, k_len=600, heads=8, causal=True, options={"num_splits": 2}),
    *backwards("sm_90a"),
    *backwards("sm_100a"),
]
