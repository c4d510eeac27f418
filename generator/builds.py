"""Many plans compiled at once: processes fill the cache, and the caller takes the kernels from there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from .compile import compile_kernel
from .plan import Plan


def compile_plans(plans: Sequence[Plan], jobs: int) -> Iterator[tuple[int, str]]:
    """(i, why plan i does not compile, or "") as they are done, by `jobs` processes; then compile_kernel(plans[i])
    reads it from the cache. Closing the iterator ends the processes.
    """
    from .emulator.interrupt import each

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # inherited: one process a core, one thread each
    yield from each(max(1, min(jobs, len(plans))), "spawn", _compile, [(plan,) for plan in plans])


def _compile(plan: Plan) -> str:
    try:
        compile_kernel(plan)
    except Exception as error:  # one kernel's trouble must not lose the others
        return f"{type(error).__name__}: {error}"
    return ""
