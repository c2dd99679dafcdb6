"""The law of loss: the minimum is the minimum, and bad input is told so."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from depthutil import scaling
from depthutil.scaling import solver

NAMES = ["c_width", "c_depth", "c_data", "alpha_width", "alpha_depth", "alpha_data", "L0"]


@pytest.fixture(scope="module")
def runs():
    return scaling.drop_highest(scaling.load_chinchilla())


@pytest.fixture(scope="module")
def exact(runs):
    return scaling.fit(runs)


def design(n=60, seed=0):
    """Runs whose width, depth and tokens vary freely: every exponent is determined."""
    rng = np.random.default_rng(seed)
    width = np.exp(rng.uniform(np.log(64), np.log(4096), n)).round()
    depth = np.exp(rng.uniform(0, np.log(64), n)).round()
    tokens = np.exp(rng.uniform(np.log(1e8), np.log(1e12), n))
    return pd.DataFrame(
        {"width": width, "depth": depth, "params": 12 * width**2 * depth, "tokens": tokens}
    )


def with_losses(runs, params, noise=0.0, seed=0):
    error = noise * np.random.default_rng(seed).normal(size=len(runs))
    return runs.assign(loss=scaling.predict(params, runs) * np.exp(error))


def brute_force(runs, law, weights=None, starts=30, seed=0):
    """The lowest of many runs of scipy's least squares, written independently."""
    columns = {
        "width-depth-data": ["width", "depth", "tokens"],
        "params-data": ["params", "tokens"],
    }[law]
    z = np.log(runs[columns].to_numpy()).T
    z -= z.mean(1, keepdims=True)
    y, k = np.log(runs["loss"].to_numpy()), len(columns)
    root = np.ones(len(y)) if weights is None else np.sqrt(weights)

    def residual(theta):
        terms = theta[:k, None] * np.exp(-theta[k : 2 * k, None] * z)
        return root * (np.log(terms.sum(0) + theta[-1] + 1e-300) - y)

    rng, best = np.random.default_rng(seed), np.inf
    upper = np.r_[np.full(k, np.inf), np.full(k, scaling.ALPHA_MAX), np.inf]
    for _ in range(starts):
        start = np.r_[rng.uniform(0.05, 1, k), rng.uniform(0.1, 2, k), rng.uniform(0.5, 2)]
        found = optimize.least_squares(residual, start, bounds=(0, upper), x_scale=start)
        best = min(best, 2 * found.cost)
    return 100 * best / (len(y) if weights is None else weights.sum())


def test_data():
    runs = scaling.load_chinchilla()
    assert list(runs.columns) == ["width", "depth", "params", "tokens", "loss"]
    assert len(runs) == 245
    assert len(scaling.drop_highest(runs, 40)) == 203  # three tie at the 40th
    assert len(scaling.drop_highest(runs, 42)) == 203
    assert len(scaling.drop_highest(runs, 0)) == 245


def test_no_torch():
    code = "import sys, depthutil.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_known_minimum(exact):
    """The values of an independent Levenberg-Marquardt fit from nine starts."""
    assert list(exact.params.index) == list(exact.stderr.index) == NAMES
    assert exact.objective == pytest.approx(0.0030274, abs=5e-8)
    assert exact.params["alpha_width"] == pytest.approx(0.9455, abs=1e-4)
    assert exact.params["alpha_depth"] == pytest.approx(1.3251, abs=1e-4)
    assert exact.params["alpha_data"] == pytest.approx(0.2991, abs=1e-4)
    assert exact.params["L0"] == pytest.approx(1.7536, abs=1e-4)
    assert exact.stderr["alpha_depth"] == pytest.approx(0.287, abs=1e-3)


def test_law_in_parameters(runs):
    fit = scaling.fit(runs, "params-data")
    assert list(fit.params.index) == ["c_params", "c_data", "alpha_params", "alpha_data", "L0"]
    assert fit.objective == pytest.approx(0.0029343, abs=5e-8)


@pytest.mark.parametrize("law", ["width-depth-data", "params-data"])
@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_brute_force(law, seed):
    rng = np.random.default_rng(seed)
    runs = design(25, seed).assign(loss=np.exp(rng.normal(1, 0.3, 25)))  # no law at all
    assert scaling.fit(runs, law).objective <= brute_force(runs, law) * (1 + 1e-9)


