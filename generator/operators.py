"""A kernel as an operator of PyTorch: what torch.compile and torch.export keep in their graphs.

    torch.ops.bespoke.fmha_sm90_d128_causal_1f0c36ab(q, k, v, scale=0.1)

The operator is named after the specification and a digest of the tiling, so that the same build has the same operator
in every process: a graph that names it runs where `Kernel.op` of that build was read before.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .arrays import check_kinds
from .compile import Binary
from .handles import object_of
from .launch import torch_dtype
from .layout import Plan
from .run import RunError
from .signature import fixed_sizes, outputs

NAMESPACE = "bespoke"
_ARGUMENTS = ("q", "k", "v", "k2", "v2", "seqlens", "seqlens2", "limit2", "sink", "scale")

_registered: dict[str, Binary] = {}
_registering = threading.RLock()


def operator_of(kernel: Any) -> Any:
    """The kernel's torch._ops.OpOverload, registered on first use; equal builds share one.

    Its schema is the same for every kernel, but for the number of outputs: q and k, then v, k2, v2, seqlens, seqlens2,
    limit2 and sink, each an optional Tensor, and scale, an optional float. It returns what the kernel's call returns,
    in memory of its own.
    """
    return getattr(getattr(torch.ops, NAMESPACE), operator_name(kernel.handle)).default


@torch.compiler.assume_constant_result  # a trace calls it and goes on with the name
def operator_name(handle: str) -> str:
    """The operator's name within the namespace of the kernel with this handle; registers it on first use.

    By the handle, since PyTorch 2.11 takes no object where a trace's constant is computed.
    """
    kernel = object_of(handle)
    name = kernel.__dict__.get("_operator_name")
    if name is None:
        with _registering:
            name = kernel._operator_name = _register(kernel)
    return name


def planned_name(plan: Plan) -> str:
    """The operator's name of the kernel that the plan's template writes."""
    tiling = hashlib.sha256(repr(plan.tiling).encode()).hexdigest()
    return f"{plan.kernel_name}_{tiling[:8]}"


def _register(kernel: Any) -> str:
    binary, name = kernel.binary, planned_name(kernel.plan)
    if name in _registered and not _same_code(_registered[name], binary):
        code = hashlib.sha256(binary.ptx.encode() + binary.host_object).hexdigest()
        name += f"_{code[:8]}"  # one of the two is of an edited file
    if name not in _registered:
        _define(name, kernel)
        _registered[name] = binary
    return name


def _same_code(one: Binary, other: Binary) -> bool:
    return (one.ptx, one.cubin, one.host_object) == (other.ptx, other.cubin, other.host_object)


def _define(name: str, kernel: Any) -> None:
    spec, results = kernel.spec, outputs(kernel.spec)

    def attend(*arguments: Any, **named: Any) -> Any:
        arrays, scale = _bound(arguments, named)
        return _returned(kernel.run(arrays, scale))

    def fake(*arguments: Any, **named: Any) -> Any:
        """Extents may be symbols here, so they are only checked by the call itself."""
        arrays, _ = _bound(arguments, named)
        check_kinds(spec, arrays)
        batch, queries, heads, _ = arrays["q"].shape
        sizes = fixed_sizes(spec) | {"batch": batch, "queries": queries, "q_heads": heads}
        return _returned([arrays["q"].new_empty(p.extents(sizes), dtype=torch_dtype(p.dtype)) for p in results])

    def backward(*_: Any) -> None:
        raise RunError(f"{spec.name} has no backward pass: call it under torch.no_grad(), or on detached tensors")

    tensors = ", ".join(["Tensor q", "Tensor k", *(f"Tensor? {array}=None" for array in _ARGUMENTS[2:-1])])
    returns = f"({', '.join(['Tensor'] * len(results))})" if len(results) > 1 else "Tensor"
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        attend,
        mutates_args=(),
        schema=f"({tensors}, float? scale=None) -> {returns}",
    )  # an operator without layout tags gets its arguments with the strides that the traced program gives them
    operator.register_fake(fake)
    operator.register_autograd(backward)


def _bound(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The tensors that were given, by name, and the scale."""
    given = dict(zip(_ARGUMENTS, arguments, strict=False)) | named
    scale = given.pop("scale", None)
    return {name: tensor for name, tensor in given.items() if tensor is not None}, scale


def _returned(results: Sequence[Any]) -> Any:
    return tuple(results) if len(results) > 1 else results[0]
