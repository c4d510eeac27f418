"""Contenders by turns: order, launches a measurement, medians and their spread."""

import math

import pytest

from generator.timing import LAUNCHES_MIN, Timing, geometric_mean, interleaved


class FakeClock:
    """Says what each contender takes, and keeps who was measured with how many launches."""

    def __init__(self, times):
        self.times, self.calls = times, []

    def milliseconds(self, launch, count):
        name = launch()
        self.calls.append((name, count))
        times = self.times[name]
        return times[sum(seen == name for seen, _ in self.calls) % len(times)]


def contenders(*names):
    return {name: (lambda name=name: name) for name in names}


def test_every_other_repetition_goes_backwards():
    clock = FakeClock({"a": [1.0], "b": [1.0], "c": [1.0]})
    interleaved(contenders("a", "b", "c"), clock, reps=3, span_ms=1)
    assert "".join(name for name, _ in clock.calls) == "abc" + "abc" + "cba" + "abc"


def test_short_launches_are_repeated_until_the_span_is_filled():
    clock = FakeClock({"short": [0.1], "long": [50.0]})
    interleaved(contenders("short", "long"), clock, reps=2, span_ms=6.0)
    assert {name: count for name, count in clock.calls[2:]} == {"short": 60, "long": LAUNCHES_MIN}


def test_samples_are_of_the_repetitions_alone():
    found = interleaved(contenders("a"), FakeClock({"a": [9.0, 1.0, 2.0, 4.0, 3.0]}), reps=4, span_ms=1)
    assert sorted(found["a"].samples) == [2.0, 3.0, 4.0, 9.0]
    assert (found["a"].median, found["a"].min, found["a"].max) == (3.5, 2.0, 9.0)


def test_a_median_ignores_an_outlier():
    assert Timing((1.0, 1.1, 50.0)).as_dict() == {"median": 1.1, "min": 1.0, "max": 50.0}


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))
