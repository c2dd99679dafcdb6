"""What hidden states say about how a network uses its depth.

:func:`depthutil.gram.of_states` turns a trajectory into the Gram matrix of its writes,
:func:`signature` reads sizes, correlations and finishing layers off it, with standard errors,
and :func:`diagnose` names the regime of Liu et al. (arXiv 2602.05970) or says why it cannot.
Nothing here knows where the states came from: a simulation, a toy network or a language
model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from depthutil import _checks
from depthutil.gram import of_states as gram

#: What :func:`diagnose` compares the signature with; see there.
THRESHOLDS = {
    "depth": 6,  # layers
    "inputs": 16,
    "straight": 1e-4,  # disagreement 1 − agreement, below which all updates are one
    "abrupt": 1 / 3,  # memory
    "smooth": 2 / 3,  # memory
    "uneven": 0.7,  # evenness
    "even": 0.8,  # evenness
    "spread": 0.1,  # standard deviation of the finish, as a fraction of depth
    "errors": 3.0,  # standard errors that a measured number must keep from a threshold
}


@dataclass(frozen=True)
class Signature:
    """How the states of a network move along depth, averaged over inputs.

    Attributes
    ----------
    depth, inputs : int
        Layers and inputs.
    update_norms, update_norms_stderr : numpy.ndarray
        Mean size of each layer's update, ``(depth,)``.
    neighbour_cosine, neighbour_cosine_stderr : numpy.ndarray
        Mean cosine of each update and the next, ``(depth − 1,)``.
    lag_cosine, lag_cosine_stderr : numpy.ndarray
        Mean cosine of updates 1, 2, … layers apart, ``(depth − 1,)``.
    finish : numpy.ndarray
        For each input, the fraction of depth after which its updates stay below a quarter
        of their layers' means over inputs; 1 when the last layer still works on it.
    agreement, agreement_stderr : float
        Mean cosine of any two different updates of an input, weighted with their lengths:
        1 when all updates point the same way, 0 when they have nothing in common.
    memory, memory_stderr : float
        Share of the disagreement (1 − agreement) that neighbouring updates are spared:
        1 when updates turn smoothly along depth, 0 when a neighbour is like any other
        layer, negative when neighbours oppose each other.
    evenness, evenness_stderr : float
        Squared mean over mean square of an input's update sizes: 1 when all updates are
        of one size, 1/depth when one layer does everything.
    """

    depth: int
    inputs: int
    update_norms: np.ndarray = field(repr=False)
    update_norms_stderr: np.ndarray = field(repr=False)
    neighbour_cosine: np.ndarray = field(repr=False)
    neighbour_cosine_stderr: np.ndarray = field(repr=False)
    lag_cosine: np.ndarray = field(repr=False)
    lag_cosine_stderr: np.ndarray = field(repr=False)
    finish: np.ndarray = field(repr=False)
    agreement: float
    agreement_stderr: float
    memory: float
    memory_stderr: float
    evenness: float
    evenness_stderr: float

    @property
    def finish_mean(self) -> float:
        """Where the average input finishes, as a fraction of depth."""
        return float(self.finish.mean())

    @property
    def finish_spread(self) -> float:
        """Standard deviation over inputs of where they finish, as a fraction of depth."""
        return float(self.finish.std())

    def summary(self) -> pd.Series:
        """The numbers that :func:`diagnose` uses.

        Examples
        --------
        >>> straight = np.arange(9.0)[:, None, None] * np.ones((20, 4))
        >>> signature(straight).summary().round(2).to_dict()
        {'agreement': 1.0, 'memory': nan, 'evenness': 1.0, 'finish_mean': 1.0,
         'finish_spread': 0.0}
        """
        names = ("agreement", "memory", "evenness", "finish_mean", "finish_spread")
        return pd.Series({name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Diagnosis:
    """A regime, or the reason why none can be named.

    Attributes
    ----------
    regime : str
        ``"ensemble"``, ``"procedural"``, ``"compositional"`` or ``"undetermined"``.
    reasons : tuple of str
        What decided, one sentence each.
    margin : float
        By how many standard errors the closest call was clear of its threshold;
        0 where undetermined.
    signature : Signature
        The measurements.
    """

    regime: str
    reasons: tuple[str, ...]
    margin: float
    signature: Signature = field(repr=False)

    def __str__(self) -> str:
        return "\n".join([self.regime, *(f"  - {reason}" for reason in self.reasons)])


def signature(states: Any = None, *, gram_matrix: np.ndarray | None = None) -> Signature:
    """Sizes, correlations and finishing layers of a network's updates.

    Standard errors of the three shares count two sources, the inputs that happened to be
    drawn and the layers that happened to be learned. The other standard errors are over
    inputs. Inputs that never move are left out.

    Parameters
    ----------
    states : array or Trajectory, optional
        Residual stream, ``(depth + 1, inputs, width)``, or a
        :class:`depthutil.trajectory.Trajectory`, whose sample of documents is read.
    gram_matrix : array, optional
        What :func:`depthutil.gram.of_states` returns, instead of the states; of a trajectory,
        some blocks only: ``trajectory.grams(first, last)``.

    Raises
    ------
    ValueError
        If not exactly one of the two is given, if it has the wrong shape, if there are fewer
        than 2 layers or 2 inputs, or if no input moves.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> walk = rng.standard_normal((13, 200, 32)).cumsum(axis=0)
    >>> s = signature(walk)
    >>> abs(s.agreement) < 3 * s.agreement_stderr, abs(s.memory) < 3 * s.memory_stderr
    (True, True)
    """
    if (states is None) == (gram_matrix is None):
        raise ValueError("give either states or gram_matrix, and not both")
    if hasattr(states, "grams"):
        states, gram_matrix = None, states.grams()
    g = gram(states) if gram_matrix is None else _checks.real(gram_matrix, "gram_matrix")
    if g.ndim != 3 or g.shape[1] != g.shape[2]:
        raise ValueError(f"gram_matrix must be (inputs, depth + 1, depth + 1), not {g.shape}")
    finite = np.isfinite(g).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(
            f"gram_matrix of input {int(np.argmin(finite))} holds numbers that are not finite "
            f"({(~finite).sum()} such of {len(g)}): leave those inputs out"
        )
    if not np.abs(g).max() < 1e75:  # fourth powers of states are still to come
        raise ValueError(
            f"gram_matrix holds numbers as large as {np.abs(g).max():.1e}, which overflow: divide "
            "the states by a common number, which changes no angle"
        )
    g = g[:, 1:, 1:]
    square = np.einsum("nll->nl", g)
    moving = square.sum(axis=1) > 0
    if not moving.any():
        raise ValueError("no input moves: every update is zero, so there is nothing to measure")
    g, square = g[moving], square[moving]
    inputs, depth = square.shape
    if depth < 2 or inputs < 2:
        raise ValueError(
            f"a signature compares layers and inputs: it needs 2 of each, not {depth} layers "
            f"and {inputs} moving inputs"
        )
    norm = np.sqrt(np.maximum(square, 0))
    cosine = _cosines(g, norm)
    lags = np.stack([_nanmean(_diagonal(cosine, lag), axis=1) for lag in range(1, depth)], axis=1)
    evenness = norm.sum(axis=1) ** 2 / (depth * square.sum(axis=1))
    update_norms = _mean(norm)
    neighbours = _mean(_diagonal(cosine, 1))
    lag = _mean(lags)
    return Signature(
        depth,
        inputs,
        *update_norms,
        *neighbours,
        *lag,
        _finish(norm),
        *_agreement(g, norm),
        *(float(value) for value in _mean(evenness)),
    )


def diagnose(states: Any) -> Diagnosis:
    """Name the regime that hidden states point to, or say why they do not.

    Two questions decide, in this order. Do updates turn *smoothly* along depth? If
    neighbours are spared at least two thirds of the disagreement, updates are steps of a
    flow, as long as inputs finish together; if at most one third, each layer goes its own
    way; in between the two mix. Then, for layers that go their own way: is the work
    *even*? It is not if updates differ in size along depth, or if inputs finish at different
    layers. Uneven work without a shared change is a hierarchy's; even work with a shared
    change (positive agreement) is an ensemble's; even work without one is a random walk's.
    A number must keep three standard errors from its threshold.

    Parameters
    ----------
    states : array, Trajectory or Signature
        Residual stream, ``(depth + 1, inputs, width)``, or its signature. Leave out
        layers that do something else, such as a language model's first and last:
        ``signature(gram_matrix=trajectory.grams(2, trajectory.depth - 1))``.

    Returns
    -------
    Diagnosis

    Raises
    ------
    ValueError
        As :func:`signature` does for states that cannot be read.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> change, errors = rng.standard_normal((200, 32)), rng.standard_normal((12, 200, 32))
    >>> states = np.concatenate([np.zeros((1, 200, 32)), (change + errors).cumsum(axis=0)])
    >>> diagnose(states).regime
    'ensemble'
    """
    s = states if isinstance(states, Signature) else signature(states)
    limit = THRESHOLDS
    if s.depth < limit["depth"]:
        return _undetermined(s, f"{s.depth} layers are too few: it takes {limit['depth']}")
    if s.inputs < limit["inputs"]:
        return _undetermined(s, f"{s.inputs} inputs are too few: it takes {limit['inputs']}")
    if 1 - s.agreement < limit["straight"]:
        return _undetermined(
            s,
            f"all updates are the same (agreement {s.agreement:.6f}): a flow along straight "
            "lines and an ensemble without noise have the same states",
        )
    memory = f"memory {s.memory:.2f} ± {s.memory_stderr:.2f}"
    even = f"evenness {s.evenness:.2f} ± {s.evenness_stderr:.2f}"
    finish = f"inputs finish at {s.finish_mean:.2f} ± {s.finish_spread:.2f} of the depth"
    smooth = (s.memory - limit["smooth"]) / s.memory_stderr
    abrupt = (limit["abrupt"] - s.memory) / s.memory_stderr
    if smooth > limit["errors"]:
        reason = f"updates change smoothly along depth ({memory})"
        if s.finish_spread > limit["spread"]:
            return _undetermined(
                s, reason, f"but {finish}: flows end together, levels of a hierarchy do not"
            )
        return Diagnosis("procedural", (reason, finish), smooth, s)
    if abrupt <= limit["errors"]:
        return _undetermined(
            s, f"updates are neither smooth along depth nor independent ({memory})"
        )
    reason = f"updates change abruptly from layer to layer ({memory})"
    agreement = f"agreement {s.agreement:.3f} ± {s.agreement_stderr:.3f}"
    shared = s.agreement / s.agreement_stderr
    uneven = (limit["uneven"] - s.evenness) / s.evenness_stderr
    spread_stderr = s.finish_spread / np.sqrt(2 * s.inputs)
    apart = (s.finish_spread - limit["spread"]) / max(spread_stderr, 1e-12)
    if max(uneven, apart) > limit["errors"]:
        work = f"work is uneven: {even}, {finish}"
        if shared > limit["errors"]:
            return _undetermined(
                s,
                work,
                f"but updates share one change ({agreement}): a hierarchy and an ensemble of "
                "unequal members both may",
            )
        return Diagnosis("compositional", (reason, work), min(abrupt, max(uneven, apart)), s)
    evenly = (s.evenness - limit["even"]) / s.evenness_stderr
    if min(evenly, -apart) <= limit["errors"]:
        return _undetermined(s, reason, f"work is neither even nor uneven: {even}, {finish}")
    if -limit["abrupt"] - s.memory > limit["errors"] * s.memory_stderr:
        return _undetermined(s, f"neighbouring updates undo each other ({memory})")
    if shared <= limit["errors"]:
        return _undetermined(
            s,
            reason,
            f"updates share no change that can be told from chance ({agreement}): a random walk "
            "looks the same",
        )
    return Diagnosis(
        "ensemble",
        (reason, f"work is even: {even}, {finish}", f"updates share one change ({agreement})"),
        min(abrupt, evenly, -apart, shared),
        s,
    )


def evenness(sizes: Any) -> np.ndarray:
    """Squared mean over mean square: 1 if all are equal, ``1/n`` if one of ``n`` has everything.

    Parameters
    ----------
    sizes : array
        ``(…, layers)``: lengths or angles of a token's updates, for example.

    Examples
    --------
    >>> evenness([[2.0, 2.0], [4.0, 0.0]]).tolist()
    [1.0, 0.5]
    """
    sizes = np.asarray(sizes, dtype=float)
    return sizes.mean(axis=-1) ** 2 / (sizes**2).mean(axis=-1)


def _undetermined(s: Signature, *reasons: str) -> Diagnosis:
    return Diagnosis("undetermined", reasons, 0.0, s)


def _cosines(g: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Cosines of updates; not a number where one of the two is zero."""
    product = norm[:, :, None] * norm[:, None, :]
    return np.divide(g, product, out=np.full_like(g, np.nan), where=product > 0)


