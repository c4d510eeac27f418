"""crosscheck: the emulator against what an H200 was recorded to answer, and the comparison itself."""

import numpy as np
import pytest

from generator.crosscheck import GROUPS, cases_of, load_recording, replay
from generator.crosscheck.case import Array, Case, Rule, module_text
from generator.crosscheck.compare import compare
from generator.crosscheck.recording import Recording, digest_outputs, is_exact, key

EVERY = {"scalar": 6, "wgmma": 4, "conversion": 2}  # of these groups, one case in so many; the slow test takes all


def recorded(group: str, every: int) -> dict[str, int]:
    cases = [case for case in cases_of(group) if is_exact(case.rule)][::every]
    found = [(r.name, r.result) for r in replay(cases, load_recording())]
    assert [pair for pair in found if pair[1] not in ("same", "refused")] == [], "different, or to be recorded again"
    return {result: sum(r == result for _, r in found) for result in ("same", "refused")}


@pytest.mark.parametrize("group", GROUPS)
def test_the_emulator_answers_as_the_h200_did(group):
    counts = recorded(group, EVERY.get(group, 1))
    assert counts["same"] > 20 and (not counts["refused"] or group in ("scalar", "conversion"))


@pytest.mark.slow
@pytest.mark.parametrize("group", EVERY)
def test_every_case_as_recorded(group):
    assert recorded(group, 1)["same"] > 300


ONE = np.array([1.0], np.float32).view(np.uint32)


def case(rule: Rule) -> Case:
    return Case("scalar", "one", "", [Array("x", ONE), Array("y", ONE, True)], rule)


def outputs(*values: int) -> dict[str, np.ndarray]:
    return {"y": np.array(values, np.uint32)}


@pytest.mark.parametrize(
    "rule, silicon, emulated, good",
    [
        (Rule(), 5, 5, True),
        (Rule(), 5, 4, False),
        (Rule("f32"), 0x7FFFFFFF, 0x7FC00000, False),
        (Rule("f32", any_nan=True), 0x7FFFFFFF, 0x7FC00000, True),
        (Rule("f32", any_nan=True), 0x7FFFFFFF, 0x7F800000, False),
        (Rule("f32", 2**-22), 0x3F800000, 0x3F800002, True),
        (Rule("f32", 2**-22), 0x3F800000, 0x3F800003, False),
        (Rule("f32", 0, 2**-20), 0x3F800000, 0x3F800008, True),
        (Rule("f32", 2**-22), 0x7F800000, 0x7F7FFFFF, False),
        (Rule("f32", 2**-22), 0x00000000, 0x80000000, True),
        (Rule("f16", 2**-10), 0x3C003C00, 0x3C003C01, True),
        (Rule("f16", 2**-10), 0x3C003C00, 0x3C023C00, False),
    ],
)
def test_rules(rule, silicon, emulated, good):
    row = compare(case(rule), outputs(silicon), outputs(emulated))
    assert row.good is good and row.differ == (silicon != emulated)
    assert good or "silicon" in row.example


def test_a_recording_keeps_only_what_must_be_the_same_bits():
    recording = Recording("a device", 13000)
    recording.add(case(Rule()), outputs(1))
    recording.add(Case("scalar", "approximate", "", [], Rule("f32", 1e-6)), outputs(1))
    assert list(recording.cases) == [key(case(Rule()))]
    assert '"device": "a device"' in recording.text()


def test_digests_see_every_bit_but_free_payloads():
    free = Rule("f64", any_nan=True)
    first, second = ({"y": np.array([bits], np.uint64)} for bits in (0x7FF8000000000001, 0xFFF8000000000000))
    assert digest_outputs(first, free) == digest_outputs(second, free)
    assert digest_outputs(first, Rule()) != digest_outputs(second, Rule())


def test_another_seed_is_not_taken_for_the_recorded_one():
    cases = list(cases_of("warp", seed=1))[:5]
    assert {r.result for r in replay(cases, load_recording())} == {"unknown"}


def test_every_module_is_ptx_with_one_entry_a_case():
    cases = list(cases_of("memory"))[:3]
    assert module_text(cases, "sm_90a").count(".visible .entry k") == 3
