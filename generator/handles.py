"""Objects by a string: PyTorch's tracers take a string for a constant in every version, an object in some."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

_numbers = itertools.count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def handle_of(item: Any) -> str:
    """A handle of its own for the object, good as long as the object is there."""
    handle = str(next(_numbers))
    _objects[handle] = item
    return handle


def object_of(handle: str) -> Any:
    """The object of this process that has the handle; KeyError when it is gone."""
    return _objects[handle]
