"""emulator/mutants, mutation and equivalent: what is mutated, what becomes of it, and the table."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from ptx_kernels import ptx, with_tmem

from generator import emulation, mutate
from generator.cli import app
from generator.compile import compile_kernel
from generator.emulator import EmulatorError, Gpu
from generator.emulator.formal import Formal
from generator.emulator.memory import WINDOW_BASE
from generator.emulator.mutants import Mutator
from generator.emulator.mutation import RESULTS, Outcome, run_mutants
from generator.emulator.parse import parse_ptx
from generator.emulator.recorder import Recorder
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.spec import load_spec

# Warp 1 hands a word to warp 0 through shared memory, and warp 0 hands the slot back: three rounds.
HANDOVER = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 32;
@%p1 mbarrier.init.shared.b64 [%s+8], 32;
bar.sync 0; mov.u32 %r1, 0; setp.ge.u32 %p2, %tid, 32; and.b32 %r9, %tid, 31; mad.lo.u32 %r9, %r9, 4, %s;
@%p2 bra GIVES;
TAKES: and.b32 %r2, %r1, 1;
W0: mbarrier.try_wait.parity.shared.b64 %p3, [%s], %r2;
@!%p3 bra W0;
ld.shared.b32 %r3, [%r9+64]; add.u32 %r5, %r5, %r3;
mbarrier.arrive.shared.b64 _, [%s+8];
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 3; @%p4 bra TAKES;
st.global.b32 [%y_g], %r5; bra END;
GIVES: xor.b32 %r2, %r1, 1; and.b32 %r2, %r2, 1;
W1: mbarrier.try_wait.parity.shared.b64 %p3, [%s+8], %r2;
@!%p3 bra W1;
mad.lo.u32 %r4, %r1, 10, 7; st.shared.b32 [%r9+64], %r4;
mbarrier.arrive.shared.b64 _, [%s];
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 3; @%p4 bra GIVES;
END:"""


def outcomes_of(body: str, y: np.ndarray, select=lambda mutant: True, limit=20, cluster=1) -> list[Outcome]:
    """Mutants of `body`, launched as one CTA of 64 threads that writes y, or as a cluster of them."""
    found = []
    gpu = Gpu()
    gpu.add_array(y, "y")
    text = ptx("mov.u32 %r5, 0; " + body, y=y)

    class Around:
        def __init__(self, case):
            found.extend(run_mutants(case, jobs=1, limit=limit, select=select))

        __enter__ = __exit__ = lambda *_: None

    gpu.observers.append(Around)
    params = [y.ctypes.data.to_bytes(8, "little")]
    gpu.launch(gpu.load_ptx(text), "k", (cluster, 1, 1), (64, 1, 1), (cluster, 1, 1), 1024, params)
    return found


@pytest.mark.parametrize("strict", [True, False])
def test_a_recorder_keeps_what_warps_know_at_their_events_and_at_their_end(strict):
    y, gpu, recorder = np.zeros(64, np.uint32), Gpu(strict=strict), Recorder(clocks=True)
    gpu.add_array(y, "y")

    class Around:
        def __init__(self, case):
            case.run(program=recorder.program(parse_ptx(case.text).kernels["k"]))

        __enter__ = __exit__ = lambda *_: None

    gpu.observers.append(Around)
    text = ptx("mov.u32 %r5, 0; " + HANDOVER, y=y)
    gpu.launch(gpu.load_ptx(text), "k", (1, 1, 1), (64, 1, 1), (1, 1, 1), 1024, [y.ctypes.data.to_bytes(8, "little")])
    for who, events in recorder.events.items():
        known = recorder.knowledge(who)
        assert [k.line for k in known] == ([*(e.line for e in events), 0] if strict else [])
        assert all((after.clock >= before.clock).all() for before, after in pairwise(known)), "nothing is forgotten"
    assert len(recorder.events) == 2


def test_every_mutant_of_a_handover():
    y = np.zeros(64, np.uint32)
    found = outcomes_of(HANDOVER, y)
    assert (y[:32] == 7 + 17 + 27).all(), "the original ran last"
    results = {(o.kind, o.change[:40]): o.result for o in found}
    assert not [o for o in found if o.result == "not run"]
    by_kind = {kind: {o.result for o in found if o.kind == kind} for kind, _ in results}
    assert by_kind["mbarrier.arrive removed"] == {"deadlocked"}
    assert by_kind["mbarrier.init: count + 1"] == {"deadlocked"}
    assert by_kind["mbarrier.init: count - 1"] == {"reported"}
    assert by_kind["mbarrier.init removed"] == {"reported"}
    assert by_kind["mbarrier wait: phase flipped"] <= {"deadlocked", "wrong numbers", "reported"}


