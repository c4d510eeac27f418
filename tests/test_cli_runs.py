"""The commands that compile and run: documents, verdicts, exit codes, the interrupt. One small kernel serves all."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import generator.verify
from generator import cli
from generator.matrix import shapes_of
from generator.resources import checkout_root
from generator.spec import load_spec

KERNEL = "fmha_sm100_d16_unnorm_tiles"
ROW = ["kernel", "shape", "backend", "cos", "rel_err", "max_abs_err", "lse_max_abs_err", "hazards", "seconds", "passed"]


def bespoke(*words, code=0):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def test_compile_document_and_files(tmp_path):
    facts = json.loads(bespoke("compile", KERNEL, "--out", tmp_path, "--json").stdout)
    plan = json.loads(bespoke("plan", KERNEL, "--json").stdout)
    assert facts["kernel"] == KERNEL
    assert facts["smem_bytes"] == plan["budget"]["smem_total"]
    assert facts["tmem_columns"] == plan["budget"]["tmem_columns"]
    assert facts["threads"] == 192 and 0 < facts["registers"] <= 255
    assert sorted(os.listdir(tmp_path)) == [f"{KERNEL}{suffix}" for suffix in (".cubin", ".ptx", ".py")]
    assert ".target sm_100a" in (tmp_path / f"{KERNEL}.ptx").read_text()
    assert (tmp_path / f"{KERNEL}.cubin").read_bytes()[:4] == b"\x7fELF"


def test_verify_rows_keep_the_contract():
    result = bespoke("verify", KERNEL, "--shape", "1,1,1,1,1", "--shape", "1,2,2,129,127", "--seed", 3, "--json")
    rows = json.loads(result.stdout)
    assert [row["shape"] for row in rows] == ["1,1,1,1,1", "1,2,2,129,127"]
    for row in rows:
        assert list(row)[: len(ROW)] == ROW
        assert row["kernel"] == KERNEL and row["backend"] == "emulator"
        assert row["passed"] is True and row["hazards"] == 0 and row["cos"] >= 0.99999
    assert "verify 2/2" in result.stderr and "passed" in result.stderr


def test_failed_verification_exits_with_1_and_says_the_figure(monkeypatch):
    monkeypatch.setattr(generator.verify, "REL_ERR_FACTOR", 0.5)
    result = bespoke("verify", KERNEL, "--shape", "1,1,1,128,128", "--json", code=1)
    (row,) = json.loads(result.stdout)
    assert row["passed"] is False
    assert "1 of 1 verifications failed" in result.stderr
    assert f"{KERNEL} [1,1,1,128,128]" in result.stderr and "rel_err" in result.stderr


def test_unknown_backend_is_refused():
    result = bespoke("verify", KERNEL, "--shape", "1,1,1,1,1", "--backend", "opencl", code=2)
    assert "opencl" in result.stderr and result.stdout == ""


def test_make_goes_all_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "generated_dir", lambda: tmp_path)
    result = bespoke("make", KERNEL)
    shapes = shapes_of(load_spec(KERNEL))
    assert [path.name for path in tmp_path.iterdir()] == [f"{KERNEL}.py"]
    for text in (
        "fits, chosen",
        "232448",
        "dynamic shared memory, bytes",
        f"{KERNEL}: verified on {len(shapes)} shapes",
    ):
        assert text in result.stdout
    for stage in ("plan ", "generate ", "compile ", "verify "):
        assert stage in result.stderr
    assert result.stdout.count("passed") == len(shapes)


@pytest.mark.parametrize("jobs", [1, 2])
def test_matrix_writes_its_rows_to_a_file(tmp_path, jobs):
    path = tmp_path / "rows.json"
    result = bespoke("matrix", "--select", KERNEL, "--jobs", jobs, "--json", path)
    rows = json.loads(path.read_text())
    assert {row["shape"] for row in rows} == {str(shape) for shape in shapes_of(load_spec(KERNEL))}
    assert all(row["passed"] for row in rows) and f"matrix {len(rows)}/{len(rows)}" in result.stderr


def test_one_kernel_s_trouble_gives_failed_rows(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("generator.compile.compile_kernel", broken)
    result = bespoke("matrix", "--select", KERNEL, "--jobs", 1, code=1)
    assert "ZeroDivisionError: planted" in result.stderr and "FAILED" in result.stdout


def test_interrupt_while_compiling_leaves_no_half_written_file(tmp_path):
    words = ["compile", "--head-dim", "48", "--kv-stage", "1", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "BESPOKE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "generator", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=checkout_root(),
    )
    assert process.stderr.readline() == "compile ...\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert output == "" and "interrupted; no half-written file is left" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fmha_sm100_d48_stage1.py"]
    assert not [path for path in tmp_path.rglob("*") if "part" in path.name]
