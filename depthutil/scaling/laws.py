"""The laws, the runs that they are fitted to, and the law read forwards."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pandas as pd

from depthutil import _checks

#: The laws that :func:`fit` knows, by the quantities whose power laws they add.
LAWS = {
    "width-depth-data": ("width", "depth", "data"),
    "params-data": ("params", "data"),
    "depth-data": ("depth", "data"),
    "depth": ("depth",),
}


# --------------------------------------------------------------------- runs


def load_chinchilla() -> pd.DataFrame:
    """The 245 training runs of Hoffmann et al. (2022), as read from the literature.

    Returns
    -------
    pandas.DataFrame
        One row a run: ``width`` (hidden size), ``depth`` (layers), ``params``
        (parameters), ``tokens`` (training tokens) and ``loss`` (nats per token).
        Losses and sizes were read from Figure 4 of arXiv 2203.15556 by Besiroglu
        et al. (arXiv 2404.10102); shapes are from its Table A9.

    Examples
    --------
    >>> load_chinchilla().shape
    (245, 5)
    """
    with resources.files("depthutil").joinpath("data/chinchilla_runs.csv").open() as file:
        return pd.read_csv(file)


def drop_highest(runs: pd.DataFrame, count: int = 40) -> pd.DataFrame:
    """Keep the runs whose loss is below the ``count``-th largest.

    Runs that tie with the ``count``-th largest go too. Of the Chinchilla runs, the
    default leaves out 42, because three share the 40th largest loss, and keeps the
    203 that Liu et al. (arXiv 2602.05970, appendix B) fitted.

    Examples
    --------
    >>> len(drop_highest(load_chinchilla(), 40))
    203
    """
    _checks.columns(runs, ("loss",))
    if not 0 <= count < len(runs):
        raise ValueError(
            f"count must be from 0 to {len(runs) - 1} for {len(runs)} runs, not {count}"
        )
    if count == 0:
        return runs.copy()
    return runs[runs["loss"] < runs["loss"].nlargest(count).iloc[-1]]


def column(quantity: str) -> str:
    return "tokens" if quantity == "data" else quantity


def names_of(law: str) -> list[str]:
    parts = LAWS[law]
    return [f"c_{part}" for part in parts] + [f"alpha_{part}" for part in parts] + ["L0"]


def law_of(params: pd.Series) -> str:
    for law in LAWS:
        if list(params.index) == names_of(law):
            return law
    raise ValueError(f"no law has the parameters {list(params.index)}; the laws are {list(LAWS)}")


def inputs_of(runs: pd.DataFrame, law: str, depth_offset: float) -> np.ndarray:
    """Logarithms of the law's inputs, (terms, runs), after checking them."""
    _checks.word(law, LAWS, "law")
    _checks.columns(runs, map(column, LAWS[law]))
    _checks.number(depth_offset, "depth_offset")
    if depth_offset and len(runs) and not depth_offset < runs["depth"].min():
        raise ValueError(
            f"depth_offset must be below the smallest depth, {runs['depth'].min()}, "
            f"not {depth_offset}"
        )
    shift = {"depth": depth_offset}
    columns = {part: _checks.real(runs[column(part)], part) for part in LAWS[law]}
    return np.log([column - shift.get(part, 0) for part, column in columns.items()])


def log_losses(runs: pd.DataFrame) -> np.ndarray:
    _checks.columns(runs, ("loss",))
    return np.log(_checks.real(runs["loss"], "loss"))


# ------------------------------------------------------------------ the law


def terms(params: pd.Series, runs: pd.DataFrame, *, depth_offset: float = 0) -> pd.DataFrame:
    """What each term of the law contributes to the loss of each run.

    Parameters
    ----------
    params : pandas.Series
        As ``ScalingFit.params``; its names say which law it is.
    runs : pandas.DataFrame
        Rows with the law's inputs (``width``, ``depth``, ``params``, ``tokens``).
    depth_offset : float
        Layers that do not count: the law is read at ``depth - depth_offset``.

    Returns
    -------
    pandas.DataFrame
        Nats per token, a column for each quantity of the law and one for ``L0``.

    Examples
    --------
    >>> law = pd.Series({"c_depth": 2.0, "alpha_depth": 1.0, "L0": 1.5})
    >>> terms(law, pd.DataFrame({"depth": [1, 2, 4]}))
       depth   L0
    0    2.0  1.5
    1    1.0  1.5
    2    0.5  1.5
    """
    law = law_of(params)
    absent = params.index[~np.isfinite(_checks.real(params, "params"))]
    if len(absent):
        raise ValueError(f"params hold no finite number for {absent[0]}: fit or fix it")
    x = inputs_of(runs, law, depth_offset)
    parts = {
        part: params[f"c_{part}"] * np.exp(-params[f"alpha_{part}"] * x[k])
        for k, part in enumerate(LAWS[law])
    }
    return pd.DataFrame(parts | {"L0": params["L0"]}, index=runs.index)


def predict(params: pd.Series, runs: pd.DataFrame, *, depth_offset: float = 0) -> pd.Series:
    """The law's loss for each run, in nats per token: the sum of :func:`terms`.

    Examples
    --------
    >>> law = pd.Series({"c_depth": 2.0, "alpha_depth": 1.0, "L0": 1.5})
    >>> predict(law, pd.DataFrame({"depth": [1, 2, 4]})).tolist()
    [3.5, 2.5, 2.0]
    """
    return terms(params, runs, depth_offset=depth_offset).sum(axis=1).rename("loss")