def test_a_mutant_keeps_the_lines_and_changes_one_statement():
    y = np.zeros(64, np.uint32)
    text = ptx(HANDOVER, y=y)
    original = parse_ptx(text).kernels["k"].instrs
    mutants = list(Mutator(text, "k", {}, [], WINDOW_BASE).mutants())
    assert Counter(m.kind for m in mutants)["mbarrier wait removed"] == 2
    for mutant in mutants:
        changed = parse_ptx(mutant.text).kernels["k"].instrs
        assert mutant.text.count("\n") == text.count("\n")
        kept = {(i.line, i.text) for i in changed}
        assert len([i for i in original if (i.line, i.text) not in kept]) == 1, mutant


WEAKENED = {
    "mbarrier.try_wait.parity.shared.b64 %p1, [%s+8], 1;": [
        "mov.pred %p1, 1",
        "mbarrier.try_wait.parity.shared.b64 %p1, [%s+8], 0",
    ],
    "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s], %r1;": [
        "",
        "{ .reg .b32 %mutant; add.s32 %mutant, %r1, 16; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s], %mutant; }",
        "{ .reg .b32 %mutant; add.s32 %mutant, %r1, -16; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s], %mutant; }",
        "@%p1 mbarrier.arrive.shared.b64 _, [%s]",
    ],
    "cp.async.bulk.wait_group.read 0;": ["", "cp.async.bulk.wait_group.read 1"],
    "wgmma.wait_group.sync.aligned 1;": ["", "wgmma.wait_group.sync.aligned 2"],
    "elect.sync %r1|%p1, -1;": ["mov.b32 %r1, 0; mov.pred %p1, 1"],
    "elect.sync _|%p1, -1;": ["mov.pred %p1, 1"],
    "bar.sync 3, 64;": ["", "bar.arrive 3, 64", "bar.sync 3, 96", "bar.sync 3, 32", "bar.sync 11, 64"],
    "bar.sync 0;": [""],
    "barrier.arrive 3, 64;": ["", "barrier.arrive 3, 96", "barrier.arrive 3, 32", "barrier.arrive 11, 64"],
    "tcgen05.fence::after_thread_sync;": [""],
    "fence.proxy.async.shared::cta;": [""],
    "griddepcontrol.wait;": [""],
    "mov.u32 %r1, 0;": [],
}


@pytest.mark.parametrize("statement", WEAKENED)
def test_what_becomes_of_a_statement(statement):
    text = ptx(statement)
    found = [m.change for m in Mutator(text, "k", {}, [], WINDOW_BASE).mutants()]
    assert found == WEAKENED[statement]


def test_stage_indices_wrap_in_their_ring():
    text = ptx(
        "mbarrier.arrive.shared.b64 _, [%s+24];\ntcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [smem+32];"
    )
    lines = [i.line for i in parse_ptx(text).kernels["k"].instrs if i.opcode.startswith(("mbarrier", "tcgen05"))]
    places = {lines[0]: frozenset({8, 16, 24}), lines[1]: frozenset({32})}
    moved = [m.change for m in Mutator(text, "k", places, [(32, 40)], WINDOW_BASE).mutants() if "stage" in m.kind]
    assert "add.s32 %mutant, %s, 32;" in moved[0] and f"%low, {WINDOW_BASE + 32};" in moved[0]
    assert "sub.s32 %mutant, %mutant, 24;" in moved[0]
    assert moved[1].endswith("[smem+40]")


def test_only_a_kernel_that_passes_is_mutated():
    y = np.zeros(64, np.uint32)
    with pytest.raises(EmulatorError, match="before mbarrier.init"):
        outcomes_of("mbarrier.arrive.shared.b64 _, [%s];", y)


def test_a_mutant_that_does_not_end_is_stopped():
    y = np.zeros(64, np.uint32)
    found = outcomes_of(HANDOVER, y, lambda mutant: mutant.kind == "mbarrier.arrive removed", limit=0.0001)
    assert {(o.result, o.message) for o in found} == {("deadlocked", "did not end within 0.0001 s")}


def warned(body):
    y = np.zeros(64, np.uint32)
    gpu, found = Gpu(), []
    gpu.add_array(y, "y")

    class Around:
        def __init__(self, case):
            checker = Formal()
            case.run(program=checker.program(parse_ptx(case.text).kernels["k"]))
            found.extend(checker.warnings.values())

        __enter__ = __exit__ = lambda *_: None

    gpu.observers.append(Around)
    params = [y.ctypes.data.to_bytes(8, "little")]
    gpu.launch(gpu.load_ptx(ptx(body, y=y)), "k", (1, 1, 1), (64, 1, 1), (1, 1, 1), 4096, params)
    return found


