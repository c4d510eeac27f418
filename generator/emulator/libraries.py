"""The package's compiled C files: plain shared libraries that are loaded with ctypes, no Python extension modules."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

from .errors import EmulatorError


def find_library(stem: str) -> Path:
    """The library that was built as `stem` beside this file. Raises EmulatorError when the package was not built."""
    folder = Path(__file__).resolve().parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.exists():
            return path
    raise EmulatorError(
        f"the emulator's library {stem}{importlib.machinery.EXTENSION_SUFFIXES[0]} is missing from {folder}; "
        "install the package (pip install -e .), which compiles it and needs a C compiler"
    )
