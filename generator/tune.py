"""The fastest plan by measurement: candidates of a specification compiled, checked, timed in one run, the winner kept.

Candidates are the tiles that the model ranks first, and the one that the table has now, each with every
schedule (turns, beside_pv) that it can have. How far the model's own pick is from the measured best says what the table
is worth, and what the model is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .arch import ARCHS, Arch
from .bench import Kernel, check_kernel, default_shapes, flop_of, random_tensors, rate
from .budget import Tiling
from .chunks import budget_of
from .column_order import column_order
from .columns import column_tilings
from .launch import RunError
from .plan import Plan, check_implemented, plan_tiling, strategies
from .sample import take_sample
from .spec import KernelSpec, SpecError, load_spec
from .timing import Clock, Launch, Timing, geometric_mean, interleaved
from .tuned import Winner, mask_kind
from .warpgroups import consumers, default_schedule, is_winner, model_preference, warpgroup_tilings

ARCH = "sm_90a"  # the architecture whose planner reads tuned.json
HEAD_DIMS = tuple(range(16, 257, 16))
MASKS = ("full", "causal")
CANDIDATES = 4
REPS = 8
SPAN_MS = 3.0
COMPILING = 0.5  # of the time that a run may take, at most

Tokens = int
Build = Callable[[Plan], Kernel]


@dataclass(frozen=True)
class Case:
    """A specification and the plans that are compared. picked: what the model takes, one of them."""

    spec: KernelSpec
    plans: tuple[Plan, ...]
    picked: Tiling

    @property
    def mask(self) -> str:
        return mask_kind(self.spec)

    def __str__(self) -> str:
        dims = str(self.spec.head_dim)
        dims += f"/{self.spec.v_dim}" if self.spec.v_dim != self.spec.head_dim else ""
        return f"head_dim {dims} {self.mask}"


@dataclass(frozen=True)
class Candidate:
    """One plan of a case, measured. timings and tflops: by number of tokens; failure: why it was not timed; wrong: it
    compiled, and its results are not attention.
    """

    tiling: Tiling
    timings: Mapping[Tokens, Timing]
    tflops: Mapping[Tokens, float]
    failure: str = ""
    wrong: bool = False

    @property
    def score(self) -> float:
        """Milliseconds, the geometric mean over the shapes: the smallest wins."""
        return geometric_mean([timing.median for timing in self.timings.values()])


@dataclass(frozen=True)
class Result:
    """A case, measured: its candidates, those that were timed first, the fastest before the others."""

    case: Case
    candidates: tuple[Candidate, ...]

    @property
    def timed(self) -> list[Candidate]:
        return [item for item in self.candidates if not item.failure]

    @property
    def best(self) -> Candidate | None:
        return min(self.timed, key=lambda item: item.score, default=None)

    @property
    def picked(self) -> Candidate | None:
        """The model's pick; None when it was not timed."""
        return next((item for item in self.timed if item.tiling == self.case.picked), None)

    @property
    def of_best(self) -> float | None:
        """Speed of the model's pick as a fraction of the best one's."""
        return self.best.score / self.picked.score if self.picked and self.best else None

    def winner(self, device: str, date: str) -> Winner | None:
        """The record for tuned.json; None when nothing was timed."""
        best, spec = self.best, self.case.spec
        if best is None:
            return None
        tiling = best.tiling
        tflops = {str(tokens): round(value) for tokens, value in best.tflops.items()}
        tile = (tiling.tile_m, tiling.tile_n, tiling.turns, tiling.beside_pv, tiling.v_keys)
        return Winner(spec.arch, spec.head_dim, spec.v_dim, self.case.mask, *tile, tflops, device, date)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every candidate."""
        return {
            "head_dim": self.case.spec.head_dim,
            "head_dim_v": self.case.spec.v_dim,
            "mask": self.case.mask,
            "picked_of_best": self.of_best,
            "candidates": [
                {
                    **asdict(item.tiling),
                    "picked": item.tiling == self.case.picked,
                    "failure": item.failure,
                    "wrong": item.wrong,
                    "ms": {tokens: timing.as_dict() for tokens, timing in item.timings.items()},
                    "tflops": dict(item.tflops),
                }
                for item in self.candidates
            ],
        }


def picked_of_best(results: Iterable[Result]) -> float:
    """The geometric mean over the cases whose pick was timed; NaN of none."""
    return geometric_mean([value for value in (result.of_best for result in results) if value is not None])


# --- what to compare --------------------------------------------------------------------------------------------------


def parse_head_dims(text: str) -> list[tuple[int, int]]:
    """ "64,128,192/128" -> (head_dim, head_dim_v) each. Raises SpecError."""
    found = []
    for word in text.split(","):
        dims = word.strip().split("/")
        if len(dims) > 2 or not all(dim.isdecimal() for dim in dims):
            limit = "must be whole numbers, or pairs head_dim/head_dim_v, separated by commas"
            raise SpecError("head_dim", word, limit, "for example --head-dim 64,128,192/128")
        found.append((int(dims[0]), int(dims[-1])))
    return list(dict.fromkeys(found))


def parse_masks(text: str) -> list[str]:
    """ "full,causal" -> names. Raises SpecError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in MASKS:
            raise SpecError("mask", word, f"must be of {', '.join(MASKS)}", "for example --mask full,causal")
    return list(dict.fromkeys(words))


