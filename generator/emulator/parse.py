"""PTX text → a module of kernels whose instructions carry their line number (PTX ISA 9.1, sections 4 to 7)."""

from __future__ import annotations

import re

from .body import BodyParser
from .errors import PtxSyntaxError
from .lineinfo import drop_asm_locs, read_files
from .syntax import TYPE_BITS, Kernel, Module, Param
from .toplevel import ENTRY, Outside, read_outside

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.[a-z]+\s+)??(?:\.align\s+\d+\s+)?)?([$\w]+)(?:\[(\d+)\])?"
)
_DYNAMIC = re.compile(r"\.extern\s+\.shared\s+(?:\.align\s+(\d+)\s+)?\.\w+\s+([$\w]+)\[\];")


def _blank(match: re.Match) -> str:
    """Replace a comment with as many newlines as it held, so that line numbers stay."""
    return "\n" * match.group().count("\n")


def strip_comments(text: str) -> str:
    """The text without comments; every line keeps its number."""
    return _COMMENT.sub(_blank, text)


def parse_ptx(text: str) -> Module:
    """Parse a PTX module.

    Args:
        text: PTX source (ISA 8.x to 9.x) as nvvm or the DSL writes it.
    Returns:
        the module with its kernels; every instruction carries the line of `text` it came from.
    Raises:
        PtxSyntaxError: cut-off text, undeclared registers, unknown directives.
    """
    text = strip_comments(drop_asm_locs(text))
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    version = re.search(r"^\s*\.version\s+(\S+)", text, re.M)
    if not target or not version:
        raise PtxSyntaxError("not PTX: no .version and .target directives")
    files, outside = read_files(text), read_outside(text)
    dynamic = {m[2]: int(m[1] or 16) for m in _DYNAMIC.finditer(text)}
    kernels = {m[1]: _kernel(m, text, outside, dynamic) for m in ENTRY.finditer(text) if m[4] == "{"}
    if not kernels or len(kernels) != len(re.findall(r"\.entry\b", text)):
        raise PtxSyntaxError("the PTX text holds no complete .entry, or one that was cut off before its body")
    return Module(target[1], version[1], kernels, files, outside.variables)


def _kernel(match: re.Match, text: str, outside: Outside, dynamic: dict[str, int]) -> Kernel:
    kernel = Kernel(match[1], dynamic_shared=dynamic, variables=outside.variables)
    offset = 0
    for declared in _PARAM.finditer(match[2] or ""):
        width = TYPE_BITS[declared[2]] // 8
        size, align = width * int(declared[4] or 1), int(declared[1] or width)
        offset = -(-offset // align) * align
        kernel.params.append(Param(declared[3], size, align, offset))
        offset += size
    for name, value in re.findall(r"\.(\w+)\s+([\d, ]+)", match[3]):
        kernel.directives[name] = value.strip()
    parser = BodyParser(kernel, text, outside)
    parser.body(match.end(), text.count("\n", 0, match.end()) + 1)
    parser.finish()
    return kernel
