"""Verdicts follow from numbers, and a table holds what was said."""

import math

import pytest

from depthutil import findings


@pytest.mark.parametrize(
    "here, error, compared, expected",
    [
        (1.09, 0.05, {"target": 1}, "agrees"),
        (1.11, 0.05, {"target": 1}, "differs"),
        (1.3, 0.1, {"target": 1, "target_error": 0.2}, "agrees"),
        (1.0, 0.0, {"target": 1}, "agrees"),
        (0.3, 0.1, {"at_least": 0}, "agrees"),
        (-0.3, 0.1, {"at_least": 0}, "differs"),
        (0.1, 0.1, {"at_least": 0}, "undecided"),
        (-0.3, 0.1, {"at_most": 0}, "agrees"),
        (0.3, 0.1, {"at_most": 0}, "differs"),
        (0.2, 0.1, {"at_most": 0}, "undecided"),
        (0.0, 0.0, {"at_least": 0}, "undecided"),
        (5.0, 0.1, {}, "not compared"),
    ],
)
def test_a_verdict_follows_from_numbers(here, error, compared, expected):
    assert findings.verdict(here, error, **compared) == expected


@pytest.mark.parametrize(
    "here, error, compared, word",
    [
        (math.nan, 0.1, {"target": 1}, "here is a number, not nan"),
        (1.0, -0.1, {"target": 1}, "error is a number of at least 0, not -0.1"),
        (1.0, math.inf, {}, "error is a number of at least 0, not inf"),
        (1.0, 0.1, {"target": math.inf}, "target is a number, not inf"),
        (1.0, 0.1, {"target": 1, "at_least": 0}, "give one of target and at_least"),
    ],
)
def test_what_is_no_comparison_is_refused(here, error, compared, word):
    found = findings.Findings()
    with pytest.raises(ValueError, match=word):
        found.add("a", "b", "c", here, error, "d", **compared)
    assert found.rows == []  # and leaves nothing behind


def test_a_table_holds_all_rows_and_counts_them():
    found = findings.Findings()
    found.add("one", "slope", "≈ 1", 1.1, 0.1, "small", target=1, where="here")
    found.add("one", "sign", "> 0", -1.0, 0.1, "small", at_least=0)
    found.untested("two", "loss", "2.1", "too large")
    table = found.table()
    assert table["verdict"].tolist() == ["agrees", "differs", "not testable here"]
    assert table["here"].tolist() == ["1.100 ± 0.100", "-1.000 ± 0.100", "–"]
    assert table["value"].isna().tolist() == [False, False, True]
    counts = found.counts()
    assert list(counts.columns) == list(findings.VERDICTS)
    assert counts.loc["one"].tolist() == [1, 1, 0, 0, 0]
    assert counts.to_numpy().sum() == 3
    with pytest.raises(ValueError, match="by"):
        found.counts("chapter")


def test_no_rows_are_an_empty_table():
    empty = findings.Findings()
    assert empty.table().empty and empty.counts().empty