def _diagonal(matrices: np.ndarray, lag: int) -> np.ndarray:
    return np.diagonal(matrices, offset=lag, axis1=1, axis2=2)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    present = np.isfinite(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over inputs (the first axis) and its standard error, passing over nan."""
    mean = _nanmean(values, axis=0)
    count = np.isfinite(values).sum(axis=0)
    variance = _nanmean((values - mean) ** 2, axis=0)
    return mean, np.sqrt(variance / np.maximum(count - 1, 1))


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Ratio of two means over inputs and its standard error (linearised)."""
    ratio = above.mean() / below.mean()
    rest = above - ratio * below
    return ratio, rest.std(ddof=1) / np.sqrt(len(rest)) / below.mean()


def _agreement(g: np.ndarray, norm: np.ndarray) -> tuple[float, float, float, float]:
    """Agreement and memory with their standard errors, from length-weighted cosines."""
    depth = norm.shape[1]
    lengths = norm[:, :, None] * norm[:, None, :]
    off = 1 - np.eye(depth)
    agreement, of_inputs = _ratio((g * off).sum(axis=(1, 2)), (lengths * off).sum(axis=(1, 2)))
    # What a layer adds to the mean over pairs; each pair has two layers, hence the 2
    # (the projection of a U-statistic).
    rest = ((g - agreement * lengths) * off).mean(axis=0)
    of_layers = 2 * np.sqrt((rest.sum(axis=1) ** 2).sum()) / (lengths * off).mean(axis=0).sum()
    agreement_stderr = np.hypot(of_inputs, of_layers)

    disagreement = 1 - agreement
    if disagreement <= 1e-12:  # rounding: there is no disagreement to divide
        return float(agreement), float(agreement_stderr), np.nan, np.nan
    near, near_lengths = _diagonal(g, 1), _diagonal(lengths, 1)
    neighbours, of_inputs = _ratio(near.sum(axis=1), near_lengths.sum(axis=1))
    rest = (near - neighbours * near_lengths).mean(axis=0)
    of_layers = np.sqrt((rest**2).sum()) / near_lengths.mean(axis=0).sum()
    memory = 1 - (1 - neighbours) / disagreement
    # 1 − memory is a ratio: relative errors add, so a smooth flow's memory is sharp.
    stderr = (
        np.hypot(np.hypot(of_inputs, of_layers), (1 - memory) * agreement_stderr) / disagreement
    )
    return float(agreement), float(agreement_stderr), float(memory), float(stderr)


def _finish(norm: np.ndarray) -> np.ndarray:
    """Fraction of depth after which an input's updates stay small for their layers."""
    depth = norm.shape[1]
    at_work = norm > norm.mean(axis=0) / 4
    return (depth - np.argmax(at_work[:, ::-1], axis=1)) / depth
