"""docs/instructions.md is what the instruction table says, and its patterns say exactly what the table holds."""

import re
from collections import Counter
from pathlib import Path

import pytest

from generator.emulator import document
from generator.emulator.table import TABLE, expand

PAGE = Path(__file__).parents[1] / "docs" / "instructions.md"


def test_the_committed_page_is_current():
    current = PAGE.read_text() == document.document()
    assert current, "run: python -m generator.emulator.document > docs/instructions.md"


def test_the_patterns_expand_to_the_table():
    rows = [line for line in document.document().splitlines() if line.startswith("| ") and "`" in line]
    counts = Counter(name for row in rows for pattern in re.findall(r"`([^`]+)`", row) for name in expand(pattern))
    assert max(counts.values()) == 1
    translated = {name for names, _ in document.TRANSLATED for name in names}
    assert set(counts) == set(TABLE) | translated
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


def test_every_entry_names_its_section():
    assert all(re.fullmatch(r"9\.7\.\d+(\.\d+)*", entry.isa) for entry in TABLE.values())
    assert all(".".join(entry.isa.split(".")[:3]) in document.SECTIONS for entry in TABLE.values())
