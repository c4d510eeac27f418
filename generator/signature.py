"""The tensors that a kernel of a specification takes and gives: one list, in the order of its host function.

The same list is traced (dsl.py), probed (compile.py), checked against a caller's arrays (arrays.py) and spelled into
the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .spec import KernelSpec

AXIS_NAMES = {"queries": "sequence", "keys": "sequence", "keys2": "sequence", "q_heads": "heads", "kv_heads": "heads"}
_Q = ("batch", "queries", "q_heads", "head_dim")
_K, _K2 = (("batch", keys, "kv_heads", "head_dim") for keys in ("keys", "keys2"))
_V, _V2 = (("batch", keys, "kv_heads", "head_dim_v") for keys in ("keys", "keys2"))
_O = ("batch", "queries", "q_heads", "head_dim_v")
_ROWS = ("batch", "q_heads", "queries")


@dataclass(frozen=True)
class Parameter:
    """One tensor. axes: names of its extents, slowest first; dtype: "bf16", "fp16", "float32" or "int32"; scratch:
    memory that a call needs and nobody else sees.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    output: bool = False
    scratch: bool = False

    @property
    def matrix(self) -> bool:
        """[B, S, H, D], which TMA reads or writes; the others are read and written by threads."""
        return len(self.axes) == 4

    @property
    def spelled(self) -> str:
        """Its name in a kernel, where m alone is the running maximum of a row."""
        return "m_out" if self.name == "m" else self.name

    def extents(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)


@lru_cache(maxsize=256)
def signature(spec: KernelSpec) -> tuple[Parameter, ...]:
    """Inputs, outputs, then scratch, as the kernel's host function takes them (numbers and the stream follow)."""
    element, stored = spec.dtype, "float32" if spec.unnormalized else spec.dtype
    wanted = (
        (True, Parameter("q", _Q, element)),
        (True, Parameter("k", _K, element)),
        (not spec.kv_shared, Parameter("v", _V, element)),
        (spec.kv_sources == 2, Parameter("k2", _K2, element)),
        (spec.kv_sources == 2 and not spec.kv_shared, Parameter("v2", _V2, element)),
        (spec.seqlens, Parameter("seqlens", ("batch",), "int32")),
        (spec.seqlens and spec.kv_sources == 2, Parameter("seqlens2", ("batch",), "int32")),
        (spec.limit2, Parameter("limit2", ("batch", "queries"), "int32")),
        (spec.sink, Parameter("sink", ("q_heads",), "float32")),
        (True, Parameter("o", _O, stored, output=True)),
        (spec.lse, Parameter("lse", _ROWS, "float32", output=True)),
        (spec.unnormalized, Parameter("m", _ROWS, "float32", output=True)),
        (spec.split_kv, Parameter("o_parts", ("parts", *_O[1:]), "float32", scratch=True)),
        (spec.split_kv, Parameter("lse_parts", ("parts", *_ROWS[1:]), "float32", scratch=True)),
        (spec.split_kv, Parameter("m_parts", ("parts", *_ROWS[1:]), "float32", scratch=True)),
    )
    return tuple(parameter for present, parameter in wanted if present)


@lru_cache(maxsize=256)
def inputs(spec: KernelSpec) -> tuple[Parameter, ...]:
    return tuple(parameter for parameter in signature(spec) if not parameter.output and not parameter.scratch)


@lru_cache(maxsize=256)
def outputs(spec: KernelSpec) -> tuple[Parameter, ...]:
    return tuple(parameter for parameter in signature(spec) if parameter.output)


@lru_cache(maxsize=256)
def scratch(spec: KernelSpec) -> tuple[Parameter, ...]:
    """Partial results of split_kv: parts are a batch entry's splits, one batch entry after another."""
    return tuple(parameter for parameter in signature(spec) if parameter.scratch)


def fixed_sizes(spec: KernelSpec) -> dict[str, int]:
    """Extents that the specification decides."""
    return {"head_dim": spec.head_dim, "head_dim_v": spec.v_dim}
