"""Outputs against the reference: figures, bounds and a verdict.

A kernel passes when all of these hold. Every figure is over the whole tensor, with O as attention: an un-normalized O
enters as O * exp(m - LSE).
  rel_err            relative L2 error of O: at most twice that of reference.rounding_model, which rounds what a kernel
                     of this dtype must round and nothing else. Where that model is exact (one key), float32's own
                     error, 2^-20, is allowed.
  cos                cosine similarity with the reference: at least 0.99999.
  lse_max_abs_err    at most 1e-4; rows that see no key have exactly -inf, and no others.
  m                  exactly -inf in the rows that see no key, and at most LSE + 1e-4 (a kernel that returns it).
  written            every element of every output, and nothing in the guard regions around them.
  hazards            the emulator reported none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import DTYPES, Output
from .compile import Binary
from .emulator.errors import Deadlock, EmulatorError, Hazard
from .mask import TileCounts
from .reference import Attention, attention, normalize, rounding_model
from .run import EMULATED_SMS, Prepare, run_observed
from .signature import inputs
from .spec import KernelSpec
from .tiles import count_tiles, seen_of

COS_MIN = 0.99999
REL_ERR_FACTOR = 2.0
REL_ERR_FLOOR = 2.0**-20  # ex2.approx errs by 2 ulp, rcp.approx by 1, LSE is a float32
LSE_ABS_MAX = 1e-4


@dataclass(frozen=True)
class Figures:
    """How far outputs are from the reference; rel_err_model: relative L2 error of the rounding model."""

    cos: float
    rel_err: float
    rel_err_model: float
    max_abs_err: float
    lse_max_abs_err: float | None  # None: the kernel returns no LSE
    lse_infinite_wrong: int  # rows whose LSE is infinite in one and not the other
    m_wrong: int

    @property
    def rel_err_bound(self) -> float:
        return max(REL_ERR_FACTOR * self.rel_err_model, REL_ERR_FLOOR)


@dataclass(frozen=True)
class Report:
    """One verification. shape: (B, Hq, Hkv, Sq, Skv[, Skv2]); figures: None when the kernel did not finish; tiles: KV
    tiles that its query tiles visited, that some row of theirs saw, that there were, and that its CTAs loaded.
    """

    kernel: str
    shape: tuple[int, ...]
    backend: str
    seed: int
    figures: Figures | None
    unwritten: dict[str, int]
    outside: dict[str, int]
    hazards: int
    seconds: float
    failures: tuple[str, ...] = field(default=())
    tiles: TileCounts | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """A row for JSON: a figure that is missing or not finite is None, and `failures` says why."""
        figures = self.figures
        names = ("cos", "rel_err", "max_abs_err", "lse_max_abs_err")
        return {
            "kernel": self.kernel,
            "shape": ",".join(map(str, self.shape)),
            "backend": self.backend,
            **{name: _finite(getattr(figures, name, None)) for name in names},
            "hazards": self.hazards,
            "seconds": round(self.seconds, 4),
            "passed": self.passed,
            "rel_err_bound": _finite(figures.rel_err_bound if figures else None),
            "seed": self.seed,
            "failures": list(self.failures),
            "tiles": self.tiles._asdict() if self.tiles else None,
        }

    def __str__(self) -> str:
        where = f"{self.kernel} [{','.join(map(str, self.shape))}] on {self.backend}, seed {self.seed}"
        return f"{where}: " + ("passed" if self.passed else "; ".join(self.failures))


def verify_kernel(
    binary: Binary,
    shape: Sequence[int],
    *,
    backend: str = "emulator",
    seed: int = 0,
    strict: bool = True,
    prepare: Prepare | None = None,
    trace: Any = None,
    sms: int = EMULATED_SMS,
) -> Report:
    """Run the kernel on random data of `shape` (B, Hq, Hkv, Sq, Skv[, Skv2]) and compare it with the reference.

    strict: with the emulator's hazard checks; prepare, trace, sms: see run_observed.
    Hazards and launch failures are failed reports, not exceptions; a shape that the kernel was not built for raises
    CallError, and a machine without the GPU asked for raises RunError.
    """
    spec = binary.spec
    shape = tuple(int(extent) for extent in shape)[: 4 + spec.kv_sources]
    operands = random_operands(spec, shape, seed)
    start = time.perf_counter()
    try:
        run = run_observed(binary, **operands, backend=backend, strict=strict, prepare=prepare, trace=trace, sms=sms)
    except EmulatorError as error:
        hazards = int(isinstance(error, (Hazard, Deadlock)))
        failure = f"{type(error).__name__}: {error}"
        return Report(spec.name, shape, backend, seed, None, {}, {}, hazards, time.perf_counter() - start, (failure,))
    figures = compare(binary, operands, run.outputs)
    unwritten = {output.name: output.unwritten() for output in run.outputs}
    outside = {output.name: output.outside() for output in run.outputs}
    failures = (*judge(figures), *judge_writes(run.outputs))
    tiles = count_tiles(binary.plan, operands)
    return Report(spec.name, shape, backend, seed, figures, unwritten, outside, 0, run.seconds, failures, tiles)


def random_inputs(
    dtype: str, shape: Sequence[int], head_dim: int, head_dim_v: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K, V of a shape (B, Hq, Hkv, Sq, Skv): standard normal, rounded to dtype; the same on every machine."""
    batch, q_heads, kv_heads, queries, keys = shape
    rng = np.random.default_rng([seed, *shape, head_dim, head_dim_v])
    shapes = (
        (batch, queries, q_heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, head_dim_v),
    )
    q, k, v = (rng.standard_normal(size, dtype=np.float32).astype(DTYPES[dtype]) for size in shapes)
    return q, k, v


