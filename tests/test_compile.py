"""compile.py, dsl.py, cubin.py, cache.py: facts read from what was compiled, checked, cached and versioned."""

import dataclasses
import json
import multiprocessing
import os
import struct
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from generator import cache, columns, compile, cubin, dsl
from generator.compile import (
    CompileError,
    allocated_columns,
    check_budget,
    compile_kernel,
    emit_to_cache,
    is_serialized,
)
from generator.dsl import DslVersionError, check_dsl
from generator.plan import plan_kernel
from generator.spec import load_spec

SMALL = {"head_dim": 16, "tile_n": 16, "kv_stage": 1}


@pytest.fixture(scope="module")
def plan():
    return plan_kernel(load_spec(SMALL))


@pytest.fixture(scope="module")
def binary(plan):
    return compile_kernel(plan)


@pytest.fixture
def edited(plan, tmp_path):
    """The emitted kernel with one text replaced by another, as a file."""

    def edit(old, new):
        text = emit_to_cache(plan).read_text()
        assert text.count(old) == 1, old
        path = tmp_path / "edited.py"
        path.write_text(text.replace(old, new))
        return path

    return edit


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", ["tmem", "smem"])
def test_compiled_kernel_is_what_was_planned(staging):
    plan = plan_kernel(load_spec(head_dim=32, strategy="tiles", p_staging=staging, tile_n=32))
    binary = compile_kernel(plan)
    assert binary.smem_bytes == plan.budget.smem_total
    assert binary.tmem_columns == plan.budget.tmem_columns
    assert binary.threads == plan.budget.threads == 192
    assert binary.cluster == (1, 1, 1)
    assert 24 <= binary.registers <= 255
    assert binary.spills == binary.stack_bytes == 0
    assert binary.cubin[:4] == b"\x7fELF"
    assert ".target sm_100a" in binary.ptx
    assert binary.kernel_name in binary.ptx


def test_wrong_shared_memory_is_refused(plan, edited):
    total = plan.budget.smem_total
    path = edited(f"SMEM_BYTES = {total}", f"SMEM_BYTES = {total + 1024}")
    message = (
        rf"edited.py: .*dynamic shared memory \(bytes\): the compiled kernel has {total + 1024}, the plan {total}$"
    )
    with pytest.raises(CompileError, match=message):
        compile_kernel(plan, path)


def test_wrong_tmem_and_threads_are_refused(plan, edited):
    columns = plan.budget.tmem_columns
    path = edited(f"TMEM_COLUMNS = {columns}", f"TMEM_COLUMNS = {columns * 2}")
    with pytest.raises(CompileError, match=rf"columns\): the compiled kernel has {columns * 2}, the plan {columns}$"):
        compile_kernel(plan, path)


def test_every_figure_that_differs_is_named(binary):
    wrong = dataclasses.replace(binary, smem_bytes=1, tmem_columns=2, threads=3, ptx=".target sm_90a\n")
    with pytest.raises(CompileError, match="shared memory.* has 1,.*columns.* has 2,.*threads.* has 3,.* has sm_90a,"):
        check_budget(wrong)


def test_an_edit_of_the_same_size_in_the_same_second_is_seen(plan, edited):
    total = plan.budget.smem_total
    path = edited(f"SMEM_BYTES = {total}", f"SMEM_BYTES = {total + 1024}")
    wrong, stamp = path.read_text(), path.stat().st_mtime_ns
    with pytest.raises(CompileError, match="dynamic shared memory"):
        compile_kernel(plan, path, use_cache=False)
    path.write_text(wrong.replace(f"SMEM_BYTES = {total + 1024}", f"SMEM_BYTES = {total}"))
    os.utime(path, ns=(stamp, stamp))
    assert compile_kernel(plan, path, use_cache=False).smem_bytes == total


def test_an_edited_source_in_the_cache_is_written_again(plan, own_cache):
    path = emit_to_cache(plan)
    text = path.read_text()
    path.write_text(text + "# edited\n")
    assert emit_to_cache(plan) == path
    assert path.read_text() == text


def test_a_kernel_that_does_not_trace_is_an_error_with_its_file(plan, edited):
    with pytest.raises(CompileError, match=r"edited.py: \w+.*no_such_name"):
        compile_kernel(plan, edited("KV_STAGES = 1", "KV_STAGES = no_such_name"))


