"""Compiled kernels on disk: one file an entry, written whole or not at all.

An entry is a zip archive (stored, each member with a checksum) under the hash of everything that it depends on. A
writer renames a finished temporary file onto the entry, so concurrent processes see the old entry, the new one or
none; two that compile the same kernel at once write equal entries, and the later one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .spec import SpecError


class CacheError(SpecError):
    """The cache folder cannot be written."""


def cache_dir() -> Path:
    """BESPOKE_CACHE, else bespoke/ in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    chosen = os.environ.get("BESPOKE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bespoke"


def cache_key(facts: Mapping[str, object]) -> str:
    """sha256 (hex) of the facts' canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_entry(key: str) -> dict[str, bytes] | None:
    """The members of an entry; None when there is none, or when it is damaged (it will be written again)."""
    try:
        with zipfile.ZipFile(_path(key)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (FileNotFoundError, NotADirectoryError, zipfile.BadZipFile, EOFError):
        return None


def require_cache(key: str) -> None:
    """Whether `write_entry` can store an entry, asked before it is made. Raises CacheError."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _refused(error) from None


def _refused(error: OSError) -> CacheError:
    return CacheError(
        "BESPOKE_CACHE", cache_dir(), f"cannot be written: {error.strerror}", "set it to a folder of yours"
    )


def write_entry(key: str, members: Mapping[str, bytes]) -> Path:
    """Store an entry atomically. Raises CacheError when the folder cannot be written."""
    path = _path(key)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        os.replace(part, path)
    except OSError as error:
        raise _refused(error) from None
    finally:
        if part is not None and os.path.exists(part):
            os.unlink(part)
    return path


def _path(key: str) -> Path:
    return cache_dir() / "kernels" / key[:2] / f"{key}.zip"