def test_objective_is_what_the_docstring_says(exact):
    assert exact.objective == pytest.approx(100 * (exact.residuals() ** 2).mean(), rel=1e-10)
    assert exact.predict().index.equals(exact.runs.index)


def test_jacobian_and_curvature_match_finite_differences(runs, exact):
    problem, y, theta = exact._parts()
    w = np.random.default_rng(0).uniform(0.5, 2, (1, len(y)))
    theta = theta * np.linspace(0.9, 1.1, 7)

    def objective(t, delta=np.inf):
        changed = solver.Problem(problem.z, problem.centre, problem.fixed, delta)
        return solver.evaluate(changed, t[None], y, w)[-1][0] / 2

    def log_prediction(t):
        return np.log(solver.evaluate(problem, t[None], y, w)[2][0])

    state = solver.evaluate(problem, theta[None], y, w)
    slopes = solver.jacobian(problem, *state[:3])[0]
    numeric = optimize.approx_fprime(theta, log_prediction, 1e-7)
    np.testing.assert_allclose(slopes, numeric.T, atol=1e-6)

    for delta in (np.inf, 0.01):
        changed = solver.Problem(problem.z, problem.centre, problem.fixed, delta)

        def gradient(t, problem=changed):
            parts = solver.evaluate(problem, t[None], y, w)[:4]
            return solver.curvature(problem, *parts, w, np.array([True]))[0][0]

        parts = solver.evaluate(changed, theta[None], y, w)[:4]
        g, hessian, _ = solver.curvature(changed, *parts, w, np.array([True]))
        central = optimize.approx_fprime(theta, lambda t, d=delta: objective(t, d), 1e-7)
        np.testing.assert_allclose(g[0], central, rtol=1e-4, atol=1e-3)
        numeric = optimize.approx_fprime(theta, gradient, 1e-8)
        np.testing.assert_allclose(hessian[0], numeric, rtol=1e-3, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(*[st.floats(0.1, 1.0)] * 3),
    alphas=st.tuples(*[st.floats(0.2, 1.6)] * 3),
    floor=st.floats(0.5, 3.0),
)
def test_recovers_a_law_without_noise(sizes, alphas, floor):
    runs = design()
    centre = np.log(runs[["width", "depth", "tokens"]]).mean().to_numpy()
    coefficients = np.array(sizes) * np.exp(np.array(alphas) * centre)
    law = pd.Series([*coefficients, *alphas, floor], index=NAMES)
    fit = scaling.fit(with_losses(runs, law))
    np.testing.assert_allclose(fit.params, law, rtol=1e-3)
    assert fit.objective < 1e-12


@settings(max_examples=10, deadline=None)
@given(exponent=st.integers(-12, 12), seed=st.integers(0, 1000))
def test_invariant_to_units_of_data_and_order_of_rows(exponent, seed):
    runs = scaling.drop_highest(scaling.load_chinchilla())
    before = scaling.fit(runs)
    factor = 10.0**exponent
    changed = runs.assign(tokens=runs["tokens"] * factor).sample(frac=1, random_state=seed)
    after = scaling.fit(changed)
    expected = before.params.copy()
    expected["c_data"] *= factor ** before.params["alpha_data"]
    np.testing.assert_allclose(after.params, expected, rtol=1e-5)
    assert after.objective == pytest.approx(before.objective, rel=1e-10)
    scale_free = ["alpha_width", "alpha_depth", "alpha_data", "L0"]
    np.testing.assert_allclose(after.stderr[scale_free], before.stderr[scale_free], rtol=1e-4)


def test_recovery_with_noise_is_within_its_standard_errors():
    law = pd.Series([300.0, 2.0, 500.0, 1.0, 1.0, 0.3, 1.7], index=NAMES)
    runs = design(200)
    losses = np.stack([with_losses(runs, law, 0.005, seed)["loss"] for seed in range(200)])
    many = scaling.fit_many(runs, losses)
    error = scaling.fit(runs.assign(loss=losses[0])).stderr
    score = (many[NAMES] - law) / error
    # 200 draws: the mean of a score is known to 0.07, its standard deviation to 5 %.
    assert (score[NAMES[3:]].mean().abs() < 0.3).all()
    assert (score[NAMES[3:]].std().sub(1).abs() < 0.2).all()


