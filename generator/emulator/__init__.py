"""Executes compiled PTX on the CPU, more strictly than silicon would.

    gpu = Gpu(arch="sm_100a")
    gpu.add_array(q, "q")
    module = gpu.load_ptx(text)
    gpu.launch(module, kernel_name, grid, block, (1, 1, 1), smem_bytes, params)

or, for a CuTe DSL program as it is, `with attached("sm_100a") as gpu:` around it (attach.py).

Nothing here imports from the parent package.
"""

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
