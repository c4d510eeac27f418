"""Ctrl-C while a command works: exit code 130, one line, no half-written file, no process left; and folders that an
ordinary user may not write to, which are told before the work.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from generator.emulator.interrupt import interrupt_held_back
from generator.resources import checkout_root

ROOT = checkout_root()
ENDLESS = """import sys, vector_add
while True:
    vector_add.main()
    print("once more", file=sys.stderr, flush=True)
"""


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts pytest in the background lets it, and what it starts, ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(words, **environment):
    """A command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "generator", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def members(group):
    """Processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def read_until(process, marker):
    for line in process.stderr:
        if marker in line:
            return
    raise AssertionError(f"ended before {marker!r}")


def interrupted(process, whole, folder):
    """Send SIGINT to all processes of the group, or to the command alone, and look at what is left."""
    (os.killpg if whole else os.kill)(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted; no half-written file is left\n") and "Traceback" not in errors + output
    until(lambda: not members(process.pid), 5)
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"]
    return output


ALONE = pytest.param(False, marks=pytest.mark.sweep)  # as test_verify has it


@pytest.mark.parametrize("whole", [True, ALONE])
def test_mutate(tmp_path, whole):
    words = ["mutate", "--head-dim", 32, "--tile-n", 32, "--jobs", 2, "--json", tmp_path / "all.json"]
    process = started(words)
    read_until(process, "mutants 3 ")
    assert len(members(process.pid)) == 3
    assert interrupted(process, whole, tmp_path) == ""


@pytest.mark.parametrize("whole", [True, ALONE])
def test_matrix(tmp_path, whole):
    process = started(["matrix", "--select", "*_d64*", "--jobs", 2, "--json", tmp_path / "rows.json"])
    read_until(process, "matrix 1/")
    assert len(members(process.pid)) >= 3
    assert interrupted(process, whole, tmp_path) == ""


@pytest.mark.parametrize("whole", [True, False])
def test_verify(tmp_path, whole):
    """While the CTAs of a launch run in two processes."""
    words = ["verify", "--head-dim", 128, "--strategy", "tiles", "--shape", "1,8,8,2048,1024", "--json"]
    process = started(words, BESPOKE_PROCESSES="2")
    until(lambda: len(members(process.pid)) == 2)
    time.sleep(0.3)
    assert interrupted(process, whole, tmp_path) == ""


def test_emulate(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    files = ["--json", tmp_path / "launches.json", "--capture", tmp_path / "launches.npz"]
    process = started(["emulate", *files, script], PYTHONPATH=f"{ROOT}:{ROOT / 'tests/programs'}")
    read_until(process, "once more")
    time.sleep(0.2)
    interrupted(process, True, tmp_path)


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_verify_while_the_dsl_is_imported(tmp_path, delay):
    """A kernel that is compiled already: the DSL's native code is loaded to call it."""
    words = ["verify", "--head-dim", 32, "--tile-n", 32, "--shape", "1,16,16,1024,1024", "--json"]
    process = started(words)
    read_until(process, "compile  ")
    time.sleep(delay)
    interrupted(process, True, tmp_path)


def test_interrupts_are_held_back():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("the block")
    assert done == ["the block"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), interrupt_held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("more")
    assert done == ["the block"], "the second one is not"


ORPHANS = """import os, time
from generator.emulator.interrupt import each
def work(i):
    os.write(1, b"working" + os.linesep.encode())
    time.sleep(60)
for _ in each(2, "fork", work, [(0,), (1,)]):
    pass
"""


def test_workers_end_with_their_parent():
    """However it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    assert [process.stdout.readline() for _ in range(2)] == [b"working\n"] * 2
    assert len(members(process.pid)) == 3
    process.kill()
    process.wait()
    until(lambda: not members(process.pid), 5)
    process.stdout.close()


def as_ordinary_user():
    """What root may do beyond permission bits is dropped at exec; for anybody else this does nothing."""
    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.parametrize("words", [
    ("mutate", "--head-dim", "32", "--json", "FOLDER/all.json"),
    ("matrix", "--select", "*_d64", "--json", "FOLDER/rows.json"),
    ("verify", "--head-dim", "32", "--trace", "FOLDER/trace.json"),
    ("emulate", "--json", "FOLDER/launches.json", "tests/programs/vector_add.py"),
    ("emulate", "--capture", "FOLDER/launches.npz", "tests/programs/vector_add.py"),
    ("crosscheck", "--markdown", "FOLDER/report.md"),
    ("compile", "--head-dim", "32", "--out", "FOLDER"),
    ("generate", "--head-dim", "32", "--out", "FOLDER/new"),
    ("docs", "--out", "FOLDER"),
], ids=lambda words: f"{words[0]} {words[-2]}")  # fmt: skip
def test_a_folder_that_may_not_be_written_to(tmp_path, words):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    words = [word.replace("FOLDER", str(folder)) for word in words]
    command = [sys.executable, "-m", "generator", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=as_ordinary_user, timeout=60)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and str(folder) in line and "cannot be written: Permission denied" in line
    assert not list(folder.iterdir())


def test_a_cache_that_may_not_be_written_to(tmp_path):
    """It is told before a kernel is compiled: the sources' part of it can be written, and the kernels' cannot."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o555)
    command = [sys.executable, "-m", "generator", "compile", "--head-dim", "32", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "BESPOKE_CACHE": str(tmp_path)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, preexec_fn=as_ordinary_user, timeout=60, env=environment
    )
    assert result.returncode == 2 and "BESPOKE_CACHE" in result.stderr and "Permission denied" in result.stderr
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".py"]
