"""How long launches take: contenders by turns, medians with their spread.

Every repetition times every contender once, several launches between two events, and every other repetition goes
through them backwards, so that a clock that drifts, or a neighbor's heat, favors none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SPAN_MS = 6.0  # of one measurement, at least: far above an event's resolution, 0.5 us
LAUNCHES_MIN = 2
LAUNCHES_PROBED = 3

Launch = Callable[[], Any]


class Clock(Protocol):
    """Measures launches."""

    def milliseconds(self, launch: Launch, count: int) -> float:
        """Of one launch, of `count` in a row."""


class CudaClock:
    """CUDA events on PyTorch's current stream. One launch before the first event keeps the GPU busy while the host
    submits the others, so that the host's share does not count as long as it is the smaller one.
    """

    def milliseconds(self, launch: Launch, count: int) -> float:
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launch()
        first.record()
        for _ in range(count):
            launch()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / count


class GraphClock:
    """Launches recorded in a CUDA graph, which is replayed between two events, so that the host has no share: for
    kernels that run no longer than their calls take the host. Raises what PyTorch raises for a launch that cannot be
    recorded.
    """

    def milliseconds(self, launch: Launch, count: int) -> float:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                launch()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / count


@dataclass(frozen=True)
class Timing:
    """Milliseconds a launch, one a repetition."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def max(self) -> float:
        return max(self.samples)

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max}


def interleaved(
    contenders: Mapping[str, Launch], clock: Clock, reps: int, span_ms: float = SPAN_MS
) -> dict[str, Timing]:
    """The Timing of every contender, by name. reps: repetitions, an even number to go both ways as often; span_ms: of a
    measurement, which decides how many launches it takes. All contenders must have run before (warm).
    """
    counts = {}
    for name, launch in contenders.items():
        once = clock.milliseconds(launch, LAUNCHES_PROBED)
        counts[name] = max(LAUNCHES_MIN, math.ceil(span_ms / once) if once > 0 else LAUNCHES_MIN)
    names, samples = list(contenders), {name: [] for name in contenders}
    for rep in range(reps):
        for name in names if rep % 2 == 0 else reversed(names):
            samples[name].append(clock.milliseconds(contenders[name], counts[name]))
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers; NaN of none."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan
