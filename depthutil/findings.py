"""Findings of papers beside measurements of one's own, with verdicts that follow from numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from depthutil import _checks

#: In the order in which tables count them.
VERDICTS = ("agrees", "differs", "undecided", "not compared", "not testable here")


def verdict(
    here: float,
    error: float,
    *,
    target: float | None = None,
    target_error: float = 0.0,
    at_least: float | None = None,
    at_most: float | None = None,
) -> str:
    """Whether a measurement agrees with a value, or with a bound.

    Parameters
    ----------
    here, error : float
        What was measured, and its standard error.
    target, target_error : float, optional
        A value to agree with, to within two standard errors of the difference, and its error.
    at_least, at_most : float, optional
        Or a bound. It holds, or does not, if the measurement is two standard errors away
        from it.

    Returns
    -------
    str
        One of :data:`VERDICTS`: "agrees", "differs", "undecided" for a bound that is too near,
        or "not compared" if there is nothing to compare with.

    Raises
    ------
    ValueError
        If there is more than one thing to compare with, or a number that is none.

    Examples
    --------
    >>> verdict(1.1, 0.1, target=1)
    'agrees'
    >>> verdict(0.3, 0.1, at_most=0)
    'differs'
    >>> verdict(0.1, 0.1, at_least=0)
    'undecided'
    """
    some = {"target": target, "at_least": at_least, "at_most": at_most}
    given = {name: value for name, value in some.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join(given)}")
    for name, value in {"here": here, **given}.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is a number, not {value}")
    for name, value in {"error": error, "target_error": target_error}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is a number of at least 0, not {value}")
    if target is not None:
        return "agrees" if abs(here - target) <= 2 * math.hypot(error, target_error) else "differs"
    if not given:
        return "not compared"
    (bound,) = given.values()
    margin = here - bound if at_most is None else bound - here
    if abs(margin) <= 2 * error:
        return "undecided"
    return "agrees" if margin > 0 else "differs"


@dataclass
class Findings:
    """A table of findings that grows row by row.

    Examples
    --------
    >>> found = Findings()
    >>> found.add("Figure 1", "slope", "≈ 1", 1.1, 0.1, "demo", target=1)
    'agrees'
    >>> found.untested("Figure 2", "loss of a model of 12 billion", "2.1", "cannot be loaded here")
    >>> found.table()[["quantity", "verdict"]].to_numpy().tolist()
    [['slope', 'agrees'], ['loss of a model of 12 billion', 'not testable here']]
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        source: str,
        quantity: str,
        paper: str,
        here: float,
        error: float,
        scale: str,
        *,
        where: str = "",
        **compared: float,
    ) -> str:
        """One row, whose verdict :func:`verdict` gives.

        Parameters
        ----------
        source, quantity : str
            Which figure or paper, and what of it.
        paper : str
            What the paper says, "–" if nothing.
        here, error : float
            What was measured, and its standard error.
        scale : str
            On which models, and how much.
        where : str
            The chapter that shows it.
        **compared : float
            As :func:`verdict` takes it.

        Returns
        -------
        str
            The verdict.
        """
        said = verdict(here, error, **compared)
        found = {"here": f"{here:.3f} ± {error:.3f}", "value": float(here), "error": float(error)}
        about = {"source": source, "quantity": quantity, "paper": paper, **found}
        self.rows.append({**about, "verdict": said, "scale": scale, "where": where})
        return said

    def untested(self, source: str, quantity: str, paper: str, why: str, where: str = "") -> None:
        """A finding that cannot be tested, and why."""
        found = {"here": "–", "value": math.nan, "error": math.nan}
        about = {"source": source, "quantity": quantity, "paper": paper, **found}
        self.rows.append({**about, "verdict": VERDICTS[-1], "scale": why, "where": where})

    def table(self) -> pd.DataFrame:
        """All rows: ``source, quantity, paper, here, value, error, verdict, scale, where``."""
        columns = "source quantity paper here value error verdict scale where".split()
        return pd.DataFrame(self.rows, columns=columns)

    def counts(self, by: str = "source") -> pd.DataFrame:
        """How many rows have which verdict, for each value of a column.

        Examples
        --------
        >>> Findings([{"source": "a", "verdict": "agrees"}]).counts().loc["a", "agrees"]
        np.int64(1)
        """
        _checks.word(by, ("source", "where", "scale"), "by")
        table = pd.DataFrame(self.rows, columns=[by, "verdict"])
        counted = pd.crosstab(table[by], table["verdict"])
        return counted.reindex(columns=list(VERDICTS), fill_value=0).rename_axis(columns=None)
