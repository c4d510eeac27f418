"""Bulk reductions shared → global memory, of a row and of tensors (PTX ISA 9.1 §9.7.9.25.4.2, §9.7.9.27.1.3)."""

from __future__ import annotations

from functools import partial

from ..errors import Hazard, UnsupportedInstruction
from ..table import effect
from .atomic import DTYPES, combiner
from .copy import bulk_store
from .tma import store

REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "add.noftz": ("f16", "bf16"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64", "f16", "bf16")),
    **dict.fromkeys(("inc", "dec"), ("u32",)),
    **dict.fromkeys(("and", "or", "xor"), ("b32", "b64")),
}


def _of_bytes(operation: str, kind: str):
    combine = (DTYPES[kind], combiner(operation, kind, False))
    return partial(bulk_store, combine=combine)


for _operation, _kinds in REDUCTIONS.items():
    for _kind in _kinds:
        effect(
            f"cp.reduce.async.bulk.global.shared::cta.bulk_group{{,.L2::cache_hint}}.{_operation}.{_kind}",
            "=a,a,u,?U",
            "9.7.9.25.4.2",
        )(_of_bytes(_operation.removesuffix(".noftz"), _kind))


# -- tensors: the type of their elements is the tensor map's -----------------------------------------------------------
_OF_ELEMENT = {
    "b32": ("add", "inc", "dec", "and", "or", "xor"),
    "s32": ("add", "min", "max", "and", "or", "xor"),
    "u64": ("add", "min", "max", "and", "or", "xor"),
    "s64": ("min", "max", "and", "or", "xor"),
    "f64": ("add",),
    "f16": ("add", "min", "max"),
    "bf16": ("add", "min", "max"),
    "f32": ("add",),
}


def _of_elements(operation: str):
    def combine(element: str, where):
        if element == "b32" and operation in ("min", "max"):
            raise UnsupportedInstruction(
                f"{where}: the DSL packs tensor maps of signed and unsigned 32-bit integers alike: {operation} is not "
                "supported on them"
            )
        if operation not in _OF_ELEMENT.get(element, ()):
            raise Hazard(f"{where}: .{operation} is not defined for a tensor of {element} (PTX ISA 9.1 §9.7.9.27.1.3)")
        if element in ("s32", "u64", "s64") and operation in ("and", "or", "xor"):
            element = f"b{element[1:]}"
        kind = "u32" if element == "b32" and operation in ("add", "inc", "dec") else element
        return DTYPES[kind], combiner(operation, kind, False)

    return partial(store, combine=combine)


for _rank in range(1, 6):
    for _operation in ("add", "min", "max", "inc", "dec", "and", "or", "xor"):
        effect(
            f"cp.reduce.async.bulk.tensor.{_rank}d.global.shared::cta.{_operation}{{,.tile}}.bulk_group{{,.L2::cache_hint}}",
            "=T,a,?U",
            "9.7.9.27.1.3",
        )(_of_elements(_operation))
