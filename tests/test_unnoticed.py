"""emulator/unnoticed: which mutants a run proves equivalent, and that their near relatives are not."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from ptx_kernels import ptx
from test_mutation import HANDOVER

from generator.emulator import Gpu
from generator.emulator.equivalent import Context, _used_on_every_way, why_equivalent
from generator.emulator.memory import WINDOW_BASE
from generator.emulator.mutants import Mutator
from generator.emulator.mutation import mutator_of
from generator.emulator.parse import parse_ptx
from generator.emulator.recorder import Recorder

DRAIN = "W2: mbarrier.try_wait.parity.shared.b64 %p3, [%s+8], 0; @!%p3 bra W2;"  # the last of three phases


def equivalent(body: str) -> dict[tuple[str, str], str]:
    """(kind, original statement) → reason, of the mutants of a launch of two warps that are proven equivalent."""
    y, found = np.zeros(64, np.uint32), {}
    gpu = Gpu()
    gpu.add_array(y, "y")

    @contextmanager
    def observer(case):
        kernel, recorder = parse_ptx(case.text).kernels["k"], Recorder()
        case.run(program=recorder.program(kernel))
        mutator = mutator_of(case, recorder)
        context = Context(kernel, recorder, tuple(mutator.rings), 1, 2)
        texts = {i.line: i.text for i in kernel.instrs}
        for mutant in mutator.mutants():
            reason = why_equivalent(mutant, context)
            if reason is not None:
                found[mutant.kind, texts[mutant.line]] = reason
        yield

    gpu.observers.append(observer)
    lines = ("mov.u32 %r5, 0; " + body).replace(";", ";\n")
    params = [y.ctypes.data.to_bytes(8, "little")]
    gpu.launch(gpu.load_ptx(ptx(lines, y=y)), "k", (1, 1, 1), (64, 1, 1), (1, 1, 1), 1024, params)
    return found


def after_init(statement: str) -> str:
    return HANDOVER.replace("bar.sync 0;", f"{statement} bar.sync 0;", 1)


def test_nothing_of_a_handover_is_excused():
    assert equivalent(HANDOVER) == {}


def test_an_mbarrier_without_use():
    found = equivalent(after_init("@%p1 mbarrier.init.shared.b64 [%s+32], 4;"))
    assert {kind for kind, _ in found} == {f"mbarrier.init{how}" for how in (" removed", ": count + 1", ": count - 1")}
    assert {text for _, text in found} == {"@%p1 mbarrier.init.shared.b64 [%s+32], 4"}


def test_a_count_of_nothing_is_not_excused():
    found = equivalent(after_init("@%p1 mbarrier.init.shared.b64 [%s+32], 1;"))
    assert {kind for kind, _ in found} == {"mbarrier.init removed", "mbarrier.init: count + 1"}


def test_a_wait_for_the_phase_before_the_first():
    wait = "mov.u32 %r8, 1; W3: mbarrier.try_wait.parity.shared.b64 %p3, [%s+8], %r8; @!%p3 bra W3;"
    found = equivalent(
        HANDOVER.replace("GIVES:", f"{wait} GIVES:")
        .replace("bra GIVES;\nTAKES", "bra W3A;\nTAKES")
        .replace(wait, wait.replace("mov", "W3A: mov"))
    )
    assert [kind for kind, _ in found] == ["mbarrier wait removed"]
    assert "it never blocks and orders nothing" in next(iter(found.values()))


def test_a_wait_at_the_end():
    found = equivalent(HANDOVER.replace("END:", f"{DRAIN} END:"))
    assert [kind for kind, _ in found] == ["mbarrier wait removed"]
    assert "before it exits" in next(iter(found.values()))


@pytest.mark.parametrize("then", ["st.global.b32 [%y_g], %r5;", "ld.shared.b32 %r3, [%r9+64];", "bar.arrive 1, 64;"])
def test_a_wait_that_something_comes_after_is_not_a_wait_at_the_end(then):
    """That it is spare for another reason is for `ordered` to say, of a run."""
    other = " bar.sync 1, 64;" if "bar" in then else ""
    body = HANDOVER.replace("bra END;", f"{other} bra END;").replace("END:", f"{DRAIN} {then} END:")
    assert not any("before it exits" in reason for reason in equivalent(body).values())


def test_an_arrival_that_nobody_waits_for():
    body = after_init("@%p1 mbarrier.init.shared.b64 [%s+32], 1;").replace(
        "GIVES: xor",
        "GIVES: setp.eq.u32 %p5, %r1, 0; setp.eq.and.u32 %p5, %tid, 32, %p5; "
        "@%p5 mbarrier.arrive.shared.b64 _, [%s+32]; xor",
    )
    assert {kind for kind, _ in equivalent(body)} == {"mbarrier.arrive removed", "mbarrier.init: count + 1"}


FENCED = "wgmma.fence.sync.aligned;\n{between}\nwgmma.fence.sync.aligned;\n"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %e1, %e2, 1, 1, 1, 0, 0;\n"


@pytest.mark.parametrize(
    "between, excused", [("mov.f32 %f9, %f8;", True), ("mov.f32 %f2, %f8;", False), ("mov.f32 %f9, %f3;", False)]
)
def test_a_fence_after_a_fence(between, excused):
    text = ptx(".reg .f32 %f<10>; .reg .b64 %e<3>;\n" + FENCED.format(between=between) + PRODUCT)
    kernel = parse_ptx(text).kernels["k"]
    mutants = [m for m in Mutator(text, "k", {}, [], WINDOW_BASE).mutants() if m.kind == "wgmma.fence removed"]
    first, second = (why_equivalent(mutant, Context(kernel, Recorder())) for mutant in mutants)
    assert first is None and (second is not None) == excused


@pytest.mark.parametrize(
    "after, used",
    [
        ("add.u32 %r3, %r1, %r2;", True),
        ("@%p1 bra NEXT; add.u32 %r3, %r1, 1; NEXT: add.u32 %r3, %r1, %r2;", True),
        ("@%p1 bra NEXT; add.u32 %r3, %r1, %r2; NEXT: st.shared.b32 [%s], %tid;", False),  # not on the other way
        ("add.u32 %r3, %r1, 1;", False),
        ("mov.u32 %r4, %r2; add.u32 %r3, %r1, 1; add.u32 %r3, %r4, 1;", True),
        ("mov.u32 %r4, %r2; add.u32 %r3, %r1, 1;", False),  # moved, and not used
        ("mbarrier.arrive.shared.b64 _, [%s]; add.u32 %r3, %r1, %r2;", False),  # signals before
        ("@%p1 bra NEXT; mbarrier.arrive.shared.b64 _, [%s]; NEXT: add.u32 %r3, %r1, %r2;", False),
        ("AGAIN: setp.eq.u32 %p1, %tid, %r5; @%p1 bra AGAIN; add.u32 %r3, %r1, %r2;", True),
    ],
)
def test_registers_that_are_used_on_every_way(after, used):
    text = ptx(f"setp.eq.u32 %p1, %tid, 0; FROM: {after}".replace(";", ";\n"), y=np.zeros(64, np.uint32))
    kernel = parse_ptx(text).kernels["k"]
    loaded = frozenset(reg.index for reg in kernel.regs if reg.name in ("%r1", "%r2"))
    assert _used_on_every_way(SimpleNamespace(kernel=kernel), kernel.labels["FROM@0"], loaded) is used
