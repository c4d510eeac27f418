"""Which files of templates/ make a kernel, by strategy: chosen here, so that the template has no case to tell apart."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Partials:
    """Files of templates/ that make a kernel: its docstring, its constants of the tile, and its functions in order."""

    overview: str
    tile_constants: str
    parts: tuple[str, ...]


def _partials(overview: str, constants: str, *parts: str) -> Partials:
    names = [f"_{part}.py.j2" for part in (overview, constants, *parts)]
    return Partials(names[0], names[1], tuple(names[2:]))


_CHUNKS = ("overview_chunks", "constants_chunks", "operands_chunks", "tiles", "mask")
_APART = ("tma_views", "load_chunks", "mma_chunks", "tmem")  # chunks of V in buffers of their own
_OUT = ("rows", "store_columns", "stage", "kernel_chunks", "launch_chunks")


def _warpgroups(schedule: str) -> Partials:
    """schedule: where a consumer's softmax runs, "beside" its product of the tile before with V, or "after" it."""
    return _partials(
        *("overview_sm90", "constants_sm90", "operands_sm90", "ring_sm90", "mask", "work", "spans_sm90", "load_sm90"),
        *("softmax_sm90", f"softmax_{schedule}_sm90", "finish_sm90", "epilogue_sm90", "multiply_sm90"),
        *(f"tile_{schedule}_sm90", "consumer_sm90", "kernel_sm90", "launch_sm90"),
    )


PARTIALS = {
    "tiles": _partials(
        *("overview_tiles", "constants_tiles", "operands", "tiles", "mask", "tma_views", "load", "mma"),
        *("tmem", "softmax", "rows", "epilogue", "stage", "kernel", "launch"),
    ),
    "two_tiles": _partials(
        *("overview_two", "constants_two", "operands", "tiles", "mask", "work", "spans_two"),
        *("tma_views", "load", "mma_two", "tmem", "softmax_two", "rows", "correction_two", "epilogue_turns", "stage"),
        *("kernel_two", "launch"),
    ),
    "two_ctas": _partials(
        *("overview_ctas", "constants_ctas", "operands_ctas", "tiles", "mask", "work", "spans_ctas"),
        *("tma_views", "load_ctas", "mma_ctas", "tmem", "softmax_ctas", "rows", "correction_ctas", "epilogue_turns"),
        *("stage", "kernel_ctas", "launch"),
    ),
    "chunks": _partials(*_CHUNKS, *_APART, "softmax", *_OUT),
    "chunks_shared": _partials(*_CHUNKS, "tma_views", "load_shared", "mma_shared", "tmem", "softmax", *_OUT),
    "pair": _partials(*_CHUNKS, *_APART, "softmax_pair", *_OUT),
    "warpgroups": _warpgroups("beside"),
    "warpgroups_after": _warpgroups("after"),
    "columns": _partials(
        *("overview_columns", "constants_columns", "operands_columns", "ring_columns", "mask", "work", "spans_sm90"),
        *("load_columns", "softmax_sm90", "softmax_after_sm90", "finish_sm90", "scores_columns", "tile_columns"),
        *("score_columns", "outputs_columns", "kernel_columns", "launch_columns"),
    ),
}


def with_part(partials: Partials, part: str, before: str) -> Partials:
    """With a part more, before the one whose name begins so."""
    at = next(i for i, name in enumerate(partials.parts) if name.startswith(before))
    return replace(partials, parts=(*partials.parts[:at], f"{part}.py.j2", *partials.parts[at:]))
