"""docs/instructions.md is what the instruction table says, and its patterns say exactly what the table holds."""

import re
from collections import Counter
from pathlib import Path

import pytest

from generator.emulator import document
from generator.emulator.table import FAMILIES, RESULT, TABLE, expand, find

PAGE = Path(__file__).parents[1] / "docs" / "instructions.md"


def test_the_committed_page_is_current():
    current = PAGE.read_text() == document.document()
    assert current, "run: python -m generator.emulator.document > docs/instructions.md"


def test_the_patterns_expand_to_the_table():
    rows = [line for line in document.document().splitlines() if line.startswith("| ") and "`" in line]
    counts = Counter(name for row in rows for pattern in re.findall(r"`([^`]+)`", row) for name in expand(pattern))
    assert max(counts.values()) == 1
    translated = {name for names, _ in document.TRANSLATED for name in names}
    families = {name for family in FAMILIES.values() for entry in family for name in expand(entry.name)}
    assert not families & (set(TABLE) | translated)
    assert set(counts) == {name for name in TABLE if RESULT not in name} | translated | families
    assert sum(int(row.split("|")[3]) for row in rows) == len(counts)


@pytest.mark.parametrize(
    "names, patterns",
    [
        (["a.b", "a.c"], ["a.{b,c}"]),
        (["a", "a.b"], ["a{,.b}"]),
        (["a.x", "a.b.x", "a.c.x"], ["a{,.b,.c}.x"]),
        (["a.x.u", "a.y.u", "a.x.v"], ["a.x.{u,v}", "a.y.u"]),
    ],
)
def test_names_collapse(names, patterns):
    assert [p[1:] for p in document.collapse(names)] == patterns


def test_a_family_knows_its_spellings_and_no_others():
    assert find("ld.global.nc.L1::no_allocate.L2::256B.v4.b32").sources == ("a",)
    assert find("ld.global.L2::cache_hint.b32").sources == ("a", "U")
    for name in (
        "ld.global.v4.b128",
        "ld.global.v8.b64",
        "ld.shared.ca.b32",
        "st.const.b32",
        "ld.volatile.global.nc.b32",
        "atom.global.add.s64",
        "red.acquire.gpu.global.add.u32",
        "ld.global.L2::evict_last.b32",
    ):
        assert find(name) is None, name


def test_every_entry_names_its_section():
    assert all(re.fullmatch(r"9\.7\.\d+(\.\d+)*", entry.isa) for entry in TABLE.values())
    assert all(".".join(entry.isa.split(".")[:3]) in document.SECTIONS for entry in TABLE.values())