def test_fit_many_is_fit_many_times(runs, exact):
    rng = np.random.default_rng(0)
    losses = exact.predict().to_numpy() * np.exp(0.0055 * rng.normal(size=(5, len(runs))))
    many = scaling.fit_many(runs, losses, fixed={"alpha_depth": 1.0})
    for row, loss in zip(many.itertuples(), losses, strict=True):
        one = scaling.fit(runs.assign(loss=loss), fixed={"alpha_depth": 1.0})
        assert row.objective == pytest.approx(one.objective, rel=1e-9)
        assert row.alpha_depth == 1.0


def test_each_bootstrap_draw_reaches_its_own_minimum(runs, exact):
    draws = exact.bootstrap(30, seed=3)
    weights = scaling.fits.resampled(len(runs), 30, 3)
    y = np.log(runs["loss"].to_numpy())
    for i in range(0, 30, 3):
        r = np.log(scaling.predict(draws.iloc[i], runs).to_numpy()) - y
        reached = 100 * (weights[i] * r**2).sum() / len(runs)
        best = brute_force(runs, "width-depth-data", weights[i], starts=4, seed=i)
        resampled = scaling.fit(runs.loc[np.repeat(runs.index, weights[i])])
        assert reached <= best * (1 + 1e-7)
        assert reached <= resampled.objective * (1 + 1e-7)


def test_bootstrap_interval_and_seed(exact):
    draws = exact.bootstrap(200, seed=0)
    pd.testing.assert_frame_equal(draws, exact.bootstrap(200, seed=0))
    low, high = draws["alpha_depth"].quantile([0.025, 0.975])
    # About 0.93 to 1.79 by another implementation: ends move by 0.05 between seeds.
    assert (low, high) == (pytest.approx(0.93, abs=0.15), pytest.approx(1.79, abs=0.15))


def test_bootstrap_by_group_resamples_whole_shapes(runs, exact):
    alone = exact.bootstrap(5, by=runs.columns)  # every run its own group
    assert (alone["alpha_depth"] > 0).all()
    shapes = exact.bootstrap(200, by=["width", "depth"])["alpha_depth"]
    # Runs of one shape share part of their error, so shapes vary more than runs.
    assert shapes.std() > exact.bootstrap(200)["alpha_depth"].std()
    with pytest.raises(ValueError, match="need a column 'family'"):
        exact.bootstrap(5, by=["family"])


def test_fixed_parameters(runs, exact):
    for name in NAMES:
        value = 0.98 * exact.params[name]
        held = exact.refit(fixed={name: value})
        assert held.params[name] == value
        assert held.stderr[name] == 0 and held.n_free == 6
        assert held.objective > exact.objective
        again = exact.refit(fixed={name: exact.params[name]})
        assert again.objective == pytest.approx(exact.objective, rel=1e-9)


def test_everything_fixed_predicts_only(runs, exact):
    held = exact.refit(fixed=exact.params.to_dict())
    assert held.objective == pytest.approx(exact.objective, rel=1e-12)


def test_profile(runs, exact):
    profile = exact.profile("alpha_depth", points=9)
    for end in profile.interval:
        held = exact.refit(fixed={"alpha_depth": end})
        deviance = 2 * (exact.log_likelihood - held.log_likelihood)
        assert deviance == pytest.approx(profile.threshold, abs=1e-3)
    for row in profile.table.itertuples():
        held = exact.refit(fixed={"alpha_depth": row.value})
        assert held.objective == pytest.approx(row.objective, rel=1e-8)
    coefficient = exact.profile("c_data", points=3)
    low, high = coefficient.interval
    assert low < exact.params["c_data"] < high
    held = exact.refit(fixed={"c_data": high})
    deviance = 2 * (exact.log_likelihood - held.log_likelihood)
    assert deviance == pytest.approx(coefficient.threshold, abs=1e-3)


