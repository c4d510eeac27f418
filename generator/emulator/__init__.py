"""Executes compiled PTX on the CPU, more strictly than silicon would.

    gpu = Gpu(arch="sm_100a")
    gpu.add_array(q, "q")
    module = gpu.load_ptx(text)
    gpu.launch(module, kernel_name, grid, block, (1, 1, 1), smem_bytes, params)

or, for a CuTe DSL program as it is, `with attached("sm_100a") as gpu:` around it (attach.py).

Nothing here imports from the parent package, and what a name needs is loaded when it is used: compiling takes host.py
alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import DEFAULT_SMS, attached
    from .errors import Deadlock, EmulatorError, Hazard, LaunchError, PtxSyntaxError, UnsupportedInstruction
    from .gpu import Gpu, LaunchReport
    from .labels import Labels
    from .trace import Tracer

__all__ = [
    "DEFAULT_SMS",
    "Deadlock",
    "EmulatorError",
    "Gpu",
    "Hazard",
    "Labels",
    "LaunchError",
    "LaunchReport",
    "PtxSyntaxError",
    "Tracer",
    "UnsupportedInstruction",
    "attached",
]

_HOMES = {
    "DEFAULT_SMS": "attach",
    "attached": "attach",
    "Gpu": "gpu",
    "LaunchReport": "gpu",
    "Labels": "labels",
    "Tracer": "trace",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
