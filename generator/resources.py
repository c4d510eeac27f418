"""Where templates/, specs/ and tuned.json are, in a checkout and in an installed wheel, and the version.

In a checkout (or an editable install) they lie beside the package, in a wheel inside it.
"""

from __future__ import annotations

from pathlib import Path

VERSION = "0.1.0"

_PACKAGE = Path(__file__).resolve().parent  # resolve(): an editable install may reach us through a link


def checkout_root() -> Path | None:
    """The folder that holds generator/, templates/ and specs/, or None in an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "templates").is_dir() and (root / "pyproject.toml").is_file() else None


def _folder(name: str) -> Path:
    root = checkout_root()
    return (root or _PACKAGE) / name


def templates_dir() -> Path:
    """Folder of the Jinja templates (*.py.j2)."""
    return _folder("templates")


def specs_dir() -> Path:
    """Folder of the specifications (*.toml)."""
    return _folder("specs")


def tuned_path() -> Path:
    """The table of measured winners (tuned.py)."""
    return _PACKAGE / "tuned.json"


def generated_dir() -> Path:
    """Where emitted kernels go when nobody says otherwise: the checkout's generated/, else ./generated."""
    root = checkout_root()
    return (root or Path.cwd()) / "generated"
