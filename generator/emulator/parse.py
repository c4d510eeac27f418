"""PTX text → typed instructions, each with its line number (PTX ISA 9.1, sections 4 and 7).

Labels and registers are lexically scoped (inline assembly opens `{ }` scopes that re-declare both), so every name is
resolved here, once: registers become `Reg` objects with an index, labels become positions in the instruction list.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from .errors import PtxSyntaxError
from .lineinfo import Source, drop_asm_locs, read_files, read_loc

TYPE_BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b128": 128, "f16x2": 32, "bf16x2": 32, "bf16": 16}
TYPE_BITS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (16, 32, 64)}


class Reg(NamedTuple):
    """A virtual register: a number unique in its kernel, its name in the text, its width in bits (1 for predicates)."""

    index: int
    name: str
    bits: int


class Imm(NamedTuple):
    """An immediate: an int, or a float with `is_float` (0fXXXXXXXX and 0dXXXXXXXXXXXXXXXX are exact)."""

    value: int | float
    is_float: bool = False


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Symbol(NamedTuple):
    """A parameter, a variable or a label, by name."""

    name: str


class Address(NamedTuple):
    """`[base + offset]`, with the coordinates of a tensor copy or further address operands in `more`."""

    base: Reg | Symbol | Imm
    offset: int
    more: tuple = ()


class Vector(NamedTuple):
    """`{a, b, …}`."""

    items: tuple


class Pair(NamedTuple):
    """`d|p`: a destination and its predicate."""

    first: object
    second: object


class Not(NamedTuple):
    """`!p`."""

    reg: Reg


SINK = Symbol("_")


class Instr(NamedTuple):
    """One instruction: its opcode with all modifiers, operands, guard (a register and whether it is negated), PTX
    line.
    """

    opcode: str
    operands: tuple
    guard: Reg | None
    guard_negated: bool
    line: int
    text: str
    source: Source | None = None  # where the PTX carries line information


class Param(NamedTuple):
    """A kernel parameter: size and alignment in bytes, offset in the parameter space."""

    name: str
    size: int
    align: int
    offset: int


@dataclass
class Kernel:
    """One `.entry`: parameters, instructions, labels (name → index of the instruction that follows), shared
    variables.
    """

    name: str
    params: list[Param] = field(default_factory=list)
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    regs: list[Reg] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (bytes, align), static
    dynamic_shared: dict[str, int] = field(default_factory=dict)  # name → align
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (bytes, align), of each thread
    directives: dict[str, str] = field(default_factory=dict)

    def place_local(self) -> tuple[dict[str, int], int]:
        """Offset of each local variable, and the bytes that a thread needs for all of them."""
        places, offset = {}, 0
        for name, (size, align) in self.local.items():
            places[name] = -(-offset // align) * align
            offset = places[name] + size
        return places, offset


@dataclass
class Module:
    """A PTX module: target, version, its kernels by name, and the source files of `.file` directives."""

    target: str
    version: str
    kernels: dict[str, Kernel]
    files: dict[int, str]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"\s*([$%\w]+)\s*:(?!:)")
_REG_RANGE = re.compile(r"([%$\w]+)<(\d+)>$")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.[a-z]+\s+)??(?:\.align\s+\d+\s+)?)?([$\w]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(r"\.(?:shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?")
_INSTR = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)


_SYMBOL = re.compile(r"[$\w]+$")
_SPECIAL = re.compile(  # §10
    r"%(?:(?:n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)(?:\.[xyz])?|laneid|n?warpid|n?smid|gridid|cluster_n?ctarank"
    r"|is_explicit_cluster|lanemask_\w+|clock\w*|globaltimer\w*|pm\d+\w*|envreg\d+|\w+_smem_\w+|current_graph_exec)$"
)


def _blank(match: re.Match) -> str:
    """Replace a comment with as many newlines as it held, so that line numbers stay."""
    return "\n" * match.group().count("\n")


class _Scope:
    """One `{ }`: its registers by name, its register families (`%r<10>`), its labels."""

    def __init__(self, parent: _Scope | None, uid: int):
        self.parent, self.uid = parent, uid
        self.names: dict[str, Reg] = {}
        self.labels: set[str] = set()


class _KernelParser:
    """Turns the body of one kernel into instructions."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scope = _Scope(None, 0)
        self.scopes = 1
        self.operand_cache: dict[tuple[int, str], object] = {}
        self.pending: list[tuple[Instr, _Scope]] = []
        self.source: Source | None = None

    def declare(self, text: str, line: int) -> None:
        kind, names = text.split(None, 2)[1:]
        bits = TYPE_BITS.get(kind.lstrip("."))
        if bits is None:
            raise PtxSyntaxError(f"PTX line {line}: register type {kind} is not known in {text!r}")
        for name in names.split(","):
            name = name.strip()
            family = _REG_RANGE.match(name)
            expanded = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
            for one in expanded:
                if one in self.scope.names:
                    raise PtxSyntaxError(f"PTX line {line}: register {one!r} is declared twice in one scope")
                reg = Reg(len(self.kernel.regs), one, bits)
                self.kernel.regs.append(reg)
                self.scope.names[one] = reg

    def lookup(self, name: str, line: int) -> Reg | None:
        scope: _Scope | None = self.scope
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def operand(self, text: str, line: int):
        key = (self.scope.uid, text)
        found = self.operand_cache.get(key)
        if found is None:
            found = self.operand_cache[key] = self._operand(text, line)
        return found

    def _operand(self, text: str, line: int):
        if text[0] == "{":
            return Vector(tuple(self.operand(t, line) for t in split_operands(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1].strip(), line)
        if text[0] == "!":
            return Not(self._register(text[1:].strip(), line))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), line), self.operand(second.strip(), line))
        number = _number(text)
        if number is not None:
            return number
        if text == "_":
            return SINK
        reg = self.lookup(text, line)
        if reg is not None:
            return reg
        if _SPECIAL.match(text):
            return Special(text)
        if text[0] == "%" or not _SYMBOL.match(text):
            raise PtxSyntaxError(f"PTX line {line}: register or operand {text!r} is not declared")
        return Symbol(text)

    def _register(self, text: str, line: int) -> Reg:
        reg = self.lookup(text, line)
        if reg is None:
            raise PtxSyntaxError(f"PTX line {line}: register {text!r} is not declared")
        return reg

    def _address(self, text: str, line: int) -> Address:
        first, *more = split_operands(text)
        base, sign, offset = first, 1, "0"
        plus = re.match(r"(.+?)\s*([+-])\s*(-?\w+)$", first)
        if plus:
            base, sign, offset = plus[1], 1 if plus[2] == "+" else -1, plus[3]
        value = self.operand(base.strip(), line)
        return Address(value, sign * int(offset, 0), tuple(self.operand(m, line) for m in more))

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare(text, line)
        elif text.startswith((".shared", ".local")):
            self.variable(text, line)
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            raise PtxSyntaxError(f"PTX line {line}: directive {text.split()[0]} is not supported inside a kernel")
        else:
            match = _INSTR.match(text)
            if not match:
                raise PtxSyntaxError(f"PTX line {line}: cannot read {text!r}")
            negated, guard, opcode, rest = match.groups()
            operands = tuple(self.operand(t, line) for t in split_operands(rest)) if rest else ()
            guard_reg = self._register(guard, line) if guard else None
            instr = Instr(opcode, operands, guard_reg, bool(negated), line, text, self.source)
            self.pending.append((instr, self.scope))

    def variable(self, text: str, line: int) -> None:
        match = _VARIABLE.match(text)
        if not match or match[4] == "":
            raise PtxSyntaxError(f"PTX line {line}: cannot read the variable {text!r}")
        size = TYPE_BITS[match[2]] // 8 * int(match[4] or 1)
        place = self.kernel.local if text.startswith(".local") else self.kernel.shared
        place[match[3]] = (size, int(match[1] or TYPE_BITS[match[2]] // 8))

    def label(self, name: str, line: int) -> None:
        if name in self.scope.labels:
            raise PtxSyntaxError(f"PTX line {line}: label {name} is defined twice in one scope")
        self.scope.labels.add(name)
        self.kernel.labels[f"{name}@{self.scope.uid}"] = len(self.pending)

    def open(self) -> None:
        self.scope = _Scope(self.scope, self.scopes)
        self.scopes += 1

    def close(self) -> None:
        self.scope = self.scope.parent

    def finish(self) -> None:
        """Resolve branch targets now that every label is known."""
        for instr, scope in self.pending:
            if instr.opcode.startswith("bra"):
                instr = instr._replace(operands=(Symbol(self._target(instr, scope)),))
            self.kernel.instrs.append(instr)

    def _target(self, instr: Instr, scope: _Scope | None) -> str:
        name = instr.operands[0].name
        while scope is not None:
            if name in scope.labels:
                return f"{name}@{scope.uid}"
            scope = scope.parent
        raise PtxSyntaxError(f"PTX line {instr.line}: branch to {name}, which is not defined")


@lru_cache(maxsize=65536)
def _number(text: str) -> Imm | None:
    head = text[:2].lower()
    try:
        if head == "0f" and len(text) == 10:
            return Imm(struct.unpack(">f", bytes.fromhex(text[2:]))[0], True)
        if head == "0d" and len(text) == 18:
            return Imm(struct.unpack(">d", bytes.fromhex(text[2:]))[0], True)
        if text[0] in "0123456789-":
            if "." in text:
                return Imm(float(text), True)
            digits = text.rstrip("U")
            return Imm(int(digits, 8 if re.fullmatch(r"-?0[0-7]+", digits) else 0))
    except ValueError:
        return None
    return None


def split_operands(text: str) -> list[str]:
    """Split at the commas outside every bracket."""
    if "{" not in text and "[" not in text:
        return [t.strip() for t in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return parts


_EVENT = re.compile(r"[;{}]|^[ \t]*\.loc\s[^\n;]*\n", re.M)


def _parse_body(parser: _KernelParser, text: str, start: int, line: int) -> int:
    """Consume statements from `start` (just past the opening brace) to the kernel's closing brace; return that
    position.
    """
    depth, position, bracket = 1, start, False
    for match in _EVENT.finditer(text, start):
        char, begin = match.group(), match.start()
        if bracket and char != ";":
            continue  # a brace inside a statement: a vector operand
        chunk = text[position:begin]
        line += chunk.count("\n", 0, len(chunk) - len(chunk.lstrip()))
        body = chunk.lstrip()
        while (label := _LABEL.match(body)) is not None:
            parser.label(label[1], line)
            rest = body[label.end() :]
            line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
            body = rest.lstrip()
        if char == "{" and body:
            bracket = True  # the statement goes on: come back at its semicolon with everything since `position`
            continue_from = begin - len(body)
            position, bracket_line = continue_from, line
            line = bracket_line
            continue
        if char == ";":
            bracket = False
            if body:
                parser.statement(body.rstrip(), line)
        elif char == "{":
            parser.open()
            depth += 1
        elif char == "}":
            if body:
                raise PtxSyntaxError(f"PTX line {line}: statement without a semicolon: {body!r}")
            depth -= 1
            if depth == 0:
                return match.end()
            parser.close()
        else:
            parser.source = read_loc(char)
            body = char
        line += body.count("\n")
        position = match.end()
    raise PtxSyntaxError(f"PTX line {line}: the text ends inside kernel {parser.kernel.name}: it was cut off")


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
    files = read_files(text)
    dynamic = {
        m[2]: int(m[1] or 16)
        for m in re.finditer(r"\.extern\s+\.shared\s+(?:\.align\s+(\d+)\s+)?\.\w+\s+([$\w]+)\[\];", text)
    }
    kernels: dict[str, Kernel] = {}
    if re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
        raise PtxSyntaxError(".func: device functions are not supported yet")
    for match in _ENTRY.finditer(text):
        kernel = Kernel(match[1], dynamic_shared=dynamic)
        offset = 0
        for declared in _PARAM.finditer(match[2] or ""):
            size = TYPE_BITS[declared[2]] // 8 * int(declared[4] or 1)
            align = int(declared[1] or TYPE_BITS[declared[2]] // 8)
            offset = -(-offset // align) * align
            kernel.params.append(Param(declared[3], size, align, offset))
            offset += size
        for name, value in re.findall(r"\.(\w+)\s+([\d, ]+)", match[3]):
            kernel.directives[name] = value.strip()
        parser = _KernelParser(kernel)
        _parse_body(parser, text, match.end(), text.count("\n", 0, match.end()) + 1)
        parser.finish()
        kernels[kernel.name] = kernel
    if not kernels or len(kernels) != len(re.findall(r"\.entry\b", text)):
        raise PtxSyntaxError("the PTX text holds no complete .entry, or one that was cut off before its body")
    return Module(target[1], version[1], kernels, files)
