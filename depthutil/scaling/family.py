"""Losses of a family of models that differ in depth alone: gains, noise, and the exponent.

At one width and one number of tokens the law of loss is ``L = a + c/(ℓ + s)**α``, with a floor
``a`` for each seed. Given exponent and offset it is a straight line, for which least squares has
one answer: so exponents are gone through one by one, and no start is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from depthutil import _checks
from depthutil.scaling.fits import level_of

#: The exponents that are gone through.
EXPONENTS = np.arange(0.02, 4, 0.02)


@dataclass(frozen=True, eq=False)
class DepthFamily:
    """Losses of models of several depths, with one floor for each seed.

    Residuals are of losses, in nats, as training noise is; :func:`fit` with ``law="depth"`` takes
    them of logarithms, has one floor, and so answers a little differently.

    Parameters
    ----------
    points : pandas.DataFrame
        ``seed``, ``depth``, ``loss`` (nats), a model a row.
    samples : numpy.ndarray, optional
        The same losses on bootstrap samples of the documents, ``(samples, models)``, where every
        sample is of the same documents for all models: differences of depths are then known far
        better than losses.
    exponents : numpy.ndarray
        The exponents α to choose from, ascending.

    Raises
    ------
    ValueError
        If a column is missing, a number is not finite, or shapes do not agree.

    Examples
    --------
    >>> depth = np.array([1, 2, 4, 8, 16])
    >>> family = DepthFamily(pd.DataFrame({"seed": 0, "depth": depth, "loss": 1 + 2 / depth}))
    >>> family.gains().round(3).to_dict()
    {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}
    >>> round(float(family.exponent()), 2)
    1.0
    """

    points: pd.DataFrame
    samples: np.ndarray | None = field(default=None, repr=False)
    exponents: np.ndarray = field(default_factory=lambda: EXPONENTS, repr=False)

    def __post_init__(self) -> None:
        missing = [name for name in ("seed", "depth", "loss") if name not in self.points]
        if missing:
            raise ValueError(f"points need the column {missing[0]!r}: a seed, depth and loss each")
        _checks.positive(self.points["depth"], "depth")
        object.__setattr__(self, "points", self.points.reset_index(drop=True))
        _checks.real(self.loss, "loss")
        if not np.isfinite(self.loss).all():
            raise ValueError("losses must all be finite: leave out models that diverged")
        shape = None if self.samples is None else np.shape(self.samples)
        if shape is not None and (len(shape) != 2 or shape[1] != len(self.points)):
            raise ValueError(f"samples must be (samples, {len(self.points)} models), not {shape}")

    @property
    def loss(self) -> np.ndarray:
        """The models' losses, ``(models,)``."""
        return self.points["loss"].to_numpy(float)

    @property
    def depths(self) -> list[int]:
        """The different depths."""
        return sorted(set(self.points["depth"]))

    @property
    def seeds(self) -> int:
        """How many seeds, and so floors."""
        return self.points["seed"].nunique()

    def where(self, chosen: pd.Series | np.ndarray) -> DepthFamily:
        """The family without the models that a mask leaves out."""
        chosen = np.asarray(chosen, dtype=bool)
        samples = None if self.samples is None else self.samples[:, chosen]
        return DepthFamily(self.points[chosen], samples, self.exponents)

    # What a doubling buys

    def contrasts(self, pairs: Iterable[tuple[int, int]] | None = None) -> pd.DataFrame:
        """The matrix that takes losses to gains ``L(a) − L(b)``, averaged over seeds.

        Parameters
        ----------
        pairs : iterable of (int, int), optional
            Depths ``a`` and ``b``; by default all doublings, named by the smaller depth. Pairs
            that no seed has both of are left out.

        Returns
        -------
        pandas.DataFrame
            ``(gains, models)``.
        """
        wanted = [(d, 2 * d) for d in self.depths] if pairs is None else list(pairs)
        seeds, depths = self.points["seed"], self.points["depth"]
        have, rows = set(zip(seeds, depths, strict=True)), {}
        for a, b in wanted:
            both = [s for s in set(seeds) if {(s, a), (s, b)} <= have]
            if both:
                sign = 1.0 * (depths == a) - 1.0 * (depths == b)
                rows[a, b] = sign * seeds.isin(both) / len(both)
        table = pd.DataFrame(rows).T
        return table.droplevel(1) if pairs is None and len(table) else table

    def gains(self, losses: np.ndarray | None = None) -> pd.Series | pd.DataFrame:
        """What each doubling of depth buys, by the smaller depth; a floor cancels in it.

        Parameters
        ----------
        losses : numpy.ndarray, optional
            Other losses of these models, ``(sets, models)``: then a row for each set.
        """
        matrix = self.contrasts()
        if losses is None:
            return matrix @ self.loss
        return pd.DataFrame(np.asarray(losses) @ matrix.T.to_numpy(), columns=matrix.index)

    def ratios(
        self, chains: Iterable[tuple[int, int, int]], losses: np.ndarray | None = None
    ) -> pd.DataFrame:
        """``L(b) − L(c)`` over ``L(a) − L(b)``: ``2**-α`` for doublings, whatever the floor.

        Parameters
        ----------
        chains : iterable of (int, int, int)
            Depths ``a, b, c``; those that are not there are left out.
        losses : numpy.ndarray, optional
            ``(sets, models)``; the family's own, as one set, by default.

        Returns
        -------
        pandas.DataFrame
            A row for each set, and a column for each chain, named ``"a → b → c"``.

        Examples
        --------
        >>> points = pd.DataFrame({"seed": 0, "depth": [1, 2, 4], "loss": [3.0, 2.0, 1.5]})
        >>> DepthFamily(points).ratios([(1, 2, 4)]).to_dict("records")
        [{'1 → 2 → 4': 0.5}]
        """
        chains = list(chains)
        matrix = self.contrasts({pair for a, b, c in chains for pair in ((a, b), (b, c))})
        there = [chain for chain in chains if {chain[:2], chain[1:]} <= set(matrix.index)]
        losses = np.atleast_2d(self.loss if losses is None else losses)
        gain = {pair: losses @ row.to_numpy() for pair, row in matrix.iterrows()}
        return pd.DataFrame(
            {" → ".join(map(str, chain)): gain[chain[1:]] / gain[chain[:2]] for chain in there}
        )

    def gain_errors(self, noise: float) -> pd.Series:
        """Standard errors of the gains, from documents and training noise together."""
        matrix = self.contrasts()
        of_documents = self.gains(self._samples()).var(ddof=0)
        return np.sqrt(of_documents + noise**2 * (matrix**2).sum(axis=1))

    def noisy(self, noise: float, seed: int = 1, *, documents: bool = True) -> np.ndarray:
        """Losses ``(samples, models)`` with training noise, and on samples of documents, or not."""
        samples = self._samples()
        drawn = noise * np.random.default_rng(seed).normal(size=samples.shape)
        return (samples if documents else self.loss) + drawn

    def _samples(self) -> np.ndarray:
        if self.samples is None:
            raise ValueError("this family has no samples of documents: give samples=")
        return self.samples

    # Training noise

    def training_noise(self) -> tuple[float, int]:
        """Standard deviation of a loss about its depth's and its seed's level, in nats.

        With two seeds or more, of what their levels leave; with a single one, of what a parabola
        in log depth leaves.

        Returns
        -------
        tuple
            The noise, and its degrees of freedom.
        """
        both = self.points.pivot(index="depth", columns="seed", values="loss")
        both = both.dropna(axis=1, thresh=3).dropna()
        if both.shape[1] > 1:
            level = both.mean() - both.to_numpy().mean()
            rest = both.sub(both.mean(axis=1), axis=0) - level
            free = (len(both) - 1) * (both.shape[1] - 1)
            return float(np.sqrt((rest**2).to_numpy().sum() / free)), free
        if len(both) < 4:
            raise ValueError(f"{len(both)} depths of one seed do not show how noisy they are")
        x, y = np.log(both.index.to_numpy()), both.iloc[:, 0].to_numpy()
        rest = y - np.polyval(np.polyfit(x, y, 2), x)
        return float(np.sqrt((rest**2).sum() / (len(y) - 3))), len(y) - 3

    # Fits

    def residuals(
        self, exponent: float, offset: float = 0.0, losses: np.ndarray | None = None
    ) -> np.ndarray:
        """What is left of losses after the best ``a + c/(ℓ + offset)**exponent``.

        Parameters
        ----------
        exponent, offset : float
        losses : numpy.ndarray, optional
            ``(…, models)``; the family's own by default.

        Returns
        -------
        numpy.ndarray
            ``(…, models)``, in nats.
        """
        y, x = self._about_floors(losses), self._about_floors(self._power(exponent, offset))
        return y - np.multiply.outer(y @ x / (x @ x), x)

    def coefficient(self, exponent: float, offset: float = 0.0) -> float:
        """The best ``c`` of ``a + c/(ℓ + offset)**exponent``."""
        x = self._about_floors(self._power(exponent, offset))
        return float((self._about_floors() * x).sum() / (x**2).sum())

    def predict(self, depth: float, exponent: float, offset: float = 0.0) -> float:
        """Loss at another depth from the best fit, for the mean of the seeds."""
        ours = self._power(exponent, offset).mean()
        rise = (depth + offset) ** -exponent - ours
        return float(self.loss.mean() + self.coefficient(exponent, offset) * rise)

    def squares(self, losses: np.ndarray | None = None, offset: float = 0.0) -> np.ndarray:
        """The sum of squares left at each of the exponents, ``(…, models) → (…, exponents)``.

        It is the profile likelihood of the exponent: floors and coefficient are fitted to each.
        """
        powers = self._power(self.exponents[:, None], offset)
        x, y = self._about_floors(powers), self._about_floors(losses)
        return (y**2).sum(axis=-1)[..., None] - (y @ x.T) ** 2 / (x**2).sum(axis=1)

    def exponent(self, losses: np.ndarray | None = None, offset: float = 0.0) -> np.ndarray:
        """The best of the exponents, for each set of losses."""
        return self.exponents[self.squares(losses, offset).argmin(axis=-1)]

    def interval(self, offset: float = 0.0, level: float = 0.95) -> tuple[float, float, float]:
        """The best exponent, and the ends of where an F test no longer tells it from the best.

        The sum of squares takes everything that the law leaves, noise or not, as its measure of
        error; there are few models, hence F in place of the usual χ².

        Raises
        ------
        ValueError
            If there are no more models than parameters.
        """
        q, free = self.squares(offset=offset), self._free(2)
        limit = 1 + stats.f.ppf(level_of(level), 1, free) / free
        inside = self.exponents[q <= q.min() * limit]
        return float(self.exponents[q.argmin()]), float(inside[0]), float(inside[-1])

    def region(self, offsets: Sequence[float], level: float = 0.95) -> tuple[np.ndarray, float]:
        """Joint profile of offset and exponent.

        Parameters
        ----------
        offsets : sequence of float
        level : float

        Returns
        -------
        tuple
            Sums of squares ``(offsets, exponents)``, and the one below which an F test allows
            both together.
        """
        q, free = np.array([self.squares(offset=s) for s in offsets]), self._free(3)
        return q, float(q.min() * (1 + 2 / free * stats.f.ppf(level_of(level), 2, free)))

    def best_offset(self, exponent: float, offsets: Iterable[float]) -> tuple[float, float]:
        """The offset that fits best with an exponent; the root mean square that it leaves."""
        left = {s: np.mean(self.residuals(exponent, s) ** 2) for s in offsets}
        best = min(left, key=lambda s: left[s])
        return float(best), float(np.sqrt(left[best]))

    def _free(self, beside_floors: int) -> int:
        free = len(self.points) - self.seeds - beside_floors
        if free < 1:
            raise ValueError(
                f"{len(self.points)} models leave nothing to judge {self.seeds} floors and "
                f"{beside_floors} more parameters by: bring more depths"
            )
        return free

    def _power(self, exponent: float | np.ndarray, offset: float) -> np.ndarray:
        depths = self.points["depth"].to_numpy() + offset
        if not (depths > 0).all():
            raise ValueError(f"an offset of {offset:g} takes depth {min(self.depths)} to 0 or less")
        return depths**-exponent

    def _about_floors(self, values: np.ndarray | None = None) -> np.ndarray:
        """Values ``(…, models)`` less the mean of their seed, which fits each seed's floor."""
        values = self.loss if values is None else np.asarray(values)
        seeds = self.points["seed"].to_numpy()
        same = 1.0 * (seeds == seeds[:, None])
        return values - values @ (same / same.sum(axis=1))
