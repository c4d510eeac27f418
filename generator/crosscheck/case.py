"""One cross-check: a kernel's PTX, what it is launched with, and how close the two results must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PTX_VERSION = "8.8"  # every driver that knows sm_90a's instructions of today assembles it
REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<320>; .reg .b64 %d<64>;
.reg .b32 %thread, %block, %g, %s, %lane;"""
PROLOGUE = """mov.u32 %thread, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %g, %ntid.x;
mad.lo.u32 %g, %block, %g, %thread;
mov.u32 %lane, %laneid; mov.u32 %s, smem;"""


@dataclass(frozen=True)
class Array:
    """A global array: `value` is the input, or for an output what it holds before the launch."""

    name: str
    value: np.ndarray
    output: bool = False


@dataclass(frozen=True)
class Map:
    """A tensor map over array `array`, passed by value. See emulator/encode.py for the other fields."""

    name: str
    array: str
    data_type: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0


@dataclass(frozen=True)
class Rule:
    """How close two results must be. `kind` is the dtype of the outputs where they are floats ("f32", "f16", "bf16",
    "f64"), else "bits". Both bounds 0: the same bits. A bound applies where both are finite; zeros, infinities and NaN
    must agree everywhere; `any_nan`: but for the payload of a NaN.
    """

    kind: str = "bits"
    relative: float = 0.0
    absolute: float = 0.0
    source: str = ""
    any_nan: bool = False


@dataclass(frozen=True)
class Case:
    """`body` is PTX between the braces of an entry: `%NAME` holds the address of each array and map.

    `fast` replaces `rule` where the emulator accumulates in float32 BLAS instead of as the tensor core does.
    At hand: %thread, %block, %g (thread in the grid), %lane, %s (dynamic shared memory),
    %p0-15, %h0-31, %r0-319, %d0-63.
    """

    group: str
    name: str
    body: str
    arguments: Sequence[Array | Map]
    rule: Rule = field(default_factory=Rule)
    grid: int = 1
    block: int = 32
    cluster: int = 1
    smem_bytes: int = 0
    fast: Rule | None = None


def module_text(cases: Sequence[Case], target: str) -> str:
    """A PTX module with one entry `k0`, `k1`, … a case."""
    header = f".version {PTX_VERSION}\n.target {target}\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"
    return header + "".join(_entry(f"k{i}", case) for i, case in enumerate(cases))


def _entry(name: str, case: Case) -> str:
    params, loads = [], []
    for argument in case.arguments:
        if isinstance(argument, Map):
            params.append(f".param .align 64 .b8 {name}_{argument.name}[128]")
            loads.append(f".reg .b64 %{argument.name}; mov.b64 %{argument.name}, {name}_{argument.name};")
            loads.append(f"cvta.param.u64 %{argument.name}, %{argument.name};")
        else:
            params.append(f".param .u64 {name}_{argument.name}")
            loads.append(f".reg .b64 %{argument.name}; ld.param.b64 %{argument.name}, [{name}_{argument.name}];")
            loads.append(f"cvta.to.global.u64 %{argument.name}, %{argument.name};")
    cluster = f".explicitcluster\n.reqnctapercluster {case.cluster}, 1, 1\n" if case.cluster > 1 else ""
    head = f".visible .entry {name}({', '.join(params)})\n{cluster}.reqntid {case.block}, 1, 1\n{{\n"
    return head + "\n".join([REGISTERS, *loads, PROLOGUE]) + f"\n{case.body}\nret;\n}}\n"
