"""Ctrl-C: held back where native code would not survive it, none of a worker's business, and the end of all workers.

A terminal sends SIGINT to every process of the command. The parent alone answers it: workers are started with the
signal blocked, and end with their parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

_PR_SET_PDEATHSIG = 1


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Deliver the first Ctrl-C when the block is done: one that meets the DSL's native code, or its import, aborts the
    process. A second one is not held back. Only the main thread is told of it, so elsewhere this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held = []

    def hold(*_: object) -> None:
        held.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


@contextmanager
def without_interrupt() -> Iterator[None]:
    """Processes that are started in the block never see SIGINT; one that comes here is delivered after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """Kill this process, which `parent` has just started, when that one dies, however it does. On Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # too late
        os._exit(1)


def end_workers() -> None:
    """End the processes of every `each` under way, whatever became of whoever was reading its results."""
    for worker in active_children():
        worker.terminate()


def each(jobs: int, method: str, work: Callable[..., Any], items: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
    """(i, work(*items[i])) as they are done, by `jobs` processes that are started by `method` ("fork", "spawn").

    The processes end with the last result, with an exception here, and with this process.
    """
    pool = ProcessPoolExecutor(jobs, get_context(method), initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        with without_interrupt():  # the workers are started by the first items
            futures = {pool.submit(work, *item): i for i, item in enumerate(items)}
        for done in as_completed(futures):
            yield futures[done], done.result()
    except BaseException:
        end_workers()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
