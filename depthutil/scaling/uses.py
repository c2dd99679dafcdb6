"""What fits are for: to compare laws, to shape a model, to see what an optimiser makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from depthutil import _checks
from depthutil.scaling.fits import ScalingFit, check_fit, level_of
from depthutil.scaling.laws import (
    LAWS,
    column,
    law_of,
    log_losses,
    names_of,
)


def compare(fits: Mapping[str, ScalingFit], **cross_validation: Any) -> pd.DataFrame:
    """Laws fitted to the same losses, side by side.

    Parameters
    ----------
    fits : dict of str to ScalingFit
        A name for each.
    **cross_validation
        ``splits``, ``fraction`` and ``seed`` for :meth:`ScalingFit.cross_validate`.

    Returns
    -------
    pandas.DataFrame
        One row a fit: free ``parameters``, ``objective``, ``AIC`` and ``BIC`` as
        differences from the lowest, and mean ``held-out objective`` and ``held-out error``.

    Examples
    --------
    >>> from depthutil.scaling import drop_highest, fit, load_chinchilla
    >>> runs = drop_highest(load_chinchilla())
    >>> fits = {law: fit(runs, law) for law in ("width-depth-data", "params-data")}
    >>> compare(fits)["AIC"].round(1)
    width-depth-data    10.3
    params-data          0.0
    Name: AIC, dtype: float64
    """
    if not fits:
        raise ValueError("compare needs at least one fit")
    first = next(iter(fits.values()))
    for name, other in fits.items():
        if not first.runs["loss"].equals(other.runs["loss"]):
            raise ValueError(f"fit {name!r} is to other runs than the first: fit the same runs")
    held = {name: one.cross_validate(**cross_validation).mean() for name, one in fits.items()}
    table = pd.DataFrame(
        {
            "parameters": {name: one.n_free for name, one in fits.items()},
            "objective": {name: one.objective for name, one in fits.items()},
            "AIC": {name: one.aic for name, one in fits.items()},
            "BIC": {name: one.bic for name, one in fits.items()},
            "held-out objective": {name: mean["held_out"] for name, mean in held.items()},
            "held-out error": {name: mean["error"] for name, mean in held.items()},
        }
    )
    table[["AIC", "BIC"]] -= table[["AIC", "BIC"]].min()
    return table


def optimal_shape(
    law: ScalingFit | pd.Series,
    n_params: Iterable[float],
    *,
    draws: pd.DataFrame | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Width and depth that minimise the law at ``12 width**2 depth`` parameters.

    Setting the derivative to 0 along ``depth = N / (12 width**2)`` gives
    ``width**(a + 2 b) = a c_width / (2 b c_depth) (N / 12)**b``, with a and b the
    exponents of width and depth (the law of Liu et al., arXiv 2602.05970).

    Parameters
    ----------
    law : ScalingFit or pandas.Series
        Of the law ``"width-depth-data"``, without ``depth_offset``.
    n_params : sequence of float
        Numbers of parameters N, without embeddings.
    draws : pandas.DataFrame, optional
        As from :meth:`ScalingFit.bootstrap`: adds an interval to each column.
    level : float
        Its confidence level.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``n_params``: ``width``, ``depth`` and ``loss`` (the sum of the width
        and depth terms, nats), with ``_low`` and ``_high`` if ``draws`` were given.

    Examples
    --------
    >>> from depthutil.scaling import fit, load_chinchilla
    >>> law = pd.Series([300, 6, 500, 1, 1, 0.3, 1.75], index=fit(load_chinchilla()).params.index)
    >>> shape = optimal_shape(law, [1e8, 1e9])
    >>> (shape["width"] / shape["depth"]).round(3).tolist()
    [25.0, 25.0]
    """
    if isinstance(law, ScalingFit):
        if law.depth_offset:
            raise ValueError(f"optimal_shape needs depth_offset=0, not {law.depth_offset}")
        law = law.params
    if law_of(law) != "width-depth-data":
        raise ValueError(f"optimal_shape needs the law 'width-depth-data', not {law_of(law)!r}")
    n, level = _checks.positive(list(n_params), "n_params"), level_of(level)

    def shape(p: Mapping[str, float]) -> pd.DataFrame:
        cw, cd, a, b = (p[k] for k in ("c_width", "c_depth", "alpha_width", "alpha_depth"))
        if not min(cw, cd, a, b) > 0:  # one of the terms is absent: no optimum between them
            return pd.DataFrame({"width": np.nan, "depth": np.nan, "loss": np.nan}, index=n)
        width = np.exp((np.log(a * cw / (2 * b * cd)) + b * np.log(n / 12)) / (a + 2 * b))
        depth = n / (12 * width**2)
        table = {"width": width, "depth": depth, "loss": cw / width**a + cd / depth**b}
        return pd.DataFrame(table, index=n)

    best = shape(law).rename_axis("n_params")
    if draws is None:
        return best
    cloud = np.stack([shape(row).to_numpy() for _, row in draws.iterrows()])
    for tail, quantile in (("low", 0.5 - level / 2), ("high", 0.5 + level / 2)):
        best[[f"{c}_{tail}" for c in ("width", "depth", "loss")]] = np.nanquantile(
            cloud, quantile, axis=0
        )
    return best


