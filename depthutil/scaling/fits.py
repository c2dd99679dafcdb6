"""Fit a law exactly, and question the fit: intervals, resamples, held-out runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from depthutil import _checks
from depthutil.scaling import solver
from depthutil.scaling.laws import LAWS, column, inputs_of, log_losses, names_of, predict
from depthutil.scaling.solver import ALPHA_MAX


def level_of(level: float) -> float:
    """A confidence level, between 0 and 1."""
    if not 0 < _checks.number(level, "level", low=0, high=1) < 1:
        raise ValueError(f"level lies between 0 and 1, such as 0.95, and is not {level!r}")
    return float(level)


def _problem(
    x: np.ndarray, law: str, fixed: Mapping[str, float], huber_delta: float | None
) -> solver.Problem:
    values = np.array([float(fixed.get(name, np.nan)) for name in names_of(law)])
    centre = np.where(np.isnan(values[: len(x)]), x.mean(axis=1), 0.0)
    delta = np.inf if huber_delta is None else float(huber_delta)
    return solver.Problem(x - centre[:, None], centre, values, delta)


def check_fit(
    runs: pd.DataFrame,
    law: str,
    depth_offset: float,
    fixed: Mapping[str, float] | None,
    huber_delta: float | None,
) -> tuple[np.ndarray, dict]:
    x = inputs_of(runs, law, depth_offset)
    fixed = dict(fixed or {})
    for name, number in fixed.items():
        if name not in names_of(law):
            raise ValueError(f"fixed names {name!r}; law {law!r} has {names_of(law)}")
        _checks.number(number, f"fixed[{name!r}]", low=0)
        if name.startswith("alpha_") and number > ALPHA_MAX:
            raise ValueError(f"fixed[{name!r}] must be at most {ALPHA_MAX:g}, not {number}")
    if depth_offset and "depth" not in LAWS[law]:
        raise ValueError(f"law {law!r} has no depth, so depth_offset={depth_offset} has no meaning")
    if huber_delta is not None:  # for least squares
        _checks.number(huber_delta, "huber_delta", low=0, above=True)
    free = len(names_of(law)) - len(fixed)
    different = len(np.unique(x, axis=1).T)
    if min(len(runs), different) < max(free, 1):
        raise ValueError(
            f"{len(runs)} runs cannot determine {free} parameters: bring more runs, or fix some"
            if len(runs) < max(free, 1)
            else f"runs at {different} different settings cannot determine {free} parameters: "
            "bring others, or fix some"
        )
    for part, row in zip(LAWS[law], x, strict=True):
        if np.ptp(row) == 0 and not {f"c_{part}", f"alpha_{part}"} <= fixed.keys():
            raise ValueError(
                f"{column(part)} is {runs[column(part)].iloc[0]} in every run, so its term "
                f"cannot be told from L0: vary it, choose a law without it, or fix "
                f"c_{part} and alpha_{part}"
            )
        needed = 1 + len({f"c_{part}", f"alpha_{part}"} - fixed.keys()) - ("L0" in fixed)
        if len(np.unique(row)) < needed:
            raise ValueError(
                f"{column(part)} takes {len(np.unique(row))} values, and its coefficient and "
                f"exponent need {needed} beside a floor: bring others, or fix c_{part} or "
                f"alpha_{part}"
            )
    return x, fixed


def fit(
    runs: pd.DataFrame,
    law: str = "width-depth-data",
    *,
    depth_offset: float = 0,
    fixed: Mapping[str, float] | None = None,
    huber_delta: float | None = None,
) -> ScalingFit:
    """Fit a law to training runs: the exact minimum of the log-loss objective.

    The search starts from the best of a grid of exponents and polishes each start
    with a damped Newton method on analytic derivatives; it is deterministic.

    Parameters
    ----------
    runs : pandas.DataFrame
        One row a run: ``loss`` in nats per token and the law's inputs, ``width``,
        ``depth``, ``params``, ``tokens``.
    law : {"width-depth-data", "params-data", "depth-data", "depth"}
        Which power laws are added.
    depth_offset : float
        Fit ``depth - depth_offset`` in place of ``depth``.
    fixed : dict of str to float, optional
        Parameters held at a value, such as ``{"alpha_depth": 1.0}``.
    huber_delta : float, optional
        Errors larger than this (in log loss) count linearly, not squared.

    Returns
    -------
    ScalingFit

    Raises
    ------
    ValueError, TypeError
        If the runs cannot determine the law, in a sentence that says why.

    Examples
    --------
    >>> runs = pd.DataFrame({"depth": [1, 2, 4, 8, 16]})
    >>> runs["loss"] = 1.5 + 2.0 / runs["depth"]
    >>> fit(runs, law="depth").params.round(4).to_dict()
    {'c_depth': 2.0, 'alpha_depth': 1.0, 'L0': 1.5}
    """
    x, fixed = check_fit(runs, law, depth_offset, fixed, huber_delta)
    problem, y = _problem(x, law, fixed, huber_delta), log_losses(runs)
    theta, value = solver.search_wide(problem, y)
    names = names_of(law)
    return ScalingFit(
        law=law,
        runs=runs,
        params=pd.Series(solver.natural(problem, theta), index=names, name="estimate"),
        cov=pd.DataFrame(solver.covariance(problem, theta, y), index=names, columns=names),
        objective=100 * value / len(y),
        depth_offset=depth_offset,
        fixed=fixed,
        huber_delta=huber_delta,
    )


def fit_many(
    runs: pd.DataFrame,
    losses: np.ndarray,
    law: str = "width-depth-data",
    *,
    depth_offset: float = 0,
    fixed: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Fit the same law to many sets of losses at the same runs, all at once.

    Parameters
    ----------
    runs : pandas.DataFrame
        The inputs; a ``loss`` column is ignored.
    losses : numpy.ndarray
        Shape (sets, runs), nats per token.
    law, depth_offset, fixed
        As in :func:`fit`.

    Returns
    -------
    pandas.DataFrame
        One row a set: the law's parameters, and ``objective`` as in :class:`ScalingFit`.

    Examples
    --------
    >>> runs = pd.DataFrame({"depth": [1, 2, 4, 8, 16]})
    >>> losses = 1.5 + np.array([[2.0], [3.0]]) / runs["depth"].to_numpy()
    >>> fit_many(runs, losses, law="depth")["c_depth"].round(4).tolist()
    [2.0, 3.0]
    """
    x, fixed = check_fit(runs, law, depth_offset, fixed, None)
    losses = _checks.real(losses, "losses")
    if losses.ndim != 2 or losses.shape[1] != len(runs):
        raise ValueError(f"losses must have shape (sets, {len(runs)}), not {losses.shape}")
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise ValueError("losses must all be finite and above 0")
    problem = _problem(x, law, fixed, None)
    theta, value = solver.search(problem, np.log(losses), np.ones(losses.shape), starts=3)
    table = pd.DataFrame(solver.natural(problem, theta), columns=names_of(law))
    return table.assign(objective=100 * value / len(runs))


