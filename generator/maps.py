"""Pictures of a plan as SVG text, drawn from its Budget: shared memory by bytes, tensor memory by lanes and columns."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .budget import Buffer, Region
from .layout import Plan

WIDTH, LEFT, TOP = 760, 20, 46
BAR_HEIGHT, TMEM_HEIGHT, LINE = 54, 128, 18
COLORS_OF_REGIONS = {"S": "#9ecae1", "P": "#dadaeb", "O": "#fc9272"}
COLORS = {
    **{"sQ": "#9ecae1", "sK": "#a1d99b", "sV": "#fdd0a2", "ring": "#c7e9c0", "sP": "#dadaeb", "peaks": "#f7b6d2"},
    **{"barriers": "#bdbdbd", "rows": "#f7b6d2", "sO": "#fc9272"},
    **{f"{name}{i}": color for name, color in COLORS_OF_REGIONS.items() for i in ("", 0, 1)},
}


def smem_map(plan: Plan) -> str:
    """One CTA's shared memory, from offset 0 to the architecture's limit; what lies over another buffer is below it."""
    budget = plan.budget
    scale = (WIDTH - 2 * LEFT) / budget.smem_limit
    parts = [
        _text(
            LEFT, 20, f"{plan.kernel_name}: shared memory of one CTA, {budget.smem_total} of {budget.smem_limit} bytes"
        )
    ]
    parts.append(_box(LEFT, TOP, budget.smem_limit * scale, BAR_HEIGHT, "#f7f7f7", "free"))
    for buffer in budget.buffers:
        lower = buffer.alias_of is not None
        parts += _buffer(buffer, scale, TOP + (BAR_HEIGHT + 4 if lower else 0), BAR_HEIGHT // (2 if lower else 1))
    y = TOP + BAR_HEIGHT + BAR_HEIGHT // 2 + 4 + LINE
    for buffer in budget.buffers:
        over = f", over {buffer.alias_of}" if buffer.alias_of else ""
        end = buffer.offset + buffer.bytes
        label = f"{buffer.name}: bytes {buffer.offset} to {end - 1}{over}: {buffer.reason}"
        parts += _legend(buffer.name, y, label)
        y += LINE
    return _svg(y, parts)


def tmem_map(plan: Plan) -> str:
    """One CTA's tensor memory: 512 columns to the right, 128 lanes down. In a pair each region is two halves; what lies
    over another region is drawn in the lower half of its height."""
    budget = plan.budget
    scale = (WIDTH - 2 * LEFT) / budget.tmem_limit
    title = (
        f"{plan.kernel_name}: tensor memory of one CTA, {budget.tmem_used} of {budget.tmem_limit} columns x 128 lanes"
    )
    parts = [_text(LEFT, 20, title), _box(LEFT, TOP, budget.tmem_limit * scale, TMEM_HEIGHT, "#f7f7f7", "free")]
    drawn: list[Region] = []
    for region in budget.regions:
        x, width = LEFT + region.column * scale, region.columns * scale
        halves = ("left half", "right half") if plan.pair else ("",)
        lies_over = any(other.column < region.column + region.columns and region.column < other.end for other in drawn)
        height = TMEM_HEIGHT / len(halves) / (2 if lies_over else 1)
        for i, half in enumerate(halves):
            y = TOP + i * height + (height if lies_over else 0)
            lanes = f"lanes {64 * i} to {64 * i + 63}: {half}" if half else "lanes 0 to 127"
            parts.append(_box(x, y, width, height, COLORS[region.name], f"{region.name}, {lanes}"))
            parts.append(_text(x + 4, y + 16, region.name))
            if half and width > 180:  # room for the words
                parts.append(_text(x + 4, y + 32, lanes, 11))
        drawn.append(region)
    y = TOP + TMEM_HEIGHT + LINE
    for region in budget.regions:
        label = f"{region.name}: columns {region.column} to {region.column + region.columns - 1}: {region.reason}"
        parts += _legend(region.name, y, label)
        y += LINE
    return _svg(y, parts)


def _buffer(buffer: Buffer, scale: float, y: float, height: float) -> Iterator[str]:
    for stage in range(buffer.stages):
        x = LEFT + (buffer.offset + stage * buffer.stage_bytes) * scale
        name = f"{buffer.name}[{stage}]" if buffer.stages > 1 else buffer.name
        width = max(buffer.stage_bytes * scale, 1)
        yield _box(x, y, width, height, COLORS[buffer.name], f"{name}: {buffer.stage_bytes} bytes")
    if buffer.bytes * scale > 24:
        yield _text(LEFT + buffer.offset * scale + 4, y + 16, buffer.name)


def _legend(name: str, y: float, label: str) -> tuple[str, str]:
    return _box(LEFT, y - 10, 12, 12, COLORS[name], name), _text(LEFT + 20, y, label, 12)


def _box(x: float, y: float, width: float, height: float, color: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{color}" stroke="#555" stroke-width="0.5"><title>{escape(title)}</title></rect>'


def _text(x: float, y: float, words: str, size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(words)}</text>'


def _svg(height: float, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" font-family="sans-serif">'
    background = f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"
