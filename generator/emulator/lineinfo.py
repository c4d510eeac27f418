"""Source lines of PTX: what its `.loc` directives say (PTX ISA 9.1, sections 11.5.3 and 11.5.4), for messages.

The CuTe DSL writes them when asked (CUTE_DSL_LINEINFO=1, seen in nvidia-cutlass-dsl 4.8.1): the innermost line of the
program, functions that it inlines included, and no function names, which are looked up in the file. A line or column of
0 stands for code that belongs to no statement.
"""

from __future__ import annotations

import ast
import bisect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .errors import EmulatorError

SHOWN = 8  # source lines that a message quotes


class Source(NamedTuple):
    """Where an instruction comes from: `.file` number, line, column; with inlining its function and its caller."""

    file: int
    line: int
    column: int
    function: str = ""  # label in .debug_str, empty where the directive has none
    inlined_at: tuple[int, int, int] | None = None  # file, line, column of the call

    @property
    def known(self) -> bool:
        """False for code that belongs to no statement."""
        return self.line > 0 and self.column > 0


_LOC = re.compile(
    r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:\s*,\s*function_name\s+([$\w]+(?:\s*\+\s*\d+)?)"
    r"\s*,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_ASM = re.compile(r"// begin inline asm\n.*?// end inline asm", re.S)
_ASM_LOC = re.compile(r"^[ \t]*\.loc\b[^\n]*$", re.M)
_PLACE = re.compile(r"^[ \t]*\.loc\b[^\n;]*$|\.entry\b", re.M)
_MENTION = re.compile(r"PTX lines? (\d+)(?: to (\d+))?( \([\w.:]+(?=\)))?")


def read_loc(text: str) -> Source:
    """One `.loc` directive."""
    match = _LOC.match(text)
    if match is None:
        raise ValueError(f"cannot read {text.strip()!r}")
    file, line, column, function, *call = match.groups()
    inlined_at = tuple(int(x) for x in call) if call[0] else None
    return Source(int(file), int(line), int(column), (function or "").replace(" ", ""), inlined_at)


def drop_asm_locs(text: str) -> str:
    """Blank the `.loc` directives inside inline assembly: they count lines of the assembly as lines of the file."""
    return _ASM.sub(lambda asm: _ASM_LOC.sub("", asm[0]), text) if ".loc" in text else text


def read_files(text: str) -> dict[int, str]:
    """Paths by `.file` number."""
    return {int(m[1]): m[2] for m in _FILE.finditer(text)}


class LineTable:
    """Source of each line of a PTX text."""

    def __init__(self, text: str):
        text = drop_asm_locs(text)
        self.files = read_files(text)
        self._names = _debug_strings(text)
        self._lines: list[int] = []
        self._sources: list[Source | None] = []
        line, position = 1, 0
        for match in _PLACE.finditer(text):
            line += text.count("\n", position, match.start())
            position = match.start()
            self._lines.append(line)
            self._sources.append(None if match[0] == ".entry" else read_loc(match[0]))

    def at(self, line: int) -> Source | None:
        """Source of a PTX line, None where it is not known."""
        place = bisect.bisect_right(self._lines, line) - 1
        found = self._sources[place] if place >= 0 else None
        return found if found is not None and found.known and found.file in self.files else None

    def function(self, source: Source) -> str:
        """The function that holds a source line: as its file says, else as the PTX does, else empty."""
        return enclosing_function(self.files[source.file], source.line) or self._names.get(source.function, "")

    def describe(self, source: Source) -> str:
        """ "kernels/softmax.py:214, in softmax"."""
        function = self.function(source)
        text = f"{shown_path(self.files[source.file])}:{source.line}"
        text = f"{text}, in {function}" if function else text
        if source.inlined_at is None or source.inlined_at[0] not in self.files:
            return text
        file, line, _ = source.inlined_at
        return f"{text}, called at {shown_path(self.files[file])}:{line}"

    def quote(self, source: Source) -> str:
        """ "kernels/softmax.py:214: s = read(tile)", empty when the file cannot be read."""
        text = source_line(self.files[source.file], source.line)
        return f"{shown_path(self.files[source.file])}:{source.line}: {text}" if text else ""


@lru_cache(maxsize=64)
def line_table(ptx: str) -> LineTable | None:
    """The table of a PTX text, None when it carries no line information."""
    return LineTable(ptx) if re.search(r"^\s*\.loc\s", ptx, re.M) else None


def _debug_strings(text: str) -> dict[str, str]:
    """Names in .debug_str by "label" and "label+offset"."""
    section = re.search(r"\.section\s+\.debug_str\s*\{(.*?)\}", text, re.S)
    if section is None:
        return {}
    label, base, raw, names = "", 0, bytearray(), {}
    for word in re.findall(r"[$\w]+:|\b\d+\b|\.b8", section[1]):
        if word.endswith(":"):
            label, base = word[:-1], len(raw)
        elif word.isdecimal():
            raw.append(int(word))
            if word == "0":
                start = bytes(raw[:-1]).rfind(b"\0", base) + 1 or base
                names[label if start == base else f"{label}+{start - base}"] = raw[start:-1].decode(errors="replace")
    return names


# -- the program's files -----------------------------------------------------------------------------------------------
def shown_path(path: str) -> str:
    """Relative to the working folder where it lies inside."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


def source_line(path: str, line: int) -> str:
    """A line of a file without its indentation, empty when there is none."""
    lines = _read(path, _stamp(path)).splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def enclosing_function(path: str, line: int) -> str:
    """Name of the innermost function of a Python file around a line; empty outside of one, and for other files."""
    inside = [f for f in _functions(path, _stamp(path)) if f[0] <= line <= f[1]]
    return max(inside)[2] if inside else ""


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=64)
def _read(path: str, stamp: tuple[int, int]) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


@lru_cache(maxsize=64)
def _functions(path: str, stamp: tuple[int, int]) -> list[tuple[int, int, str]]:
    """First line, last line and name of each function."""
    if not path.endswith(".py"):
        return []
    try:
        tree = ast.parse(_read(path, stamp))
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name) for node in ast.walk(tree) if isinstance(node, kinds)
    ]


def callees(path: str) -> dict[str, set[str]]:
    """Functions of a Python file, and which of its functions each of them calls by name; empty for other files."""
    return _callees(path, _stamp(path))


@lru_cache(maxsize=64)
def _callees(path: str, stamp: tuple[int, int]) -> dict[str, set[str]]:
    if not path.endswith(".py"):
        return {}
    try:
        tree = ast.parse(_read(path, stamp))
    except (SyntaxError, ValueError):
        return {}
    calls: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
            named = {f.id if isinstance(f, ast.Name) else getattr(f, "attr", "") for f in inside}
            calls.setdefault(node.name, set()).update(named - {node.name})
    return {name: {n for n in named if n in calls} for name, named in calls.items()}


# -- messages ----------------------------------------------------------------------------------------------------------
def name_sources(message: str, ptx: str) -> str:
    """A message with the source beside each PTX line that it mentions, and the text of these source lines below.

    "PTX line 812 (st.shared.b32), CTA …" becomes "PTX line 812 (st.shared.b32; kernel.py:214, in softmax), CTA …".
    A message about PTX without line information stays as it is.
    """
    table = line_table(ptx)
    if table is None:
        return message
    quotes: dict[str, None] = {}

    def add(match: re.Match) -> str:
        first, last = int(match[1]), int(match[2] or match[1])
        found = [s for s in map(table.at, range(first, last + 1)) if s is not None]
        if not found:
            return match[0]
        low = min(s for s in found if s.file == found[0].file)
        quotes[table.quote(low)] = None
        place = table.describe(low)
        return f"{match[0]}; {place}" if match[3] else f"{match[0]} ({place})"

    named = _MENTION.sub(add, message)
    lines = [f"\n    {quote}" for quote in quotes if quote]
    more = f"\n    and {len(lines) - SHOWN} other source lines" if len(lines) > SHOWN else ""
    return named + "".join(lines[:SHOWN]) + more


@contextmanager
def naming_sources(ptx: str) -> Iterator[None]:
    """What the emulator raises inside the block about `ptx` names source lines too."""
    try:
        yield
    except EmulatorError as error:
        if error.args:
            error.args = (name_sources(str(error), ptx), *error.args[1:])
        raise