def test_a_missing_file_is_an_error(plan, tmp_path):
    with pytest.raises(CompileError, match="nothing.py: cannot be read: No such file"):
        compile_kernel(plan, tmp_path / "nothing.py")


ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], "


@pytest.mark.parametrize(
    ("ptx", "columns"),
    [
        ("", 0),
        (f"{ALLOC}512;", 512),
        (f"mov.b32 %r1, 64;\n{ALLOC}%r1;", 64),
        (f"mov.u32 %r12, 0x20;\nadd.s32 %r2, %r12, %r3;\n\t{ALLOC}%r12;", 32),
    ],
)
def test_tmem_columns_are_read_from_the_ptx(ptx, columns):
    assert allocated_columns(ptx) == columns


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (f"{ALLOC}512;\n{ALLOC}32;", "expected one tcgen05.alloc"),
        (f"{ALLOC}n + 1;", "expected one tcgen05.alloc"),
        (f"ld.param.b32 %r1, [p];\n{ALLOC}%r1;", "from %r1, which is not one constant"),
        (f"mov.b32 %r1, 64;\nadd.s32 %r1, %r1, 1;\n{ALLOC}%r1;", "from %r1, which is not one constant"),
        (f"mov.b32 %r1, %r2;\n{ALLOC}%r1;", "from %r1, which is not one constant"),
    ],
)
def test_tmem_columns_that_cannot_be_read_are_refused(ptx, message):
    with pytest.raises(CompileError, match=message):
        allocated_columns(ptx)


# --- cubin ------------------------------------------------------------------------------------------------------------


def test_spills_are_counted_in_the_machine_code():
    """STL.128, STL.32 and LDL.64 between others: 20 bytes stored, 8 loaded."""
    instructions = [(0x387, 6), (0x7387, 4), (0x7983, 5), (0x7984, 4), (0x0388, 6)]
    code = b"".join(struct.pack("<QQ", low, size << 9) for low, size in instructions)
    assert cubin._local_traffic(code) == (20, 8)


def test_cubin_without_the_kernel_is_refused(binary):
    with pytest.raises(ValueError, match="no kernel 'other'"):
        cubin.read_cubin(binary.cubin, "other")
    with pytest.raises(ValueError, match="no ELF-64 header"):
        cubin.read_cubin(b"PTX", "other")


def test_waits_for_wgmma_are_counted_in_the_machine_code():
    """WARPGROUP.DEPBAR twice, WARPGROUP.ARRIVE and HGMMA."""
    code = b"".join(struct.pack("<QQ", low, 0) for low in (0x8000000079C5, 0x79C5, 0x41E00000185879F0, 0x8100000079C5))
    assert cubin._wgmma_waits(code) == 2


def test_products_that_ptxas_waits_for_one_by_one_are_refused(monkeypatch):
    """Where Q, S and P leave a thread too little, which the planner knows and here is made to forget."""
    narrow = load_spec(head_dim=512, tile_n=32, arch="sm_90a")
    monkeypatch.setattr(columns, "P_REGISTERS_MIN", 0)
    with pytest.raises(CompileError, match=r"waits 100 times where the source waits 14 times: .* use another tile_n"):
        compile_kernel(plan_kernel(narrow), use_cache=False)
    monkeypatch.undo()
    assert not is_serialized(compile_kernel(plan_kernel(narrow)))


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BESPOKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_second_compile_needs_no_trace(plan, own_cache, monkeypatch):
    first = compile_kernel(plan)
    monkeypatch.setattr(compile, "trace_kernel", None)
    second = compile_kernel(plan)
    assert (first.cached, second.cached) == (False, True)
    assert dataclasses.replace(first, cached=True) == second
    assert not list(own_cache.rglob(".part-*"))


def test_damaged_entry_is_written_again(plan, binary, own_cache, monkeypatch):
    compile_kernel(plan)
    (entry,) = own_cache.rglob("*.zip")
    good = entry.read_bytes()
    for damaged in (b"", good[:1000], good.replace(b".target sm_100a", b".target sm_100b")):
        entry.write_bytes(damaged)
        assert cache.read_entry(entry.stem) is None
    traced = dsl.Traced(binary.ptx, binary.cubin, binary.host_object, binary.host_symbol)
    monkeypatch.setattr(compile, "trace_kernel", lambda *arguments: traced)
    assert not compile_kernel(plan).cached
    assert compile_kernel(plan).cached


