"""What stands in a PTX module outside of its kernels: functions, variables with initial values (PTX ISA 9.1 §5.4)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from .errors import PtxSyntaxError
from .syntax import TYPE_BITS, Variable

_LINKING = r"(?:\.(?:visible|weak|extern|common)\s+)*"
FUNCTION = re.compile(
    _LINKING + r"\.func\s*(?:\.noreturn\s*)?(?:\(([^)]*)\)\s*)?([$\w]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])", re.S
)
ENTRY = re.compile(_LINKING + r"\.entry\s+([$\w]+)\s*(?:\((.*?)\))?([^{;]*)([{;])", re.S)
_PARAM_NAME = re.compile(r"([$\w]+)\s*(?:\[\d*\])?$")
_LINES = re.compile(r"^[ \t]*\.(?:version|target|address_size|file|loc)\b[^\n]*", re.M)
_SECTION = re.compile(r"\.section\s+\S+\s*\{[^}]*\}", re.S)
_VARIABLE = re.compile(
    r"\.(global|const|shared)\s+(?:\.attribute\([^)]*\)\s+)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)\s*((?:\[\d*\])*)"
    r"\s*(?:=\s*(.*))?$",
    re.S,
)
_ADDRESS = re.compile(r"(?:(0[xX][0-9a-fA-F]+)\()?(?:generic\()?([$\w]+)\)?\s*(?:([+-])\s*(\d+))?\)?$")


@dataclass(frozen=True)
class Function:
    """A device function: names of what it returns and takes; where its body starts, None if it is only declared."""

    name: str
    returns: tuple[str, ...]
    params: tuple[str, ...]
    start: int | None
    line: int


@dataclass
class Outside:
    """By name: functions, variables, and the module's shared variables as (bytes, align)."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_functions(text: str) -> dict[str, Function]:
    """Every .func, defined or declared."""
    found: dict[str, Function] = {}
    for match in FUNCTION.finditer(text):
        returns, params = (tuple(_names(match[i] or "")) for i in (1, 3))
        line = text.count("\n", 0, match.end()) + 1
        defined = match[5] == "{"
        if defined or match[2] not in found:
            found[match[2]] = Function(match[2], returns, params, match.end() if defined else None, line)
    return found


def _names(params: str):
    for declared in params.split(","):
        if declared.strip():
            name = _PARAM_NAME.search(declared.strip())
            if name is None:
                raise PtxSyntaxError(f"cannot read the parameter {declared.strip()!r}")
            yield name[1]


def body_end(text: str, start: int) -> int:
    """Position behind the brace that closes a body."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    return len(text)


def read_outside(text: str) -> Outside:
    """The functions and variables of a module without comments.

    Raises:
        PtxSyntaxError: something that is neither, or that was cut off.
    """
    outside = Outside(read_functions(text))
    rest, at = [], 0
    for match in sorted((*FUNCTION.finditer(text), *ENTRY.finditer(text)), key=lambda m: m.start()):
        if match.start() < at:
            continue
        end = body_end(text, match.end()) if match[match.lastindex] == "{" else match.end()
        rest += [text[at : match.start()], "\n" * text.count("\n", match.start(), end)]
        at = end
    left = "".join([*rest, text[at:]])
    for pattern in (_LINES, _SECTION):
        left = pattern.sub(lambda m: "\n" * m[0].count("\n"), left)
    line = 1
    *statements, tail = left.split(";")
    for statement in statements:
        lead = len(statement) - len(statement.lstrip())
        _statement(outside, statement.strip(), line + statement.count("\n", 0, lead))
        line += statement.count("\n")
    if tail.strip():
        raise PtxSyntaxError(f"PTX line {line}: the text ends inside {tail.strip()[:60]!r}: it was cut off")
    return outside


def _statement(outside: Outside, text: str, line: int) -> None:
    external = re.match(r"(?:\.\w+\s+)*?\.extern\b", text)
    body = re.sub("^" + _LINKING, "", text)
    match = _VARIABLE.match(body)
    if not text or body.startswith((".pragma", ".alias")):
        return
    if match is None or match[3] not in TYPE_BITS:
        raise PtxSyntaxError(f"PTX line {line}: cannot read {text.split(chr(10))[0]!r} outside of a kernel")
    space, align, kind, name, extents, initial = match.groups()
    width = TYPE_BITS[kind] // 8
    counts = re.findall(r"\[(\d*)\]", extents)
    if space == "shared":
        if "" not in counts:
            outside.shared[name] = (_product(width, counts), int(align or width))
        return
    values = tuple(_values(initial, line)) if initial else ()
    if external and name not in outside.variables:
        raise PtxSyntaxError(f"PTX line {line}: {name} is .extern: modules are not linked with others")
    if counts and counts[0] == "":
        counts[0] = str(len(values) or 1)
    size = _product(width, counts)
    if len(values) * width > size:
        raise PtxSyntaxError(f"PTX line {line}: {len(values)} values for {name}, which has {size // width} elements")
    outside.variables[name] = Variable(name, space, size, max(int(align or width), width), kind, values, line)


def _product(width: int, counts: list[str]) -> int:
    for count in counts:
        width *= int(count)
    return width


def _values(text: str, line: int):
    """Numbers, or (symbol, offset, mask) for addresses; nested braces count as one row."""
    for item in text.replace("{", " ").replace("}", " ").split(","):
        item = item.strip()
        if not item:
            continue
        number = _number(item)
        if number is not None:
            yield number
            continue
        address = _ADDRESS.match(item)
        if address is None:
            raise PtxSyntaxError(f"PTX line {line}: cannot read the initial value {item!r}")
        mask, symbol, sign, offset = address.groups()
        yield symbol, int(f"{sign or '+'}{offset or 0}"), int(mask, 16) if mask else 0


def _number(item: str) -> int | float | None:
    try:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", item):
            return struct.unpack(">f", bytes.fromhex(item[2:]))[0]
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", item):
            return struct.unpack(">d", bytes.fromhex(item[2:]))[0]
        if re.fullmatch(r"-?0[0-7]+U?", item):
            return int(item.rstrip("U"), 8)
        return int(item.rstrip("U"), 0)
    except ValueError:
        pass
    try:
        return float(item)
    except ValueError:
        return None
