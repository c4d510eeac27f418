"""One basic block → the text of one Python function.

Registers that cross a block boundary are stored in the machine's arrays, at the end of the block, in the lanes that
run.
"""

from __future__ import annotations

from .errors import UnsupportedInstruction
from .flow import CONTROL, MOVES, PARAM_LOADS, entry_of
from .operands import OperandWriter
from .syntax import SINK, Imm, Instr, Pair, Reg, Vector
from .table import BITS
from .values import CANONICAL, PARAM_TYPES, Value


class BlockWriter(OperandWriter):
    """Writes the function of one block."""

    def instruction(self, instr: Instr) -> None:
        self.instr, self.line, self.active_guard = instr, instr.line, None
        self.setting = self.sets_constant(instr)
        if instr.opcode in MOVES:
            self.move(instr)
        elif instr.opcode in PARAM_LOADS:
            self.load_param(instr)
        else:
            entry = entry_of(instr)
            if entry is None:
                return
            if entry.in_flight:
                self.wgmma(instr, entry)
            elif entry.pure:
                self.alu(instr, entry)
            else:
                self.effect(instr, entry)
            if instr.opcode == "wgmma.fence.sync.aligned" and instr.guard is None:
                self.unfenced, self.fenced = {}, True

    def move(self, instr: Instr) -> None:
        guard = self.guard(instr)
        dest, source = instr.operands
        if instr.opcode == "mov.b128":
            return self.move_wide(instr, guard)
        value = self.value_of(source, instr)
        if not isinstance(dest, Vector):
            return self.assign(dest, value, guard)
        bits, count = value.bits, len(dest.items)
        if (bits, count) == (64, 2):
            parts = self.halves(value)
        elif (bits, count) == (64, 4):
            parts = [quarter for half in self.halves(value) for quarter in self.quarters(half)]
        elif (bits, count) == (32, 2):
            parts = self.quarters(value)
        else:
            raise UnsupportedInstruction(f"PTX line {instr.line}: cannot unpack {instr.text!r}")
        for item, part in zip(dest.items, parts, strict=True):
            self.assign(item, part, guard)
        return None

    def move_wide(self, instr: Instr, guard: str | None) -> None:
        """mov.b128: a register is two 64-bit halves, and may be packed from and unpacked into four 32-bit ones."""
        dest, source = instr.operands
        if not isinstance(dest, Vector) or not isinstance(source, Vector):
            raise UnsupportedInstruction(f"PTX line {instr.line}: cannot move {instr.text!r}")
        part = instr._replace(opcode=f"mov.b{128 // len(source.items)}")
        values = [self.value_of(item, part) for item in source.items]
        if len(values) == 4:
            values = [Value(64, {}, (values[0], values[1])), Value(64, {}, (values[2], values[3]))]
        if len(dest.items) == 4:
            values = [half for value in values for half in self.halves(value)]
        for item, value in zip(dest.items, values, strict=True):
            self.assign(item, value, guard)

    def load_param(self, instr: Instr) -> None:
        dest, source = instr.operands
        kind = PARAM_TYPES[instr.opcode.split(".")[-1]]
        width = int(kind[1])
        regs = dest.items if isinstance(dest, Vector) else (dest,)
        offset = self.owner.param_offset(source.base.name, instr, source.offset, width * len(regs))
        guard = self.guard(instr)
        for i, reg in enumerate(regs):
            slot = self.owner.param_slot(offset + i * width, kind)
            canonical = CANONICAL[reg.bits]
            self.assign(reg, Value(reg.bits, {canonical: self.let(f"P[{slot}].astype(T_{canonical})")}), guard)

    def alu(self, instr: Instr, entry) -> None:
        guard = self.guard(instr)
        dests, operands = self.split(instr, entry)
        if len(operands) > len(entry.sources) or any(s[0] != "?" for s in entry.sources[len(operands) :]):
            raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} with {len(operands)} sources")
        function = self.owner.function(entry)
        kinds = [s.lstrip("?") for s in entry.sources]
        kind = entry.dests[0]
        if kind == "2":
            sides = []
            pairs = [self.pair_of(o, instr) for o in operands]
            for side in (0, 1):
                arguments = ", ".join(p[side] for p in pairs)
                sides.append(Value(32, {"f": self.let(f"{function}({arguments})")}))
            self.assign(dests[0], Value(64, {}, (sides[0], sides[1])), guard)
            return
        arguments = ", ".join(self.read(o, k, instr) for o, k in zip(operands, kinds, strict=False))
        result = self.let(f"{function}({arguments})")
        self.kinds[result] = kind
        dest = dests[0]
        if isinstance(dest, Pair):  # setp p|q: q is made from the complement of the comparison
            combined = hasattr(entry.run, "complement")
            other = self.let(f"{function}.complement({arguments})" if combined else f"~{result}")
            self.assign(dest.first, Value(1, {"p": result}), guard)
            self.assign(dest.second, Value(1, {"p": other}), guard)
            return
        bits = BITS[kind]
        if isinstance(dest, Reg) and dest.bits != bits:  # ISA 9.4.1: a destination may be wider (zero or sign extended)
            if dest.bits < bits:
                raise UnsupportedInstruction(f"PTX line {instr.line}: destination of {instr.opcode} is too narrow")
            wide = CANONICAL[dest.bits]
            signed = {"i": "s", "s": "S"}.get(kind)
            result = self.let(f"{result}.astype(T_{signed}).view(T_{wide})" if signed else f"{result}.astype(T_{wide})")
            self.assign(dest, Value(dest.bits, {wide: result}), guard)
            return
        self.assign(dest, Value(bits, {kind: result}), guard)

    def split(self, instr: Instr, entry) -> tuple[list, list]:
        """Destinations and sources of an instruction; `d|p` counts as the two destinations of a two-destination
        entry.
        """
        if len(entry.dests) == 2 and instr.operands and isinstance(instr.operands[0], Pair):
            pair = instr.operands[0]
            return [pair.first, pair.second], list(instr.operands[1:])
        if entry.dests and entry.dests[-1][0] == "?":  # `d` where `d|p` might stand
            return [instr.operands[0], SINK], list(instr.operands[1:])
        n = len(entry.dests)
        return list(instr.operands[:n]), list(instr.operands[n:])

    def effect(self, instr: Instr, entry) -> None:
        guard = self.guard(instr)
        dests, operands = self.split(instr, entry)
        arguments = self.arguments(instr, entry, operands)
        rest = "".join(", " + a for a in arguments)
        call = f"{self.owner.function(entry)}(m, ws, {{active}}, {self.owner.info(instr)}{rest})"
        slots: list[tuple[Reg, str]] = []
        for dest, kind in zip(dests, entry.dests, strict=True):
            if isinstance(dest, Vector) and kind[0] != "*":
                raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} takes no vector: {instr.text!r}")
            for item in self.vector(dest, instr) if kind[0] == "*" else (dest,):
                if isinstance(item, Pair):
                    raise UnsupportedInstruction(f"PTX line {instr.line}: {instr.opcode} with a predicate destination")
                slots.append((item, kind.lstrip("*?")))
        names = [self.name() for _ in slots]
        self.kinds.update(zip(names, (kind for _, kind in slots), strict=True))
        comma = "," if len(names) != 1 or entry.dests[0][0] == "*" else ""
        target = f"{', '.join(names)}{comma} = " if names else ""
        if guard is None:
            self.lines.append(target + call.format(active="ws.mask"))
        else:
            active = self.lanes_that_run(guard)
            self.lines.append(f"if {active} is not False: {target}{call.format(active=active)}")
            if names:  # no lane runs it: any value will do, the guard merges it away
                zeros = ", ".join(f"T_{k}(0)" for _, k in slots)
                self.lines.append(f"else: {target}{zeros}{comma}")
        for (reg, kind), name in zip(slots, names, strict=True):
            if reg == SINK:
                continue
            bits = BITS[kind]
            if reg.bits != bits:
                wide = CANONICAL[reg.bits]
                name, kind, bits = self.let(f"{name}.astype(T_{wide})"), wide, reg.bits
            self.assign(reg, Value(bits, {kind: name}), guard)

    def lanes_that_run(self, guard: str) -> str:
        """The name of what `ws_active` says of a guard, found once a block."""
        if guard not in self.active_of:
            self.active_of[guard] = self.let(f"ws_active(ws, {guard})")
        return self.active_of[guard]

    def wgmma(self, instr: Instr, entry) -> None:
        """D is brought to its storage, where the wait will find and change it; A in registers is handed over."""
        guard = self.guard(instr)
        d, a, b, scale, *rest = instr.operands
        arguments = [self.read(operand, kind, instr) for operand, kind in ((b, "U"), (scale, "p"))]
        a_items = a.items if isinstance(a, Vector) else ()
        for item in a_items:
            self.touch(item, as_a=True)
            self.touched.add(item.index)
        arguments.insert(0, self.read(a, "*u" if a_items else "U", instr))
        adds = guard is not None or scale != Imm(0)
        for reg in d.items:
            self.owner.keep(reg.index)
            if adds and reg.index in self.dirty:
                self._settle(reg)
            if adds and reg.index in self.owner.checked:
                needed = self.let(f"D[{reg.index}][ix] | ~{arguments[2]}")
                needed = needed if guard is None else f"{needed} | ~{guard}"
                self.lines.append(f"m.check_register(ws, {needed}, {reg.name!r}, {self.owner.info(instr)})")
        indices = [tuple(r.index for r in items) for items in (d.items, a_items)]
        arguments = [*map(str, indices), *arguments, *(self.read(operand, "k", instr) for operand in rest)]
        active = "ws.mask" if guard is None else self.lanes_that_run(guard)
        used = [*indices[0], *indices[1]]
        if self.owner.strict and (not self.fenced or not self.unfenced.keys().isdisjoint(used)):
            self._note_unfenced()
            self.lines.append(f"m.wgmma.require_fence(ws, {active}, {used}, {self.owner.info(instr)})")
        call = f"{self.owner.function(entry)}(m, ws, {active}, {self.owner.info(instr)}, {', '.join(arguments)})"
        self.lines.append(call if guard is None else f"if {active} is not False: {call}")
        for reg in d.items:
            self.values.pop(reg.index, None)
            self.dirty.pop(reg.index, None)
            self.constants.discard(reg.index)
            if reg.index in self.owner.checked and guard is None:
                self.lines.append(f"put(D[{reg.index}], TRUE)")
        self.touched.difference_update(*indices)

    def _note_unfenced(self) -> None:
        for only_set in (False, True):
            found = [index for index, kind in self.unfenced.items() if kind == only_set]
            if found:
                self.lines.append(f"m.wgmma.used(ws, {found}, {only_set})")

    def _settle(self, reg: Reg) -> None:
        """Write a register to its storage in the middle of the block; views of what was there are copied first."""
        value = self.values[reg.index]
        for other in self.values.values():
            for part in (other, *(other.halves or ())):
                if part.loaded_from == reg.index:
                    self.lines += [f"{name} = {name}.copy()" for name in part.forms.values()]
                    part.loaded_from = None
        self.lines.append(f"put(R[{reg.index}], {self.form(value, CANONICAL[value.bits])})")
        if reg.index in self.owner.checked:
            self.lines.append(f"put(D[{reg.index}], {self.shadow_of(value) or 'TRUE'})")

    # -- the end of the block -----------------------------------------------------------------------------------------
    def finish(self) -> None:
        block, instrs = self.block, self.owner.kernel.instrs
        last = instrs[block.stop - 1]
        condition = None
        if last.opcode in CONTROL and last.guard is not None:
            condition = self.guard(last)
        self.store()
        self._note_unfenced()
        after = block.number + 1
        if last.opcode in ("ret", "exit"):
            target = self.owner.exit_block
        elif last.opcode.startswith("bra"):
            target = self.owner.block_at[self.owner.kernel.labels[last.operands[0].name]]
        else:
            self.lines.append(f"m.goto(ws, {after})")
            return
        if condition is None:
            self.lines.append(f"m.goto(ws, {target})")
        else:
            self.lines.append(f"m.branch(ws, {condition}, {target}, {after})")

    def store(self) -> None:
        """Write the registers that live on; values that are views of another register's storage are copied first."""
        puts = []
        for index in self.dirty:
            if not self.block.live_out >> index & 1:
                continue
            value = self.values[index]
            self.owner.keep(index)
            if index in self.owner.paired:
                for side, half in enumerate(self.halves(value)):
                    name = self.form(half, "u")
                    puts.append((f"R[{index}][{side}]", name, half.loaded_from, index))
            else:
                name = self.form(value, CANONICAL[value.bits])
                puts.append((f"R[{index}]", name, value.loaded_from, index))
            if index in self.owner.checked:
                puts.append((f"D[{index}]", self.shadow_of(value) or "TRUE", None, index))
        written = {index for _, _, _, index in puts}
        puts = [
            (s, self.let(f"{n}.copy()") if origin is not None and origin != i and origin in written else n, i)
            for s, n, origin, i in puts
        ]
        for storage, name, _ in puts:
            self.lines.append(f"put({storage}, {name})")
