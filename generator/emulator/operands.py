"""Operands of a block's instructions → expressions in the text of its function, and what is known of their values.

Values live in local variables as NumPy arrays that broadcast to […, 32 lanes]. A 32-bit register has lazily made views
as u32, s32 and float32; a 64-bit one is a u64 or a pair of 32-bit halves; moves only rename.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedInstruction
from .flow import MOVES, Block
from .syntax import SINK, Address, Imm, Instr, Not, Reg, Special, Symbol, Vector
from .table import BITS
from .values import CANONICAL, DTYPE, Value

if TYPE_CHECKING:
    from .translate import Translator


class OperandWriter:
    """Reads operands and binds destinations."""

    def __init__(self, owner: Translator, block: Block):
        self.owner, self.block = owner, block
        self.lines: list[str] = []
        self.kinds: dict[str, str] = {}  # type of what an instruction delivers in a variable
        self.values: dict[int, Value] = {}
        self.dirty: dict[int, None] = {}
        self.names = 0
        self.line = 0  # of the instruction being written
        self.instr: Instr | None = None
        self.touched: set[int] = set()  # registers known not to be in flight here
        self.unfenced: dict[int, bool] = {}  # registers of wgmma used here, with no wgmma.fence since: whether only set
        self.constants: set[int] = set()  # registers that a move of a constant set last
        self.setting = False  # whether the instruction at hand is such a move
        self.fenced = False  # a wgmma.fence came before in this block
        self.active_guard: str | None = None  # its guard, once evaluated
        self.active_of: dict[str, str] = {}  # guard → the name of the lanes that it lets run

    # -- names and values ---------------------------------------------------------------------------------------------
    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def let(self, expression: str) -> str:
        name = self.name()
        self.lines.append(f"{name} = {expression}")
        return name

    def load(self, reg: Reg) -> Value:
        self.touch(reg)
        value = self.values.get(reg.index)
        if value is None:
            index = reg.index
            shadow = self.let(f"D[{index}][ix]") if index in self.owner.checked else None
            if index in self.owner.paired:
                low, high = (Value(32, {"u": self.let(f"R[{index}][{h}][ix]")}, None, index, shadow) for h in (0, 1))
                value = Value(64, {}, (low, high), index)
            else:
                value = Value(reg.bits, {CANONICAL[reg.bits]: self.let(f"R[{index}][ix]")}, None, index, shadow)
            self.values[index] = value
        return value

    def form(self, value: Value, kind: str) -> str:
        """Variable that holds `value` as type `kind`; "2" is handled by `pair`."""
        if kind in value.forms:
            return value.forms[kind]
        if value.bits == 64 and not value.forms:
            low, high = value.halves
            value.forms["U"] = self.let(f"join64({self.form(low, 'u')}, {self.form(high, 'u')})")
            return self.form(value, kind)
        source = next(iter(value.forms.values()))
        if BITS[kind] != value.bits:
            raise UnsupportedInstruction(f"PTX line {self.line}: operand of {value.bits} bits used as type {kind!r}")
        computed = "f" in value.forms and "u" not in value.forms and "s" not in value.forms  # see `hardware_nan`
        read = f"hardware_nan({source})" if computed and kind in "us" else f"{source}.view(T_{kind})"
        value.forms[kind] = self.let(read if kind != "s" or not computed else f"{read}.view(T_s)")
        return value.forms[kind]

    def halves(self, value: Value) -> tuple[Value, Value]:
        if value.halves is None:
            whole = self.form(value, "U")
            value.halves = (
                Value(32, {"u": self.let(f"low32({whole})")}, shadow=value.shadow),
                Value(32, {"u": self.let(f"high32({whole})")}, shadow=value.shadow),
            )
        return value.halves

    def constant(self, imm: Imm, kind: str) -> str:
        number = imm.value
        if kind == "p":
            return "T_p(True)" if number else "T_p(False)"
        if kind in "fd" and imm.is_float:
            return self.owner.constant(DTYPE[kind](number))
        if imm.is_float:
            number = (
                struct.unpack("<I", struct.pack("<f", number))[0]
                if BITS[kind] == 32
                else struct.unpack("<Q", struct.pack("<d", number))[0]
            )
        width = BITS[kind]
        unsigned = np.dtype(f"u{width // 8}").type(int(number) & ((1 << width) - 1))
        return self.owner.constant(unsigned.view(DTYPE[kind]))

    def value_of(self, operand, instr: Instr) -> Value:
        """A move's source as a Value."""
        if isinstance(operand, Reg):
            return self.load(operand)
        if isinstance(operand, Vector):
            part = instr._replace(opcode=f"mov.b{int(instr.opcode[5:]) // len(operand.items)}")
            items = [self.value_of(item, part) for item in operand.items]
            empty = [isinstance(item, Reg) and item.index in self.owner.undefined for item in operand.items]
            if items[0].bits == 16 and not all(empty):  # a compiler fills the half that nothing will use that way
                items = [replace(v, shadow=None) if e else v for v, e in zip(items, empty, strict=True)]
            if len(items) == 2 and items[0].bits == 32:
                return Value(64, {}, (items[0], items[1]))
            if len(items) == 4 and items[0].bits == 16:
                return Value(64, {}, (self.packed(*items[:2]), self.packed(*items[2:])))
            if len(items) == 2 and items[0].bits == 16:
                return self.packed(*items)
            raise UnsupportedInstruction(f"PTX line {instr.line}: cannot pack {instr.text!r}")
        bits = {"b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "pred": 1}.get(
            instr.opcode[4:], 64
        )
        kind = CANONICAL[bits]
        if isinstance(operand, Imm):
            if instr.opcode[4:] in ("f32", "f64"):
                fkind = "f" if bits == 32 else "d"
                return Value(bits, {fkind: self.constant(Imm(float(operand.value), True), fkind)})
            return Value(bits, {kind: self.constant(operand, kind)})
        if isinstance(operand, Special):
            return self.special(operand.name, bits, instr)
        if isinstance(operand, Symbol):
            if operand.name in self.owner.kernel.variables:
                return Value(64, {"U": self.let(f"m.variables[{operand.name!r}]")})
            address = self.owner.constant(DTYPE[kind](self.owner.symbol_address(operand.name, instr)))
            return Value(bits, {kind: self.in_window(operand.name, address)})
        raise UnsupportedInstruction(f"PTX line {instr.line}: cannot move {operand!r}")

    def packed(self, low: Value, high: Value) -> Value:
        """Two 16-bit values as one of 32 bits."""
        pack = f"pack16({self.form(high, 'h')}, {self.form(low, 'h')})"
        return Value(32, {"u": self.let(pack)}, shadow=self.both(low.shadow, high.shadow))

    def quarters(self, value: Value) -> tuple[Value, Value]:
        """The 16-bit halves of a 32-bit value."""
        whole = self.form(value, "u")
        low, high = self.let(f"{whole}.astype(T_h)"), self.let(f"({whole} >> C16).astype(T_h)")
        return Value(16, {"h": low}, shadow=value.shadow), Value(16, {"h": high}, shadow=value.shadow)

    def special(self, name: str, bits: int, instr: Instr) -> Value:
        if name[1:] not in self.owner.SPECIALS:
            raise UnsupportedInstruction(f"PTX line {instr.line}: special register {name} is not known")
        value = Value(32, {"u": self.let(f"m.special[{name[1:]!r}](ws)")})
        if bits == 64:
            return Value(64, {"U": self.let(f"{value.forms['u']}.astype(T_U)")})
        return value

    def read(self, operand, kind: str, instr: Instr) -> str:
        """Expression for a source operand of type `kind`."""
        if kind[0] == "*":
            items = self.vector(operand, instr)
            return "(" + "".join(self.read(item, kind[1:], instr) + ", " for item in items) + ")"
        if kind == "k":
            if not isinstance(operand, Imm):
                raise UnsupportedInstruction(
                    f"PTX line {instr.line}: {instr.opcode} needs an immediate, not {operand!r}"
                )
            return repr(operand.value)
        if kind == "a":
            return self.address(operand, instr)
        if kind == "T":
            coordinates = self.read(operand.more[0], "*s", instr)
            return f"({self.address(operand._replace(more=()), instr)}, {coordinates})"
        if kind == "x":
            if isinstance(operand, Address):
                return f"('tmem', {self.address(operand, instr)})"
            return f"('desc', {self.read(operand, 'U', instr)})"
        if isinstance(operand, Imm):
            typed = instr.opcode.rsplit(".", 1)[-1][0] in "us"  # an untyped (.b32) operand may be spelled as a float
            if kind in "fd" and not operand.is_float or kind in "husiUS" and operand.is_float and typed:
                raise UnsupportedInstruction(f"PTX line {instr.line}: immediate {operand.value} in {instr.text!r}")
            return self.constant(operand, kind)
        if isinstance(operand, (Vector, Address)):
            raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} takes no {operand!r}")
        if isinstance(operand, Not):
            return self.let(f"~{self.read(operand.reg, 'p', instr)}")
        if isinstance(operand, (Special, Symbol)):
            bits = BITS[kind]
            move = instr._replace(opcode=f"mov.b{bits}")
            return self.form(self.value_of(operand, move), kind)
        value = self.load(operand)
        self.check_defined(operand, value, instr)
        if value.bits > BITS[kind] and instr.opcode.startswith(("st.", "cvt.")):  # ISA 9.4.1: the low bits count
            return self.let(
                f"{self.form(value, CANONICAL[value.bits])}.astype(T_{CANONICAL[BITS[kind]]}).view(T_{kind})"
            )
        if value.bits > BITS[kind]:
            raise UnsupportedInstruction(f"PTX line {instr.line}: {operand.name} is wider than {instr.opcode} reads")
        return self.form(value, kind)

    def in_window(self, symbol: str, address: str) -> str:
        """A shared symbol's address depends on the CTA's rank in its cluster."""
        return self.let(f"m.window(ws, {address})") if symbol in self.owner.shared_offsets else address

    def vector(self, operand, instr: Instr) -> tuple:
        """The items of a vector operand; their number must be the one that the opcode says (.v4, .x16)."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        said = re.search(r"\.[vx](\d+)(?=\.|$)", instr.opcode)
        wide = next((n for shape, n in (("16x128b", 2), ("16x256b", 4)) if shape in instr.opcode), 1)  # of tcgen05.ld
        whole = ".b128" in instr.opcode and len(items) == 2  # a 128-bit register
        if said and len(items) != int(said[1]) * wide and not whole:
            raise UnsupportedInstruction(
                f"PTX line {instr.line}: {instr.opcode} with {len(items)} registers: {instr.text!r}"
            )
        return items

    def address(self, operand: Address, instr: Instr) -> str:
        if not isinstance(operand, Address) or operand.more:
            raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} needs an address, not {operand!r}")
        if isinstance(operand.base, Symbol) and operand.base.name in self.owner.kernel.variables:
            offset = self.constant(Imm(operand.offset), "U")
            return self.let(f"m.variables[{operand.base.name!r}] + {offset}")
        if isinstance(operand.base, Symbol):
            address = np.uint32(self.owner.symbol_address(operand.base.name, instr) + operand.offset)
            return self.in_window(operand.base.name, self.owner.constant(address))
        if isinstance(operand.base, Imm):
            return self.owner.constant(np.uint32(operand.base.value + operand.offset))
        kind = CANONICAL[operand.base.bits]
        base = self.read(operand.base, kind, instr)
        if not operand.offset:
            return base
        return self.let(f"{base} + {self.constant(Imm(operand.offset), kind)}")

    # -- registers that may be read before they are written ------------------------------------------------------------
    def check_defined(self, reg: Reg, value: Value, instr: Instr) -> None:
        """An instruction that is not a move uses `value`: it must have been written in every lane that runs."""
        shadow = self.shadow_of(value)
        if shadow is not None:
            needed = shadow if self.active_guard is None else f"{shadow} | ~{self.active_guard}"
            self.lines.append(f"m.check_register(ws, {needed}, {reg.name!r}, {self.owner.info(instr)})")

    def shadow_of(self, value: Value) -> str | None:
        if value.halves is not None and not value.forms:
            return self.both(value.halves[0].shadow, value.halves[1].shadow)
        return value.shadow

    def both(self, one: str | None, other: str | None) -> str | None:
        if one is None or one == other:
            return other
        return one if other is None else self.let(f"{one} & {other}")

    def assign(self, reg, value: Value, guard: str | None) -> None:
        """Bind a destination register to a value; under a guard, merge with the old one."""
        if reg == SINK:
            return
        self.touch(reg)
        if guard is not None:
            value = self.merge(guard, value, self.load(reg))
        if reg.index in self.owner.in_flight:
            self.note_use(reg.index)
        if self.setting:
            self.constants.add(reg.index)
        else:
            self.constants.discard(reg.index)
        self.values[reg.index] = value
        self.dirty[reg.index] = None

    def merge(self, guard: str, new: Value, old: Value) -> Value:
        if new.bits == 64 and (new.halves is not None and not new.forms or old.halves is not None and not old.forms):
            pairs = zip(self.halves(new), self.halves(old), strict=True)
            return Value(64, {}, tuple(self.merge(guard, n, o) for n, o in pairs))
        kind = CANONICAL[new.bits]
        shadow = None
        if new.shadow is not None or old.shadow is not None:
            shadow = self.let(f"where({guard}, {new.shadow or 'TRUE'}, {old.shadow or 'TRUE'})")
        merged = self.let(f"where({guard}, {self.form(new, kind)}, {self.form(old, kind)})")
        return Value(new.bits, {kind: merged}, shadow=shadow)

    # -- registers that a wgmma has in flight --------------------------------------------------------------------------
    def note_use(self, index: int) -> None:
        self.unfenced[index] = self.setting and self.unfenced.get(index, True)

    def sets_constant(self, instr: Instr) -> bool:
        """Whether it moves an immediate, or what this block set to one, into a register."""
        if instr.opcode not in MOVES or instr.guard is not None or not isinstance(instr.operands[0], Reg):
            return False
        source = instr.operands[1]
        return isinstance(source, Imm) or (isinstance(source, Reg) and source.index in self.constants)

    def touch(self, reg: Reg, as_a: bool = False) -> None:
        """Something reads or writes `reg`: no wgmma may have it in flight."""
        if reg.index not in self.owner.in_flight:
            return
        if reg.index in self.owner.d_registers:
            self.note_use(reg.index)
        if reg.index in self.touched:
            return
        lanes = self.active_guard or "TRUE"
        instr = self.owner.info(self.instr)
        rest = ", True" if as_a else ""
        self.lines.append(f"if Q[{reg.index}]: m.wgmma.touch(ws, {reg.index}, {lanes}, {instr}, {reg.name!r}{rest})")
        if self.active_guard is None and not as_a:
            self.touched.add(reg.index)

    # -- instructions -------------------------------------------------------------------------------------------------
    def guard(self, instr: Instr) -> str | None:
        if instr.guard is None:
            return None
        name = self.read(instr.guard, "p", instr)
        self.active_guard = self.let(f"~{name}") if instr.guard_negated else name
        return self.active_guard

    def pair_of(self, operand, instr: Instr) -> tuple[str, str]:
        if isinstance(operand, Imm):
            text = self.constant(operand, "U")
            value = Value(64, {"U": text})
        else:
            value = self.load(operand)
            self.check_defined(operand, value, instr)
        low, high = self.halves(value)
        return self.form(low, "f"), self.form(high, "f")

    def arguments(self, instr: Instr, entry, operands: list) -> list[str]:
        """Source operands as expressions; an optional vector in the middle ("?*u") may be left out of the text."""
        arguments, rest = [], list(operands)
        for kind in entry.sources:
            if kind.startswith("?*") and not (rest and isinstance(rest[0], Vector)):
                arguments.append("None")
            elif rest:
                arguments.append(self.read(rest.pop(0), kind.lstrip("?"), instr))
            elif kind[0] != "?":
                raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} with {len(operands)} sources")
        if rest:
            raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} with {len(operands)} sources")
        return arguments
