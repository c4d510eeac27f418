"""docs/assumptions.md: every place in the code that its tables name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "assumptions.md"


def places() -> list[tuple[str, str]]:
    """(reference, row) of every name in a "where" column; a name after a comma may omit its module."""
    found, column, module = [], None, None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "where" in cells:
            column = cells.index("where")
        elif cells and column is not None and not set(cells[0]) <= set("-"):
            for name in re.findall(r"`([^`]+)`", cells[column]):
                head, _, rest = name.partition(".")
                if (ROOT / "generator" / "emulator" / f"{head}.py").exists():
                    module, name = head, rest
                found.append((f"{module}:{name}", cells[0]))
    return found


@pytest.mark.parametrize("place", sorted({place for place, _ in places()}))
def test_the_places_that_the_tables_name(place):
    module, _, name = place.partition(":")
    text = (ROOT / "generator" / "emulator" / f"{module}.py").read_text()
    for part in filter(None, name.split(".")):
        assert re.search(rf"\b{re.escape(part)}\b", text), f"{module}.py has no {part}"


def test_there_are_rows():
    assert len(places()) > 40
