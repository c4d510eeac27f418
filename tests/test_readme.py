"""What the README says is what the program says."""

import pytest

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
    rows = [row for row in rows if row[1] in ("TMEM", "SMEM")]
    surveyed = [row for dim in ("64", "128", "256") for row in survey_kernel(load_spec(head_dim=int(dim)))]
    assert len(rows) == len(surveyed)
    for cells, row in zip(rows, surveyed, strict=True):
        budget, tiling = row.budget, row.tiling
        columns = {region.name: region.columns for region in budget.regions}
        assert cells == [
            str(row.spec.head_dim),
            tiling.p_staging.upper(),
            str(tiling.kv_stages),
            f"{tiling.tile_m}x{tiling.tile_n}",
            *(str(budget.bytes_of(name)) for name in ("sQ", "sK", "sV", "sP")),
            "in sQ" if tiling.o_over_q else str(budget.bytes_of("sO")),
            str(budget.smem_total),
            str(budget.smem_limit),
            " + ".join(str(columns.get(name, 0)) for name in "SPO"),
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
    assert f"tries {len(plan.rejected) + 1} candidates" in README
    assert (plan.tile_n, plan.kv_stages, plan.p_staging) == (128, 3, "tmem")
    assert f"barriers {budget.buffer('barriers').bytes} bytes" in README
    assert f"sQ {budget.buffer('sQ').bytes}, sK and sV 3 x {budget.buffer('sK').stage_bytes} each" in README
    assert f"{budget.smem_total} in all" in README and f"so {budget.tmem_columns} are allocated" in README
    ends = [(region.column, region.column + region.columns - 1) for region in budget.regions]
    assert ends == [(0, 127), (128, 191), (192, 287)]
    assert plan.layouts["sQ"].swizzle_bytes == 64 and plan.layouts["sK"].swizzle_columns == 32
    assert budget.threads == 192


def test_tree_names_every_module():
    for path in (checkout_root() / "generator").glob("*.py"):
        if not path.stem.startswith("__"):
            assert path.name in README, path.name
