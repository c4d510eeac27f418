"""Every spelling of the instruction table is one that ptxas takes, where there is a ptxas ($PTXAS, or on the path)."""

import os
import re
import shutil
import subprocess

import pytest

from generator.emulator import ops  # noqa: F401  (fills the table)
from generator.emulator.table import FAMILIES, RESULT, TABLE, expand
from generator.emulator.targets import NEEDS_SM_100

PTXAS = os.environ.get("PTXAS") or shutil.which("ptxas")
REGISTERS = {"p": "%p", **dict.fromkeys("hie", "%h"), **dict.fromkeys("usf", "%r"), **dict.fromkeys("USd2", "%d")}
HEAD = """.version 9.1
.target sm_100a
.address_size 64
.visible .entry k()
{
.reg .pred %p<99>; .reg .b16 %h<99>; .reg .b32 %r<99>; .reg .b64 %d<99>; .reg .b128 %q<9>;
"""
NUMBERS = {"setmaxnreg": 64, "applypriority": 128, "tensormap.cp_": 128, "fence.proxy.tensormap": 128, "cp.async.c": 16}
ELSEWHERE = ("mma", "wgmma", "tcgen05", "ldmatrix", "stmatrix")  # operands of shapes of their own
PROVIDED = ("vprintf", "__assertfail")  # functions


def operands(name: str, entry) -> str:
    """An operand of the right kind in each place."""
    used = iter(range(1, 99))
    vector = int(next(iter(re.findall(r"\.v(\d)\b", name)), 2))

    def one(kind: str) -> str:
        if kind == "*U" and name.endswith(".b128"):
            return f"%q{next(used) % 9}"
        if kind[0] == "*":
            return "{" + ", ".join(one(kind[1:]) for _ in range(vector)) + "}"
        if kind == "T":
            return "[%d40, {" + ", ".join(f"%r{i}" for i in range(int(re.search(r"\.(\d)d\b", name)[1]))) + "}]"
        if kind == "k":
            return str(next((n for head, n in NUMBERS.items() if name.startswith(head)), 1))
        return "[%d40]" if kind == "a" else f"{REGISTERS[kind]}{next(used)}"

    made = TABLE[name + RESULT].dests if name + RESULT in TABLE else entry.dests
    dests = [one(kind) for kind in made if kind[0] != "?"]
    if len(dests) == 2 and entry.dests[1] == "p":
        dests = ["|".join(dests)]
    if ".shared::cluster" in name and name.startswith("mbarrier.arrive"):
        dests = ["_"]
    wanted = [kind for kind in entry.sources if kind[0] != "?" or (kind == "?U" and "cache_hint" in name)]
    return ", ".join(dests + [one(kind.lstrip("?")) for kind in wanted])


def release() -> tuple[int, int]:
    """Of the CUDA toolkit that ptxas is from; (0, 0) where there is none."""
    if PTXAS is None:
        return 0, 0
    said = subprocess.run([PTXAS, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def refused(names: list[str], entries: dict, arch: str, folder) -> dict[str, str]:
    """What ptxas says against instructions, by name; nothing is compiled."""
    lines = [f"{name} {operands(name, entries[name])};" for name in names]
    path = folder / f"{arch}.ptx"
    path.write_text(HEAD.replace("sm_100a", arch) + "\n".join(lines) + "\nnot.an.instruction;\nret;\n}\n")
    command = [PTXAS, f"-arch={arch}", "-o", os.devnull, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = dict(re.findall(r"line (\d+); error\s*: (.*)", said))
    first = HEAD.count("\n") + 1
    assert str(first + len(lines)) in found, said[:500]  # it did read to the end
    return {names[int(at) - first]: why for at, why in found.items() if int(at) - first < len(lines)}


def spellings() -> tuple[list[str], dict]:
    entries = TABLE | {name: entry for family in FAMILIES.values() for entry in family for name in expand(entry.name)}
    skipped = (name.split(".")[0] in ELSEWHERE or name in PROVIDED or RESULT in name for name in entries)
    return [name for name, skip in zip(entries, skipped, strict=True) if not skip], entries


@pytest.mark.skipif(release() < (13, 1), reason="no ptxas of CUDA 13.1 or later, which knows PTX ISA 9.1")
def test_ptxas_takes_every_spelling(tmp_path):
    names, entries = spellings()
    found = refused(names, entries, "sm_100a", tmp_path)
    said = [f"{name} {operands(name, entries[name])} {why}" for name, why in found.items()]
    assert not said, f"{len(said)} spellings are refused: " + "\n".join(said[:20])


@pytest.mark.skipif(release() < (13, 1), reason="no ptxas of CUDA 13.1 or later, which knows PTX ISA 9.1")
def test_what_sm_90a_does_not_have(tmp_path):
    """`targets` refuses what ptxas refuses for sm_90a, and nothing else."""
    names, entries = spellings()
    found = refused(names, entries, "sm_90a", tmp_path)
    wrong = [name for name in names if bool(NEEDS_SM_100.match(name)) != (name in found)]
    assert not wrong, f"{len(wrong)} spellings are judged differently: {wrong[:20]}"
    assert len(found) > 40_000 and all(NEEDS_SM_100.match(n) for n in TABLE if n.startswith("tcgen05"))
