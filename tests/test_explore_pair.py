"""emulator/explore on CTA pairs: their kernels are proven in seconds, and a planted fault is found."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from generator.compile import compile_kernel
from generator.emulator import Deadlock
from generator.emulator.barrier_program import extract, split
from generator.emulator.exhaustive import Exhaustive
from generator.emulator.explore import explore
from generator.emulator.mutation import mutator_of
from generator.emulator.parse import parse_ptx
from generator.emulator.recorder import Recorder
from generator.plan import plan_kernel
from generator.run import run_observed
from generator.spec import load_spec
from generator.verify import random_operands

SMALL = {"head_dim": 32, "strategy": "pair", "kv_stage": 2, "tile_n": 32}


def watched(fields, shape, look):
    """Run a kernel; look(case) is called with its launch."""
    binary = compile_kernel(plan_kernel(load_spec(None, **fields)))

    @contextmanager
    def observer(case):
        look(case)
        yield

    operands = random_operands(binary.spec, shape, 0)
    run_observed(binary, **operands, backend="emulator", prepare=lambda gpu, _: gpu.observers.append(observer))


def programs(fields, shape):
    found = []
    watched(fields, shape, lambda case: found.extend(split(extract(case))))
    return found


@pytest.mark.parametrize("fields, tile_n", [(SMALL, 32), ({"head_dim": 512, "strategy": "pair"}, 128)])
def test_a_pair_is_proven(fields, tile_n):
    """Two pairs alike, and states that grow with the KV tiles and not with a power of them."""
    (short,), (long,) = (programs(fields, (1, 1, 1, 256, tiles * tile_n)) for tiles in (2, 4))
    assert len(short.steps) == 12, "six warps in each CTA of a pair"
    few, more = explore(short), explore(long)
    assert few.fault is None and few.complete and more.fault is None and more.complete, f"{few}\n{more}"
    assert more.states < 2.2 * few.states and more.states < 2000 and more.seconds < 20


def without_wait(case, name):
    """The launch with the waits for one mbarrier taken out, those that come before another round of it."""
    recorder = Recorder()
    case.run(program=recorder.program(parse_ptx(case.text).kernels[case.kernel]))
    at = {e.line: e.places[0][1] for events in recorder.events.values() for e in events if e.kind == "wait"}
    found = [m for m in mutator_of(case, recorder).mutants() if m.kind == "mbarrier wait removed"]
    (first, *_) = (m for m in found if m.line in at and f"({name})" in case.labels.shared_at(at[m.line]))
    return replace(case, text=first.text)


@pytest.mark.parametrize("name", ["s_empty", "p_full", "o_full"])
def test_a_wait_that_a_pair_lacks(name):
    """Without hazard checks the launch ends well, whatever S, P or O were worth; another interleaving does not."""

    def look(case):
        broken = without_wait(case, name)
        case.gpu.strict = False
        broken.run()
        with pytest.raises(Deadlock, match="some interleaving of the barriers") as caught, Exhaustive()(broken):
            pass
        told.append(str(caught.value))

    told = []
    watched(SMALL, (1, 1, 1, 128, 5 * 32), look)
    assert name in told[0] and "of CTA 1, PTX line" in told[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_phase_that_one_cta_of_a_pair_gets_wrong(rank):
    (program,) = programs(SMALL, (1, 1, 1, 128, 5 * 32))
    load = 6 * rank + 5

    def late(warp, step):
        turned = warp == load and step.kind == "wait" and step.phase == 1
        return step._replace(parity=step.parity ^ 1) if turned else step

    assert explore(program.changed(late)).fault
    last = [s for s in program.steps[load] if s.kind == "arrive"][-1]
    lost = explore(program.without(lambda warp, step: warp == load and step == last))
    assert lost.fault and ("deadlock" in lost.fault or "more than phase" in lost.fault)