@pytest.mark.parametrize("changed", ["spec", "source", "versions", "named", "cpu"])
def test_key_depends_on_everything_that_the_binary_depends_on(plan, monkeypatch, changed):
    arguments = {"spec": plan.spec, "source": b"text", "versions": {"nvidia-cutlass-dsl": "4.8.1"}, "named": None}
    before = compile._key(**arguments)
    assert before == compile._key(**arguments)
    other = {"spec": load_spec(SMALL, causal=True), "source": b"texts", "versions": {"nvidia-cutlass-dsl": "4.8.2"}}
    other["named"] = Path("/with/line/information.py")
    if changed == "cpu":
        monkeypatch.setattr(compile, "host_cpu", lambda: "another processor")
    else:
        arguments[changed] = other[changed]
    assert compile._key(**arguments) != before


def test_unwritable_cache_says_so(plan, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BESPOKE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        cache.CacheError, match="BESPOKE_CACHE = .*file.*: cannot be written: Not a directory; set it to"
    ):
        cache.write_entry("0" * 64, {"a": b""})


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("BESPOKE_CACHE", "/a/b")
    assert str(cache.cache_dir()) == "/a/b"
    monkeypatch.delenv("BESPOKE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert str(cache.cache_dir()) == "/c/bespoke"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache.cache_dir()) == "/home/someone/.cache/bespoke"


def _write_and_read(number):
    """Entries of one key that differ by writer: every read must see one of them whole."""
    for _ in range(40):
        cache.write_entry("ab" * 32, {"first": bytes([number]) * 50000, "second": bytes([number]) * 7})
        members = cache.read_entry("ab" * 32)
        if members is None or set(members["first"]) != set(members["second"]) or len(members["first"]) != 50000:
            return False
    return True


def test_concurrent_processes_see_whole_entries(own_cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_write_and_read, range(4), chunksize=1) == [True] * 4
    assert [path.name for path in own_cache.rglob("*") if path.is_file()] == ["ab" * 32 + ".zip"]


def test_entry_can_be_read_by_hand(plan, binary, own_cache):
    compile_kernel(plan)
    (entry,) = own_cache.rglob("*.zip")
    with zipfile.ZipFile(entry) as archive:
        assert sorted(archive.namelist()) == ["facts.json", "host.o", "kernel.cubin", "kernel.ptx"]
        assert json.loads(archive.read("facts.json"))["registers"] == binary.registers


# --- versions ---------------------------------------------------------------------------------------------------------


def test_installed_dsl_is_tested():
    versions = check_dsl()
    assert versions["nvidia-cutlass-dsl"].startswith(dsl.TESTED_SERIES + ".")
    assert len(versions) >= 2


def test_missing_dsl_says_what_to_install(monkeypatch, plan):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    message = r'^nvidia-cutlass-dsl = .*not installed.*: 4.8.x is needed to compile; pip install "nvidia-cutlass-dsl==4'
    with pytest.raises(DslVersionError, match=message) as caught:
        compile_kernel(plan)
    assert caught.value.field == "nvidia-cutlass-dsl"


@pytest.mark.parametrize("version", ["4.7.9", "4.80.0", "5.0.0"])
def test_untested_dsl_is_refused(monkeypatch, plan, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(DslVersionError, match=f"{version}.*: tested with 4.8.x only; pip install"):
        compile_kernel(plan)


def test_planning_and_importing_need_no_dsl():
    """In a process of its own: the package, planning and emitting import neither the DSL nor NumPy."""
    import subprocess
    import sys

    code = (
        "import sys, generator\n"
        "assert not {'numpy', 'pydantic', 'cutlass'} & set(sys.modules)\n"
        "generator.plan_kernel(generator.load_spec(head_dim=64))\n"
        "assert not {'numpy', 'cutlass', 'torch'} & set(sys.modules)\n"
        "import generator.compile, generator.run\n"
        "assert not {'cutlass', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
