"""docs/plans: the pages are what the plans say today; the maps are drawn to the Budget; every barrier is told."""

import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from generator import cli
from generator.maps import LEFT, WIDTH, smem_map, tmem_map
from generator.pages import PAGES, write_pages
from generator.plan import plan_kernel
from generator.protocol import protocol
from generator.resources import checkout_root
from generator.spec import load_spec, spec_names

SVG = "{http://www.w3.org/2000/svg}"
PLANS = checkout_root() / "docs" / "plans"


def test_committed_pages_are_current():
    pages = write_pages()
    assert {path.name for path in PLANS.iterdir()} == set(pages)
    for name, text in pages.items():
        assert (PLANS / name).read_text() == text, f"{name}: run `bespoke docs`"


def test_command_writes_and_checks(tmp_path, monkeypatch):
    pages = write_pages()
    monkeypatch.setattr(cli, "write_pages", lambda: pages)
    run = lambda *words: CliRunner().invoke(cli.app, ["docs", "--out", str(tmp_path), *words])  # noqa: E731
    assert run("--check").exit_code == 1
    assert run().exit_code == 0 and len(list(tmp_path.iterdir())) == len(pages)
    assert run("--check").exit_code == 0
    (tmp_path / "pair.md").write_text("old")
    stale = run("--check")
    assert stale.exit_code == 1 and "pair.md" in stale.stderr and "tiles.md" not in stale.stderr


def boxes(svg):
    """Title -> (x, width) of each box, in the units of the axis: what 1 is of the whole."""
    found = {}
    for box in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        title = box.find(f"{SVG}title")
        if title is not None:
            found[title.text] = float(box.get("x")) - LEFT, float(box.get("width"))
    return found


@pytest.mark.parametrize("strategy", PAGES)
def test_maps_are_to_scale(strategy):
    plan = plan_kernel(load_spec(PAGES[strategy][0]))
    axis = WIDTH - 2 * LEFT
    smem = boxes(smem_map(plan))
    tmem = boxes(tmem_map(plan)) if plan.arch.tmem_columns else {}
    assert bool(plan.budget.regions) == bool(tmem)
    for buffer in plan.budget.buffers:
        for stage in range(buffer.stages):
            name = f"{buffer.name}[{stage}]" if buffer.stages > 1 else buffer.name
            x, width = smem[f"{name}: {buffer.stage_bytes} bytes"]
            assert x == pytest.approx((buffer.offset + stage * buffer.stage_bytes) / 232448 * axis, abs=0.1)
            assert width == pytest.approx(max(buffer.stage_bytes / 232448 * axis, 1), abs=0.1)
    for region in plan.budget.regions:
        drawn = {title: box for title, box in tmem.items() if title.startswith(f"{region.name}, lanes")}
        assert len(drawn) == (2 if plan.pair else 1)
        for x, width in drawn.values():
            assert (x, width) == pytest.approx((region.column / 512 * axis, region.columns / 512 * axis), abs=0.1)


@pytest.mark.parametrize("name", spec_names())
def test_protocol_tells_every_barrier_once(name):
    plan = plan_kernel(load_spec(name))
    rows = protocol(plan)
    budget = plan.budget
    assert [(r.barrier, r.stages, r.arrivals.split()[0]) for r in rows[: len(budget.mbarriers)]] == [
        (bar.name, bar.stages, str(bar.arrivals)) for bar in budget.mbarriers
    ]
    rest = [f"bar.sync {bar.id}" for bar in budget.named_barriers] + ["barrier.cluster"] * (plan.ctas == 2)
    assert [row.barrier for row in rows[len(budget.mbarriers) :]] == rest
    assert all(row.arrives and row.waits and row.phase for row in rows)


def test_protocol_of_a_pair_names_who_counts_for_both():
    rows = {row.barrier: row for row in protocol(plan_kernel(load_spec(head_dim=512)))}
    assert rows["p_full"].arrivals == "8" and "even CTA" in rows["p_full"].arrives
    assert rows["ring_full"].arrivals == "2 and 32768 bytes"
    assert "multicast to both CTAs" in rows["s_full"].arrives
