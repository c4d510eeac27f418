"""Names for places in shared and tensor memory, so that messages can say `k_full[1]` instead of an offset."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Labels:
    """What the host knows about a kernel's memory: (first, count, name) in bytes of shared memory and TMEM columns."""

    shared: list[tuple[int, int, str]] = field(default_factory=list)
    columns: list[tuple[int, int, str]] = field(default_factory=list)

    def shared_at(self, offset: int) -> str:
        """ "shared offset 0x48 (s_full)"; several names where buffers overlap."""
        return f"shared offset {offset:#x}{_names(self.shared, offset)}"

    def column_at(self, column: int) -> str:
        """ "TMEM column 130 (P)"."""
        return f"TMEM column {column}{_names(self.columns, column)}"


def _names(places: list[tuple[int, int, str]], at: int) -> str:
    found = [name for first, count, name in places if first <= at < first + count]
    return f" ({' or '.join(found)})" if found else ""