def tuning_cases(head_dims: Sequence[tuple[int, int]], masks: Sequence[str], tiles: int) -> list[Case]:
    """One a head_dim and mask, with the schedules of the model's first `tiles` tiles, and of the one that the table has
    now. Raises SpecError for what cannot be planned.
    """
    cases = []
    for head_dim, head_dim_v in head_dims:
        for mask in masks:
            spec = load_spec(arch=ARCH, head_dim=head_dim, head_dim_v=head_dim_v, causal=mask == "causal")
            check_implemented(spec)
            ranked = ranked_tiles(spec, ARCHS[ARCH])
            compared = ranked[:tiles] + [tile for tile in ranked[tiles:] if is_winner(spec, tile)]
            plans = [plan_tiling(spec, item) for tile in compared for item in schedules(tile, ARCHS[ARCH])]
            cases.append(Case(spec, tuple(plans), ranked[0]))
    return cases


def ranked_tiles(spec: KernelSpec, arch: Arch) -> list[Tiling]:
    """The best candidate of each (tile_m, tile_n) that fits, by the model alone, best first, with the schedule that the
    planner takes where nothing was measured.
    """
    if strategies(spec) == ("columns",):
        return _ranked_columns(spec, arch)
    fitting = [tiling for tiling in warpgroup_tilings(spec, arch) if budget_of(spec, arch, tiling).fits]
    best: dict[tuple[int, int], Tiling] = {}
    for tiling in sorted(fitting, key=lambda item: model_preference(spec, arch, item)):
        usual = replace(tiling, **default_schedule(spec, arch, tiling.tile_m, tiling.tile_n))
        best.setdefault((tiling.tile_m, tiling.tile_n), usual)
    return list(best.values())


def _ranked_columns(spec: KernelSpec, arch: Arch) -> list[Tiling]:
    """ranked_tiles of the strategy columns, whose order of preference is the model; slices of V belong to a tile."""
    fitting = [tiling for tiling in column_tilings(spec, arch) if budget_of(spec, arch, tiling).fits]
    best: dict[tuple[int, int, int], Tiling] = {}
    for tiling in sorted(fitting, key=lambda item: column_order(spec, arch, item)):
        best.setdefault((tiling.tile_m, tiling.tile_n, tiling.v_keys), tiling)
    return list(best.values())


