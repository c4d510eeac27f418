"""Acts on a module when a program imports it, without importing it for programs that do not."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any


def when_imported(stack: ExitStack, name: str, act: Callable[[ModuleType], None]) -> None:
    """act(module) now when the module is imported already, or as soon as it is, until the stack unwinds."""
    if name in sys.modules:
        act(sys.modules[name])
        return
    finder = _Finder(name, act)
    sys.meta_path.insert(0, finder)
    stack.callback(finder.remove)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name, self._act = name, act

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._act(module)

            spec.loader.exec_module = exec_module
        return spec