def random_operands(spec: KernelSpec, shape: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """Every input of a kernel by name, of a shape (B, Hq, Hkv, Sq, Skv) and Skv2 where there is a second source.

    Q, K, V are random_inputs. Of several batch entries the last has no keys, the others have lengths from 1 on. Past a
    length K is NaN, which must not show, and V is large but finite: it meets P = 0. (K that is V as well is finite.)
    limit2 rises with the query in even batch entries and is random in odd ones. Sinks are normal with twice the
    deviation of a score.
    """
    batch, q_heads, _, queries, *keys = shape = tuple(shape)[: 4 + spec.kv_sources]
    rng = np.random.default_rng([seed, *shape, spec.head_dim, spec.v_dim, 1])
    given = dict(zip("qkv", random_inputs(spec.dtype, shape[:5], spec.head_dim, spec.v_dim, seed), strict=True))
    if spec.kv_sources == 2:
        other = (*shape[:4], keys[1])
        _, given["k2"], given["v2"] = random_inputs(spec.dtype, other, spec.head_dim, spec.v_dim, seed + 1)
        ramp = (np.arange(queries) + 1) * keys[1] // queries
        limits = [ramp if b % 2 == 0 else rng.integers(0, keys[1] + 2, queries) for b in range(batch)]
        given["limit2"] = np.array(limits, np.int32)
    for index, name in ((0, "seqlens"), (1, "seqlens2"))[: len(keys)]:
        lengths = rng.integers(1, keys[index] + 1, batch)
        lengths[1:][-1:] = 0
        given[name] = lengths.astype(np.int32)
        if spec.seqlens:
            for b, length in enumerate(lengths):
                given["k" + name[7:]][b, length:] = 100 if spec.kv_shared else np.nan
                given["v" + name[7:]][b, length:] = 1e4
    given["sink"] = 2 * rng.standard_normal(q_heads, dtype=np.float32)
    return {parameter.name: given[parameter.name] for parameter in inputs(spec)}


def compare(binary: Binary, operands: Mapping[str, np.ndarray], outputs: Sequence[Output]) -> Figures:
    """Figures of a call's outputs against the reference and its rounding model, with the default scale."""
    spec = binary.spec
    scale = spec.head_dim**-0.5
    arrays = {output.name: output.array for output in outputs}
    q, k = operands["q"], operands["k"]
    v = operands.get("v", k[..., : spec.v_dim])
    seen = seen_of(spec, operands)
    with np.errstate(invalid="ignore"):  # scores of keys past a length may be NaN; they are hidden
        exact = attention(q, k, v, scale, seen=seen)
        rules = {"unnormalized": spec.unnormalized, "seen": seen, "skip_log2": binary.skip_log2}
        model = rounding_model(q, k, v, scale, binary.tile_n, **rules)
    modelled = model.merged() if spec.unnormalized else model.o.astype(np.float64)
    o = arrays["o"].astype(np.float64)
    if spec.unnormalized:
        o = normalize(o, arrays["lse"], arrays["m"])
    lse_error, lse_wrong = _compare_lse(arrays.get("lse"), exact)
    return Figures(
        cos=cosine(o, exact.o),
        rel_err=relative_error(o, exact.o),
        rel_err_model=relative_error(modelled, exact.o),
        max_abs_err=float(np.max(np.abs(o - exact.o))),
        lse_max_abs_err=lse_error,
        lse_infinite_wrong=lse_wrong,
        m_wrong=_count_wrong_m(arrays["m"], arrays["lse"], exact) if "m" in arrays else 0,
    )


def cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    """Cosine similarity; 1 when both are zero, 0 when one is."""
    norms = np.linalg.norm(actual.ravel()) * np.linalg.norm(expected.ravel())
    if norms == 0:
        return float(not actual.any() and not expected.any())
    with np.errstate(invalid="ignore"):  # an infinite element makes it NaN, which misses the bound
        return float(np.dot(actual.ravel(), expected.ravel()) / norms)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over that of the expected; infinite when only the expected is zero."""
    difference, norm = np.linalg.norm((actual - expected).ravel()), np.linalg.norm(expected.ravel())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference / norm)


def _compare_lse(lse: np.ndarray | None, exact: Attention) -> tuple[float | None, int]:
    if lse is None:
        return None, 0
    infinite = np.isneginf(exact.lse)
    wrong = int(np.count_nonzero(np.isneginf(lse) != infinite))
    both = ~infinite & ~np.isneginf(lse)
    errors = np.abs(lse[both].astype(np.float64) - exact.lse[both])
    return (float(errors.max()) if errors.size else 0.0), wrong  # max keeps a NaN


def _count_wrong_m(m: np.ndarray, lse: np.ndarray, exact: Attention) -> int:
    infinite = np.isneginf(exact.m)
    with np.errstate(invalid="ignore"):
        good = np.where(infinite, np.isneginf(m), np.isfinite(m) & (m <= lse + LSE_ABS_MAX))
    return int(np.count_nonzero(~good))


def judge(figures: Figures) -> list[str]:
    """Which figures miss their bounds, each with both. A NaN misses."""
    failures = []
    bound = figures.rel_err_bound
    if not figures.rel_err <= bound:
        source = f"{REL_ERR_FACTOR:g} x {figures.rel_err_model:.3e} of the rounding model"
        source = source if bound > REL_ERR_FLOOR else "float32"
        failures.append(f"rel_err {figures.rel_err:.3e} > {bound:.3e} ({source})")
    if not figures.cos >= COS_MIN:
        failures.append(f"cos {figures.cos:.7f} < {COS_MIN}")
    if figures.lse_max_abs_err is not None and not figures.lse_max_abs_err <= LSE_ABS_MAX:
        failures.append(f"lse_max_abs_err {figures.lse_max_abs_err:.3e} > {LSE_ABS_MAX:g}")
    if figures.lse_infinite_wrong:
        failures.append(f"lse: {figures.lse_infinite_wrong} rows are -inf in one of kernel and reference only")
    if figures.m_wrong:
        failures.append(f"m: {figures.m_wrong} rows are not finite, above LSE, or not -inf where no key is seen")
    return failures


def judge_writes(outputs: Sequence[Output]) -> list[str]:
    """Elements that were not written, or written outside."""
    failures = []
    for output in outputs:
        if output.unwritten():
            failures.append(f"{output.name}: {output.unwritten()} of {output.array.size} elements were not written")
        if output.outside():
            failures.append(f"{output.name}: {output.outside()} elements outside of it were written")
    return failures


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
