"""What a NumPy expression computes, found by running it on symbols instead of arrays.

The functions of the instruction table are written for arrays. Run on a `Symbol` for each operand, through NumPy's own
protocols, they leave a graph of elementwise operations with NumPy's types and promotions, which `lower` turns into
machine code. A shortcut such as `if np.any(small)` is taken: its branch must give the right result for every element,
whether or not any needs it. What cannot be traced raises and stays NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np


class NotTraceable(Exception):
    """The expression needs something that a graph of elementwise operations does not have."""


class Symbol(np.lib.mixins.NDArrayOperatorsMixin):
    """One value of the graph: an operation, its arguments, the dtype of each of its elements.

    `op` is a ufunc's name, "cast", "view", "where", "fma", "bf16", "const", or what the tracer calls its leaves.
    """

    __slots__ = ("graph", "number", "op", "args", "dtype", "extra")
    __array_priority__ = 1000

    def __init__(self, graph: Graph, number: int, op: str, args: tuple[Symbol, ...], dtype: np.dtype, extra: Any):
        self.graph, self.number, self.op, self.args, self.dtype, self.extra = graph, number, op, args, dtype, extra

    def astype(self, dtype: Any, copy: bool = True) -> Symbol:
        dtype = np.dtype(dtype)
        if dtype.char not in "?bBhHiIlLefd" or (self.dtype.char, dtype.char) == ("d", "e"):
            raise NotTraceable(f"{self.dtype} as {dtype}")
        return self if dtype == self.dtype else self.graph.node("cast", dtype, self)

    def view(self, dtype: Any) -> Symbol:
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        if dtype.itemsize != self.dtype.itemsize or np.dtype(bool) in (dtype, self.dtype):
            raise NotTraceable(f"view of {self.dtype} as {dtype}")
        source = self.args[0] if self.op == "view" else self
        return source if source.dtype == dtype else self.graph.node("view", dtype, source)

    def copy(self) -> Symbol:
        return self

    def any(self) -> bool:
        return True

    def __bool__(self) -> bool:
        raise NotTraceable("a decision that depends on values")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Symbol:
        dtype = options.pop("dtype", None)
        if method != "__call__" or ufunc.nout != 1 or options:
            raise NotTraceable(f"{ufunc.__name__}.{method}")
        given = tuple(type(x) if type(x) in (int, float) else getattr(x, "dtype", np.dtype(type(x))) for x in inputs)
        chosen = {} if dtype is None else {"signature": (*[None] * ufunc.nin, np.dtype(dtype))}
        *wanted, result = ufunc.resolve_dtypes((*given, None), **chosen)
        return self.graph.apply(ufunc, [self.graph.cast(x, t) for x, t in zip(inputs, wanted, strict=True)], result)

    def __array_function__(self, function: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        if function is np.any and not kwargs:
            return True
        if function is np.where and len(args) == 3:
            return self.graph.where(*args)
        if function is np.clip and len(args) == 3 and not kwargs:
            return np.minimum(np.maximum(args[0], args[1]), args[2])
        if function is np.zeros_like and len(args) == 1:
            return self.graph.constant(0, args[0].dtype)
        raise NotTraceable(function.__name__)


class Graph:
    """Symbols, each distinct operation once."""

    def __init__(self):
        self.nodes: list[Symbol] = []
        self._known: dict[tuple, Symbol] = {}

    def node(self, op: str, dtype: Any, *args: Symbol, extra: Any = None) -> Symbol:
        dtype = np.dtype(dtype)
        key = (op, dtype, tuple(a.number for a in args), extra)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Symbol(self, len(self.nodes), op, args, dtype, extra)
            self.nodes.append(found)
        return found

    def constant(self, value: Any, dtype: np.dtype) -> Symbol:
        return self.node("const", dtype, extra=np.asarray(value).astype(dtype).tobytes())

    def cast(self, value: Any, dtype: np.dtype) -> Symbol:
        """A symbol, or a scalar, as `dtype`."""
        if isinstance(value, Symbol):
            return value.astype(dtype)
        if np.ndim(value) != 0:
            raise NotTraceable("an array among the operands")
        return self.constant(value, dtype)

    def apply(self, ufunc: np.ufunc, args: list[Symbol], dtype: np.dtype) -> Symbol:
        if args[0].dtype == np.dtype(bool) and ufunc in (np.bitwise_and, np.bitwise_or):
            for one, other in (args, args[::-1]):
                if one.op == "const":
                    absorbing = (one.extra == b"\x01") == (ufunc is np.bitwise_or)
                    return one if absorbing else other
        return self.node(ufunc.__name__, dtype, *args, extra=ufunc)

    def where(self, condition: Any, x: Any, y: Any) -> Symbol:
        kinds = [v.dtype if isinstance(v, (Symbol, np.generic)) else v for v in (x, y)]
        dtype = np.result_type(*kinds)
        condition, x, y = self.cast(condition, np.dtype(bool)), self.cast(x, dtype), self.cast(y, dtype)
        if condition.op == "const":
            return x if condition.extra == b"\x01" else y
        return self.node("where", dtype, condition, x, y)


def traced_as(op: str, dtype: Any) -> Callable[[Callable], Callable]:
    """Mark a function that is one operation of the graph: run on symbols, it becomes the node `op` of type `dtype`."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*args: Any) -> Any:
            for argument in args:
                if type(argument) is Symbol:
                    graph = argument.graph
                    return graph.node(op, dtype, *(graph.cast(x, np.dtype(np.float32)) for x in args))
            return function(*args)

        return run

    return decorate
