"""Bespoke: a kernel specialization compiler for fused attention.

    import generator as bespoke

    kernel = bespoke.build(head_dim=96, arch="sm_100a", causal=True)
    o, lse = kernel(q, k, v)

Importing this package imports neither the CuTe DSL nor NumPy; what a name needs is loaded when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .resources import VERSION as __version__

if TYPE_CHECKING:
    from .kernel import Kernel, build
    from .merge import build_merge
    from .plan import plan_kernel
    from .spec import KernelSpec, SpecError, load_spec

__all__ = ["Kernel", "KernelSpec", "SpecError", "__version__", "build", "build_merge", "load_spec", "plan_kernel"]

_HOMES = {
    "Kernel": "kernel",
    "build": "kernel",
    "build_merge": "merge",
    "plan_kernel": "plan",
    "KernelSpec": "spec",
    "SpecError": "spec",
    "load_spec": "spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
