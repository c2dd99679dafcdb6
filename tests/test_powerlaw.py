import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from depthutil import powerlaw, regimes, toy

DEPTHS = np.array([6, 12, 24, 48])

DECLINES = {
    "power": (lambda d: 3 * d**-1.5, True),
    "threshold": (lambda d: np.where(d < 20, 1.0, 1e-3), False),
    "levels off": (lambda d: 1 / d + 0.1, False),
    "exponential": (lambda d: np.exp(-d / 10), False),
    "rises": (lambda d: d**0.5, False),
}


@pytest.mark.parametrize("name", DECLINES)
def test_one_verdict_by_every_door(name):
    """A toy grid, seeds of a simulation and a plain series are judged alike."""
    decline, verdict = DECLINES[name]
    losses = decline(DEPTHS.astype(float))
    assert powerlaw.fit(DEPTHS, losses).is_power_law is verdict
    assert powerlaw.fit(DEPTHS, losses[:, None] * [1.0, 2.0, 3.0]).is_power_law is verdict
    frame = pd.DataFrame(
        [
            (t, 0.0, 1.0, d, 0, 1, loss)
            for t in (0, 1)
            for d, loss in zip(DEPTHS, losses, strict=True)
        ],
        columns=[*toy.GRID, "step", "loss"],
    )
    row = toy.exponent(frame).iloc[0]
    assert row["power_law"] == verdict
    seeds = frame[["teacher", "depth", "loss"]].rename(columns={"teacher": "seed"})
    theirs = regimes.fit_exponent(seeds)
    assert row["alpha"] == pytest.approx(theirs.exponent, rel=1e-12)
    assert row["stderr"] == pytest.approx(theirs.stderr, abs=1e-12)
    assert row["residual"] == pytest.approx(theirs.scatter, abs=1e-12)
    assert row["drift"] == pytest.approx(theirs.drift, abs=1e-12)


def test_noise_excuses_drift_only_up_to_twice_its_error():
    x = np.log(DEPTHS)
    bend = 0.5 * (x - x.mean()) ** 2 / np.ptp(x)  # the local exponent falls by one in all
    noisy = powerlaw.fit(DEPTHS, np.exp(-x[:, None] + bend[:, None] * [0.0, 1.0]))
    assert noisy.drift == pytest.approx(-0.5) and noisy.drift_stderr == pytest.approx(0.5)
    assert noisy.is_power_law  # half ± half of an exponent of about one
    fair = powerlaw.fit(DEPTHS, np.exp(-x[:, None] + bend[:, None] * [0.3, 0.7]))
    assert fair.drift_stderr == pytest.approx(0.2) and not fair.is_power_law
    sure = powerlaw.fit(DEPTHS, np.exp(-x[:, None] + bend[:, None] * [0.45, 0.55]))
    assert sure.drift == pytest.approx(-0.5) and sure.drift_stderr == pytest.approx(0.05)
    assert not sure.is_power_law
    alone = powerlaw.fit(DEPTHS, np.exp(-x + 0.5 * bend))
    assert alone.drift == pytest.approx(-0.5) and math.isnan(alone.drift_stderr)
    assert not alone.is_power_law


def test_drift_is_positive_where_the_decline_grows_steeper():
    assert powerlaw.fit(DEPTHS, np.exp(-DEPTHS / 10)).drift > 0
    assert powerlaw.fit(DEPTHS, 1 / DEPTHS + 0.1).drift < 0


def test_a_single_series_has_the_error_of_a_line():
    noisy = np.exp(np.random.default_rng(1).normal(0, 0.05, 4)) / DEPTHS
    line = stats.linregress(np.log(DEPTHS), np.log(noisy))
    fit = powerlaw.fit(DEPTHS, noisy)
    assert fit.exponent == pytest.approx(-line.slope)
    assert fit.stderr == pytest.approx(line.stderr)
    assert fit.prefactor == pytest.approx(np.exp(line.intercept))


def test_given_errors_weigh_and_spread():
    random, errors = np.random.default_rng(2), np.array([0.001, 0.01, 0.02, 0.05])
    fits = [
        powerlaw.fit(DEPTHS, np.exp(random.normal(0, errors)) / DEPTHS, errors / DEPTHS)
        for _ in range(400)
    ]
    slopes, drifts = (np.array([getattr(f, n) for f in fits]) for n in ("exponent", "drift"))
    assert slopes.std() == pytest.approx(fits[0].stderr, rel=0.1)
    assert drifts.std() == pytest.approx(fits[0].drift_stderr, rel=0.1)
    assert abs(slopes.mean() - 1) < 4 * slopes.std() / 20


@pytest.mark.parametrize(
    "depths, losses, stderr, message",
    [
        ([1, 2, 3], [1, 1], None, "not of shape"),
        ([1, 2, 2], [1, 1, 1], None, "needs 3 different depths"),
        ([1, 2, 3], [1, 0, 1], None, "smallest loss is 0"),
        ([1, 2, 3], [1, math.nan, 1], None, "positive, finite"),
        ([1, 2, 3], [3, 2, 1], [1, -1, 1], "stderr must be finite and above 0, but is -1 in row 1"),
        ([1, 2, 3], [3, 2, 1], [1, 1], "stderr has shape"),
        ([1, 2, 3], [3, 2, 1j], None, "losses must be real numbers, not complex128"),
        ([1, 2, 3], np.ones((3, 2)), [1, 1, 1], "several seeds bring their own"),
    ],
)
def test_bad_input_is_named(depths, losses, stderr, message):
    with pytest.raises(ValueError, match=message):
        powerlaw.fit(depths, losses, stderr)
