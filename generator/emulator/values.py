"""Types of values, and what a block knows of a register's current value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

DTYPE = {"p": np.bool_, "h": np.uint16, "i": np.int16, "e": np.float16, "u": np.uint32, "s": np.int32, "f": np.float32}
DTYPE |= {"U": np.uint64, "S": np.int64, "d": np.float64}
CANONICAL = {1: "p", 16: "h", 32: "u", 64: "U"}
PARAM_TYPES = {
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "b32": "u4",
    "u32": "u4",
    "s32": "u4",
    "f32": "u4",
}
PARAM_TYPES |= {"b64": "u8", "u64": "u8", "s64": "u8", "f64": "u8"}


@dataclass
class Value:
    """A register's current value in a block: variable names by type, or two 32-bit halves."""

    bits: int
    forms: dict[str, str] = field(default_factory=dict)
    halves: tuple[Value, Value] | None = None
    loaded_from: int | None = None  # register whose storage it is a view of
    shadow: str | None = None  # bool variable, True where the value was ever written; None: written everywhere
