"""What the README and docs/ say is what the program says."""

import re
import shlex

import pytest
from typer.main import get_command

from generator.cli import app
from generator.cost import cost_of
from generator.pages import strategy_lines
from generator.plan import DoesNotFit, plan_kernel
from generator.resources import checkout_root
from generator.spec import load_spec
from generator.survey import survey_kernel

README = (checkout_root() / "README.md").read_text()


def test_the_two_commands_stand_to_the_letter():
    for command in ("pip install -e . && bespoke make --head-dim 96", "pip install -e '.[test]' && pytest"):
        assert f"    {command}\n" in README


def test_budget_table_is_the_computed_one():
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| ") and "232448" in line]
    rows = [row for row in rows if row[2] in ("TMEM", "SMEM")]
    surveyed = [row for dim in (128, 256) for row in survey_kernel(load_spec(head_dim=dim))]
    assert len(rows) == len(surveyed)
    for cells, row in zip(rows, surveyed, strict=True):
        budget, tiling = row.budget, row.tiling
        assert cells == [
            str(row.spec.head_dim),
            tiling.strategy,
            tiling.p_staging.upper(),
            str(tiling.kv_stages),
            f"{tiling.tile_m}x{tiling.tile_n}",
            *(str(budget.bytes_of(name)) for name in ("sQ", "sK", "sV", "sP")),
            "in sQ" if tiling.o_over_q else str(budget.bytes_of("sO")),
            str(budget.smem_total),
            str(budget.smem_limit),
            " + ".join(str(budget.columns_of(name)) for name in "SPO"),
            str(budget.tmem_columns),
            f"**{row.status}**" if row.chosen else row.status,
        ]


def test_strategies_are_the_computed_ones():
    for head_dim in (320, 512):
        assert "\n".join(strategy_lines({"head_dim": head_dim})) in README


def test_what_does_not_fit_at_512_is_quoted():
    with pytest.raises(DoesNotFit) as caught:
        plan_kernel(load_spec(head_dim=512, tile_m=128))
    assert f"    {caught.value}\n" in README


def test_the_traced_request_has_the_plan_s_numbers():
    plan = plan_kernel(load_spec(head_dim=96))
    budget = plan.budget
    assert f"tries {len(plan.rejected) + 1} candidates" in README and f"the other {len(plan.rejected)} was" in README
    costs = [cost_of(plan.spec, plan.arch, plan.tiling).score]
    costs += [cost_of(plan.spec, plan.arch, plan_kernel(load_spec(head_dim=96, strategy="tiles")).tiling).score]
    words = "they take {:.0f} SM cycles a\n   block of 128 x 128 scores and one at a time {:.0f}"
    assert words.format(*costs) in README
    assert (plan.tiling.strategy, plan.tile_n, plan.kv_stages, plan.p_staging) == ("two_tiles", 128, 3, "tmem")
    assert f"barriers {budget.buffer('barriers').bytes} bytes" in README
    assert budget.buffer("rows").bytes == 3 * 256 * 4
    assert f"sQ {budget.buffer('sQ').bytes}, sK and sV 3 x {budget.buffer('sK').stage_bytes} each" in README
    assert f"{budget.smem_total} in all" in README
    assert f"{budget.smem_total} bytes, {budget.tmem_columns} columns, {budget.threads} threads" in README
    ends = {region.name: (region.column, region.end - 1) for region in budget.regions}
    assert (ends["S0"][0], ends["S1"][1], ends["O0"][0], ends["O1"][1]) == (0, 255, 256, 447)
    assert plan.layouts["sQ"].swizzle_bytes == 64 and plan.layouts["sK"].swizzle_columns == 32


def test_tree_names_every_module():
    for path in (checkout_root() / "generator").glob("*.py"):
        if not path.stem.startswith("__"):
            assert path.name in README, path.name


def test_commands_in_the_documents_are_commands():
    """With options that there are; nothing is executed."""
    known, told = get_command(app).commands, 0
    for path in sorted((checkout_root() / "docs").rglob("*.md")):
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    (?:\w+=\S+ )*bespoke ([^\n&|>]*)", text, re.MULTILINE):
            name, *words = shlex.split(line, comments=True)
            known[name].make_context(name, words)  # raises UsageError
            told += 1
    assert told >= 12
