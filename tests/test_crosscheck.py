"""crosscheck: the emulator against what an H200 was recorded to answer, and the comparison itself."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from ptx_kernels import ptx
from typer.testing import CliRunner

from generator.cli import app
from generator.crosscheck import GROUPS, Capture, cases_of, from_bytes, load_recording, replay, to_bytes
from generator.crosscheck.case import Array, Case, Rule, module_text
from generator.crosscheck.compare import compare
from generator.crosscheck.launches import Captured, differences, moved
from generator.crosscheck.recording import Recording, digest_outputs, is_exact, key
from generator.emulator import Gpu

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


@pytest.mark.sweep
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


def test_what_the_command_refuses(tmp_path):
    for arguments, words in (
        (["--group", "foo"], "group = 'foo': one of scalar,"),
        (["--recorded", "--accumulation", "best"], "accumulation = 'best': one of fast, exact"),
        (["--launches", str(tmp_path / "none.npz")], "cannot be read"),
    ):
        result = CliRunner().invoke(app, ["crosscheck", *arguments])
        assert result.exit_code == 2 and words in " ".join(result.output.split())


def test_the_command_replays_a_recording():
    result = CliRunner().invoke(app, ["crosscheck", "--recorded", "--group", "tma"])
    assert result.exit_code == 0 and ["tma", "44", "0", "0", "0", "0"] in [
        x.split() for x in result.output.splitlines()
    ]


# -- captured launches -------------------------------------------------------------------------------------------------
BODY = "ld.global.b32 %r1, [%x_g]; add.u32 %r1, %r1, 1; st.global.b32 [%y_g], %r1;"


def captured() -> Captured:
    """One launch that adds one."""
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    gpu, capture = Gpu(), Capture()
    gpu.observers.append(capture)
    gpu.add_array(x, "x")
    gpu.add_array(y, "y", initialized=False)
    params = [struct.pack("<Q", a.ctypes.data) for a in (x, y)]
    gpu.launch(gpu.load_ptx(ptx(BODY, x=x, y=y)), "k", (1, 1, 1), (32, 1, 1), (1, 1, 1), 0, params)
    assert (y == x + 1).all()
    return capture.launches[0]


def test_a_capture_keeps_arrays_before_and_after():
    launch = captured()
    before, after = ({a[1]: a[i].view(np.uint32) for a in launch.arrays} for i in (2, 3))
    assert (before["x"] == np.arange(32)).all() and not before["y"].any() and (after["y"] == before["x"] + 1).all()
    assert launch.block == (32, 1, 1) and launch.kernel == "k"


def test_a_capture_survives_its_file():
    launch = captured()
    (read,) = from_bytes(to_bytes([launch]))
    assert replace(read, arrays=()) == replace(launch, arrays=())
    for ours, theirs in zip(launch.arrays, read.arrays, strict=True):
        assert ours[:2] == theirs[:2] and all((a == b).all() for a, b in zip(ours[2:], theirs[2:], strict=True))


@pytest.mark.parametrize("raw", [b"", b"# README", b"PK\x03\x04", to_bytes([])[:60]])
def test_files_that_are_no_captures(raw, tmp_path):
    (tmp_path / "x.npz").write_bytes(raw)
    result = CliRunner().invoke(app, ["crosscheck", "--launches", str(tmp_path / "x.npz")])
    assert result.exit_code == 2 and "cannot be read" in result.output and "emulate --capture" in result.output


def test_pointers_move_with_their_arrays():
    places = [(0x1000, 64, 0x9000), (0x2000, 16, 0xA100)]
    words = struct.pack("<5Q", 0x1000, 0x103F, 0x1040, 0x200F, 7)
    assert struct.unpack("<5Q", moved(words, places)) == (0x9000, 0x903F, 0x1040, 0xA10F, 7)
    assert moved(b"\x01\x02\x03\x04", places) == b"\x01\x02\x03\x04"


def test_differences_are_of_what_was_written():
    launch = captured()
    silicon = [array[3].copy() for array in launch.arrays]
    assert [(d.differ, d.relative["float32"]) for d in differences(launch, silicon) if d.array == "y"] == [(0, 0)]
    silicon = [array[3] ^ np.uint8(array[1] == "y") for array in launch.arrays]
    assert [(d.array, d.differ) for d in differences(launch, silicon)] == [("y", 128)]