INITIALIZED = "setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+8], 1; bar.sync 0;"
SIGNALS = "st.shared.b32 [%s4+64], %tid; {between} elect.sync _|%p2, -1; setp.ge.u32 %p3, %tid, 32; "
SIGNALS += "@%p3 bra END; @!%p2 bra END; mbarrier.arrive.shared.b64 _, [%s+8]; END:"


def test_warning_of_lanes_that_are_not_in_step():
    assert warned(INITIALIZED + SIGNALS.format(between="bar.warp.sync -1;")) == []
    (text,) = warned(INITIALIZED + SIGNALS.format(between=""))
    assert "no bar.warp.sync: other lanes stored to shared memory since the warp's last one" in text


READS = "ld.shared.b32 %r5, [%s4+64]; {between} elect.sync _|%p2, -1; setp.ge.u32 %p3, %tid, 32; "
READS += "@%p3 bra END; @!%p2 bra END; mbarrier.arrive.shared.b64 _, [%s+8]; END:"


def test_warning_of_lanes_that_may_still_read():
    """The arrival lets somebody overwrite what they read."""
    stored = INITIALIZED + "st.shared.b32 [%s4+64], %tid; bar.sync 0; "
    assert warned(stored + READS.format(between="bar.warp.sync -1;")) == []
    (text,) = warned(stored + READS.format(between=""))
    assert "no bar.warp.sync: other lanes loaded from shared memory since the warp's last one" in text


STAGES = """setp.ge.u32 %p3, %tid, 32; @%p3 bra END; st.shared.b32 [%s4], %tid; fence.proxy.async.shared::cta;
bar.warp.sync -1; elect.sync _|%p2, -1; @%p2 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 128;
@%p2 cp.async.bulk.commit_group; cp.async.bulk.wait_group.read {left}; {between} st.shared.b32 [{place}], %tid;
cp.async.bulk.wait_group 0; END:"""


@pytest.mark.parametrize("between, place, warns", [
    ("bar.warp.sync -1;", "%s4", False),
    ("", "%s4", True),
    ("", "%s4+128", False),  # beside what is copied
    ("@!%p2 bra END;", "%s", False),  # the lane that has waited stores
])  # fmt: skip
def test_warning_of_lanes_that_overwrite_what_one_of_them_copied(between, place, warns):
    found = warned(STAGES.format(between=between, place=place, left=0))
    assert len(found) == warns
    assert not warns or "no bar.warp.sync: since another lane's wait for the bulk store that reads this" in found[0]


TENSOR = "mov.u32 %r1, 5; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r151], {%r1}; tcgen05.wait::st.sync.aligned; "
TENSOR += "{before} bar.sync 0; {after} tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%r151]; "
TENSOR += "tcgen05.wait::ld.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0; "
TENSOR += "tcgen05.fence::after_thread_sync;"


def test_warnings_of_missing_tcgen05_fences():
    before, after = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
    body = TENSOR.replace("{%r1}", "{{%r1}}")
    end = "bar.sync 0; tcgen05.fence::after_thread_sync; setp.ge.u32 %p13, %tid, 32; @%p13 bra DONE; "
    end += "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r150, 32; DONE:"

    def found(**fences):
        return [
            w.split("): ")[1].split(":: ")[0] for w in warned(with_tmem(body.format(**fences) + end, 32, free=False))
        ]

    assert found(before=before, after=after) == []
    assert [w.startswith("no tcgen05.fence::before_thread_sync") for w in found(before="", after=after)] == [True]
    assert [w.startswith("no tcgen05.fence::after_thread_sync") for w in found(before=before, after="")] == [True]
    body = body.replace("bar.sync 0;", "barrier.cluster.arrive; barrier.cluster.wait;")  # a thread synchronization too
    assert found(before=before, after=after) == []
    assert [w.startswith("no tcgen05.fence::before_thread_sync") for w in found(before="", after=after)] == [True]
    assert [w.startswith("no tcgen05.fence::after_thread_sync") for w in found(before=before, after="")] == [True]


SAMPLE = ("tcgen05.wait::st", "fence.proxy.async", "mbarrier.init: count", "cp.async.bulk.wait_group")


def test_a_sample_of_a_generated_kernel(monkeypatch):
    fields = {"head_dim": 32, "causal": True, "p_staging": "smem", "kv_stage": 2, "tile_n": 48}
    binary = compile_kernel(plan_kernel(load_spec(None, **fields)))
    sampled = lambda *arguments, **options: run_mutants(  # noqa: E731
        *arguments, **options, select=lambda mutant: mutant.kind.startswith(SAMPLE)
    )
    monkeypatch.setattr(mutate, "run_mutants", sampled)
    outcomes = mutate.mutate_kernel(binary, mutate.shape_for(binary))
    results = Counter(o.result for o in outcomes)
    assert not results["missed"] and not results["not run"] and results["reported"] > 10
    assert {o.kernel for o in outcomes} == {binary.spec.name}