def test_profile_is_open_where_the_data_say_nothing():
    law = pd.Series([0.2, 1.0, 1.7], index=["c_depth", "alpha_depth", "L0"])
    runs = pd.DataFrame({"depth": [16, 18, 20, 22, 24, 26]})
    profile = scaling.fit(with_losses(runs, law, 0.01), law="depth").profile(
        "alpha_depth", points=5
    )
    assert profile.interval[0] == 0 and np.isinf(profile.interval[1])


def test_depth_offset(runs):
    shifted = scaling.fit(runs, depth_offset=2)
    by_hand = scaling.fit(runs.assign(depth=runs["depth"] - 2))
    pd.testing.assert_series_equal(shifted.params, by_hand.params)
    pd.testing.assert_series_equal(shifted.predict(), by_hand.predict())


def test_huber_matches_scipy_and_shrugs_off_outliers():
    law = pd.Series([300.0, 2.0, 500.0, 1.0, 1.0, 0.3, 1.7], index=NAMES)
    runs = with_losses(design(100), law, 0.003)
    spoilt = runs.assign(loss=runs["loss"].where(np.arange(100) >= 8, runs["loss"] * 1.4))
    robust, plain = scaling.fit(spoilt, huber_delta=0.003), scaling.fit(spoilt)
    error = (robust.params - law).abs()["alpha_depth"]
    assert error < 0.2 * (plain.params - law).abs()["alpha_depth"]

    problem, y, theta = robust._parts()

    def residual(t):
        return solver.evaluate(problem, t[None], y, np.ones((1, 100)))[3][0]

    found = optimize.least_squares(
        residual, theta, loss="huber", f_scale=0.003, x_scale=theta, xtol=1e-15, ftol=1e-15
    )
    assert robust.objective <= 100 * 2 * found.cost / 100 * (1 + 1e-9)
    far = scaling.fit(runs, huber_delta=10.0)
    assert far.objective == pytest.approx(scaling.fit(runs).objective, rel=1e-9)


def test_a_term_that_is_not_there_ends_at_the_edge():
    law = pd.Series([300.0, 0.0, 500.0, 1.0, 1.0, 0.3, 1.7], index=NAMES)
    runs = with_losses(design(80), law, 0.004, seed=5)
    fit = scaling.fit(runs)
    assert fit.params["c_depth"] >= 0
    assert fit.objective <= brute_force(runs, "width-depth-data", starts=10) * (1 + 1e-9)
    fit.summary()


def test_compare_and_cross_validation(runs, exact):
    ordinary = scaling.fit(runs, "params-data")
    table = scaling.compare({"shape": exact, "size": ordinary})
    assert table.loc["size", "AIC"] == 0
    assert table.loc["shape", "AIC"] == pytest.approx(10.3, abs=0.1)
    splits = exact.cross_validate(10, 0.2, seed=1)
    assert len(splits) == 10
    mask = np.random.default_rng(1).permutation(len(runs)) < 41
    one = scaling.fit(runs[~mask])
    assert splits["train"].iloc[0] == pytest.approx(one.objective, rel=1e-9)
    r = np.log(runs["loss"] / one.predict(runs))[mask]
    assert splits["held_out"].iloc[0] == pytest.approx(100 * (r**2).mean(), rel=1e-5)
    with pytest.raises(ValueError, match="other runs"):
        scaling.compare({"a": exact, "b": scaling.fit(runs.iloc[:150])})


def test_optimal_shape_is_the_minimum(exact):
    for n in (1e8, 1e10):
        p = exact.params
        best = scaling.optimal_shape(exact, [n]).iloc[0]
        width = best["width"] * np.linspace(0.5, 2, 2001)
        depth = n / (12 * width**2)
        loss = p["c_width"] / width ** p["alpha_width"] + p["c_depth"] / depth ** p["alpha_depth"]
        assert best["loss"] <= loss.min() and loss.argmin() == pytest.approx(667, abs=1)
    inverse = pd.Series([300, 6, 500, 1, 1, 0.3, 1.75], index=NAMES)
    shape = scaling.optimal_shape(inverse, [1e8, 1e9])
    assert shape["loss"].iloc[0] / shape["loss"].iloc[1] == pytest.approx(10 ** (1 / 3))
    band = scaling.optimal_shape(exact, [1e9], draws=exact.bootstrap(50)).iloc[0]
    assert band["width_low"] < band["width"] < band["width_high"]