@dataclass(frozen=True, eq=False)
class Profile:
    """How much worse the law fits when one parameter is held at each value.

    Attributes
    ----------
    name : str
        The parameter.
    table : pandas.DataFrame
        ``value``, ``objective`` of the best fit with the parameter there, and
        ``deviance``, twice the drop of the log likelihood from its maximum.
    interval : (float, float)
        Where the deviance stays below ``threshold``; 0 or ``inf`` where it never rises to it.
    level, threshold : float
        Confidence level and the chi-squared quantile it stands for.
    """

    name: str
    table: pd.DataFrame
    interval: tuple[float, float]
    level: float
    threshold: float

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Draw the deviance, its threshold and the interval.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            A new one by default.
        **style
            Passed to :meth:`matplotlib.axes.Axes.plot`, for the curve.

        Returns
        -------
        matplotlib.axes.Axes

        Examples
        --------
        >>> from depthutil.scaling import load_chinchilla
        >>> law = fit(load_chinchilla(), law="params-data")
        >>> law.profile("alpha_params", points=5).plot().get_ylabel()
        'deviance (misfit)'
        """
        import matplotlib.pyplot as plt

        from depthutil import figures

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(self.table["value"], self.table["deviance"], **{"color": figures.INK} | style)
        ax.axhline(self.threshold, color=figures.MUTED, ls="--", lw=1.1)
        low, high = self.interval
        high = min(high, self.table["value"].max())  # where there is an end
        ax.axvspan(low, high, color=figures.COLORS["blue"], alpha=0.12, lw=0)
        ax.set(xlabel=self.name, ylabel="deviance (misfit)")
        return ax


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """A fitted law, with what is needed to doubt it.

    Attributes
    ----------
    law : str
        Its name, a key of ``LAWS``.
    runs : pandas.DataFrame
        The runs that were fitted.
    params : pandas.Series
        Estimates: ``c_width, c_depth, c_data, alpha_width, alpha_depth, alpha_data, L0`` for
        ``"width-depth-data"``; ``c_params, c_data, alpha_params, alpha_data, L0`` for
        ``"params-data"``.
    cov : pandas.DataFrame
        Their covariance from the curvature at the minimum; 0 for fixed parameters, NaN for
        those at an edge (a coefficient or floor of 0, an exponent of 0 or ``ALPHA_MAX``).
    objective : float
        100 × the mean squared log residual; with ``huber_delta`` d, a residual r beyond d
        counts as ``2 d |r| - d**2`` in place of ``r**2``.
    depth_offset, fixed, huber_delta
        As given to :func:`fit`.
    """

    law: str
    runs: pd.DataFrame = field(repr=False)
    params: pd.Series
    cov: pd.DataFrame = field(repr=False)
    objective: float
    depth_offset: float = 0
    fixed: Mapping[str, float] = field(default_factory=dict)
    huber_delta: float | None = None

    @property
    def stderr(self) -> pd.Series:
        """Standard errors of ``params``: square roots of the diagonal of ``cov``."""
        diagonal = np.diag(self.cov)
        return pd.Series(np.sqrt(diagonal), index=self.params.index, name="stderr")

    @property
    def correlation(self) -> pd.DataFrame:
        """Correlation of the estimates of the free parameters."""
        free = [name for name in self.params.index if name not in self.fixed]
        error = self.stderr[free].to_numpy()
        return self.cov.loc[free, free] / np.outer(error, error)

    @property
    def n_free(self) -> int:
        """Number of parameters that were fitted."""
        return len(self.params) - len(self.fixed)

    @property
    def log_likelihood(self) -> float:
        """At the maximum, for normal log residuals of unknown variance."""
        if self.huber_delta is not None:
            raise ValueError("a Huber fit has no normal likelihood: fit with huber_delta=None")
        n = len(self.runs)
        variance = max(self.objective / 100, 1e-300)
        return -0.5 * n * (np.log(2 * np.pi * variance) + 1)

    @property
    def aic(self) -> float:
        """Akaike's criterion; the variance counts as a parameter."""
        return 2 * (self.n_free + 1) - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """Schwarz's criterion; the variance counts as a parameter."""
        return np.log(len(self.runs)) * (self.n_free + 1) - 2 * self.log_likelihood

    def predict(self, runs: pd.DataFrame | None = None) -> pd.Series:
        """The law's loss for ``runs`` (by default, those fitted), in nats per token."""
        runs = self.runs if runs is None else runs
        return predict(self.params, runs, depth_offset=self.depth_offset)

    def residuals(self) -> pd.Series:
        """Log of observed over predicted loss: near 0, the relative error."""
        residuals = log_losses(self.runs) - np.log(self.predict().to_numpy())
        return pd.Series(residuals, index=self.runs.index, name="residual")

    def refit(self, runs: pd.DataFrame | None = None, **changes: Any) -> ScalingFit:
        """The same law and options on other ``runs``, or with some options changed.

        Examples
        --------
        >>> from depthutil.scaling import drop_highest, load_chinchilla
        >>> exact = fit(drop_highest(load_chinchilla()))
        >>> bool(exact.refit(fixed={"alpha_depth": 1.0}).objective > exact.objective)
        True
        """
        options: dict[str, Any] = {
            "law": self.law,
            "depth_offset": self.depth_offset,
            "fixed": self.fixed,
            "huber_delta": self.huber_delta,
        }
        return fit(self.runs if runs is None else runs, **options | changes)

    def summary(self, level: float = 0.95) -> str:
        """A regression table, as text to print.

        Examples
        --------
        >>> from depthutil.scaling import drop_highest, load_chinchilla
        >>> print(fit(drop_highest(load_chinchilla()), law="params-data").summary())
        L = c_params/params^alpha_params + c_data/tokens^alpha_data + L0
        203 runs, 5 free parameters, objective 0.0029343
        mean relative error 0.39 %, AIC -1530.5, BIC -1510.6
                      estimate   std. error        95 % interval
        c_params         880.2...
        """
        power = [f"c_{part}/{self._symbol(part)}^alpha_{part}" for part in LAWS[self.law]]
        error = np.abs(np.expm1(self.residuals())).mean()
        lines = [
            f"L = {' + '.join([*power, 'L0'])}",
            f"{len(self.runs)} runs, {self.n_free} free parameters, objective {self.objective:.7f}",
            f"mean relative error {100 * error:.2f} %"
            + (
                f", AIC {self.aic:.1f}, BIC {self.bic:.1f}"
                if self.huber_delta is None
                else f", Huber loss beyond {self.huber_delta:g}"
            ),
            f"{'':<12}{'estimate':>10}{'std. error':>13}{f'{100 * level:g} % interval':>21}",
        ]
        quantile = stats.t.ppf(0.5 + level_of(level) / 2, max(len(self.runs) - self.n_free, 1))
        for name, estimate in self.params.items():
            if name in self.fixed:
                lines.append(f"{name:<12}{estimate:>10.4g}{'fixed':>13}")
                continue
            error = self.stderr[name]
            low, high = estimate - quantile * error, estimate + quantile * error
            lines.append(f"{name:<12}{estimate:>10.4g}{error:>13.3g}{low:>12.4g}{high:>9.4g}")
        return "\n".join(lines)

    def _symbol(self, part: str) -> str:
        shifted = part == "depth" and self.depth_offset
        return f"(depth - {self.depth_offset:g})" if shifted else column(part)

    def _parts(self) -> tuple[solver.Problem, np.ndarray, np.ndarray]:
        x = inputs_of(self.runs, self.law, self.depth_offset)
        problem = _problem(x, self.law, self.fixed, self.huber_delta)
        y = log_losses(self.runs)
        return problem, y, solver.standard(problem, self.params.to_numpy())

    def _refit_weighted(self, weights: np.ndarray) -> pd.DataFrame:
        """Refit with (B, n) weights of the runs, from the optimum and one start more."""
        problem, y, warm = self._parts()
        theta, _ = solver.search(problem, y, weights.astype(float), starts=1, warm=warm)
        return pd.DataFrame(solver.natural(problem, theta), columns=self.params.index)

    def bootstrap(
        self, n: int = 200, seed: int = 0, *, by: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """Refit to resampled runs: the pairs bootstrap, every refit to its own minimum.

        Parameters
        ----------
        n : int
            Number of resamples.
        seed : int
            Of the resampling.
        by : sequence of str, optional
            Columns that say which runs belong together, such as ``["width", "depth"]``:
            whole groups are resampled, for errors that the runs of a group share.

        Returns
        -------
        pandas.DataFrame
            One row a resample, one column a parameter.

        Examples
        --------
        >>> from depthutil.scaling import drop_highest, load_chinchilla
        >>> draws = fit(drop_highest(load_chinchilla())).bootstrap(100)
        >>> low, high = draws["alpha_depth"].quantile([0.025, 0.975])
        >>> bool(0.8 < low < high < 2.0)
        True
        """
        n = _checks.count(n, "n")
        if by is None:
            return self._refit_weighted(resampled(len(self.runs), n, seed))
        _checks.columns(self.runs, by := list(by))
        group = self.runs.groupby(by).ngroup().to_numpy()
        if group.max() == 0:
            raise ValueError(f"all runs are of one group by {by}: there is nothing to resample")
        return self._refit_weighted(resampled(group.max() + 1, n, seed)[:, group])

    def profile(self, name: str, level: float = 0.95, points: int = 41) -> Profile:
        """Profile likelihood of one parameter, and its interval.

        Parameters
        ----------
        name : str
            A free parameter.
        level : float
            Confidence level of the interval.
        points : int
            Values in the table, over a range somewhat wider than the interval.

        Returns
        -------
        Profile

        Examples
        --------
        >>> from depthutil.scaling import drop_highest, load_chinchilla
        >>> alpha = fit(drop_highest(load_chinchilla())).profile("alpha_depth", points=5)
        >>> [round(end, 2) for end in alpha.interval]
        [0.94, 1.73]
        """
        if name not in self.params.index or name in self.fixed:
            free = [p for p in self.params.index if p not in self.fixed]
            raise ValueError(f"name must be a free parameter, one of {free}, not {name!r}")
        level = level_of(level)
        points = _checks.count(points, "points", low=2)
        best, threshold = self.params[name], float(stats.chi2.ppf(level, 1))
        limit = ALPHA_MAX if name.startswith("alpha_") else np.inf
        step = self.stderr[name] if np.isfinite(self.stderr[name]) else max(abs(best), 0.1)
        deviance = self._deviance(name)
        low = _crossing(deviance, best, -step, 0.0, threshold)
        high = _crossing(deviance, best, step, limit, threshold)
        ends = max(low, 0.0), high if np.isfinite(high) else min(best + 6 * step, limit)
        margin = 0.15 * (ends[1] - ends[0])
        values = np.linspace(max(ends[0] - margin, 0), min(ends[1] + margin, limit), points)
        rise = deviance(values)
        table = pd.DataFrame(
            {
                "value": values,
                "objective": self.objective * np.exp(rise / len(self.runs)),
                "deviance": rise,
            }
        )
        return Profile(name, table, (max(low, 0.0), high), level, threshold)

    def _deviance(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        """Twice the drop of the log likelihood with ``name`` held at each of some values."""
        if self.huber_delta is not None:
            raise ValueError("a Huber fit has no normal likelihood: fit with huber_delta=None")
        x, y = inputs_of(self.runs, self.law, self.depth_offset), log_losses(self.runs)
        index, n = self.params.index.get_loc(name), len(y)

        def held(value: float) -> solver.Problem:
            return _problem(x, self.law, dict(self.fixed) | {name: value}, None)

        def deviance(values: np.ndarray) -> np.ndarray:
            problem = held(values[0])
            warm = np.tile(solver.standard(problem, self.params.to_numpy()), (len(values), 1))
            warm[:, index] = values
            fresh = [solver.screen(held(value), y, np.ones(n), 1)[0, 0] for value in values]
            theta = np.concatenate([warm, fresh])
            error = solver.minimise(problem, theta, y, np.ones((1, n)))[1].reshape(2, -1).min(0)
            return n * np.log(np.maximum(error / n * 100 / self.objective, 1))

        return deviance

    def cross_validate(
        self, splits: int = 10, fraction: float = 0.2, seed: int = 0
    ) -> pd.DataFrame:
        """Fit to part of the runs, predict the rest, several times.

        The same seed splits the same runs alike, whichever the law.

        Parameters
        ----------
        splits : int
            Number of random splits.
        fraction : float
            Share of the runs held out.
        seed : int
            Of the splits.

        Returns
        -------
        pandas.DataFrame
            One row a split: ``train`` and ``held_out``, 100 × the mean squared log
            residual, and ``error``, the mean relative error of held-out runs.

        Examples
        --------
        >>> from depthutil.scaling import drop_highest, load_chinchilla
        >>> fit(drop_highest(load_chinchilla())).cross_validate().shape
        (10, 3)
        """
        size = len(self.runs)
        held = round(_checks.number(fraction, "fraction", low=0, high=1) * size)
        splits = _checks.count(splits, "splits", low=0)
        if splits < 1 or held < 1 or size - held < self.n_free:
            raise ValueError(
                f"cannot hold out {fraction:g} of {size} runs, {splits} times, and fit "
                f"{self.n_free} parameters to the rest"
            )
        rng = np.random.default_rng(seed)
        out = np.array([rng.permutation(size) < held for _ in range(splits)])
        params = self._refit_weighted(~out)
        y = log_losses(self.runs)
        rows = []
        for mask, (_, law) in zip(out, params.iterrows(), strict=True):
            r = np.log(predict(law, self.runs, depth_offset=self.depth_offset).to_numpy()) - y
            rows.append(
                {
                    "train": 100 * (r[~mask] ** 2).mean(),
                    "held_out": 100 * (r[mask] ** 2).mean(),
                    "error": np.abs(np.expm1(r[mask])).mean(),
                }
            )
        return pd.DataFrame(rows).rename_axis("split")


def resampled(size: int, n: int, seed: int) -> np.ndarray:
    """How often each run is in each resample, (n, size)."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n)


def _crossing(
    deviance: Callable[[np.ndarray], np.ndarray],
    best: float,
    step: float,
    limit: float,
    threshold: float,
) -> float:
    """Where the deviance rises through the threshold on one side; infinite if it never does."""
    values = best + step * 1.4 ** np.arange(-2, 14)
    values = np.r_[best, np.clip(values, min(limit, best), max(limit, best))]
    for _ in range(5):
        rise = deviance(values)
        above = np.flatnonzero(rise > threshold)
        if not len(above):
            return float(np.copysign(np.inf, step))
        values = np.linspace(values[above[0] - 1], values[above[0]], 12)
    return float(values.mean())
