"""One slope on logarithmic scales, one error, and one verdict whether it is a power law.

A line can be fitted to anything. :func:`fit` also asks whether it was a line: how far the
points lie from it, and how much the local exponent changes along it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthutil import _checks

#: What a decline must keep to be called a power law. The ``scatter`` is the root mean square
#: distance from the line in units of the logarithm, and the ``drift`` the change of the local
#: exponent over the range, as a fraction of the exponent.
THRESHOLDS = {"scatter": 0.1, "drift": 1 / 3}


@dataclass(frozen=True)
class PowerLaw:
    """The fit ``loss = prefactor · depth^−exponent`` and whether it describes the data.

    Attributes
    ----------
    exponent, stderr : float
        The exponent, positive for a falling loss, and its standard error.
    prefactor : float
    drift, drift_stderr : float
        How much the local exponent of a quadratic fit changes from the shallowest depth
        to the deepest; its standard error is not a number where one series of losses without
        errors cannot tell.
    scatter : float
        Root mean square distance of the log losses from the line.
    """

    exponent: float
    stderr: float
    prefactor: float
    drift: float
    drift_stderr: float
    scatter: float

    @property
    def is_power_law(self) -> bool:
        """Whether one exponent serves all depths.

        It falls, losses lie within the scatter of :data:`THRESHOLDS`, and the local exponent
        drifts by less than the fraction given there, or is lost in noise: within twice its
        standard error. Two or three series know their noise badly, so that more of it
        excuses nothing.
        """
        noise = 0.0 if math.isnan(self.drift_stderr) else self.drift_stderr
        straight = abs(self.drift) < max(THRESHOLDS["drift"] * abs(self.exponent), 2 * noise)
        return bool(self.exponent > 0 and straight and self.scatter < THRESHOLDS["scatter"])

    def __str__(self) -> str:
        verdict = "a power law" if self.is_power_law else "not a power law"
        return f"exponent {self.exponent:.2f} ± {self.stderr:.2f} ({verdict})"


def fit(depths: Any, losses: Any, stderr: Any = None) -> PowerLaw:
    """Fit a power of depth to losses, on logarithmic scales.

    With several series (seeds, teachers), each gets its own line, and the standard error is
    that of the series' mean, so that what a seed changes at all depths alike does not blur the
    slope. With one loss a depth, it comes from ``stderr`` or else from the residuals.

    Parameters
    ----------
    depths : array
        ``(depths,)``; three different ones at least.
    losses : array
        ``(depths,)`` or ``(depths, series)``, all positive.
    stderr : array, optional
        Standard errors of losses of shape ``(depths,)``.

    Raises
    ------
    ValueError
        If shapes do not match, there are fewer than three depths, a loss is not positive, or
        a standard error is not.

    Examples
    --------
    >>> depths = np.array([2, 4, 8, 16])
    >>> print(fit(depths, 3.0 / depths**2))
    exponent 2.00 ± 0.00 (a power law)
    >>> fit(depths, [1.0, 1.0, 1e-6, 1e-6]).is_power_law  # a threshold
    False
    >>> fit(depths, 1 / depths + 0.1).is_power_law  # levels off
    False
    """
    depths, losses = _checks.real(depths, "depths"), _checks.real(losses, "losses")
    if losses.ndim not in (1, 2) or depths.shape != losses.shape[:1] or losses.size == 0:
        raise ValueError(
            f"losses must be (depths,) or (depths, seeds) for {depths.size} depths, "
            f"not of shape {losses.shape}"
        )
    if len(np.unique(depths)) < 3:
        raise ValueError(f"an exponent with a test needs 3 different depths, not {depths.tolist()}")
    if not (np.isfinite(losses).all() and (losses > 0).all() and (depths > 0).all()):
        raise ValueError(
            "a power law needs positive, finite losses and depths; the smallest loss is "
            f"{np.min(losses)}: leave out depths whose loss is exactly 0"
        )
    x, y = np.log(depths), np.log(losses)
    if losses.ndim == 2 and losses.shape[1] > 1:
        if stderr is not None:
            raise ValueError("stderr goes with one loss a depth: several seeds bring their own")
        slopes, bends = np.polyfit(x, y, 1)[0], np.polyfit(x, y, 2)[0]
        count = math.sqrt(losses.shape[1])
        error, bend_error = slopes.std(ddof=1) / count, bends.std(ddof=1) / count
        slope, bend, y = slopes.mean(), bends.mean(), y.mean(axis=1)
        line = np.polyfit(x, y, 1)
    else:
        y, weights = y.reshape(-1), None
        if stderr is not None:
            weights = losses.reshape(-1) / _positive(stderr, y.shape)
        line, quadratic = np.polyfit(x, y, 1, w=weights), np.polyfit(x, y, 2, w=weights)
        slope, bend = line[0], quadratic[0]
        error = _coefficient_error(x, y, 1, weights)
        bend_error = math.nan if weights is None else _coefficient_error(x, y, 2, weights)
    span = np.ptp(x)
    return PowerLaw(
        exponent=float(-slope),
        stderr=float(error),
        prefactor=float(np.exp(line[1])),
        drift=float(-2 * bend * span),
        drift_stderr=float(2 * bend_error * span),
        scatter=float(np.sqrt(np.mean((y - np.polyval(line, x)) ** 2))),
    )


def _positive(stderr: Any, shape: tuple[int, ...]) -> np.ndarray:
    errors = _checks.positive(stderr, "stderr")
    if errors.shape != shape:
        raise ValueError(f"stderr has shape {errors.shape}, and losses {shape}")
    return errors


def _coefficient_error(
    x: np.ndarray, y: np.ndarray, degree: int, weights: np.ndarray | None
) -> float:
    """Standard error of a polynomial's leading coefficient."""
    design = np.vander(x, degree + 1)
    if weights is not None:
        return float(np.sqrt(np.linalg.inv((design.T * weights**2) @ design)[0, 0]))
    rest = y - design @ np.polyfit(x, y, degree)
    variance = (rest @ rest) / (len(x) - degree - 1)
    return float(np.sqrt(np.linalg.inv(design.T @ design)[0, 0] * variance))
