"""Tables and settings that would give silent wrong numbers."""

import math

import numpy as np
import pandas as pd
import pytest

from depthutil import _checks, gram, powerlaw, regimes, scaling, signatures, toy

DEPTHS = [1, 2, 4, 8, 16]
RUNS = pd.DataFrame({"depth": DEPTHS, "loss": [1.5 + 2 / d for d in DEPTHS]})
LAW = scaling.fit(RUNS, law="depth").params


def changed(row, value, kind="Float64", column="loss"):
    runs = RUNS.astype({column: kind})
    runs.loc[row, column] = value
    return runs


def wider(depth=DEPTHS):
    grid = [(d, n, 1 + 2 / d + 30 / n) for d in depth for n in (10, 100, 1000, 10_000)]
    return pd.DataFrame(grid, columns=["depth", "tokens", "loss"])


BAD = {
    "missing": (lambda: scaling.fit(changed(2, pd.NA), "depth"), "'loss'.*is nan in row 2"),
    "missing input": (
        lambda: scaling.fit(changed(1, pd.NA, "Int64", "depth"), "depth"),
        "'depth'.*is nan in row 1",
    ),
    "complex": (
        lambda: scaling.fit(RUNS.assign(loss=RUNS["loss"] + 0j), "depth"),
        "real numbers, not complex128",
    ),
    "complex sets": (
        lambda: scaling.fit_many(RUNS, np.ones((2, 5)) * 1j, "depth"),
        "losses must be real numbers",
    ),
    "two depths": (
        lambda: scaling.fit(pd.concat([RUNS[:2]] * 3, ignore_index=True), "depth"),
        "2 different settings cannot determine 3 parameters",
    ),
    "two depths of many runs": (
        lambda: scaling.fit(wider([1, 2]), "depth-data"),
        "depth takes 2 values.*need 3 beside a floor.*fix c_depth or alpha_depth",
    ),
    "a parameter": (
        lambda: scaling.predict(LAW.where(LAW.index != "alpha_depth"), RUNS),
        "no finite number for alpha_depth",
    ),
    "a coefficient": (
        lambda: scaling.terms(LAW.where(LAW.index != "c_depth"), RUNS),
        "no finite number for c_depth",
    ),
    "level": (lambda: scaling.fit(RUNS, "depth").profile("L0", level=math.nan), "level is a"),
    "whole level": (lambda: scaling.fit(RUNS, "depth").profile("L0", level=1), "between 0 and 1"),
    "summary": (lambda: scaling.fit(RUNS, "depth").summary(level=95), "level is a number from 0"),
    "offset": (lambda: scaling.fit(RUNS, "depth", depth_offset=-math.inf), "depth_offset is a"),
    "offset nan": (lambda: scaling.predict(LAW, RUNS, depth_offset=math.nan), "depth_offset is a"),
    "one group": (
        lambda: scaling.fit(RUNS.assign(width=8), "depth").bootstrap(5, by=["width"]),
        "one group by .*'width'.*nothing to resample",
    ),
    "half a resample": (lambda: scaling.fit(RUNS, "depth").bootstrap(2.5), "n is a whole number"),
    "start": (
        lambda: scaling.adam_path(scaling.load_chinchilla(), 1, start={"alpha": 1}),
        "a name in start is 'c_width'.*not 'alpha'",
    ),
    "start at zero": (
        lambda: scaling.adam_path(scaling.load_chinchilla(), 1, start={"c_width": 0}),
        r"start\['c_width'\] is a number above 0, not 0",
    ),
    "rate": (
        lambda: scaling.adam_path(scaling.load_chinchilla(), 1, learning_rate=math.nan),
        "learning_rate is a number above 0",
    ),
    "negative error": (
        lambda: regimes.fit_exponent(DEPTHS, RUNS["loss"], [-1, 1, 1, 1, 1]),
        "stderr must be finite and above 0, but is -1 in row 0",
    ),
    "complex losses": (
        lambda: regimes.fit_exponent(DEPTHS, np.ones(5) * 1j),
        "real numbers, not complex128",
    ),
    "parts of folds": (lambda: regimes.learn_folds([1.7], depths=[1]), "folds is a whole number"),
    "parts of layers": (lambda: regimes.learn_folds(2, depths=[1.7]), "whole number.*1.7"),
    "decay": (lambda: toy.ToyConfig(decay="no"), "decay is True or False, not 'no'"),
    "decay 1": (lambda: toy.ToyConfig(decay=1), "decay is True or False, not 1"),
    "rate true": (lambda: toy.ToyConfig(learning_rate=True), "learning_rate is a number above"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_number_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_tables_of_nullable_types_that_are_whole_are_read():
    exact = scaling.fit(RUNS, "depth").params
    for kinds in ({"loss": "Float64", "depth": "Int64"}, {"loss": object}):
        assert scaling.fit(RUNS.astype(kinds), "depth").params.equals(exact)
    assert scaling.predict(LAW, RUNS.astype({"depth": "Int64"})).equals(scaling.predict(LAW, RUNS))


def test_two_depths_do_with_an_exponent_that_is_given():
    fit = scaling.fit(wider([1, 2]), "depth-data", fixed={"alpha_depth": 1.0})
    assert fit.params["c_depth"] == pytest.approx(2, rel=1e-3)
    two = scaling.fit(RUNS[:2], "depth", fixed={"L0": 1.5})
    assert two.params["alpha_depth"] == pytest.approx(1, rel=1e-6)


# Losses of a grid -----------------------------------------------------------------------


def grid(**changes):
    rows = [(t, 0.0, 1.0, d, 0, 100, (1 + t) / d) for t in (0, 1) for d in (2, 4, 8, 16)]
    frame = pd.DataFrame(rows, columns=[*toy.GRID, "step", "loss"])
    return frame.assign(**changes)


def test_losses_that_are_missing_are_no_power_law():
    frame = grid()
    frame.loc[frame["depth"].isin([8, 16]) & (frame["teacher"] == 1), "loss"] = np.nan
    with pytest.raises(
        ValueError, match=r"rho 0, temperature 1: loss is missing.*teacher 1, seed 0"
    ):
        toy.exponent(frame)
    with pytest.raises(ValueError, match=r"teacher 1, seed 0, depth 16 \(1 such of 8\)"):
        toy.exponent(grid()[:-1])
    rest = toy.exponent(frame.query("teacher == 0"))
    assert rest.iloc[0]["alpha"] == pytest.approx(1) and rest.iloc[0]["teachers"] == 1


def test_two_losses_of_one_student_are_not_averaged():
    twice = pd.concat([grid(), grid()])
    assert toy.exponent(twice).equals(toy.exponent(grid()))  # the same run, read twice
    other = pd.concat([grid(), grid().assign(loss=lambda t: 2 * t["loss"])])
    with pytest.raises(ValueError, match="two values at teacher 0, seed 0, depth 2: say which"):
        toy.exponent(other)


def test_nor_two_losses_of_one_seed_of_a_simulation():
    frame = pd.DataFrame({"depth": [2, 4, 8, 8], "seed": 0, "loss": [4.0, 2.0, 1.0, 1.1]})
    with pytest.raises(ValueError, match="two values at depth 8, seed 0"):
        regimes.fit_exponent(frame)
    assert regimes.fit_exponent(frame[:3]).exponent == pytest.approx(1)


# States ---------------------------------------------------------------------------------


def test_states_that_overflow_are_not_diagnosed():
    states = regimes.ensemble(16, seed=0).states
    large, usual = regimes.diagnose(states * 1e30), regimes.diagnose(states)
    assert large.regime == usual.regime == "ensemble"
    assert large.margin == pytest.approx(usual.margin)
    for size in (1e60, 1e200):
        with pytest.raises(ValueError, match=r"as large as .*e\+\d+,? (which )?overflow.*divide"):
            regimes.diagnose(states * size)


def test_inputs_that_are_no_numbers_are_not_dropped():
    grams = gram.of_states(regimes.ensemble(16, seed=0).states)
    grams[3, 2, 2] = grams[7, 0, 0] = np.nan
    with pytest.raises(ValueError, match=rf"input 3 .*\(2 such of {len(grams)}\): leave"):
        signatures.signature(gram_matrix=grams)


# Words and numbers ----------------------------------------------------------------------


def test_one_choice_is_said_without_or():
    with pytest.raises(ValueError, match=r"^a is 'b', not 'c'$"):
        _checks.word("c", ["b"], "a")


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", True, None, 1j, b"1", [1, 2]])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="a is a finite number, not"):
        _checks.number(value, "a")
    assert powerlaw.fit([1, 2, 4], [4, 2, 1]).exponent == pytest.approx(1)