def test_adam_is_still_on_its_way(runs, exact):
    path = scaling.adam_path(runs, 3000, every=1000)
    assert path["objective"].is_monotonic_decreasing
    assert path["objective"].iloc[-1] > exact.objective
    near = scaling.adam_path(runs, 2000, start=exact.params.to_dict(), learning_rate=1e-5)
    assert near["objective"].iloc[-1] == pytest.approx(exact.objective, rel=1e-4)


def test_summary_reads_like_a_regression_table(exact):
    text = exact.summary()
    assert "203 runs, 7 free parameters" in text
    assert all(name in text for name in NAMES)
    assert "fixed" in exact.refit(fixed={"alpha_depth": 1.0}).summary()
    assert "(depth - 2)" in exact.refit(depth_offset=2).summary()
    assert "Huber" in exact.refit(huber_delta=0.01).summary()


def edit(**columns):
    return lambda runs: runs.assign(**columns)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda r: r.drop(columns="depth"), {}, "need a column 'depth'"),
        (lambda r: r.drop(columns="loss"), {}, "need a column 'loss'"),
        (edit(loss=-1.0), {}, "'loss' must be finite and above 0, but is -1 in"),
        (edit(tokens=np.nan), {}, "'tokens' must be finite and above 0, but is nan"),
        (edit(width=np.inf), {}, "'width' must be finite"),
        (edit(width=0), {}, "'width' must be finite and above 0, but is 0"),
        (edit(width="wide"), {}, "'width' must be real numbers"),
        (edit(depth=12), {}, "depth is 12 in every run"),
        (lambda r: r.iloc[:6], {}, "6 runs cannot determine 7 parameters"),
        (lambda r: r.iloc[:0], {}, "0 runs cannot determine"),
        (lambda r: r, {"law": "kaplan"}, "law is 'width-depth-data'.* or 'depth', not"),
        (lambda r: r, {"fixed": {"alpha_deep": 1}}, "fixed names 'alpha_deep'"),
        (lambda r: r, {"fixed": {"alpha_depth": -1}}, "is a number of at least 0"),
        (lambda r: r, {"fixed": {"alpha_depth": 11}}, "at most 10"),
        (lambda r: r, {"depth_offset": 12}, "below the smallest depth, 12"),
        (lambda r: r, {"law": "params-data", "depth_offset": 2}, "has no depth"),
        (lambda r: r, {"huber_delta": 0}, "huber_delta is a number above 0"),
    ],
)
def test_bad_input(runs, change, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        scaling.fit(change(runs), **options)
    assert "\n" not in str(caught.value)


def test_other_bad_input(runs, exact):
    with pytest.raises(TypeError, match="pandas DataFrame, not list"):
        scaling.fit([1, 2])
    with pytest.raises(ValueError, match="count must be from 0 to"):
        scaling.drop_highest(runs, 500)
    with pytest.raises(ValueError, match="free parameter"):
        exact.profile("alpha_params")
    with pytest.raises(ValueError, match="n is a whole number of at least 1"):
        exact.bootstrap(0)
    with pytest.raises(ValueError, match="cannot hold out"):
        exact.cross_validate(fraction=0.99)
    with pytest.raises(ValueError, match="shape"):
        scaling.fit_many(runs, np.ones((3, 5)))
    with pytest.raises(ValueError, match="above 0"):
        scaling.fit_many(runs, np.zeros((3, len(runs))))
    with pytest.raises(ValueError, match="depth_offset=0"):
        scaling.optimal_shape(exact.refit(depth_offset=2), [1e9])
    with pytest.raises(ValueError, match="width-depth-data"):
        scaling.optimal_shape(exact.refit(law="params-data"), [1e9])
    with pytest.raises(ValueError, match="Huber"):
        _ = exact.refit(huber_delta=0.01).aic
    with pytest.raises(ValueError, match="no law has the parameters"):
        scaling.predict(pd.Series({"c": 1.0}), runs)


# Errors, computed another way -----------------------------------------------------------


def noisy_depths(outliers=0):
    rng = np.random.default_rng(3)
    depth = np.repeat([1, 2, 3, 4, 6, 8, 12, 16], 4)
    noise = rng.normal(0, 0.01, len(depth))
    noise[:outliers] += 0.2
    return pd.DataFrame({"depth": depth, "loss": (1.5 + 2 / depth) * np.exp(noise)})


@pytest.mark.parametrize("delta", [None, 0.01])
def test_covariance_is_that_of_an_m_estimate(delta):
    """E[ψ²] / E[ψ']² (GᵀG)⁻¹ with a numerical Jacobian; Huber, Robust Statistics, section 7.6."""
    runs = noisy_depths(outliers=4)
    fit = scaling.fit(runs, law="depth", huber_delta=delta)
    names, steps = fit.params.index, 1e-6 * fit.params
    columns = []
    for name in names:
        up, down = fit.params.copy(), fit.params.copy()
        up[name] += steps[name]
        down[name] -= steps[name]
        change = np.log(scaling.predict(up, runs) / scaling.predict(down, runs))
        columns.append(change / (2 * steps[name]))
    slopes = np.stack(columns, 1)
    r = fit.residuals().to_numpy()
    bound = np.inf if delta is None else delta
    psi, inside = np.clip(r, -bound, bound), np.abs(r) <= bound
    assert delta is None or 0 < (~inside).sum() < len(runs)
    variance = (psi**2).sum() / (len(runs) - 3) / inside.mean() ** 2
    expected = variance * np.linalg.inv(slopes.T @ slopes)
    assert np.allclose(fit.cov, expected, rtol=1e-4)


def test_intervals_have_the_degrees_of_freedom_that_are_left():
    runs = noisy_depths()[::4]  # eight runs, three parameters
    fit = scaling.fit(runs, law="depth")
    line = next(line for line in fit.summary().splitlines() if line.startswith("alpha_depth"))
    error, low, high = map(float, line.split()[2:])
    assert (high - low) / (2 * error) == pytest.approx(stats.t.ppf(0.975, 5), rel=0.02)
    assert error == pytest.approx(fit.stderr["alpha_depth"], rel=5e-3)
    held = scaling.fit(runs, law="depth", fixed={"alpha_depth": 1.0})
    gain = 2 * (fit.log_likelihood - held.log_likelihood)
    assert held.aic - fit.aic == pytest.approx(gain - 2)
    assert held.bic - fit.bic == pytest.approx(gain - np.log(8))


def test_the_published_path_is_walked(runs):
    path = scaling.adam_path(runs, 50_000, every=10_000, **scaling.PUBLISHED)
    assert path.loc[0, "alpha_depth"] == 1
    # Of the published code: 1.018 after 10,000 steps; 1.201, its estimate, after 50,000.
    assert path.loc[10_000, "alpha_depth"] == pytest.approx(1.018, abs=0.005)
    assert path.loc[50_000, "alpha_depth"] == pytest.approx(1.201, abs=0.01)


def test_units_change_the_path_and_not_the_law(runs):
    exact = scaling.fit(runs).params
    units = {"depth": 0.01, "tokens": 1e6}
    start = exact.to_dict()
    for part, column in {"depth": "depth", "data": "tokens"}.items():
        start[f"c_{part}"] /= units[column] ** exact[f"alpha_{part}"]
    own = scaling.adam_path(runs, 0, start=exact.to_dict())
    other = scaling.adam_path(runs, 0, start=start, units=units)
    assert own["objective"].iloc[0] == pytest.approx(other["objective"].iloc[0], rel=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": {"c": 1e-3}}, "names c, alpha and L0, not only"),
        ({"learning_rate": {"beta": 1e-3}}, "a name in learning_rate is 'c', 'alpha' or 'L0'"),
        ({"units": {"params": 2.0}}, "a name in units is 'width', 'depth' or 'tokens'"),
        ({"units": {"depth": 0}}, r"units\['depth'\] is a number above 0"),
    ],
)
def test_settings_of_adam_that_make_no_sense(runs, options, message):
    with pytest.raises(ValueError, match=message):
        scaling.adam_path(runs, 1, **options)
