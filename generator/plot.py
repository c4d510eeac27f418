"""Measured rows as pictures, PNG and SVG: TFLOP/s against head_dim and against the sequence length. By matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from .bench import OURS, Row
from .emit import write_bytes
from .peers import PEERS
from .spec import SpecError

FORMATS = ("png", "svg")
PANEL = (5.2, 3.8)  # inches
COLUMNS = 3  # panels side by side, at most
TITLES = {peer.name: peer.title for peer in PEERS}

Points = dict[str, list[tuple[int, float, float, float]]]  # by contender: (x, median, min, max), TFLOP/s


def require_matplotlib() -> None:
    """Raise SpecError, with the remedy, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpecError("plot", "DIR", f"needs matplotlib ({error})", "pip install 'bespoke[bench]'") from None


def plot_names() -> list[str]:
    """File names that write_plots writes."""
    return [f"{chart}.{ending}" for chart in ("head_dim", "tokens") for ending in FORMATS]


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write head_dim and tokens, a picture each in each format; a panel a sequence length, or a kernel.

    Returns the files. Raises OutputError when the folder cannot be written, SpecError without matplotlib.
    """
    require_matplotlib()
    by_shape = _grouped(rows, lambda row: f"batch {row.shape.batch}, {row.shape.queries} x {row.shape.keys} tokens")
    by_kernel = _grouped(rows, lambda row: row.plan.kernel_name)
    charts = (
        ("head_dim", "head_dim", by_shape, lambda row: row.plan.spec.head_dim),
        ("tokens", "keys", by_kernel, lambda row: row.shape.keys),
    )
    written = []
    for name, label, panels, x_of in charts:
        picture = _picture(panels, label, x_of, log=name == "tokens")
        for ending in FORMATS:
            data = BytesIO()
            metadata = {"Date": None} if ending == "svg" else {}
            picture.savefig(data, format=ending, dpi=150, metadata=metadata)
            written.append(write_bytes(folder / f"{name}.{ending}", data.getvalue()))
    return written


def points(rows: Iterable[Row], x_of: Callable[[Row], int]) -> Points:
    """What was measured, by contender, in order of x."""
    found: Points = {}
    for row in sorted(rows, key=x_of):
        for figure in (row.ours, *row.peers):
            timing = figure.timing
            if timing:
                speeds = (row.flop / time / 1e9 for time in (timing.median, timing.max, timing.min))
                found.setdefault(figure.name, []).append((x_of(row), *speeds))
    return found


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _picture(panels: dict[str, list[Row]], label: str, x_of: Callable[[Row], int], log: bool) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "bespoke"  # the same rows give the same file
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    picture = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines), layout="constrained")
    axes = list(picture.subplots(lines, columns, squeeze=False).flat)
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        _draw(axis, rows, x_of)
        axis.set(title=title, xlabel=label, ylabel="TFLOP/s")
        axis.set_ylim(bottom=0)
        if log:
            axis.set_xscale("log", base=2)
        ticks = sorted({x_of(row) for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.remove()
    return picture


def _draw(axis: Any, rows: Sequence[Row], x_of: Callable[[Row], int]) -> None:
    ordered = sorted(rows, key=x_of)
    axis.plot([x_of(row) for row in ordered], [row.roof for row in ordered], "k--", linewidth=1, label="GEMM 8192^3")
    for name, measured in points(rows, x_of).items():
        xs, medians, lows, highs = zip(*measured, strict=True)
        below = [middle - low for middle, low in zip(medians, lows, strict=True)]
        above = [high - middle for middle, high in zip(medians, highs, strict=True)]
        own = name == OURS
        style = {"linewidth": 2.5 if own else 1.2, "marker": "o" if own else ".", "zorder": 3 if own else 2}
        axis.errorbar(xs, medians, yerr=[below, above], capsize=2, label=TITLES.get(name, name), **style)