def schedules(tiling: Tiling, arch: Arch) -> list[Tiling]:
    """The tiling as it is, then the other ways, in turns or not, the softmax beside PV or after it: one consumer has no
    other to take turns with, and columns have one schedule. Whether O is rescaled lazily does not matter where nobody
    looks for maxima.
    """
    if tiling.strategy == "columns" or consumers(tiling, arch) == 1:
        return [tiling]
    others = [replace(tiling, turns=turns, beside_pv=beside) for turns in (False, True) for beside in (False, True)]
    return list(dict.fromkeys([tiling, *others]))


# --- measuring --------------------------------------------------------------------------------------------------------


class Deadline:
    """Seconds that a run may take, from now on; None: as many as it likes. Compiling may take a part of them."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._start, self._seconds = now, now(), seconds

    def passed(self, part: float = 1.0) -> bool:
        return self._seconds is not None and self._now() - self._start >= part * self._seconds


def compiled_cases(
    cases: Sequence[Case], builds: Iterable[tuple[int, str]], deadline: Deadline
) -> tuple[list[tuple[Case, list[str]]], list[Case]]:
    """(cases all of whose plans were compiled, with why each plan does not compile, or ""), and those that the deadline
    cut off. builds: compile_plans of the cases' plans, one case after another.
    """
    failures: dict[int, str] = {}
    for index, failure in builds:
        failures[index] = failure
        if deadline.passed(COMPILING):
            break
    done, left, first = [], [], 0
    for case in cases:
        own = range(first, first + len(case.plans))
        first = own.stop
        if all(index in failures for index in own):
            done.append((case, [failures[index] for index in own]))
        else:
            left.append(case)
    return done, left


def tune_cases(
    cases: Iterable[tuple[Case, Sequence[str]]],
    build: Build,
    clock: Clock,
    deadline: Deadline,
    *,
    reps: int = REPS,
    seed: int = 0,
    device: str = "cuda",
) -> Iterator[Result]:
    """Results, case by case, as long as there is time. cases: with what did not compile, see compiled_cases."""
    for case, failures in cases:
        if deadline.passed():
            return
        yield _measured(case, failures, build, clock, reps, seed, device)


def _measured(
    case: Case, failures: Sequence[str], build: Build, clock: Clock, reps: int, seed: int, device: str
) -> Result:
    broken = {plan.tiling: (text, False) for plan, text in zip(case.plans, failures, strict=True) if text}
    kernels = {plan.tiling: build(plan) for plan in case.plans if plan.tiling not in broken}
    timings: dict[Tiling, dict[Tokens, Timing]] = {plan.tiling: {} for plan in case.plans}
    tflops: dict[Tiling, dict[Tokens, float]] = {plan.tiling: {} for plan in case.plans}
    for shape in default_shapes(case.spec):
        operands = random_tensors(case.spec, shape, seed, device)
        sample = take_sample(case.spec, operands, seed)
        for tiling, kernel in kernels.items():
            if tiling in broken:
                continue
            try:
                why = check_kernel(case.spec, kernel, operands, sample).message
            except RunError as error:
                why = str(error)
            if why:
                broken[tiling] = (f"{shape}: {why}", True)
        right = {tiling: kernel for tiling, kernel in kernels.items() if tiling not in broken}
        contenders = {str(i): _launch(kernel, operands) for i, kernel in enumerate(right.values())}
        timed = interleaved(contenders, clock, reps, SPAN_MS)
        for tiling, timing in zip(right, timed.values(), strict=True):
            timings[tiling][shape.keys] = timing
            tflops[tiling][shape.keys] = rate(flop_of(case.spec, shape, {}), timing.median)
    candidates = [
        Candidate(tiling, timings[tiling], tflops[tiling], *broken.get(tiling, ("", False))) for tiling in timings
    ]
    candidates.sort(key=lambda item: (bool(item.failure), 0.0 if item.failure else item.score))
    return Result(case, tuple(candidates))


def _launch(kernel: Kernel, operands: Mapping[str, Any]) -> Launch:
    return lambda: kernel(**operands)
