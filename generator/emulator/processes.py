"""CTAs of one launch in several processes: forked, each with a share of the clusters, their stores copied back.

Only where it cannot be noticed: kernels in which CTAs do not speak to each other through global memory, that compute
enough for it to pay, on their default schedule. When a share fails, memory is put back and the launch runs again in one
process, so that what is reported does not depend on the number of processes. `BESPOKE_PROCESSES` says how many there
may be; by default one a processor.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import LaunchError
from .interrupt import end_with_parent, without_interrupt
from .memory import GlobalMemory
from .snapshot import Snapshot

HEAVY = ("tcgen05.mma", "wgmma.mma", "mma.sync")  # a kernel with one of these computes enough
SPEAKING = ("atom", "red.", "multimem", "cp.reduce", "vprintf", "clusterlaunchcontrol", "membar.gl", "membar.sys")
ORDERED = (".volatile", ".acquire.gpu", ".acquire.sys", ".release.gpu", ".release.sys", ".relaxed.gpu", ".relaxed.sys")
CLUSTERS_EACH = 4  # a process for fewer does not pay
COPIED = 256 << 20  # bytes of global memory, at most, that are copied to find what a process stored


def wanted(program: Any, clusters: int, gmem: GlobalMemory) -> int:
    """How many processes the launch of `clusters` clusters should run in."""
    limit = _limit()
    if threading.current_thread() is not threading.main_thread():
        return 1  # a child has this thread alone, and whatever lock another holds stays held in it
    if limit == 1 or clusters < 2 * CLUSTERS_EACH or not hasattr(os, "fork"):
        return 1
    opcodes = {instr.opcode for instr in program.kernel.instrs}
    if not any(o.startswith(HEAVY) for o in opcodes) or any(_speaks(o) for o in opcodes):
        return 1
    if sum(size for _, size, *_ in gmem.regions) > COPIED:
        return 1
    return min(limit, clusters // CLUSTERS_EACH)


def _speaks(opcode: str) -> bool:
    """Another CTA may see it before the kernel ends."""
    if opcode.startswith(("ld", "st")):
        return any(word in opcode for word in ORDERED)
    if opcode.startswith("fence"):
        return opcode.startswith(("fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu", "fence.sc.sys"))
    return opcode.startswith(SPEAKING) and ".shared" not in opcode


def _limit() -> int:
    given = os.environ.get("BESPOKE_PROCESSES")
    if not given:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise LaunchError(f"BESPOKE_PROCESSES is {given!r}: a number from 1 on")
    return int(given)


def run_shares(shares: list[Callable[[], Any]], gmem: GlobalMemory) -> list[Any] | None:
    """Run each share in a process of its own, the first in this one; their results, with all stores done here.

    None, and global memory as it was, when one of them raises.
    """
    before = Snapshot(gmem)
    running = [_fork(share, gmem, before) for share in shares[1:]]
    results: list[Any] = []
    failed = False
    try:
        results.append(shares[0]())
    except Exception:
        failed = True
    except BaseException:  # Ctrl-C: nobody will want their results
        for pid, _ in running:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid, _ in running:
            os.waitpid(pid, 0)
    for _, file in running:
        with file:
            file.seek(0)
            raw = file.read()
        if not raw or failed:
            failed = True
            continue
        result, stores = pickle.loads(raw)
        results.append(result)
        for at, (mask, values) in stores.items():
            array = _arrays(gmem)[at]
            array[np.unpackbits(mask, count=len(array)).view(bool)] = values
    if failed:
        before.restore()
        return None
    return results


def _arrays(gmem: GlobalMemory) -> dict[tuple[str, int], np.ndarray]:
    """Bytes of every array, and what was written of those that came uninitialized."""
    arrays = {("data", start): view for start, _, _, view in gmem.regions}
    return arrays | {("written", start): written for start, written in gmem.written.items()}


def _fork(share: Callable[[], Any], gmem: GlobalMemory, before: Snapshot) -> tuple[int, Any]:
    """Start a process; it leaves (result, stores) in the file, or nothing when the share raises."""
    file, parent = tempfile.TemporaryFile(), os.getpid()  # noqa: SIM115  (the parent closes it)
    with warnings.catch_warnings(), without_interrupt():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of others: the child runs only what follows
        pid = os.fork()
        if not pid:
            _run_share(share, gmem, before, file, parent)
    return pid, file


def _run_share(share: Callable[[], Any], gmem: GlobalMemory, before: Snapshot, file: Any, parent: int) -> None:
    """All that a process does. Does not return."""
    try:
        end_with_parent(parent)
        result = share()
        was = before.arrays()
        stores = {}
        for at, array in _arrays(gmem).items():
            changed = array != was[at]
            if changed.any():
                stores[at] = (np.packbits(changed), array[changed])
        file.write(pickle.dumps((result, stores), protocol=5))
        file.flush()
    finally:
        os._exit(0)
