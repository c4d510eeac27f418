"""The same PTX on a GPU and in the emulator, on the same inputs, compared bit by bit."""

from __future__ import annotations

from .cases import GROUPS, cases_of
from .compare import Row, compare
from .runner import Outcome, crosscheck

__all__ = ["GROUPS", "Outcome", "Row", "cases_of", "compare", "crosscheck"]
