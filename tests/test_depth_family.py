"""Families that differ in depth alone, against scipy and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import least_squares, minimize_scalar

from depthutil import ladder
from depthutil.scaling import DepthFamily

DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16])


def made(alpha=0.7, s=0.0, noise=0.0, floors=(1.0, 1.2), depths=DEPTHS):
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"seed": i, "depth": depths, "loss": a + 0.5 / (depths + s) ** alpha})
        for i, a in enumerate(floors)
    ]
    points = pd.concat(parts, ignore_index=True)
    points["loss"] += noise * rng.normal(size=len(points))
    return DepthFamily(
        points, points["loss"].to_numpy() + 0.01 * rng.normal(size=(50, len(points)))
    )


@pytest.mark.parametrize("s", [0.0, 0.8])
def test_the_law_that_made_the_losses_is_found(s):
    family = made(s=s)
    assert family.exponent(offset=s) == pytest.approx(0.7)
    assert np.abs(family.residuals(0.7, s)).max() < 1e-12
    assert family.coefficient(0.7, s) == pytest.approx(0.5)
    assert family.predict(32, 0.7, s) == pytest.approx(1.1 + 0.5 / (32 + s) ** 0.7)
    assert family.best_offset(0.7, np.arange(0, 2, 0.1))[0] == pytest.approx(s)


def test_the_fit_equals_one_with_all_parameters_free():
    family = made(noise=0.01)
    p, seed = family.points, family.points["seed"].to_numpy()

    def rest(theta):
        return theta[seed] + theta[2] * p["depth"] ** -theta[3] - p["loss"]

    free = least_squares(rest, [1, 1, 0.5, 0.7], xtol=1e-15, ftol=1e-15)
    q = family.squares()
    assert abs(family.exponents[q.argmin()] - free.x[3]) <= 0.011
    assert q.min() == pytest.approx(2 * free.cost, rel=5e-3) and q.min() >= 2 * free.cost
    held = least_squares(lambda t: rest(np.append(t, 1.0)), [1, 1, 0.5])
    assert q[np.argmin(abs(family.exponents - 1))] == pytest.approx(2 * held.cost)


def test_intervals_end_where_an_f_test_says():
    family = made(noise=0.01)
    best, low, high = family.interval()
    limit = 1 + stats.f.ppf(0.95, 1, 16 - 4) / 12

    def ratio(alpha):
        return (family.residuals(alpha) ** 2).sum() / q

    q = minimize_scalar(
        lambda a: (family.residuals(a) ** 2).sum(), bounds=(0.1, 2), method="bounded"
    ).fun
    assert low < best < high
    assert ratio(low) <= limit * 1.001 < ratio(low - 0.02) and ratio(high) <= limit * 1.001
    assert ratio(high + 0.02) > limit
    assert family.interval(level=0.5)[1] > low
    q_all, allowed = family.region([-0.5, 0.0, 1.0])
    assert q_all.shape == (3, len(family.exponents)) and allowed > q_all.min()
    assert q_all[1] == pytest.approx(family.squares())


def test_gains_have_no_floor_and_average_over_seeds():
    family = made()
    gains = family.gains()
    for depth in (1, 2, 3, 4, 6, 8):
        assert gains[depth] == pytest.approx(0.5 * (depth**-0.7 - (2 * depth) ** -0.7))
    assert list(gains.index) == [1, 2, 3, 4, 6, 8]
    chains = family.ratios([(1, 2, 4), (4, 8, 16), (8, 16, 32)])
    assert list(chains) == ["1 → 2 → 4", "4 → 8 → 16"]
    assert np.allclose(chains, 2**-0.7)
    assert family.gains(family.samples).shape == (50, 6)
    alone = family.where((family.points["seed"] == 0) | (family.points["depth"] > 1))
    assert alone.contrasts().loc[1].abs().sum() == 2 and alone.contrasts().loc[2].abs().sum() == 2


def test_errors_add_documents_and_noise():
    family = made()
    matrix = family.contrasts()
    of_texts = (family.samples @ matrix.T.to_numpy()).var(axis=0)
    expected = np.sqrt(of_texts + 0.1**2 * 2 / 2)  # two losses, two seeds
    assert np.allclose(family.gain_errors(0.1), expected)
    noisy = family.noisy(0.1, documents=False)
    assert noisy.shape == (50, 16) and noisy.std() > 0.09
    assert np.array_equal(family.noisy(0.0), family.samples)


def test_training_noise_is_what_two_seeds_leave_or_a_parabola():
    noise, free = made(noise=0.02).training_noise()
    assert free == 7 and 0.01 < noise < 0.04
    assert made().training_noise()[0] < 1e-12
    noise, free = made(noise=0.02, floors=(1.0,)).training_noise()
    assert free == 5 and 0.005 < noise < 0.05
    with pytest.raises(ValueError, match="3 depths of one seed do not show how noisy"):
        made(floors=(1.0,), depths=DEPTHS[:3]).training_noise()


def test_what_cannot_be_meant_is_said():
    points = made().points
    with pytest.raises(ValueError, match="points need the column 'seed'"):
        DepthFamily(points.drop(columns="seed"))
    with pytest.raises(ValueError, match="losses must all be finite"):
        DepthFamily(points.assign(loss=np.nan))
    with pytest.raises(ValueError, match=r"samples must be \(samples, 16 models\), not \(3, 2\)"):
        DepthFamily(points, np.ones((3, 2)))
    with pytest.raises(ValueError, match="this family has no samples"):
        DepthFamily(points).gain_errors(0.1)
    with pytest.raises(ValueError, match="an offset of -1 takes depth 1 to 0 or less"):
        made().squares(offset=-1.0)
    with pytest.raises(ValueError, match="3 models leave nothing to judge 1 floors and 2 more"):
        made(floors=(1.0,), depths=DEPTHS[:3]).interval()


def test_the_ladders_losses_are_those_of_its_curves():
    if not len(ladder.members()):
        pytest.skip("no ladder is here")
    family = ladder.losses(draws=20)
    last = ladder.curves().frame.sort_values("step").groupby(["seed", "depth"]).tail(1)
    last = last.set_index(["seed", "depth"])["held_out_loss"]
    ours = family.points.set_index(["seed", "depth"])["loss"]
    assert np.allclose(ours, last.loc[ours.index], atol=1e-6) and family.samples.shape[0] == 20
