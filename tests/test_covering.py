"""covering.py: every pair meets, in few rows, the same every time; what cannot be is said."""

from itertools import product

from generator.covering import all_pairs, cover, pairs_of, prune

FACTORS = {"a": (0, 1, 2, 3), "b": ("x", "y", "z"), "c": (False, True), "d": (False, True), "e": (False, True)}


def met(rows):
    return set().union(*(pairs_of(row, FACTORS) for row in rows))


def test_every_pair_meets_in_few_rows():
    rows, impossible = cover(FACTORS, [], lambda row: True)
    assert not impossible and met(rows) == set(all_pairs(FACTORS))
    assert len(rows) <= 15  # 12 are needed for a and b alone, of 96 in all
    assert cover(FACTORS, [], lambda row: True)[0] == rows
    assert cover(FACTORS, rows, lambda row: True) == ([], [])


def test_rows_that_are_not_allowed_are_avoided_and_pairs_without_one_told():
    def allowed(row):
        return not (row["a"] == 0 and row["c"]) and not (row["b"] == "x" and row["d"] and row["e"])

    rows, impossible = cover(FACTORS, [], allowed, tries=200)
    assert impossible == [("a", 0, "c", True)]
    assert all(allowed(row) for row in rows)
    assert met(rows) == set(all_pairs(FACTORS)) - set(impossible)


def test_forbidden_pairs_are_in_no_row():
    forbidden = {("a", 1, "b", "y"), ("c", True, "d", True)}
    rows, impossible = cover(FACTORS, [], lambda row: True, forbidden)
    assert not impossible and met(rows) == set(all_pairs(FACTORS)) - forbidden


def test_pruning_keeps_every_pair_and_the_rows_that_must_stay():
    rows = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    few = prune(FACTORS, rows, lambda row: row["a"] == 3 and row["b"] == "z")
    assert met(few) == set(all_pairs(FACTORS))
    assert len(few) < 40 and sum(row["a"] == 3 and row["b"] == "z" for row in few) == 8
