"""The book's look: one theme, one palette, the few plots that recur.

Figures are drawn once, in dark ink on white paper, as SVG. The site shows a
second copy of each in its dark theme: :func:`recolour` exchanges the inks, so
every colour a figure uses should come from this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

PAPER = "#ffffff"
INK = "#1f2430"
MUTED = "#6b7280"
GRID = "#d9dde3"

#: The palette of Okabe and Ito (2008), in the order in which lines take it:
#: distinguishable with every common colour blindness.
COLORS = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "orange": "#e69f00",
}

#: The three regimes keep their colour through the whole book.
REGIME_COLORS = {
    "ensemble": COLORS["blue"],
    "procedural": COLORS["vermillion"],
    "compositional": COLORS["green"],
}

# Light ink -> dark-theme ink. Data colours are lifted until they stand out
# from a near-black page as clearly as they do from a white one.
_DARK = {
    PAPER: "none",
    INK: "#e6e8ec",
    MUTED: "#a2a9b4",
    GRID: "#3b414b",
    COLORS["blue"]: "#4aa3df",
    COLORS["vermillion"]: "#f0803c",
    COLORS["green"]: "#2cc295",
    COLORS["purple"]: "#e39bc3",
    COLORS["sky"]: "#8fd0f5",
    COLORS["orange"]: "#f2b632",
}


def use_theme() -> None:
    """Draw every figure from here on in the book's style; in notebooks, as SVG.

    Examples
    --------
    >>> use_theme()
    >>> import matplotlib as mpl
    >>> mpl.rcParams["axes.spines.top"]
    False
    """
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=list(COLORS.values()),
        rc={
            "figure.figsize": (7.0, 3.8),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": GRID,
            "legend.frameon": False,
            "legend.fontsize": "small",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": "small",
            "ytick.labelsize": "small",
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "savefig.facecolor": PAPER,
            # Text as outlines: the same in every browser, and no font to fetch.
            "svg.fonttype": "path",
            "svg.hashsalt": "depthutil",
            "axes.formatter.use_mathtext": True,
        },
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        # No date: a figure that did not change is the same file, byte for byte.
        set_matplotlib_formats("svg", metadata={"Date": None})


def recolour(svg: str, theme: str) -> str:
    """The same figure for the site's light or dark theme, on a clear background.

    Parameters
    ----------
    svg : str
        A figure drawn with :func:`use_theme`, as SVG source.
    theme : {"light", "dark"}

    Raises
    ------
    ValueError
        If ``theme`` is neither.

    Examples
    --------
    >>> recolour('<path style="fill: #ffffff; stroke: #1f2430"/>', "dark")
    '<path style="fill: none; stroke: #e6e8ec"/>'
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"theme must be 'light' or 'dark', not {theme!r}")
    inks = _DARK if theme == "dark" else {PAPER: "none"}
    pattern = re.compile("|".join(map(re.escape, inks)), re.IGNORECASE)
    return pattern.sub(lambda match: inks[match.group().lower()], svg)


def slope_guide(
    ax: mpl.axes.Axes,
    x: Sequence[float],
    slope: float,
    through: tuple[float, float],
    label: str | None = None,
    **style: Any,
) -> Line2D:
    """Draw a power law ``y ∝ x**slope`` as a dashed line on log-log axes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x : sequence of float
        The line runs from ``min(x)`` to ``max(x)``.
    slope : float
        Exponent of the power law.
    through : (float, float)
        A point on the line.
    label : str, optional
        Written at the line's right end.
    **style
        Passed to :meth:`matplotlib.axes.Axes.plot`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> fig, ax = plt.subplots()
    >>> line = slope_guide(ax, [1, 100], slope=-1, through=(1, 5.0))
    >>> [float(y) for y in line.get_ydata()]
    [5.0, 0.05]
    >>> plt.close(fig)
    """
    ends = np.array([np.min(x), np.max(x)], dtype=float)
    x0, y0 = through
    dashed: dict[str, Any] = {"color": MUTED, "ls": "--", "lw": 1.1}
    (line,) = ax.plot(ends, y0 * (ends / x0) ** slope, **dashed | style)
    ax.set(xscale="log", yscale="log")
    if label:
        ax.annotate(
            label,
            (ends[1], y0 * (ends[1] / x0) ** slope),
            xytext=(4, 0),
            textcoords="offset points",
            color=line.get_color(),
            fontsize="small",
            va="center",
        )
    return line


def depth_axis(ax: mpl.axes.Axes, depths: Iterable[float], label: str = "depth ℓ (layers)") -> None:
    """Make ``ax``'s x axis logarithmic, with a tick at each depth that was run.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> fig, ax = plt.subplots()
    >>> depth_axis(ax, [4, 8, 16])
    >>> [tick.get_text() for tick in ax.get_xticklabels()]
    ['4', '8', '16']
    >>> plt.close(fig)
    """
    ax.set_xscale("log")
    depths = list(depths)
    ax.set_xticks(depths, labels=[f"{depth:g}" for depth in depths])
    ax.minorticks_off()
    ax.set_xlabel(label)


