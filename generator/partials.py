"""Which files of templates/ make a kernel, by strategy: chosen here, so that the template has no case to tell apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Partials:
    """Files of templates/ that make a kernel: its docstring, its constants of the tile, and its functions in order."""

    overview: str
    tile_constants: str
    parts: tuple[str, ...]


def _partials(overview: str, constants: str, *parts: str) -> Partials:
    names = [f"_{part}.py.j2" for part in (overview, constants, *parts)]
    return Partials(names[0], names[1], tuple(names[2:]))


_CHUNKS = (
    *("overview_chunks", "constants_chunks", "operands_chunks", "tiles", "mask", "load_chunks", "mma_chunks", "tmem"),
)
PARTIALS = {
    "tiles": _partials(
        *("overview_tiles", "constants_tiles", "operands", "tiles", "mask", "load", "mma", "tmem"),
        *("softmax", "rows", "epilogue", "stage", "kernel", "launch"),
    ),
    "two_tiles": _partials(
        *("overview_two", "constants_two", "operands", "tiles", "mask", "spans_two", "load", "mma_two", "tmem"),
        *("softmax_two", "rows", "correction_two", "epilogue", "stage", "kernel_two", "launch"),
    ),
    "chunks": _partials(*_CHUNKS, "softmax", "rows", "store_columns", "stage", "kernel_chunks"),
    "pair": _partials(*_CHUNKS, "softmax_pair", "rows", "store_columns", "stage", "kernel_chunks"),
}
