"""Pictures of measured rows: which files, from which points, and what is said without matplotlib."""

import sys

import pytest

from generator.bench import Figure
from generator.plot import plot_names, points, require_matplotlib, write_plots
from generator.spec import SpecError

pytest.importorskip("torch")
measured = pytest.importorskip("measured")

MISSING = Figure("ffpa", "missing", "no such package")
ROWS = [
    measured.row(128, 4096, ours=600, peers={"fa4": 580, "ffpa": MISSING}),
    measured.row(64, 4096, ours=500, peers={"fa4": 510}),
    measured.row(64, 16384, batch=1, ours=560, peers={"fa4": 555, "cudnn": 450}),
    measured.row(64, 16384, batch=1, ours=Figure("bespoke", "wrong", "off", 1.0), peers={"cudnn": 450}, causal=True),
]


def test_both_pictures_are_written_in_both_formats(tmp_path):
    pytest.importorskip("matplotlib")
    written = write_plots(ROWS, tmp_path / "new")
    assert (
        [path.name for path in written] == plot_names() == ["head_dim.png", "head_dim.svg", "tokens.png", "tokens.svg"]
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(plot_names())
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in data
        assert len(data) > 4000


def test_the_same_rows_give_the_same_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        write_plots(ROWS[:1], tmp_path / folder)
    for name in plot_names():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_points_are_what_was_measured_in_order():
    found = points(ROWS[:2], lambda row: row.plan.spec.head_dim)
    assert list(found) == ["bespoke", "fa4"]
    assert [point[0] for point in found["bespoke"]] == [64, 128]
    x, median, low, high = found["bespoke"][1]
    assert median == pytest.approx(600) and low == pytest.approx(600 / 1.02) and high == pytest.approx(600 / 0.99)
    assert points([ROWS[3]], lambda row: 1).keys() == {"cudnn"}


def test_without_matplotlib_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SpecError, match=r"^plot = 'DIR': needs matplotlib .*; pip install 'bespoke\[bench\]'"):
        require_matplotlib()
    with pytest.raises(SpecError, match="needs matplotlib"):
        write_plots(ROWS, tmp_path)
    assert list(tmp_path.iterdir()) == []