def shades(values: Iterable[Any]) -> dict[Any, float]:
    """An opacity for each value, faint for the smallest: many curves of one colour.

    Parameters
    ----------
    values : iterable
        Depths, for example; one that is there twice counts once.

    Examples
    --------
    >>> shades([4, 16, 8, 4])
    {4: 0.25, 8: 0.625, 16: 1.0}
    """
    values = sorted(set(values))
    low = 0.25 if len(values) > 1 else 1.0
    return {
        value: float(alpha)
        for value, alpha in zip(values, np.linspace(low, 1, len(values)), strict=True)
    }


def against_depth(
    ax: mpl.axes.Axes, table: pd.DataFrame, *, errors: float = 2, **style: Any
) -> ErrorbarContainer:
    """Draw means with their error bars against layers or depths.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    table : pandas.DataFrame
        ``mean`` and its standard error, ``stderr`` (or ``sem``), against ``layer`` or ``depth``,
        a column or the index: what :class:`depthutil.trajectory.Trajectory` returns, or
        ``frame.groupby("depth")["loss"].agg(["mean", "sem"])``.
    errors : float
        Half the length of a bar, in standard errors.
    **style
        Passed to :meth:`matplotlib.axes.Axes.errorbar`; by default ``fmt="o-"``.

    Returns
    -------
    matplotlib.container.ErrorbarContainer

    Raises
    ------
    ValueError
        If the table has no such columns.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> fig, ax = plt.subplots()
    >>> table = pd.DataFrame({"layer": [1, 2], "mean": [0.4, 0.3], "stderr": [0.01, 0.02]})
    >>> drawn = against_depth(ax, table, label="trained")
    >>> [line[:, 1].round(2).tolist() for line in drawn[2][0].get_segments()]
    [[0.38, 0.42], [0.26, 0.34]]
    >>> plt.close(fig)
    """
    at, error = _columns(table)
    return ax.errorbar(at, table["mean"], errors * error, **{"fmt": "o-"} | style)


def band(ax: mpl.axes.Axes, table: pd.DataFrame, *, errors: float = 2, **style: Any) -> Line2D:
    """Draw means as a line, with a shaded band of their errors.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    table : pandas.DataFrame
        As for :func:`against_depth`; its index is the x axis where it has neither ``layer`` nor
        ``depth``.
    errors : float
        Half the width of the band, in standard errors.
    **style
        Passed to :meth:`matplotlib.axes.Axes.plot`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> fig, ax = plt.subplots()
    >>> line = band(ax, pd.DataFrame({"mean": [1.0, 2.0], "stderr": [0.1, 0.1]}), label="seen")
    >>> line.get_ydata().tolist(), len(ax.collections)
    ([1.0, 2.0], 1)
    >>> plt.close(fig)
    """
    at, error = _columns(table)
    (line,) = ax.plot(at, table["mean"], **style)
    low, high = table["mean"] - errors * error, table["mean"] + errors * error
    ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15, lw=0)
    return line


def cosine_map(ax: mpl.axes.Axes, gram: np.ndarray) -> None:
    """Draw a Gram matrix as cosines: blue where positive, vermillion where negative, pale near 0.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    gram : numpy.ndarray
        Inner products ``(writes, writes)``.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> fig, ax = plt.subplots()
    >>> cosine_map(ax, np.array([[4.0, -2.0], [-2.0, 4.0]]))
    >>> ax.collections[1].get_facecolor()[1].round(2).tolist()[3]  # the cosine is −½
    0.5
    >>> plt.close(fig)
    """
    size = np.sqrt(np.diag(gram))
    cosine = gram / size[:, None] / size
    edges = np.arange(len(gram) + 1) - 0.5
    for color, part in ((COLORS["blue"], cosine), (COLORS["vermillion"], -cosine)):
        paint = [(*mpl.colors.to_rgb(color), alpha) for alpha in part.clip(0, 1).ravel()]
        mesh = ax.pcolormesh(edges, edges, cosine, lw=0)
        mesh.set(array=None, facecolor=paint, edgecolor="none")
    ax.set_aspect("equal")
    ax.invert_yaxis()


def _columns(table: pd.DataFrame) -> tuple[Any, pd.Series]:
    """Where means are drawn, and their standard errors."""
    at = next((table[name] for name in ("layer", "depth") if name in table), table.index)
    error = next((table[name] for name in ("stderr", "sem") if name in table), None)
    if error is None or "mean" not in table:
        raise ValueError(f"the table needs mean and stderr, and has {list(table.columns)}")
    return at, error
