"""Graphs of elementwise operations → LLVM IR, 16 lanes at a time.

A region is one function `void(i64 rows, i32 *row, i8 **registers, i8 *scratch, i64 *params, i8 *work)`: for every row
(a warp of the batch) and each half of its 32 lanes it loads leaves, computes, and stores what is wanted. An operation
with no LLVM counterpart, or whose bits must be NumPy's own (exp2), calls the inner loop of the ufunc on a piece of the
work memory: four buffers of 128 bytes, their addresses, room for strides, the count 16, and the data of each
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llvmlite import ir

from .hot import ADDRESSES, BUFFERS, COUNT, DATA, LANES, STRIDES
from .symbolic import Symbol

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = ir.PointerType()
SIGNATURE = ir.FunctionType(ir.VoidType(), (I64, *[POINTER] * 5))
LOOP = ir.FunctionType(ir.VoidType(), [POINTER] * 4)
FLOATS = {2: ir.HalfType(), 4: ir.FloatType(), 8: ir.DoubleType()}
COMPARES = {"less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "==", "not_equal": "!="}
INTEGER = {"add": "add", "subtract": "sub", "multiply": "mul"}
BITWISE = {"bitwise_and": "and_", "bitwise_or": "or_", "bitwise_xor": "xor"}
FLOAT = {"add": "fadd", "subtract": "fsub", "multiply": "fmul", "divide": "fdiv"}
INTRINSICS = {"absolute": "fabs", "sqrt": "sqrt", "rint": "rint", "trunc": "trunc", "floor": "floor", "ceil": "ceil"}


def element(dtype: np.dtype) -> ir.Type:
    if dtype.kind == "f":
        return FLOATS[dtype.itemsize]
    return I1 if dtype.kind == "b" else ir.IntType(8 * dtype.itemsize)


def vector(dtype: np.dtype) -> ir.VectorType:
    return ir.VectorType(element(dtype), LANES)


def splat(dtype: np.dtype, value: int) -> ir.Constant:
    """An integer or bool in every lane."""
    return ir.Constant(ir.VectorType(element(dtype), LANES), [int(value)] * LANES)


class RegionWriter:
    """Writes one region's function."""

    def __init__(self, module: ir.Module, name: str, loops: dict[str, tuple[str, str]], units: dict[int, int]):
        """`loops`: symbol → ufunc and types, of the inner loops called, filled here. `units`: node number → its place
        in the scratch memory, in units of 128 bytes a row."""
        self.module, self.loops, self.units = module, loops, units
        self.function = ir.Function(module, SIGNATURE, name)
        self.rows, self.row, self.registers, self.scratch, self.params, self.work = self.function.args
        self.entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.body = ir.IRBuilder(self.function.append_basic_block("body"))
        self.values: dict[int, ir.Value] = {}
        self.bases: dict[Any, ir.Value] = {}

    def write(self, stores: Iterable[tuple[Symbol, str, Any]], known: Callable[[Symbol], bool]) -> None:
        """`stores`: (node, "scratch", None) or (node, "register", position). `known`: it lies in the scratch memory."""
        self.known = known
        entry, body = self.entry, self.body
        step = body.phi(I64, "step")
        half = body.and_(step, I64(1))
        row = body.load(body.gep(self.row, [body.lshr(step, I64(1))], source_etype=I32), typ=I32)
        self.at = body.add(body.shl(body.zext(row, I64), I64(5)), body.shl(half, I64(4)))  # lane in the registers
        self.here = body.shl(step, I64(4))  # lane in the scratch memory
        self.unit = entry.shl(self.rows, I64(7), "unit")
        done = [(self.value(node), node, place, position) for node, place, position in stores]
        for value, node, place, position in done:
            self.store(value, node.dtype, *self.address(node, place, position))
        after = body.add(step, I64(1))
        step.add_incoming(after, body.block)
        step.add_incoming(I64(0), entry.block)
        last = self.function.append_basic_block("last")
        body.cbranch(body.icmp_signed("<", after, body.shl(self.rows, I64(1))), self.function.blocks[1], last)
        entry.branch(self.function.blocks[1])
        ir.IRBuilder(last).ret_void()

    # -- memory --------------------------------------------------------------------------------------------------------
    def address(self, node: Symbol, place: str, position: Any) -> tuple[ir.Value, ir.Value]:
        """Base, and lane from there."""
        key = (place, self.units[node.number] if place == "scratch" else position)
        base = self.bases.get(key)
        if base is None:
            entry = self.entry
            if place == "scratch":
                base = entry.gep(self.scratch, [entry.mul(self.unit, I64(key[1]))], source_etype=I8)
            else:
                base = entry.load(entry.gep(self.registers, [I64(position)], source_etype=I64), typ=POINTER)
            self.bases[key] = base
        return base, self.here if place == "scratch" else self.at

    def pointer(self, dtype: np.dtype, base: ir.Value, lane: ir.Value) -> ir.Value:
        return self.body.gep(base, [self.body.mul(lane, I64(dtype.itemsize))], source_etype=I8)

    def load(self, dtype: np.dtype, base: ir.Value, lane: ir.Value) -> ir.Value:
        kind = ir.VectorType(I8, LANES) if dtype.kind == "b" else vector(dtype)
        found = self.body.load(self.pointer(dtype, base, lane), align=dtype.itemsize, typ=kind)
        return (
            self.body.icmp_unsigned("!=", found, ir.Constant(found.type, [0] * LANES)) if dtype.kind == "b" else found
        )

    def store(self, value: ir.Value, dtype: np.dtype, base: ir.Value, lane: ir.Value) -> None:
        if dtype.kind == "b":
            value = self.body.zext(value, ir.VectorType(I8, LANES))
        self.body.store(value, self.pointer(dtype, base, lane), align=dtype.itemsize)

    def spread(self, scalar: ir.Value) -> ir.Value:
        kind = ir.VectorType(scalar.type, LANES)
        one = self.body.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.body.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, node: Symbol) -> ir.Value:
        found = self.values.get(node.number)
        if found is None:
            stack = [node]
            while stack:  # without recursion: chains are as long as blocks
                top = stack[-1]
                left = [] if self.known(top) else [a for a in top.args if a.number not in self.values]
                stack.extend(left)
                if not left:
                    stack.pop()
                    if top.number not in self.values:
                        self.values[top.number] = self.compute(top)
            found = self.values[node.number]
        return found

    def compute(self, node: Symbol) -> ir.Value:
        if node.op == "input" or self.known(node):
            return self.load(node.dtype, *self.address(node, "scratch", None))
        if node.op == "load":
            return self.load(node.dtype, *self.address(node, "register", node.extra[0]))
        if node.op == "param":
            raw = self.body.load(self.body.gep(self.params, [I64(node.extra)], source_etype=I64), typ=I64)
            bits = 8 * node.dtype.itemsize
            return self.spread(raw if bits == 64 else self.body.trunc(raw, ir.IntType(bits)))
        if node.op == "const":
            return self.constant(node.dtype, node.extra)
        args = [self.values[a.number] for a in node.args]
        special = getattr(self, f"_{node.op}", None)
        if special is not None:
            return special(node, *args)
        return self.operation(node, args)

    def constant(self, dtype: np.dtype, raw: bytes) -> ir.Value:
        if dtype.kind != "f":
            return splat(dtype, np.frombuffer(raw, dtype)[0])
        bits = np.dtype(f"u{dtype.itemsize}")
        return self.body.bitcast(splat(bits, np.frombuffer(raw, bits)[0]), vector(dtype))

    def _view(self, node: Symbol, x: ir.Value) -> ir.Value:
        return self.body.bitcast(x, vector(node.dtype))

    def _where(self, node: Symbol, condition: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.body.select(condition, x, y)

    def _fma(self, node: Symbol, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.intrinsic("fma", a, b, c)

    def _bf16(self, node: Symbol, x: ir.Value) -> ir.Value:
        """float32 → bf16, nearest even; NaN is 0x7FFF."""
        u32 = np.dtype(np.uint32)
        body, bits = self.body, self.body.bitcast(x, vector(u32))
        odd = body.and_(body.lshr(bits, splat(u32, 16)), splat(u32, 1))
        rounded = body.lshr(body.add(bits, body.add(odd, splat(u32, 0x7FFF))), splat(u32, 16))
        chosen = body.select(body.fcmp_unordered("uno", x, x), splat(u32, 0x7FFF), rounded)
        return body.trunc(chosen, vector(node.dtype))

    def _f16(self, node: Symbol, x: ir.Value) -> ir.Value:
        half = self.body.bitcast(self.body.fptrunc(x, vector(np.dtype(np.float16))), vector(node.dtype))
        return self.body.select(self.body.fcmp_unordered("uno", x, x), splat(node.dtype, 0x7FFF), half)

    def _cast(self, node: Symbol, x: ir.Value) -> ir.Value:
        body, to, source = self.body, node.dtype, node.args[0].dtype
        kind = vector(to)
        if to.kind == "b":
            zero = self.constant(source, bytes(source.itemsize))
            return body.fcmp_unordered("!=", x, zero) if source.kind == "f" else body.icmp_unsigned("!=", x, zero)
        if source.kind == "f" and to.kind == "f":
            return (body.fptrunc if to.itemsize < source.itemsize else body.fpext)(x, kind)
        if source.kind == "f":
            return (body.fptosi if to.kind == "i" else body.fptoui)(x, kind)
        if to.kind == "f":
            return (body.sitofp if source.kind == "i" else body.uitofp)(x, kind)
        width = 1 if source.kind == "b" else 8 * source.itemsize
        if 8 * to.itemsize <= width:
            return x if 8 * to.itemsize == width else body.trunc(x, kind)
        return (body.sext if source.kind == "i" else body.zext)(x, kind)

    def intrinsic(self, name: str, *args: ir.Value) -> ir.Value:
        kind = args[0].type
        letter = {2: "f16", 4: "f32", 8: "f64"}[next(n for n, t in FLOATS.items() if t == kind.element)]
        full = f"llvm.{name}.v{LANES}{letter}"
        function = self.module.globals.get(full)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(args)), full)
        return self.body.call(function, args)

    # -- ufuncs --------------------------------------------------------------------------------------------------------
    def operation(self, node: Symbol, args: list[ir.Value]) -> ir.Value:
        name, dtype, body = node.op, node.args[0].dtype, self.body
        kind = dtype.kind
        if name in COMPARES:
            if kind == "f":
                ordered = body.fcmp_unordered if name == "not_equal" else body.fcmp_ordered
                return ordered(COMPARES[name], *args)
            return (body.icmp_signed if kind == "i" else body.icmp_unsigned)(COMPARES[name], *args)
        if name in BITWISE:
            return getattr(body, BITWISE[name])(*args)
        if kind == "f" and name in FLOAT:
            return getattr(body, FLOAT[name])(*args)
        if kind in "iu" and name in INTEGER:
            return getattr(body, INTEGER[name])(*args)
        if kind == "f" and name in INTRINSICS:
            return self.intrinsic(INTRINSICS[name], *args)
        special = getattr(self, f"_{name}_{kind}", None)
        return special(dtype, *args) if special is not None else self.call(node, args)

    def _invert_b(self, dtype, x):
        return self.body.xor(x, splat(dtype, 1))

    _logical_not_b = _invert_b

    def _invert_u(self, dtype, x):
        return self.body.xor(x, splat(dtype, -1))

    _invert_i = _invert_u

    def _negative_f(self, dtype, x):
        return self.body.fneg(x)

    def _negative_u(self, dtype, x):
        return self.body.sub(splat(dtype, 0), x)

    _negative_i = _negative_u

    def _absolute_i(self, dtype, x):
        return self.body.select(self.body.icmp_signed("<", x, splat(dtype, 0)), self._negative_u(dtype, x), x)

    def _isnan_f(self, dtype, x):
        return self.body.fcmp_unordered("uno", x, x)

    def _signbit_f(self, dtype, x):
        integer = np.dtype(f"i{dtype.itemsize}")
        return self.body.icmp_signed("<", self.body.bitcast(x, vector(integer)), splat(integer, 0))

    def _copysign_f(self, dtype, x, y):
        return self.intrinsic("copysign", x, y)

    def _extreme(self, compare: str, nan_first: bool):
        """NumPy's order of tests: it decides which of two equal or unordered operands is taken."""

        def run(dtype, x, y):
            if dtype.kind != "f":
                test = self.body.icmp_signed if dtype.kind == "i" else self.body.icmp_unsigned
                return self.body.select(test(compare, x, y), x, y)
            lost = x if nan_first else y
            takes = self.body.or_(self.body.fcmp_ordered(compare, x, y), self.body.fcmp_unordered("uno", lost, lost))
            return self.body.select(takes, x, y)

        return run

    def __getattr__(self, name: str):
        head, _, kind = name.rpartition("_")
        if head in ("_maximum", "_fmax", "_minimum", "_fmin") and kind in ("f", "i", "u"):
            return self._extreme(">=" if head[-1] in "mx" and "max" in head else "<=", head.endswith("imum"))
        raise AttributeError(name)

    def _left_shift_u(self, dtype, x, y):
        return self._shift(dtype, x, y, self.body.shl, splat(dtype, 0))

    _left_shift_i = _left_shift_u

    def _right_shift_u(self, dtype, x, y):
        return self._shift(dtype, x, y, self.body.lshr, splat(dtype, 0))

    def _right_shift_i(self, dtype, x, y):
        width = splat(dtype, 8 * dtype.itemsize - 1)
        return self._shift(dtype, x, y, self.body.ashr, self.body.ashr(x, width))

    def _shift(self, dtype, x, y, shift, beyond):
        """NumPy: a count of the width or more gives zero, or the sign."""
        inside = self.body.icmp_unsigned("<", y, splat(dtype, 8 * dtype.itemsize))
        return self.body.select(inside, shift(x, self.body.select(inside, y, splat(dtype, 0))), beyond)

    def call(self, node: Symbol, args: list[ir.Value]) -> ir.Value:
        """Run the ufunc's own inner loop on these 16 elements."""
        types = "".join(a.dtype.char for a in node.args) + node.dtype.char
        symbol = f"bespoke_{node.op}_{types}"
        self.loops[symbol] = (node.op, types)
        function = self.module.globals.get(symbol) or ir.Function(self.module, LOOP, symbol)
        data = DATA + 8 * list(self.loops).index(symbol)
        body = self.body
        kinds = [*(a.dtype for a in node.args), node.dtype]
        for i, (kind, value) in enumerate(zip(kinds, [*args, None], strict=True)):
            body.store(I64(kind.itemsize), self.in_work(STRIDES + 8 * i))
            if value is not None:
                stored = body.zext(value, ir.VectorType(I8, LANES)) if kind.kind == "b" else value
                body.store(stored, self.in_work(BUFFERS + 128 * i), align=64)
        data = body.load(self.in_work(data), typ=POINTER)
        body.call(function, [*(self.in_work(at) for at in (ADDRESSES, COUNT, STRIDES)), data])
        kind = ir.VectorType(I8, LANES) if node.dtype.kind == "b" else vector(node.dtype)
        found = body.load(self.in_work(BUFFERS + 128 * len(args)), align=64, typ=kind)
        return body.trunc(found, vector(node.dtype)) if node.dtype.kind == "b" else found

    def in_work(self, offset: int) -> ir.Value:
        return self.body.gep(self.work, [I64(offset)], source_etype=I8)
