"""`bespoke bench` and `bespoke tune` as commands: tables, files, exit codes, and what they say without a GPU.

What a GPU gives is stood in for: kernels that compute in NumPy, a clock, a roof. Nothing is compiled.
"""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from generator import bench, builds, cli, compile, launch, measurement, peers, plot, present, timing, tune
from generator.bench import Figure
from generator.launch import RunError
from generator.resources import tuned_path
from generator.tuned import read_winners

torch = pytest.importorskip("torch")
measured = pytest.importorskip("measured")

SHAPE = ("--shape", "1,2,2,24,24")


def bespoke(*words, code=0):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def has_gpu():
    try:
        launch.compute_capability()
    except RunError:
        return False
    return True


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of NumPy. Returns a dictionary: "spoil" is what is done to outputs, see NumpyKernel."""
    state = {"spoil": None, "compiled": []}

    def compiled(plans, jobs):
        for index, plan in enumerate(plans):
            state["compiled"].append(plan)
            yield index, ""

    def numpy_kernel(plan):
        return measured.NumpyKernel(plan.spec, state["spoil"])

    facts = {"device": "NVIDIA H200", "date": "2026-01-02", "torch": "2", "cuda": "13"}
    monkeypatch.setattr(launch, "device_arch", lambda *_: "sm_90a")
    monkeypatch.setattr(bench, "require_gpu", lambda arch: None)
    monkeypatch.setattr(bench, "gemm_roof", lambda: lambda: None)
    monkeypatch.setattr(bench, "kernel_of", numpy_kernel)
    monkeypatch.setattr(bench, "machine", lambda: facts)
    monkeypatch.setattr(bench, "random_tensors", measured.on_the_cpu)
    monkeypatch.setattr(compile, "compile_kernel", lambda plan: plan)
    monkeypatch.setattr(builds, "compile_plans", compiled)
    monkeypatch.setattr(timing, "CudaClock", measured.FakeClock)
    given = (
        measured.peer("fa4", ms=2.0),
        measured.peer("cudnn", raises=ImportError("No module named 'cudnn'")),
        measured.peer("flex", error=0.1),
    )
    monkeypatch.setattr(peers, "PEERS", given)
    monkeypatch.setattr(tune, "random_tensors", measured.on_the_cpu)
    shapes = [bench.Shape(1, 1, 1, tokens, tokens) for tokens in (24, 40)]
    monkeypatch.setattr(tune, "default_shapes", lambda spec: shapes)
    return state


# --- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_one_error_says_so_and_nothing_is_written(tmp_path):
    files = ("--json", tmp_path / "new" / "rows.json", "--plot", tmp_path / "plots")
    for words in (("bench", "--head-dim", 64, *files), ("bench", "--head-dim", 64, "--arch", "sm_90a", *files)):
        result = bespoke(*words, code=2)
        assert result.stdout == "" and "error: no CUDA device can be used" in result.stderr
        assert "bench and tune measure on a GPU" in " ".join(result.stderr.split())
    result = bespoke("tune", "--out", tmp_path / "new" / "tuned.json", code=2)
    assert "error: no CUDA device can be used" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_of_another_architecture_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "compute_capability", lambda *_: (9, 0))
    with pytest.raises(RunError, match="built for sm_100a, but CUDA device 0 is sm_90; bench and tune measure on"):
        bench.require_gpu("sm_100a")
    assert launch.device_arch() == "sm_90a"
    monkeypatch.setattr(launch, "compute_capability", lambda *_: (7, 5))
    with pytest.raises(RunError, match="CUDA device 0 is sm_75, and kernels are built for sm_90a and sm_100a"):
        launch.device_arch()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch sees a GPU")
def test_a_pytorch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(bench, "check_device", lambda *_: None)
    with pytest.raises(RunError, match=f"PyTorch {re.escape(torch.__version__)} sees no CUDA device; install a build"):
        bench.require_gpu("sm_90a")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RunError, match=r"bench and tune need PyTorch with CUDA .*; pip install torch"):
        bench.require_gpu("sm_90a")


def test_bad_input_is_refused_before_anything_else():
    assert "peers = 'fa5': must be all, none or names of" in bespoke("bench", "--peers", "fa5", code=2).stderr
    words = ("bench", "--head-dim", "64,24", "--arch", "sm_90a")
    assert "head_dim = 24: must be a multiple of 16" in bespoke(*words, code=2).stderr
    words = ("bench", "--head-dim", "64", "--arch", "sm_90a", "--shape", "1,2,3")
    assert "a shape is B,Hq,Hkv,Sq,Skv" in bespoke(*words, code=2).stderr
    assert "mask = 'local'" in bespoke("tune", "--mask", "local", code=2).stderr
    assert "head_dim = 264: must be a multiple of 16" in bespoke("tune", "--head-dim", 264, code=2).stderr


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_shows_kernels_beside_peers(gpu, tmp_path):
    path = tmp_path / "rows.json"
    result = bespoke("bench", "--head-dim", "16,32", "--causal", *SHAPE, "--reps", 2, "--json", path)
    lines = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("fmha_")]
    assert [line[0] for line in lines] == ["fmha_sm90_d16_causal", "fmha_sm90_d32_causal"]
    assert all(line[2] == "1,2,2,24,24" and line[-2:] == ["fa4", "2.000"] for line in lines)
    assert "WRONG" in result.stdout and "missing" in result.stdout
    reason = "ImportError: No module named 'cudnn'"
    assert f"cudnn missing: {reason}: fmha_sm90_d16_causal [1,2,2,24,24] and 1 more" in result.stdout
    assert "flex wrong: O is off by 1.0" in result.stdout
    document = json.loads(path.read_text())
    assert document["device"] == "NVIDIA H200" and document["reps"] == 2 and len(document["rows"]) == 2
    row = document["rows"][0]
    assert row["spec"] == {"arch": "sm_90a", "head_dim": 16, "causal": True}
    assert row["ratio"] == 2.0 and [peer["status"] for peer in row["peers"]] == ["measured", "missing", "wrong"]
    assert [plan.spec.head_dim for plan in gpu["compiled"]] == [16, 32]


def test_bench_without_peers(gpu):
    result = bespoke("bench", "--head-dim", "16", *SHAPE, "--reps", 2, "--peers", "none")
    assert "FA4" not in result.stdout and "missing" not in result.stdout


def test_bench_of_a_wrong_kernel_exits_with_1_and_still_writes(gpu, tmp_path):
    def spoil(named):
        named["o"][0, 3] = float("nan")

    gpu["spoil"] = spoil
    path = tmp_path / "rows.json"
    result = bespoke("bench", "--head-dim", "16", *SHAPE, "--reps", 2, "--json", path, code=1)
    assert "bespoke wrong: o: 32 elements are NaN or were not written" in result.stdout
    ours = json.loads(path.read_text())["rows"][0]["ours"]
    assert ours["status"] == "wrong" and ours["ms"] is None and ours["o_err"] is None


def test_bench_draws(gpu, tmp_path):
    pytest.importorskip("matplotlib")
    result = bespoke("bench", "--head-dim", "16,32", *SHAPE, "--reps", 2, "--plot", tmp_path / "plots")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(plot.plot_names())
    assert "head_dim.svg" in result.stderr


def test_bench_needs_matplotlib_only_to_draw(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bespoke("bench", "--head-dim", "16", *SHAPE, "--reps", 2)
    gpu["compiled"].clear()
    result = bespoke("bench", "--head-dim", "16", *SHAPE, "--plot", tmp_path / "plots", code=2)
    assert "pip install 'bespoke[bench]'" in result.stderr
    assert gpu["compiled"] == [] and list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_are_refused_before_anything_is_compiled(gpu, tmp_path):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "rows.json"
    for words in (("bench", "--head-dim", 16, "--json", where), ("tune", "--head-dim", 16, "--out", where)):
        assert "cannot be written" in bespoke(*words, code=2).stderr
    assert gpu["compiled"] == []


def test_notes_group_cases_by_reason():
    missing = Figure("ffpa", "missing", "no such package")
    rows = [measured.row(dim, peers={"ffpa": missing, "fa4": 400}) for dim in (64, 128, 256)]
    (note,) = measurement.bench_notes(rows)
    assert note == "ffpa missing: no such package: fmha_sm90_d64 [4,32,32,4096,4096] and 2 more"


def test_cells_show_the_spread_and_the_fraction_of_the_roof():
    header, (cells,) = measurement.bench_cells([measured.row(64, ours=500, peers={"fa4": 400})])
    by_name = dict(zip(header, cells, strict=True))
    assert by_name["TFLOP/s"] == "500 (490..505)" and by_name["of roof"] == "62.5%" and by_name["roof"] == "800"
    assert by_name["FA4"] == "400 (392..404)" and by_name["best peer"] == "fa4" and by_name["ratio"] == "1.250"


# --- tune -------------------------------------------------------------------------------------------------------------


def test_tune_merges_winners_into_the_table(gpu, tmp_path):
    path, every = tmp_path / "tuned.json", tmp_path / "all.json"
    result = bespoke("tune", "--head-dim", "16", "--candidates", 2, "--reps", 2, "--out", path, "--json", every)
    before, after = read_winners(tuned_path()), read_winners(path)
    assert before.keys() == after.keys()
    changed = {key[1:] for key, item in after.items() if item != before[key]}
    assert changed == {(16, 16, "full"), (16, 16, "causal")}
    found = after["sm_90a", 16, 16, "full"]
    assert (found.device, found.date) == ("NVIDIA H200", "2026-01-02") and found.tflops.keys() == {"24", "40"}
    assert "the model's picks reach 1.000 of the fastest's speed, geometric mean of 2 cases" in result.stdout
    assert f"2 winners in {path}" in result.stdout.replace("\n", "")
    document = json.loads(every.read_text())
    assert document["left_out"] == [] and len(document["cases"]) == 2


def test_tune_of_a_wrong_candidate_exits_with_1_and_writes_no_winner(gpu, tmp_path):
    def spoil(named):
        named["lse"] += 1

    gpu["spoil"] = spoil
    path = tmp_path / "tuned.json"
    result = bespoke("tune", "--head-dim", "16", "--mask", "full", "--candidates", 1, "--out", path, code=1)
    assert "WRONG: 1,1,1,24,24: LSE is off by 1.00e+00, more than 0.0001" in result.stdout
    assert "nothing was timed" in result.stdout and not path.exists()


def test_tune_says_what_the_time_did_not_suffice_for(gpu, tmp_path, monkeypatch):
    ticks = iter(range(0, 10**6, 3))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(tune.Deadline.__init__, "__defaults__", (lambda: next(ticks),))
    words = ("--head-dim", "16,32", "--mask", "full", "--candidates", 1, "--budget-seconds", 30)
    result = bespoke("tune", *words, "--out", tmp_path / "tuned.json")
    assert "left out, 30 seconds did not suffice: " in result.stdout and "head_dim 32 full" in result.stdout


def test_a_table_of_all_peers_fits_the_screen():
    speeds = {peer.name: 400 for peer in peers.PEERS}
    screen = present.console()
    with screen.capture() as captured:
        screen.print(present.plain_table(*measurement.bench_cells([measured.row(64, peers=speeds, causal=True)])))
    lines = captured.get().splitlines()
    assert len(lines) < 6 and max(map(len, lines)) <= present.TABLE_WIDTH
    assert sum("400 (392..404)" in line for line in lines) == 1 and "…" not in captured.get()
