"""Calls and jumps through tables while a body is parsed (PTX ISA 9.1 §9.7.12.2, §9.7.12.4, §7.1).

Parameters of a call are variables in each thread's local memory. A function of the module is inlined where it is
called, with registers of its own; its `ret` is a branch to its end. What the driver provides (vprintf, __assertfail)
becomes one instruction.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import PtxSyntaxError, UnsupportedInstruction
from .syntax import Address, Symbol

if TYPE_CHECKING:
    from .body import BodyParser

OF_CALL = "@"  # in the name of a call's parameter
RETURN = "$return"
PROVIDED = {"vprintf": (("b64", "b64"), ("b32",)), "__assertfail": (("b64", "b64", "b32", "b64", "b64"), ())}
_CALL = re.compile(r"(?:\(([^()]*)\)\s*,\s*)?([%$\w]+)\s*(?:,\s*\(([^()]*)\))?\s*(?:,\s*([%$\w]+))?$")


def of_call_parameters(opcode: str, operands: tuple) -> str:
    """The opcode of a load or store of a call's parameter: it is one of local memory."""
    mnemonic, _, rest = opcode.partition(".")
    space, _, tail = rest.partition(".")
    if mnemonic not in ("ld", "st") or space not in ("param", "param::func"):
        return opcode
    bases = [o.base for o in operands if isinstance(o, Address)]
    return f"{mnemonic}.local.{tail}" if any(isinstance(b, Symbol) and OF_CALL in b.name for b in bases) else opcode


def call(parser: BodyParser, text: str, condition: tuple) -> None:
    """call (returns), function, (parameters)."""
    guard, negated, line, whole, source = condition
    match = _CALL.match(text)
    if match is None:
        raise PtxSyntaxError(f"PTX line {line}: cannot read {whole!r}")
    returns, given = ([name.strip() for name in (match[i] or "").split(",") if name.strip()] for i in (1, 3))
    if match[4] or match[2][0] == "%":
        raise UnsupportedInstruction(f"PTX line {line}: calls through registers are not supported: {whole!r}")
    plain, after = (None, False, line, whole, source), f"$after{len(parser.pending)}"
    if guard is not None:
        parser.emit("bra", (Symbol(after),), (guard, not negated, line, whole, source))
    if match[2] in PROVIDED:
        _provided(parser, match[2], returns, given, plain)
    else:
        _inline(parser, match[2], returns, given, plain)
    if guard is not None:
        parser.label(after, line)


def _place(parser: BodyParser, name: str, line: int) -> Address:
    variable = parser.name_of(name)
    if OF_CALL not in variable:
        raise UnsupportedInstruction(f"PTX line {line}: {name} is not a .param variable: calls pass nothing else here")
    return Address(Symbol(variable), 0)


def _provided(parser: BodyParser, name: str, returns: list[str], given: list[str], condition: tuple) -> None:
    line, (kinds, results) = condition[2], PROVIDED[name]
    if (len(given), len(returns)) != (len(kinds), len(results)):
        raise PtxSyntaxError(f"PTX line {line}: {name} takes {len(kinds)} parameters: {condition[3]!r}")
    arguments = []
    for variable, kind in zip(given, kinds, strict=True):
        arguments.append(parser.register(f"{name}({variable})", int(kind[1:])))
        parser.emit(f"ld.local.{kind}", (arguments[-1], _place(parser, variable, line)), condition)
    outcome = [parser.register(f"{name}()", int(kind[1:])) for kind in results]
    parser.emit(name, (*outcome, *arguments), condition)
    for register, variable, kind in zip(outcome, returns, results, strict=True):
        parser.emit(f"st.local.{kind}", (_place(parser, variable, line), register), condition)


def _inline(parser: BodyParser, name: str, returns: list[str], given: list[str], condition: tuple) -> None:
    line, function = condition[2], parser.outside.functions.get(name)
    if function is None or function.start is None:
        raise UnsupportedInstruction(f"PTX line {line}: calls {name}, which the module does not define")
    if name in parser.calling:
        raise UnsupportedInstruction(f"PTX line {line}: {name} calls itself: recursion is not supported")
    formal = (*function.returns, *function.params)
    if len(formal) != len(returns) + len(given):
        raise PtxSyntaxError(f"PTX line {line}: {name} has {len(formal)} parameters: {condition[3]!r}")
    places = [_place(parser, variable, line).base.name for variable in (*returns, *given)]
    outer, source = parser.scope, parser.source
    parser.open(None)
    parser.scope.variables.update(zip(formal, places, strict=True))
    parser.calling.append(name)
    parser.body(function.start, function.line)
    parser.calling.pop()
    parser.label(RETURN, line)
    parser.scope, parser.source = outer, source


def branch_by_table(parser: BodyParser, text: str, condition: tuple) -> None:
    """brx.idx index, table: one test and branch a target; an index outside of the table is undefined, and traps."""
    guard, negated, line, whole, source = condition
    index, _, name = (part.strip() for part in text.partition(","))
    targets = parser.scope.find("tables", name)
    if targets is None:
        raise PtxSyntaxError(f"PTX line {line}: {name} is no label of .branchtargets")
    plain, after = (None, False, line, whole, source), f"$after{len(parser.pending)}"
    if guard is not None:
        parser.emit("bra", (Symbol(after),), (guard, not negated, line, whole, source))
    chosen = parser.register(f"{name} == {index}", 1)
    for i, target in enumerate(targets):
        parser.emit("setp.eq.u32", (chosen, parser.operand(index, line), parser.operand(str(i), line)), plain)
        parser.emit("bra", (Symbol(target),), (chosen, False, line, whole, source))
    parser.emit("trap", (), plain)
    if guard is not None:
        parser.label(after, line)