#: Start, step sizes and units of the code of Liu et al. (arXiv 2602.05970), for
#: :func:`adam_path`.
PUBLISHED = {
    "start": {
        "c_width": 200.0,
        "c_depth": 200.0,
        "c_data": 10.0,
        "alpha_width": 1.0,
        "alpha_depth": 1.0,
        "alpha_data": 0.33,
        "L0": 1.69,
    },
    "learning_rate": {"c": 0.005, "alpha": 0.0005, "L0": 0.005},
    "units": {"depth": 0.01, "tokens": 1e6},
}


def adam_path(
    runs: pd.DataFrame,
    steps: int = 10_000,
    *,
    learning_rate: float | Mapping[str, float] = 3e-3,
    start: Mapping[str, float] | None = None,
    units: Mapping[str, float] | None = None,
    every: int = 100,
) -> pd.DataFrame:
    """The objective of :func:`fit`, by Adam: where it stands after so many steps.

    The law is ``"width-depth-data"``, in logarithms of the coefficients, exponents and
    ``L0``. Liu et al. (arXiv 2602.05970, appendix B) took 10,000 steps for each bootstrap refit
    and 50,000 for the fit itself; start, rates and units of their code are ``PUBLISHED``.

    Parameters
    ----------
    runs : pandas.DataFrame
        As for :func:`fit`.
    steps : int
        Number of Adam steps (Kingma and Ba 2015, betas 0.9 and 0.999).
    learning_rate : float or dict
        Step size, constant; or one each for ``"c"`` (logarithms of coefficients), ``"alpha"`` and
        ``"L0"``.
    start : dict, optional
        Values that replace those of the default start: ``c_width`` = ``c_data`` = 400,
        ``c_depth`` = 4, exponents 1, ``L0`` 1.
    units : dict, optional
        What ``width``, ``depth`` and ``tokens`` are measured in, by default 1; coefficients, in
        ``start`` and in the answer, are for inputs in these units.
    every : int
        Steps between rows of the answer.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``step``: the parameters and ``objective`` (100 × mean squared log residual).

    Examples
    --------
    >>> from depthutil.scaling import drop_highest, load_chinchilla
    >>> path = adam_path(drop_highest(load_chinchilla()), 200)
    >>> path.index.tolist()
    [0, 100, 200]
    """
    law = "width-depth-data"
    x, _ = check_fit(runs, law, 0, None, None)
    y = log_losses(runs)
    steps, every = _checks.count(steps, "steps", low=0), _checks.count(every, "every")
    if not isinstance(learning_rate, Mapping):
        learning_rate = dict.fromkeys(("c", "alpha", "L0"), learning_rate)
    for name, value in learning_rate.items():
        _checks.word(name, ("c", "alpha", "L0"), "a name in learning_rate")
        _checks.number(value, "learning_rate", low=0, above=True)
    if set(learning_rate) != {"c", "alpha", "L0"}:
        raise ValueError(f"learning_rate names c, alpha and L0, not only {list(learning_rate)}")
    rates = np.array([learning_rate[group] for group in ["c"] * 3 + ["alpha"] * 3 + ["L0"]])
    for name, value in dict(units or {}).items():
        _checks.word(name, map(column, LAWS[law]), "a name in units")
        _checks.number(value, f"units[{name!r}]", low=0, above=True)
    x = x - np.log([[(units or {}).get(column(part), 1.0)] for part in LAWS[law]])
    for name, value in dict(start or {}).items():
        _checks.word(name, names_of(law), "a name in start")
        _checks.number(value, f"start[{name!r}]", low=0, above=name.startswith("c_"))
    first = {"c_width": 400, "c_depth": 4, "c_data": 400, "L0": 1} | dict(start or {})
    theta = np.array([first.get(name, 1.0) for name in names_of(law)], dtype=float)
    theta[:3] = np.log(theta[:3])
    mean, square = np.zeros(7), np.zeros(7)
    rows = {}
    for step in range(steps + 1):
        term = np.exp(theta[:3, None] - theta[3:6, None] * x)
        prediction = term.sum(0) + theta[6]
        r = np.log(prediction) - y
        if step % every == 0 or step == steps:
            rows[step] = [*np.exp(theta[:3]), *theta[3:], 100 * (r @ r) / len(r)]
        slope = 2 * r / prediction / len(r)
        gradient = np.concatenate([term @ slope, -(term * x) @ slope, [slope.sum()]])
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient**2 - square)
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        theta = theta - rates * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    columns = [*names_of(law), "objective"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("step")
