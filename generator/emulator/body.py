"""The body of a kernel → instructions.

Labels and registers are lexically scoped (inline assembly opens `{ }` scopes that re-declare both), so every name is
resolved here, once: registers become `Reg` objects with an index, labels become positions in the instruction list.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from .calls import OF_CALL, RETURN, branch_by_table, call, of_call_parameters
from .errors import PtxSyntaxError
from .lineinfo import Source, read_loc
from .syntax import SINK, TYPE_BITS, Address, Imm, Instr, Kernel, Not, Pair, Reg, Special, Symbol, Vector
from .table import RESULT
from .toplevel import Outside

_LABEL = re.compile(r"\s*([$%\w]+)\s*:(?!:)")
_REG_RANGE = re.compile(r"([%$\w]+)<(\d+)>$")
_VARIABLE = re.compile(r"\.(?:shared|local|param)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?")
_INSTR = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_SYMBOL = re.compile(r"[$\w]+$")
_SPECIAL = re.compile(  # §10
    r"%(?:(?:n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)(?:\.[xyz])?|laneid|n?warpid|n?smid|gridid|cluster_n?ctarank"
    r"|is_explicit_cluster|lanemask_\w+|clock\w*|globaltimer\w*|pm\d+\w*|envreg\d+|\w+_smem_\w+|current_graph_exec)$"
)
_EVENT = re.compile(r"[;{}]|^[ \t]*\.loc\s[^\n;]*\n", re.M)


class Scope:
    """One `{ }`: its registers by name (a .b128 register is a vector of two 64-bit halves), its labels, its branch
    tables, and what its .param variables are called in the kernel.
    """

    def __init__(self, parent: Scope | None, uid: int):
        self.parent, self.uid = parent, uid
        self.names: dict[str, Reg | Vector] = {}
        self.labels: set[str] = set()
        self.tables: dict[str, list[str]] = {}
        self.variables: dict[str, str] = {}

    def find(self, places: str, name: str):
        """What `name` is in this scope or one around it: in its `names`, `tables` or `variables`; None if nothing."""
        scope: Scope | None = self
        while scope is not None:
            found = getattr(scope, places).get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


class BodyParser:
    """Turns the body of one kernel into instructions. Functions that it calls are inlined."""

    def __init__(self, kernel: Kernel, text: str, outside: Outside):
        self.kernel, self.text, self.outside = kernel, text, outside
        self.calling: list[str] = []  # functions whose body is being inlined
        self.last_label = ""
        self.scope = Scope(None, 0)
        self.scopes = 1
        self.operand_cache: dict[tuple[int, str], object] = {}
        self.pending: list[tuple[Instr, Scope]] = []
        self.source: Source | None = None

    def declare(self, text: str, line: int) -> None:
        kind, names = text.split(None, 2)[1:]
        elements = "xyzw"[: {".v2": 2, ".v4": 4}.get(kind, 0)]  # of a vector (§5.4.2)
        if elements:
            kind, names = names.split(None, 1)
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
                if elements:
                    parts = {f"{one}.{element}": self.register(f"{one}.{element}", bits) for element in elements}
                    self.scope.names |= parts | {one: Vector(tuple(parts.values()))}
                elif bits == 128:
                    halves = (self.register(f"{one}.{half}", 64) for half in ("low", "high"))
                    self.scope.names[one] = Vector(tuple(halves))
                else:
                    self.scope.names[one] = self.register(one, bits)

    def register(self, name: str, bits: int) -> Reg:
        """A new register."""
        reg = Reg(len(self.kernel.regs), name, bits)
        self.kernel.regs.append(reg)
        return reg

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
        reg = self.scope.find("names", text)
        if reg is not None:
            return reg
        if _SPECIAL.match(text):
            return Special(text)
        if text[0] == "%" or not _SYMBOL.match(text):
            raise PtxSyntaxError(f"PTX line {line}: register or operand {text!r} is not declared")
        return Symbol(self.name_of(text))

    def name_of(self, variable: str) -> str:
        """What a variable is called in the kernel."""
        size_and_align = self.outside.shared.get(variable)
        if size_and_align is not None:
            self.kernel.shared.setdefault(variable, size_and_align)
        return self.scope.find("variables", variable) or variable

    def _register(self, text: str, line: int) -> Reg:
        reg = self.scope.find("names", text)
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
        try:
            if text[0] == ".":
                self.directive(text, line)
            else:
                self.instruction(text, line)
        except (IndexError, KeyError, TypeError, ValueError):
            raise PtxSyntaxError(f"PTX line {line}: cannot read {text!r}") from None

    def directive(self, text: str, line: int) -> None:
        word = text.split()[0]
        if word == ".reg":
            self.declare(text, line)
        elif word in (".shared", ".local", ".param"):
            self.variable(text, line)
        elif word == ".branchtargets":
            self.scope.tables[self.last_label] = [name.strip() for name in text.removeprefix(word).split(",")]
        elif word != ".pragma":
            raise PtxSyntaxError(f"PTX line {line}: directive {word} is not supported inside a kernel")

    def instruction(self, text: str, line: int) -> None:
        match = _INSTR.match(text)
        if not match:
            raise PtxSyntaxError(f"PTX line {line}: cannot read {text!r}")
        negated, guard, opcode, rest = match.groups()
        condition = (self._register(guard, line) if guard else None, bool(negated), line, text, self.source)
        if opcode in ("call", "call.uni"):
            return call(self, rest, condition)
        if opcode == "brx.idx":
            return branch_by_table(self, rest, condition)
        if opcode == "ret" and self.calling:
            return self.emit("bra", (Symbol(RETURN),), condition)
        operands = tuple(self.operand(t, line) for t in split_operands(rest)) if rest else ()
        if re.match(r"bar(rier)?(\.cta)?\.red\.", opcode):  # arrives and waits; then the result is read
            result, barrier, *counts, predicate = operands
            self.emit(opcode, (barrier, *(counts or [Imm(0)]), predicate), condition)
            return self.emit(opcode + RESULT, (result, barrier), condition)
        return self.emit(of_call_parameters(opcode, operands), operands, condition)

    def emit(self, opcode: str, operands: tuple, condition: tuple) -> None:
        """`condition`: guard, whether it is negated, line, text and source of the statement."""
        self.pending.append((Instr(opcode, operands, *condition), self.scope))

    def variable(self, text: str, line: int) -> None:
        match = _VARIABLE.match(text)
        if not match or match[4] == "":
            raise PtxSyntaxError(f"PTX line {line}: cannot read the variable {text!r}")
        width, name = TYPE_BITS[match[2]] // 8, match[3]
        place = self.kernel.shared if text.startswith(".shared") else self.kernel.local
        if text.startswith(".param"):  # of a call: each thread's own memory
            self.scope.variables[name] = name = f"{name}{OF_CALL}{self.scope.uid}"
        place[name] = (width * int(match[4] or 1), int(match[1] or width))

    def label(self, name: str, line: int) -> None:
        if name in self.scope.labels:
            raise PtxSyntaxError(f"PTX line {line}: label {name} is defined twice in one scope")
        self.scope.labels.add(name)
        self.last_label = name
        self.kernel.labels[f"{name}@{self.scope.uid}"] = len(self.pending)

    def open(self, parent: Scope | None) -> None:
        """Enter a scope."""
        self.scope = Scope(parent, self.scopes)
        self.scopes += 1

    def close(self) -> None:
        self.scope = self.scope.parent

    def finish(self) -> None:
        """Resolve branch targets now that every label is known."""
        for instr, scope in self.pending:
            if instr.opcode.startswith("bra"):
                instr = instr._replace(operands=(Symbol(self._target(instr, scope)),))
            self.kernel.instrs.append(instr)

    def _target(self, instr: Instr, scope: Scope | None) -> str:
        name = instr.operands[0].name
        while scope is not None:
            if name in scope.labels:
                return f"{name}@{scope.uid}"
            scope = scope.parent
        raise PtxSyntaxError(f"PTX line {instr.line}: branch to {name}, which is not defined")

    def body(self, start: int, line: int) -> int:
        """Consume statements from `start` (just past the opening brace) to its closing brace; return that position."""
        text = self.text
        depth, position, bracket = 1, start, False
        for match in _EVENT.finditer(text, start):
            char, begin = match.group(), match.start()
            if bracket and char != ";":
                continue  # a brace inside a statement: a vector operand
            chunk = text[position:begin]
            line += chunk.count("\n", 0, len(chunk) - len(chunk.lstrip()))
            body = chunk.lstrip()
            while (label := _LABEL.match(body)) is not None:
                self.label(label[1], line)
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
                    self.statement(body.rstrip(), line)
            elif char == "{":
                self.open(self.scope)
                depth += 1
            elif char == "}":
                if body:
                    raise PtxSyntaxError(f"PTX line {line}: statement without a semicolon: {body!r}")
                depth -= 1
                if depth == 0:
                    return match.end()
                self.close()
            else:
                self.source = read_loc(char)
                body = char
            line += body.count("\n")
            position = match.end()
        raise PtxSyntaxError(f"PTX line {line}: the text ends inside kernel {self.kernel.name}: it was cut off")


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
