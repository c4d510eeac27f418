"""emulator/schedule and repeat: adversarial interleavings, what they find, and what they must leave as it is."""

import itertools
import json
import struct

import numpy as np
import pytest
from ptx_kernels import ptx
from typer.testing import CliRunner

from generator.cli import app
from generator.compile import compile_kernel
from generator.emulator import Deadlock, Gpu, Hazard, LaunchError
from generator.emulator.schedule import DELAYS, STYLES, Adversary
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.spec import load_spec
from generator.verify import verify_kernel

EVERY = len(STYLES) * len(DELAYS)  # seeds in a row that combine every style with every delay


def launch(body, schedules, seed=0, block=64, grid=1, strict=True, **arrays):
    gpu = Gpu(strict=strict, schedules=schedules, schedule_seed=seed)
    for name, array in arrays.items():
        gpu.add_array(array, name)
    params = [struct.pack("<Q", array.ctypes.data) for array in arrays.values()]
    return gpu.launch(gpu.load_ptx(ptx(body, **arrays)), "k", (grid, 1, 1), (block, 1, 1), (1, 1, 1), 1024, params)


def test_seeds_combine_every_style_with_every_delay():
    both = {(Adversary(seed).style, Adversary(seed).delays) for seed in range(EVERY)}
    assert both == set(itertools.product(STYLES, DELAYS))


LAST_WINS = "shr.u32 %r1, %tid, 5; mul.lo.u32 %r1, %r1, 10; rem.u32 %r2, %tid, 32; setp.eq.u32 %p1, %r2, 0;"
LAST_WINS += "@%p1 st.global.b32 [%y], %r1;"


def test_a_result_that_depends_on_the_order_of_warps():
    y = np.zeros(4, np.uint32)
    with pytest.raises(Hazard) as caught:
        launch(LAST_WINS, EVERY + 1, block=128, y=y)
    message = str(caught.value)
    assert "the result depends on the schedule: array 'y' at byte 0 is" in message
    seed = int(message.split("--schedule-seed ")[1])
    assert f"schedule seed {seed} ({Adversary(seed).style}, asynchronous work {Adversary(seed).delays})" in message
    y[:] = 0
    with pytest.raises(Hazard) as again:
        launch(LAST_WINS, 2, seed, block=128, y=y)
    assert str(again.value) == message, "the seed replays it"


def test_inputs_are_restored_between_schedules():
    y = np.arange(64, dtype=np.uint32)
    body = "ld.global.b32 %r1, [%y_g]; add.u32 %r1, %r1, 1; st.global.b32 [%y_g], %r1;"
    assert launch(body, 7, y=y).schedules == 7
    assert (y == np.arange(64) + 1).all()


def test_float_atomics_may_round_in_any_order():
    y = np.zeros(1, np.float32)
    add = "mul.lo.u32 %r2, %tid, 1234567; cvt.rn.f32.u32 %r1, %r2; red.global.add.f32 [%y], %r1;"
    launch(add, EVERY + 1, block=256, y=y)
    y = np.zeros(1, np.uint32)
    launch("red.global.add.u32 [%y], %tid;", EVERY + 1, block=256, y=y)
    assert y[0] == 255 * 128


# Warp 1 completes two phases; warp 0 waits for the first, which it can miss: nothing holds warp 1 back.
AHEAD = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 32; bar.sync 0; setp.ge.u32 %p2, %tid, 32;
@%p2 bra GIVES; W: mbarrier.try_wait.parity.shared.b64 %p3, [%s], 0; @!%p3 bra W; bra END;
GIVES: mbarrier.arrive.shared.b64 _, [%s]; bra NEXT; NEXT: mbarrier.arrive.shared.b64 _, [%s];
END:"""


def test_a_phase_that_can_be_missed():
    """The checks name it in any schedule; without them, one in which warp 1 is ahead ends in a deadlock."""
    y = np.zeros(1, np.uint32)
    with pytest.raises(Hazard, match="completes phase 1"):
        launch(AHEAD, 1, y=y)
    with pytest.raises(Deadlock, match="schedule seed") as caught:
        launch(AHEAD, EVERY + 1, strict=False, y=y)
    assert "--schedules 2 --schedule-seed" in str(caught.value)


POLLS = """setp.eq.u32 %p1, %tid, 0; mov.u32 %r1, 0; @%p1 st.shared.b32 [%s], %r1; bar.sync 0;
setp.ge.u32 %p2, %tid, 32;
@%p2 bra POLL; mov.u32 %r1, 7; @%p1 atom.shared.exch.b32 %r3, [%s], %r1; bra END;
POLL: atom.shared.or.b32 %r2, [%s], 0; setp.eq.u32 %p3, %r2, 0; @%p3 bra POLL; st.global.b32 [%y_g], %r2; END:"""


def test_a_loop_that_polls_ends_under_every_seed():
    y = np.zeros(128, np.uint32)
    launch(POLLS, EVERY + 1, block=128, y=y)
    assert (y[32:] == 7).all()


@pytest.mark.parametrize("bad", [{"schedules": 0}, {"schedules": True}, {"schedule_seed": -1}, {"schedules": 2.0}])
def test_bad_arguments(bad):
    with pytest.raises(LaunchError, match=next(iter(bad))):
        Gpu(**bad)


@pytest.mark.parametrize("p_staging", ["tmem", "smem"])
def test_a_generated_kernel_is_the_same_under_every_schedule(p_staging):
    fields = {"head_dim": 16, "causal": True, "p_staging": p_staging, "kv_stage": 2, "tile_n": 16}
    binary = compile_kernel(plan_kernel(load_spec(None, strategy="tiles", **fields)))

    def prepare(gpu, _):
        gpu.schedules = EVERY + 1

    report = verify_kernel(binary, (1, 1, 1, 130, 60), prepare=prepare)
    assert report.passed, str(report)


def test_command(tmp_path):
    program = checkout_root() / "tests/programs/shared_reverse.py"
    words = ["emulate", "--schedules", "3", "--json", str(tmp_path / "launches.json"), str(program)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert {launch["schedules"] for launch in json.loads((tmp_path / "launches.json").read_text())["launches"]} == {3}