def outcome(kind, result, message="", kernel="one"):
    return Outcome(kernel, kind, 7, "bar.sync", "", result, message, 0.1)


def test_documents(tmp_path):
    first = [outcome("bar.sync removed", "reported"), outcome("bar.sync removed", "equivalent", "none waits")]
    mutate.write_docs(first, tmp_path)
    path = mutate.write_docs([outcome("fence removed", "missed", kernel="two")], tmp_path, "bespoke mutate two.py")
    text = path.read_text()
    assert "| one | 2 | 1 | 0 | 0 | 0 | 1 | 0 |\n| two | 1 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "- bar.sync removed: none waits.\n" in text and "## two\n\n`bespoke mutate two.py`\n" in text
    assert "- missed: fence removed: bar.sync, PTX line 7\n" in text
    assert list(json.loads((tmp_path / "mutation.json").read_text())) == ["one", "two"]
    assert RESULTS[-1] == "missed"


def test_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr(mutate, "mutate_kernel", lambda *_, **__: [outcome("bar.sync removed", "missed")])
    result = CliRunner().invoke(app, ["mutate", "--head-dim", "32", "--json", str(tmp_path / "all.json")])
    assert result.exit_code == 1 and "missed: one PTX line 7, bar.sync removed (bar.sync)" in result.output
    assert json.loads((tmp_path / "all.json").read_text())[0]["result"] == "missed"


def test_a_title_names_the_kernel_in_the_documents(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    found = [outcome("bar.sync removed", "reported"), outcome("fence removed", "reported", kernel="two")]
    monkeypatch.setattr(mutate, "mutate_kernel", lambda *_, **__: found[:1])
    monkeypatch.setattr(emulation, "checkout_root", lambda: tmp_path)
    (tmp_path / "docs").mkdir()
    command = ["mutate", "--head-dim", "32", "--jobs", "1", "--write-docs", "--title", "A kernel, 7 tokens"]
    monkeypatch.setattr("sys.argv", ["bespoke", *command])
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "## A kernel, 7 tokens\n\n`bespoke mutate --head-dim 32`\n" in (tmp_path / "docs/mutation.md").read_text()
    monkeypatch.setattr(mutate, "mutate_kernel", lambda *_, **__: found)  # of two kernels neither is named
    assert CliRunner().invoke(app, command).exit_code == 0
    assert {"one", "two"} <= set(json.loads((tmp_path / "docs/mutation.json").read_text()))


def test_the_documented_table_is_what_its_data_says():
    folder = checkout_root() / "docs"
    kernels = json.loads((folder / "mutation.json").read_text())
    assert (folder / "mutation.md").read_text() == mutate.markdown(kernels)
    assert len(kernels) >= 5 and sum(name.startswith("FlashAttention-4") for name in kernels) >= 2
    assert not any(counts.get("missed") for entry in kernels.values() for counts in entry["kinds"].values())


def test_a_program(monkeypatch):
    """Its kernel is mutated at its first launch and named after the program."""
    sampled = lambda *arguments, **options: run_mutants(  # noqa: E731
        *arguments, **options, select=lambda mutant: mutant.kind == "bar.sync removed"
    )
    monkeypatch.setattr(mutate, "run_mutants", sampled)
    outcomes, run = mutate.mutate_script(checkout_root() / "tests/programs/shared_reverse.py", [], "sm_100a", 4)
    assert run.passed and {(o.kernel, o.result) for o in outcomes} == {("shared_reverse", "reported")}


def test_a_kernel_that_is_wrong_by_itself_is_not_mutated(monkeypatch):
    binary = compile_kernel(plan_kernel(load_spec(None, head_dim=32)))
    monkeypatch.setattr(mutate, "judge", lambda figures: ["cos 0.5"])
    with pytest.raises(EmulatorError, match="is wrong before anything is broken: cos 0.5"):
        mutate.mutate_kernel(binary, (1, 1, 1, 16, 16))


def test_the_second_source_rises_on_from_the_first():
    operands = {"k": np.ones((1, 70, 1, 16), np.float32), "k2": np.ones((1, 40, 1, 16), np.float32)}
    mutate._make_rising(operands, 32)
    steps = [operands[name][0, ::32, 0, 0].tolist() for name in ("k", "k2")]
    assert steps == [[1, 5, 9], [13, 17]]
