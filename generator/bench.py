"""Kernels and peers in one run on the same tensors, each checked before it is timed.

FLOP of attention = 2 * Hq * pairs * (D + Dv), with the (query, key) pairs that the masks leave. The roof is a matrix
product of 8192^3 in bf16, timed by turns with the kernels, so a fraction of it is of the same minute. Of a kernel with
split_kv, which is for decoding, the bytes that a call must move count too, beside what a large copy moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .arrays import output_layout, view_of
from .budget import ELEMENT_BYTES
from .compile import Binary
from .launch import Launcher, RunError, check_device
from .mask import mask_of, seen_keys
from .matrix import Shape, with_keys2
from .peers import Operands, Peer, Refused, shortened
from .plan import Plan
from .run import run_kernel
from .sample import Sample, host, take_sample
from .signature import inputs
from .spec import KernelSpec
from .timing import Clock, Launch, Timing, interleaved
from .verify import LSE_ABS_MAX

HIDDEN = 2048  # columns of all query heads together
TOKENS = ((4, 4096), (1, 16384))  # batch, tokens
DECODED = ((64, 4096), (8, 32768), (2, 131072))  # batch, keys: of one query, 262144 keys in all
ROOF = 8192  # rows, columns and inner extent of the roof's product
COPIED = 1 << 32  # bytes: some 70 times what L2 holds
O_ERR_MAX = 4e-3  # relative L2, of a sample: bf16 rounds P and O to about 2.2e-3
REPS = 20  # even, see timing.interleaved
OURS, THE_ROOF, THE_COPY = "bespoke", "roof", "copy"
NO_GPU = "bench and tune measure on a GPU: run them where there is one (`bespoke verify` needs none)"

Kernel = Callable[..., tuple[Any, ...]]  # run_kernel of a Binary: operands by name, out=tensors


@dataclass(frozen=True)
class Figure:
    """What became of one contender. status: "measured", or "wrong", "refused", "missing" with a message that says why.

    o_err: relative L2 error of O on the sample; lse_err: absolute, of a kernel that returns LSE.
    """

    name: str
    status: str
    message: str = ""
    o_err: float | None = None
    lse_err: float | None = None
    timing: Timing | None = None

    def tflops(self, flop: float) -> float | None:
        """By the median."""
        return rate(flop, self.timing.median) if self.timing else None


@dataclass(frozen=True)
class Row:
    """One kernel on one shape. flop: of one launch; roof: TFLOP/s of the roof's product; moved: bytes of one launch,
    see bytes_of; copy: GB/s of a large copy, bytes read and written, where it was timed.
    """

    plan: Plan
    shape: Shape
    flop: int
    roof: float
    ours: Figure
    peers: tuple[Figure, ...]
    moved: int = 0
    copy: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """GB/s, by the median."""
        return self.moved / self.ours.timing.median / 1e6 if self.ours.timing else None

    @property
    def of_copy(self) -> float | None:
        return self.bandwidth / self.copy if self.copy and self.bandwidth is not None else None

    @property
    def best_peer(self) -> Figure | None:
        return min((peer for peer in self.peers if peer.timing), key=lambda peer: peer.timing.median, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer; None where one of them was not measured."""
        best = self.best_peer
        return best.timing.median / self.ours.timing.median if best and self.ours.timing else None

    @property
    def of_roof(self) -> float | None:
        rated = self.ours.tflops(self.flop)
        return None if rated is None else rated / self.roof

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Milliseconds and TFLOP/s: median, min, max."""
        best = self.best_peer
        return {
            "kernel": self.plan.kernel_name,
            "digest": self.plan.spec.digest,
            "spec": self.plan.spec.non_default(),
            "tiling": asdict(self.plan.tiling),
            "shape": str(self.shape),
            "flop": self.flop,
            "roof_tflops": self.roof,
            "bytes": self.moved,
            "gb_s": self.bandwidth,
            "copy_gb_s": self.copy,
            "of_copy": self.of_copy,
            "ours": _figure_dict(self.ours, self.flop),
            "peers": [_figure_dict(peer, self.flop) for peer in self.peers],
            "of_roof": self.of_roof,
            "best_peer": best.name if best else None,
            "ratio": self.ratio,
        }


def _figure_dict(figure: Figure, flop: int) -> dict[str, Any]:
    names = ("name", "status", "message", "o_err", "lse_err")
    facts: dict[str, Any] = {name: getattr(figure, name) for name in names}
    facts |= {name: None for name in names[3:] if facts[name] is None or not math.isfinite(facts[name])}
    timing = figure.timing
    spread = (timing.median, timing.max, timing.min) if timing else ()
    facts["ms"] = timing.as_dict() if timing else None
    named = zip(("median", "min", "max"), spread, strict=False)
    facts["tflops"] = {name: rate(flop, time) for name, time in named} if timing else None
    return facts


def rate(flop: float, milliseconds: float) -> float:
    """TFLOP/s."""
    return flop / milliseconds / 1e9


# --- a case -----------------------------------------------------------------------------------------------------------


def default_shapes(spec: KernelSpec) -> list[Shape]:
    """Batch 4 of 4096 tokens and batch 1 of 16384, with heads that make the hidden size 2048: max(1, 2048 // D), and a
    whole group of them at least. With split_kv decoding steps: one query and 262144 keys over the batch, one KV head
    for a group, eight for MHA.
    """
    group = spec.q_heads_per_kv
    if spec.split_kv:
        heads = 1 if group > 1 else 8
        return [with_keys2(Shape(batch, heads * group, heads, 1, keys), spec) for batch, keys in DECODED]
    kv_heads = max(1, max(1, HIDDEN // spec.head_dim) // group)
    return [with_keys2(Shape(batch, kv_heads * group, kv_heads, tokens, tokens), spec) for batch, tokens in TOKENS]


def pairs(spec: KernelSpec, shape: Shape, rows: Mapping[str, Any]) -> int:
    """(query, key) pairs of one head that are not masked, over the batch. rows: seqlens, seqlens2 and limit2 of the
    call where the kernel takes them, as NumPy.
    """
    mask, count = mask_of(spec), 0
    for b in range(shape.batch):
        length = int(rows["seqlens"][b]) if "seqlens" in rows else shape.keys
        if mask.windowed:
            spans = (seen_keys(mask, token, shape.queries, length) for token in range(shape.queries))
            count += sum(max(end - first, 0) for first, end in spans)
        else:
            count += shape.queries * length
        if spec.kv_sources == 2:
            length = int(rows["seqlens2"][b]) if "seqlens2" in rows else shape.keys2
            limits = rows["limit2"][b].tolist() if "limit2" in rows else [length] * shape.queries
            count += sum(min(max(limit, 0), length) for limit in limits)
    return count


def flop_of(spec: KernelSpec, shape: Shape, rows: Mapping[str, Any]) -> int:
    """Floating-point operations of a call: a multiplication and an addition a pair and column of K and of V."""
    return 2 * shape.q_heads * pairs(spec, shape, rows) * (spec.head_dim + spec.v_dim)


def bytes_of(spec: KernelSpec, shape: Shape, rows: Mapping[str, Any]) -> int:
    """Bytes that a call must move: the keys that some query sees once, with their V, Q, and the outputs. rows: as pairs
    takes them.
    """
    mask, count = mask_of(spec), 0
    for b in range(shape.batch):
        length = int(rows["seqlens"][b]) if "seqlens" in rows else shape.keys
        first, _ = seen_keys(mask, 0, shape.queries, length)
        _, end = seen_keys(mask, shape.queries - 1, shape.queries, length)
        count += max(end - first, 0)
        if spec.kv_sources == 2:
            length = int(rows["seqlens2"][b]) if "seqlens2" in rows else shape.keys2
            most = int(rows["limit2"][b].max()) if "limit2" in rows else length
            count += min(max(most, 0), length)
    columns = spec.head_dim + (0 if spec.kv_shared else spec.v_dim)
    tokens = shape.batch * shape.queries * shape.q_heads
    stored = spec.v_dim * (4 if spec.unnormalized else ELEMENT_BYTES) + 4 * spec.lse + 4 * spec.unnormalized
    return count * shape.kv_heads * columns * ELEMENT_BYTES + tokens * (spec.head_dim * ELEMENT_BYTES + stored)


def random_tensors(spec: KernelSpec, shape: Shape, seed: int, device: str) -> dict[str, Any]:
    """Every input of a kernel by name, as tensors: Q, K, V and sinks standard normal; KV lengths from half of the keys
    to all of them; limit2 rising with the query from none to all of the second source.
    """
    import torch

    draw = torch.Generator(device=device).manual_seed(seed)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32, "int32": torch.int32}
    sizes = {"batch": shape.batch, "q_heads": shape.q_heads, "kv_heads": shape.kv_heads, "queries": shape.queries}
    sizes |= {"keys": shape.keys, "keys2": shape.keys2, "head_dim": spec.head_dim, "head_dim_v": spec.v_dim}
    made = {}
    for parameter in inputs(spec):
        extents = parameter.extents(sizes)
        if parameter.name == "limit2":
            ramp = torch.arange(1, shape.queries + 1, device=device) * shape.keys2 // shape.queries
            made["limit2"] = ramp.to(torch.int32).expand(extents).contiguous()
        elif parameter.dtype == "int32":
            keys = shape.keys if parameter.name == "seqlens" else shape.keys2
            lengths = torch.randint(keys // 2, keys + 1, extents, generator=draw, device=device)
            made[parameter.name] = lengths.to(torch.int32)
        else:
            normal = torch.randn(extents, generator=draw, device=device)
            made[parameter.name] = normal.to(dtypes[parameter.dtype])
    return made


def bench_case(
    plan: Plan,
    kernel: Kernel,
    shape: Shape,
    peers: Sequence[Peer],
    roof: Launch,
    clock: Clock,
    *,
    reps: int = REPS,
    seed: int = 0,
    device: str = "cuda",
    copy: Launch | None = None,
) -> Row:
    """Check and time a kernel, the peers and the roof on random tensors of a shape; and a copy (device_copy), if given.
    A peer that the clock cannot time is refused.
    """
    spec = plan.spec
    operands = random_tensors(spec, shape, seed, device)
    rows = {name: host(operands[name]) for name in ("seqlens", "seqlens2", "limit2") if name in operands}
    flop = flop_of(spec, shape, rows)
    sample = take_sample(spec, operands, seed)
    figures = [check_kernel(spec, kernel, operands, sample)]
    contenders: dict[str, Launch] = {THE_ROOF: roof} | ({THE_COPY: copy} if copy else {})
    if figures[0].status == "measured":
        contenders[OURS] = lambda: kernel(**operands)
    for figure, call in _asked_peers(peers, spec, shape, operands, sample):
        if call is not None and (why := _untimed(call, clock)):
            figure, call = Figure(figure.name, "refused", why, figure.o_err), None
        figures.append(figure)
        if call is not None:
            contenders[figure.name] = call
    roof()
    if copy:
        copy()
    timings = interleaved(contenders, clock, reps)
    ours, *others = [Figure(**{**vars(figure), "timing": timings.get(figure.name)}) for figure in figures]
    copied = 2 * COPIED / timings[THE_COPY].median / 1e6 if copy else None
    roof_rate = rate(2 * ROOF**3, timings[THE_ROOF].median)
    return Row(plan, shape, flop, roof_rate, ours, tuple(others), bytes_of(spec, shape, rows), copied)


def _untimed(call: Launch, clock: Clock) -> str:
    """Why the clock cannot time a call that has run; "" where it can."""
    try:
        clock.milliseconds(call, 1)
    except Exception as error:  # whatever a peer raises is its answer
        return f"cannot be timed: {shortened(error)}"
    return ""


def _asked_peers(
    peers: Sequence[Peer], spec: KernelSpec, shape: Shape, operands: Operands, sample: Sample
) -> Iterator[tuple[Figure, Launch | None]]:
    """What each peer answers, and what to time; a last resort is asked when no other one is right, or alone."""
    answered = False
    for peer in sorted(peers, key=lambda peer: peer.last_resort):
        if peer.last_resort and answered:
            continue
        try:
            call, o = peer.call(spec, shape, operands)
        except Refused as why:
            yield Figure(peer.name, why.status, str(why)), None
            continue
        error = sample.o_error(o)
        if error <= O_ERR_MAX:
            answered = True
            yield Figure(peer.name, "measured", o_err=error), call
        else:
            yield Figure(peer.name, "wrong", f"O is off by {error:.2e}, more than {O_ERR_MAX:g}", error), None


def check_kernel(spec: KernelSpec, kernel: Kernel, operands: Operands, sample: Sample) -> Figure:
    """Run a kernel into outputs full of NaN and compare the sample; "measured" when it may be timed."""
    named = poisoned(spec, operands["q"])
    kernel(**operands, out=tuple(named.values()))
    failures = [f"{name}: {count} elements are NaN or were not written" for name, count in _nans(named) if count]
    o_err = sample.o_error(**named)
    lse_err = sample.lse_error(named["lse"]) if "lse" in named else None
    if not o_err <= O_ERR_MAX:
        failures.append(f"O is off by {o_err:.2e}, more than {O_ERR_MAX:g}")
    if lse_err is not None and not lse_err <= LSE_ABS_MAX:
        failures.append(f"LSE is off by {lse_err:.2e}, more than {LSE_ABS_MAX:g}")
    return Figure(OURS, "wrong" if failures else "measured", "; ".join(failures), o_err, lse_err)


def poisoned(spec: KernelSpec, q: Any) -> dict[str, Any]:
    """Outputs of a call by name, on Q's device, every element NaN."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
    return {
        name: torch.full(shape, float("nan"), dtype=dtypes[dtype], device=q.device)
        for name, shape, dtype in output_layout(spec, view_of("q", q))
    }


def _nans(tensors: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    return ((name, int(tensor.isnan().sum())) for name, tensor in tensors.items())


# --- a GPU ------------------------------------------------------------------------------------------------------------


def require_gpu(arch: str) -> None:
    """Raise RunError unless there is a GPU for `arch` and a PyTorch that sees it."""
    check_device(arch, 0, NO_GPU)
    try:
        import torch
    except ImportError as error:
        raise RunError(f"bench and tune need PyTorch with CUDA ({error}); pip install torch") from None
    if not torch.cuda.is_available():
        raise RunError(f"PyTorch {torch.__version__} sees no CUDA device; install a build of it with CUDA")


def gemm_roof() -> Launch:
    """A product of two random 8192 x 8192 bf16 matrices on the GPU."""
    import torch

    a, b = (torch.randn(ROOF, ROOF, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=c)


def device_copy() -> Launch:
    """A copy of COPIED bytes on the GPU."""
    import torch

    source = torch.randn(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def kernel_of(binary: Binary) -> Kernel:
    """The binary as a function of the operands by name, as users call it."""

    launcher = Launcher(binary)

    def kernel(out: Sequence[Any] | None = None, **operands: Any) -> tuple[Any, ...]:
        return launcher(operands) if out is None else run_kernel(binary, **operands, out=out)

    return kernel


def machine() -> dict[str, str]:
    """What was measured on, and when: device, date, PyTorch's and its CUDA's version."""
    import datetime

    import torch

    return {
        "device": torch.cuda.get_device_name(0),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
