"""emulator/trace: timelines of launches, as Perfetto reads them and as a picture."""

import gzip
import json
from collections import defaultdict
from xml.etree import ElementTree

import numpy as np
import pytest
from ptx_kernels import launch, ptx, tensor_map
from test_emulator_lineinfo import WAITS
from typer.testing import CliRunner

from generator import cli
from generator.compile import compile_kernel
from generator.emulator import Deadlock, Gpu, LaunchError, Tracer, attached
from generator.emulator.clock import CONSTANTS, issue_cycles, matrix_cycles
from generator.emulator.parse import parse_ptx
from generator.emulator.record import Barrier, Key
from generator.emulator.trace import MAX_LAUNCHES
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.run import run_observed
from generator.spec import load_spec
from generator.verify import random_inputs

SHAPE = (1, 1, 1, 384, 384)  # three query tiles of three, two and one KV tile, the longest first
TILE = 128
FLOP = 2 * TILE**3
KEYS = {  # by phase of an event: what it must have
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"name", "pid", "ts", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


@pytest.fixture(scope="module")
def binary():
    plan = plan_kernel(load_spec(None, head_dim=128, causal=True, strategy="tiles", p_staging="tmem", kv_stage=2))
    return compile_kernel(plan, lineinfo=True)


@pytest.fixture(scope="module")
def traced(binary, tmp_path_factory):
    """The trace of two CTAs, and the run that it is of."""
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    run = run_observed(binary, *random_inputs("bf16", SHAPE, TILE, TILE, 0), trace=Tracer(path, 2))
    return json.loads(gzip.decompress(path.read_bytes())), run


@pytest.fixture(scope="module")
def trace(traced):
    return traced[0]


def threads(trace):
    """(process, name) → the slices of a track, in order."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], names[event["pid"], event["tid"]]].append(event)
    return found


def end(piece):
    return piece["ts"] + piece["dur"]


def overlap(one, other):
    """Microseconds of the format in which a slice of both runs."""
    return sum(max(min(end(a), end(b)) - max(a["ts"], b["ts"]), 0) for a in one for b in other)


# --- the format -------------------------------------------------------------------------------------------------------


def test_events_have_what_the_format_asks_for(trace):
    assert trace["displayTimeUnit"] == "ns"
    for event in trace["traceEvents"]:
        assert event.keys() >= KEYS[event["ph"]], event
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
    phases = {event["ph"] for event in trace["traceEvents"]}
    assert phases == set(KEYS)


def test_every_process_and_thread_is_named(trace):
    events = trace["traceEvents"]
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} == processes == {0, 1}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xsf"} <= named


def test_the_metadata_says_what_the_times_are(trace):
    facts = trace["otherData"]
    assert "not measurements" in facts["clock"]
    assert all(constant["source"] and constant["unit"] for constant in facts["constants"].values())
    (said,) = facts["launches"]
    assert said["arch"] == "sm_100a" and said["grid"] == [3, 1, 1] and said["ctas"] == 2
    assert said["unresolved_waits"] == 0 and facts["truncated"] is False


def test_slices_of_a_track_follow_one_another(trace):
    for name, slices in threads(trace).items():
        for before, after in zip(slices, slices[1:], strict=False):
            assert end(before) <= after["ts"] + 1e-6, (name, before, after)


def test_every_arrow_has_both_ends_inside_slices(trace):
    slices = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append(event)
    ends = defaultdict(dict)
    for event in trace["traceEvents"]:
        if event["ph"] in "sf":
            assert event["ph"] not in ends[event["id"]]
            ends[event["id"]][event["ph"]] = event
            here = slices[event["pid"], event["tid"]]
            assert any(s["ts"] <= event["ts"] <= end(s) for s in here), event
    assert len(ends) > 40
    assert all(both.keys() == {"s", "f"} and both["s"]["ts"] < both["f"]["ts"] for both in ends.values())


# --- what it says -----------------------------------------------------------------------------------------------------


def test_tracks_of_a_cta(trace):
    names = [name for pid, name in threads(trace) if pid == 0]
    assert names[:6] == [*(f"warp {i} softmax_warps" for i in range(4)), "warp 4 mma_warp", "warp 5 load_warp"]
    assert "tensor core" in names and "TMA 0" in names
    rings = [f"{tile}_{side}[{stage}]" for tile in "kv" for side in ("full", "empty") for stage in (0, 1)]
    assert {*rings, "q_full", "s_full", "s_empty", "p_full", "o_full"} <= set(names)


@pytest.mark.parametrize(("cta", "tiles"), [(0, 3), (1, 2)])
def test_matrix_products_in_issue_order(trace, cta, tiles):
    products = threads(trace)[cta, "tensor core"]
    qk = [f"S = sQ x sK[{j % 2}]" for j in range(tiles)]
    pv = [f"O = P x sV[{j % 2}]" for j in range(tiles)]
    order = [qk[0], *(name for j in range(1, tiles) for name in (qk[j], pv[j - 1])), pv[-1]]
    assert [p["name"] for p in products] == order
    assert [p["args"]["FLOP"] for p in products] == [FLOP] * len(order)
    assert [p["args"]["instructions"] for p in products] == [8] * len(order)
    cycles = FLOP / CONSTANTS["sm_100a"].value
    assert all(p["args"]["busy cycles"] == cycles and p["dur"] >= cycles / 1000 - 1e-6 for p in products)
    assert all(p["args"]["issued"] / 1000 <= p["ts"] + 1e-6 for p in products)


def test_copies_bring_every_byte_that_the_cta_needs(trace):
    copies = [p for (pid, name), slices in threads(trace).items() if pid == 0 and name[:3] == "TMA" for p in slices]
    loads = sorted(p["name"] for p in copies if p["name"].startswith("load"))
    assert loads == sorted(["load sQ", *(f"load s{t}[{j % 2}]" for t in "KV" for j in range(3))])
    assert {p["args"]["bytes"] for p in copies if p["name"].startswith("load")} == {TILE * TILE * 2}
    assert sum(p["args"]["bytes"] for p in copies if p["name"].startswith("store")) == TILE * TILE * 2
    (first,) = [p for p in copies if p["name"] == "load sQ"]
    assert first["args"]["boxes"] == ["q[0, 256, 0, 0]", "q[64, 256, 0, 0]"]


def test_waits_end_after_the_phase_that_they_wait_for(trace):
    tracks, checked = threads(trace), 0
    for (pid, name), slices in tracks.items():
        for wait in (s for s in slices if name.startswith("warp") and s["name"].startswith("wait ")):
            barrier, phase = wait["name"].removeprefix("wait "), wait["args"].get("phase", -1)
            if (pid, barrier) in tracks and phase >= 0:
                (done,) = [s for s in tracks[pid, barrier] if s["name"] == f"phase {phase}"]
                assert end(wait) >= end(done) - 1e-6, (wait, done)
                checked += 1
    assert checked >= 4 * 2 * (3 + 2)  # S_FULL and O_FULL of every tile, in every softmax warp


def test_products_run_while_the_softmax_warps_compute(trace):
    tracks = threads(trace)
    products = {p["name"]: p for p in tracks[0, "tensor core"]}
    exponentials = [s for s in tracks[0, "warp 0 softmax_warps"] if s["name"] in ("exponentiate", "row_max")]
    assert overlap([products["S = sQ x sK[1]"]], exponentials) == pytest.approx(FLOP / 8192 / 1000, rel=0.2)
    assert overlap(tracks[0, "tensor core"], exponentials) > 0.5 * sum(p["dur"] for p in tracks[0, "tensor core"][1:4])


def test_counters_return_to_what_a_phase_expects(trace):
    series = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "C" and event["pid"] == 0:
            series[event["name"]].append(event["args"])
    assert {s["arrivals"] for s in series["p_full pending"]} == {4, 3, 2, 1}
    assert max(s["bytes"] for s in series["k_full[0] pending"]) == TILE * TILE * 2
    for name, values in series.items():
        assert values[0] == values[-1], name
        assert min(v["arrivals"] for v in values) >= 0 and min(v["bytes"] for v in values) >= 0


def test_report_of_a_traced_launch(traced):
    trace, run = traced
    (report,) = run.launches
    assert report.mma_flop == 2 * FLOP * (3 + 2 + 1)
    assert report.loaded_bytes == (3 + 2 * (3 + 2 + 1)) * TILE * TILE * 2
    assert report.stored_bytes == 3 * TILE * TILE * 2
    model = report.model
    assert set(model["warps"]) == {"softmax_warps", "mma_warp", "load_warp"}
    assert 0 < model["tensor_core"] < 1 and 0 < model["copy_engine"] < 1
    assert all(sum(shares[k] for k in ("run", "tmem", "wait")) <= 1 for shares in model["warps"].values())
    assert sum(shares["instructions"] for shares in model["warps"].values()) < report.warp_instructions
    assert model["warps"]["softmax_warps"]["run"] > model["warps"]["mma_warp"]["run"]
    last = max(end(s) for slices in threads(trace).values() for s in slices)
    assert last == pytest.approx(model["cycles"] / 1000)


def test_tracing_changes_nothing_and_is_repeatable(binary, traced, tmp_path):
    trace, run = traced
    inputs = random_inputs("bf16", SHAPE, TILE, TILE, 0)
    again = run_observed(binary, *inputs, trace=Tracer(tmp_path / "t.json", 2))
    plain = run_observed(binary, *inputs)
    assert json.loads((tmp_path / "t.json").read_text()) == trace
    for ours in (again, plain):
        for one, other in zip(run.outputs, ours.outputs, strict=True):
            assert np.array_equal(one.array.view(np.uint8), other.array.view(np.uint8))
    assert plain.launches[0].model is None and plain.launches[0].opcodes == run.launches[0].opcodes


# --- other programs ---------------------------------------------------------------------------------------------------


def trace_of(text, path, arguments, block=32, smem=1024, ctas=1, arch="sm_100a", strict=True):
    gpu = Gpu(arch, strict, trace=Tracer(path, ctas))
    params = []
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            gpu.add_array(value, name)
            value = value.ctypes.data.to_bytes(8, "little")
        params.append(value)
    gpu.launch(gpu.load_ptx(text), "k", (2, 1, 1), (block, 1, 1), (1, 1, 1), smem, params)
    return json.loads(path.read_text())


def test_named_barrier_ends_when_its_last_warp_comes(tmp_path):
    slow = "\n".join("ex2.approx.ftz.f32 %r1, %r1;" for _ in range(100))
    body = f"setp.lt.u32 %p1, %tid, 32; mov.b32 %r1, 0f00000000; @!%p1 bra JOIN;\n{slow}\nJOIN: bar.sync 0;"
    found = threads(trace_of(ptx(body), tmp_path / "t.json", {}, block=96))
    waits = {name: next(s for s in slices if s["cat"] == "wait") for (_, name), slices in found.items()}
    assert set(waits) == {"warp 0", "warp 1", "warp 2"}
    assert len({round(end(w), 6) for w in waits.values()}) == 1
    assert waits["warp 1"]["dur"] > 0.8 > 0.1 > waits["warp 0"]["dur"]  # a hundred times eight cycles
    assert end(waits["warp 1"]) > 100 * 8 / 1000


def test_spinning_on_a_barrier_is_one_wait(tmp_path):
    body = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [smem], 1; bar.sync 0;
    setp.lt.u32 %p2, %tid, 32; @%p2 bra WAIT;
    setp.eq.u32 %p3, %tid, 32; @%p3 mbarrier.arrive.shared.b64 %d1, [smem]; bra DONE;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [smem], 0; @!%p4 bra WAIT;
    DONE: add.u32 %r1, %r2, 1;""".replace("%r2", "%tid")
    found = threads(trace_of(ptx(body), tmp_path / "t.json", {}, block=64))
    waits = [s for s in found[0, "warp 0"] if s["name"] == "wait mbarrier 0x0"]
    (arrival,) = [s for s in found[0, "warp 1"] if s["name"] == "arrive mbarrier 0x0"]
    assert len(waits) == 1
    assert end(waits[0]) == pytest.approx(end(arrival) + CONSTANTS["signal"].value / 1000)


SENDS = {  # what brings 128 bytes on the mbarrier at shared offset 0: the slice that shows it
    "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s + 128], [%x], 128, [%s];": "load shared 0x80",
    "cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%s + 128], [%map, {0}], [%s];": (
        "load shared 0x80"
    ),
}


@pytest.mark.parametrize("text", SENDS)
def test_wait_for_a_copy_ends_when_its_last_byte_is_there(text, tmp_path):
    x = np.zeros(32, np.float32)
    body = f"""setp.eq.u32 %p1, %tid, 0; @!%p1 bra JOIN;
    mbarrier.init.shared.b64 [%s], 1; mbarrier.arrive.expect_tx.shared.b64 %d1, [%s], 128; {text}
    JOIN: bar.warp.sync -1;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%s], 0; @!%p4 bra WAIT;"""
    arguments = {"x": x, "map": tensor_map(x, (32,))}
    found = threads(trace_of(ptx(body, **arguments), tmp_path / "t.json", arguments))
    ((copy,), (wait,)) = found[0, "TMA 0"], [s for s in found[0, "warp 0 copies in"] if s["cat"] == "wait"]
    assert copy["name"] == SENDS[text] and copy["args"]["bytes"] == 128
    assert copy["dur"] * 1000 == pytest.approx(128 / CONSTANTS["copy"].value + CONSTANTS["latency"].value)
    assert end(wait) == pytest.approx(end(copy) + CONSTANTS["signal"].value / 1000)


def test_bytes_that_lanes_send_count_on_the_barrier(tmp_path):
    body = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 %d1, [%s], 128; bar.warp.sync -1;
    add.u32 %r1, %s4, 128; st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %tid, [%s];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%s], 0; @!%p4 bra WAIT;"""
    trace = trace_of(ptx(body), tmp_path / "t.json", {})
    assert trace["otherData"]["launches"][0]["unresolved_waits"] == 0
    pending = [e["args"] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert pending[0] == pending[-1] == {"arrivals": 1, "bytes": 0}
    assert {"arrivals": 0, "bytes": 128} in pending


def test_barrier_that_reduces_is_a_wait(tmp_path):
    body = "setp.eq.u32 %p1, %tid, 5; barrier.cta.red.popc.aligned.u32 %r1, 0, %p1;"
    found = threads(trace_of(ptx(body), tmp_path / "t.json", {}, block=64))
    assert [[s["name"] for s in found[0, f"warp {i}"] if s["cat"] == "wait"] for i in (0, 1)] == [["bar.sync 0"]] * 2


def test_products_of_a_warpgroup(tmp_path):
    """The wait for a group ends when its product does; the tensor core takes products one after the other."""
    product = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {D}, %d1, %d1, 0, 1, 1, 0, 0;\n"
    product = product.replace("D", ", ".join(f"%r{i}" for i in range(32)))
    commit = "wgmma.commit_group.sync.aligned;\n"
    body = f"""mov.b64 %d1, {1024 >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32}; wgmma.fence.sync.aligned;
    {product}{commit}wgmma.wait_group.sync.aligned 0; wgmma.fence.sync.aligned;\n{product * 2}{commit}
    wgmma.wait_group.sync.aligned 0;"""
    text = ptx(body).replace("sm_100a", "sm_90a")
    found = threads(trace_of(text, tmp_path / "t.json", {}, block=128, smem=65536, arch="sm_90a", strict=False))
    one = 2 * 64 * 64 * 16 / CONSTANTS["sm_90a"].value / 1000
    products = found[0, "tensor core"]
    assert [p["name"] for p in products] == ["wgmma 64x64, warps 0 to 3"] * 2
    assert [p["dur"] for p in products] == [pytest.approx(one), pytest.approx(2 * one)]
    for warp in range(4):
        waits = [s for s in found[0, f"warp {warp} MMA"] if s["name"] == "wgmma.wait_group"]
        for wait, done in zip(waits, products, strict=True):
            assert end(wait) == pytest.approx(end(done) + CONSTANTS["signal"].value / 1000)


def test_arrivals_that_drop_out_are_not_waited_for_again():
    barrier = Barrier(Key(0, 0, 0), "b", 3)
    phases = [barrier.arrive(1).phase, barrier.arrive(1, drop=True).phase, barrier.arrive(1).phase]
    assert phases == [0, 0, 0]
    assert [barrier.arrive(1).phase for _ in range(5)] == [1, 1, 2, 2, 3]


def test_ctas_are_counted_through_the_launch(tmp_path):
    trace = trace_of(ptx("add.u32 %r1, %tid, 1;"), tmp_path / "t.json", {}, ctas=9)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["CTA (0, 0, 0) of k", "CTA (1, 0, 0) of k"]


def test_a_deadlock_leaves_a_trace_of_what_never_ended(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WAITS)
    path = tmp_path / "t.json"
    with pytest.raises(Deadlock), attached("sm_100a", lineinfo=True, trace=path):
        exec(compile(program.read_text(), str(program), "exec"), {"__name__": "program"})
    trace = json.loads(path.read_text())
    (stuck,) = [s for s in threads(trace)[0, "warp 0"] if s["name"].endswith("(never)")]
    assert stuck["name"] == "wait mbarrier 0x0 (never)"
    assert trace["otherData"]["launches"][0]["unresolved_waits"] == 1


@pytest.mark.parametrize(
    ("name", "count"), [("two_kernels", 4), ("cluster_rank", 1), ("gemm_sm100", 1), ("tma_copy", 1)]
)
def test_command_traces_every_launch(name, count, tmp_path):
    program = checkout_root() / "tests" / "programs" / f"{name}.py"
    words = ["emulate", "--trace", str(tmp_path / "t.json"), "--json", str(tmp_path / "l.json"), str(program)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.stderr
    trace = json.loads((tmp_path / "t.json").read_text())
    starts = [launch["starts"] for launch in trace["otherData"]["launches"]]
    assert len(starts) == count and starts == sorted(set(starts))
    launches = json.loads((tmp_path / "l.json").read_text())["launches"]
    assert [said["model"]["unresolved_waits"] for said in launches] == [0] * count
    assert not list(tmp_path.glob(".part-*"))


def test_launches_beyond_the_limit_are_counted(tmp_path):
    gpu = Gpu(trace=tmp_path / "t.json")
    module = gpu.load_ptx(ptx("add.u32 %r1, %tid, 1;"))
    for _ in range(MAX_LAUNCHES + 2):
        report = gpu.launch(module, "k", (1, 1, 1), (32, 1, 1), smem_bytes=1024)
    facts = json.loads((tmp_path / "t.json").read_text())["otherData"]
    assert len(facts["launches"]) == MAX_LAUNCHES and facts["truncated"] is True
    assert report.model is None and report.warp_instructions > 0


@pytest.mark.parametrize(("name", "ctas", "message"), [("t.txt", 1, "must end in .json"), ("t.json", 0, "at least 1")])
def test_bad_requests(name, ctas, message, tmp_path):
    with pytest.raises(LaunchError, match=message):
        Tracer(tmp_path / name, ctas)


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"trace file .*cannot be written"):
        Tracer(tmp_path / "file" / "t.json")


def test_only_the_emulator_is_traced(tmp_path):
    words = ["verify", "fmha_sm100_d16_unnorm_tiles", "--backend", "cuda", "--trace", str(tmp_path / "t.json")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2 and "only the emulator is traced" in result.stderr


# --- the clock --------------------------------------------------------------------------------------------------------

CYCLES = {
    "mov.b32 %r1, %r2;": 0,
    "add.f32 %r1, %r2, %r3;": 1,
    "fma.rn.f32x2 %d1, %d2, %d3, %d4;": 2,
    "add.s32 %r1, %r2, %r3;": 2,
    "ex2.approx.ftz.f32 %r1, %r2;": 8,
    "shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;": 4,
    "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};": 4,
    "ld.shared.b32 %r1, [%r2];": 1,
    "bar.sync 0;": 1,
}


@pytest.mark.parametrize("text", CYCLES)
def test_cycles_of_an_instruction(text):
    (kernel,) = parse_ptx(ptx(text)).kernels.values()
    assert issue_cycles(kernel.instrs[-2], "sm_100a") == CYCLES[text]


@pytest.fixture
def busy(tmp_path):
    """Cycles to the end of a launch of a body."""
    return lambda body, block=32: _busy(tmp_path, body, block)


def _busy(folder, body, block):
    gpu = Gpu(strict=False, trace=Tracer(folder / "t.json", 1))
    return gpu.launch(gpu.load_ptx(ptx(body)), "k", (1, 1, 1), (block, 1, 1), (1, 1, 1), 1024, []).model["cycles"]


def test_units_work_side_by_side(busy):
    """32 exponentials keep their unit for 256 cycles; 64 independent multiplications fit beside them."""
    special = "".join(f"ex2.approx.ftz.f32 %r{i}, %r159;" for i in range(32))
    floats = "".join(f"mul.f32 %r{40 + i}, %r158, %r157;" for i in range(64))
    alone, both = busy(special), busy(special + floats)
    assert 256 <= alone <= both < alone + 8
    assert 4 * 64 <= busy(floats * 4) < 4 * 64 + 16


def test_a_chain_takes_its_latency(busy):
    chain = "add.f32 %r1, %r1, %r2;" * 100
    apart = "".join(f"add.f32 %r{i}, %r150, %r151;" for i in range(100))
    assert busy(chain) - busy(apart) == pytest.approx(100 * (CONSTANTS["chain"].value - 1), abs=8)
    assert busy(chain, 256) < 1.1 * busy(chain), "two warps a sub-partition hide each other's latency"


def test_cycles_of_a_matrix_product():
    assert matrix_cycles("f16", 128, 128, 16, "sm_100a") == 64
    assert matrix_cycles("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 64, 128, 16, "sm_90a") == 64
    assert matrix_cycles("f8f6f4", 128, 128, 32, "sm_100a") == 64
    assert matrix_cycles("tf32", 128, 128, 8, "sm_100a") == 64


# --- the picture ------------------------------------------------------------------------------------------------------


def test_committed_picture_is_current(binary, tmp_path):
    path = tmp_path / "timeline.svg"
    run_observed(binary, *random_inputs("bf16", (1, 1, 1, 512, 512), TILE, TILE, 0), trace=path)
    committed = (checkout_root() / "docs" / "timeline.svg").read_text()
    assert committed == path.read_text(), "make it anew with the command in docs/timeline.md"


def test_the_page_has_the_clock_s_figures():
    page = (checkout_root() / "docs" / "timeline.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in page.splitlines() if line[:2] == "| "]
    expected = {(name, f"{c.value:g}", c.unit, c.source) for name, c in CONSTANTS.items()}
    assert expected <= set(rows)


def test_picture_shows_tracks_and_slices(binary, tmp_path):
    path = tmp_path / "t.svg"
    run_observed(binary, *random_inputs("bf16", SHAPE, TILE, TILE, 0), trace=path)
    root = ElementTree.fromstring(path.read_text())
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"warp 4 mma_warp", "tensor core", "TMA 0", "k_full[1]", "exponentiate"} <= set(texts)
    assert "modelled cycles, not measurements" in texts[0]
    hints = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(hint.startswith("O = P x sV") for hint in hints) == 3


def test_untraced_launches_keep_the_plain_program():
    report = launch(ptx("add.u32 %r1, %tid, 1;"), {})
    assert report.model is None and report.mma_flop == report.loaded_bytes == 0
