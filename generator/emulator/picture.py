"""A timeline as a picture: one CTA's tracks over time, SVG without anything foreign."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .clock import SHOWN_AS
from .timeline import BARRIER, COPY, TENSOR, WARP, Slice, Timeline, Track

WIDTH, LABELS, ROW, TOP = 1480, 190, 20, 64
BAR_ROW = 13
RUN_COLOURS = ("#4e79a7", "#76b7b2", "#9c755f", "#af7aa1", "#edc948", "#86bcb6", "#b6992d", "#79706e")
COLOURS = {"wait": "#e3e3e3", "issue": "#333333", "tmem": "#59a14f", "mma": "#f28e2b", "copy": "#8e6bbf"}
MEANINGS = {
    "mma": "tensor core",
    "copy": "TMA, issue to arrival",
    "tmem": "tcgen05.ld, st",
    "wait": "waiting",
    "issue": "issue, arrive, commit",
}
PHASES = ("#c9d7e8", "#f3d9b8")
CHARACTER = 6.1  # pixels of a letter at the font size of a slice
_ROWS = {WARP: 0, TENSOR: 1, COPY: 2, BARRIER: 3}


def picture(timeline: Timeline, cta: int = 0) -> str:
    """The tracks of one traced CTA as an SVG document; each slice tells its times when pointed at."""
    numbered = [(i, t) for i, t in enumerate(timeline.tracks) if t.cta == cta and t.slices]
    numbered.sort(key=lambda item: _ROWS[item[1].kind])
    scale = (WIDTH - LABELS - 20) / max(timeline.end, 1)
    functions = _longest_functions([t for _, t in numbered])
    colours = {name: RUN_COLOURS[i] for i, name in enumerate(functions[: len(RUN_COLOURS)])}
    body, places, y, kind = [], {}, TOP, WARP
    for number, track in numbered:
        if track.kind != kind:
            y, kind = y + 8, track.kind
        height = BAR_ROW if kind == BARRIER else ROW
        places[number] = y + height / 2
        body.append(f'<text x="{LABELS - 8}" y="{y + height - 5}" text-anchor="end">{escape(track.name)}</text>')
        for i, piece in enumerate(track.slices):
            body.append(_shape(piece, y, height - 3, scale, colours, i))
        y += height
    arrows = [
        f'<path d="M{LABELS + a.start * scale:.1f} {places[a.source]:.1f}L{LABELS + a.end * scale:.1f} '
        f'{places[a.target]:.1f}"/>'
        for a in timeline.flows
        if a.waited and a.source in places and a.target in places and _is_between_units(timeline, a)
    ]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 30}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{y + 30}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-size="13">{escape(_title(timeline, cta))}</text>',
        *_legend(colours),
        *_axis(timeline.end, scale, y),
    ]
    return "\n".join(
        [*head, *body, '<g stroke="#000000" stroke-opacity="0.25" fill="none">', *arrows, "</g>", "</svg>\n"]
    )


def _title(timeline: Timeline, cta: int) -> str:
    recording = timeline.recording
    name = recording.kernel.removeprefix("kernel_cutlass_").split("_CopyAtom")[0].split("_tensor")[0]
    return f"{name}, grid {recording.grid}, CTA {recording.ctas[cta]}: modelled cycles, not measurements"


def _longest_functions(tracks: list[Track]) -> list[str]:
    spent: dict[str, float] = {}
    for track in tracks:
        for piece in track.slices:
            if piece.kind == "run":
                spent[piece.name] = spent.get(piece.name, 0) + piece.end - piece.start
    return sorted(spent, key=lambda name: -spent[name])


def _legend(colours: dict[str, str]) -> Iterator[str]:
    x = 8.0
    for text, colour in [*((MEANINGS[k], COLOURS[k]) for k in MEANINGS), *colours.items()]:
        yield f'<rect x="{x:.0f}" y="27" width="11" height="11" fill="{colour}"/>'
        yield f'<text x="{x + 15:.0f}" y="37">{escape(text)}</text>'
        x += 32 + CHARACTER * len(text)
        if x > WIDTH - 150:
            return


def _axis(end: float, scale: float, bottom: float) -> Iterator[str]:
    step = next(s for n in range(9) for s in (10**n, 2 * 10**n, 5 * 10**n) if end / s <= 12)
    for i in range(int(end // step) + 1):
        x = LABELS + i * step * scale
        yield f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle" fill="#666666">{i * step}</text>'
    text = f"cycles of the model ({SHOWN_AS} in the JSON trace)"
    yield f'<text x="{LABELS}" y="{bottom + 18}" fill="#666666">{text}</text>'


def _shape(piece: Slice, y: float, height: float, scale: float, colours: dict[str, str], number: int) -> str:
    x, width = LABELS + piece.start * scale, max((piece.end - piece.start) * scale, 0.6)
    if piece.kind == "phase":
        colour = PHASES[number % 2]
    else:
        colour = colours.get(piece.name, "#bbbbbb") if piece.kind == "run" else COLOURS[piece.kind]
    hint = escape(f"{piece.name}: {piece.start:.0f} to {piece.end:.0f}")
    shape = (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"><title>{hint}</title></rect>'
    )
    text = piece.name.replace(", not complete", "")
    if piece.kind == "mma" and len(text) * CHARACTER > width - 4:
        text = text.split(" = ")[0]
    if len(text) * CHARACTER > width - 4:
        return shape
    fill = "#ffffff" if piece.kind in ("run", "copy", "tmem") else "#222222"
    place = f'x="{x + 3:.1f}" y="{y + height - 4 + (height < 12)}" font-size="10" fill="{fill}"'
    return f"{shape}<text {place}>{escape(text)}</text>"


def _is_between_units(timeline: Timeline, arrow) -> bool:
    """Arrows from one warp to another of its kind would hide the others."""
    source, target = timeline.tracks[arrow.source], timeline.tracks[arrow.target]
    return source.kind != WARP or source.role != target.role
