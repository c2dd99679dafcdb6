"""Where updates point: whether layers agree, whether their order shows, and how straight they go.

:func:`cosines` compares the writes of layers, :func:`by_lag` and :func:`order_test` ask whether
neighbours agree more than others, :func:`participation_ratio` counts the directions that are
used. :func:`path_and_chord` and :func:`progress` follow the way from the first state to the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from depthutil import _checks


def angle(x: Any, y: Any) -> Tensor:
    """Angles between vectors, to all digits, small or large: ``2 atan2(|x̂ − ŷ|, |x̂ + ŷ|)``.

    An arccosine loses half of the digits of a small angle. The formula is Kahan's.

    Parameters
    ----------
    x, y : array
        ``(…, width)``; NumPy or torch.

    Returns
    -------
    torch.Tensor
        Radians, ``(…)``.

    Examples
    --------
    >>> angle(np.array([1.0, 0.0]), np.array([1.0, 1e-9])).item()
    1e-09
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))


def cosines(writes: Any, documents: Any = None) -> np.ndarray:
    """Mean cosine of each pair of writes.

    Parameters
    ----------
    writes : array
        ``(writes, tokens, width)``; NumPy or torch.
    documents : array, optional
        Of each token, the document that it is from, ``(tokens,)``.

    Returns
    -------
    numpy.ndarray
        ``(documents, writes, writes)``; with ``documents=None`` there is one.

    Examples
    --------
    >>> writes = np.array([[[2.0, 0.0]], [[1.0, 1.0]]])  # two writes to one token
    >>> cosines(writes).round(3).tolist()
    [[[1.0, 0.707], [0.707, 1.0]]]
    """
    writes = torch.as_tensor(writes).detach()
    count = writes.shape[1]
    documents = torch.zeros(count) if documents is None else torch.as_tensor(documents)
    unit = torch.nn.functional.normalize(writes, dim=-1)
    each = torch.einsum("ltd,mtd->tlm", unit, unit)
    found = [each[documents == d].mean(0) for d in documents.unique()]
    return torch.stack(found).double().cpu().numpy()


def by_lag(matrices: np.ndarray) -> pd.DataFrame:
    """The cosine of two layers against how far apart they are.

    Parameters
    ----------
    matrices : numpy.ndarray
        ``(documents, layers, layers)``, of :func:`cosines`.

    Returns
    -------
    pandas.DataFrame
        ``mean`` and ``stderr`` (over documents; not a number with one), indexed by ``lag``.

    Examples
    --------
    >>> by_lag(np.array([[[1, 0.5, 0.2], [0.5, 1, 0.3], [0.2, 0.3, 1]]]))["mean"].tolist()
    [0.4, 0.2]
    """
    matrices = np.asarray(matrices)
    lags = range(1, matrices.shape[-1])
    each = np.stack([np.diagonal(matrices, lag, -2, -1).mean(-1) for lag in lags], -1)
    error = np.full(len(lags), np.nan)
    if len(each) > 1:
        error = each.std(0, ddof=1) / len(each) ** 0.5
    index = pd.RangeIndex(1, len(lags) + 1, name="lag")
    return pd.DataFrame({"mean": each.mean(0), "stderr": error}, index=index)


def order_test(matrix: Any, draws: int = 4000, seed: int = 0) -> dict[str, float]:
    """Do neighbouring layers agree more than the same layers in another order?

    A permutation test: rows and columns of the matrix of cosines are put into other orders, all
    of them where they are not more than ``draws``. It needs no model of the noise, and does not
    count tokens: layers are what is drawn.

    Parameters
    ----------
    matrix : array
        ``(layers, layers)``, of at least three layers.
    draws : int
        Random orders.
    seed : int

    Returns
    -------
    dict
        ``neighbours``, their mean cosine; ``any order`` and ``spread``, its mean and standard
        deviation over orders; ``p``, the share of orders whose neighbours agree as much.

    Raises
    ------
    ValueError
        If there are no three layers.

    Examples
    --------
    >>> place = np.arange(8)
    >>> fading = np.exp(-abs(np.subtract.outer(place, place)) / 4)
    >>> order_test(fading)["p"] < 0.001
    True
    """
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 3:
        raise ValueError(
            f"an order needs three layers or more, and a square matrix, not {matrix.shape}"
        )

    def neighbours(order: np.ndarray) -> float:
        order = np.asarray(order, dtype=int)
        return float(matrix[order[:-1], order[1:]].mean())

    found = stats.permutation_test(
        (np.arange(len(matrix)),),
        neighbours,
        permutation_type="pairings",
        alternative="greater",
        vectorized=False,
        n_resamples=_checks.count(draws, "draws"),
        random_state=np.random.default_rng(seed),
    )
    chance = found.null_distribution
    return {
        "neighbours": float(found.statistic),
        "any order": float(chance.mean()),
        "spread": float(chance.std()),
        "p": float(found.pvalue),
    }


def participation_ratio(vectors: Any) -> float:
    """How many directions vectors use: ``(Σλ)²/Σλ²`` of the eigenvalues of their covariance.

    Parameters
    ----------
    vectors : array
        ``(vectors, width)``; taken at unit length, about their mean.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> bool(9.9 < participation_ratio(rng.standard_normal((100_000, 10))) < 10.1)
    True
    """
    unit = torch.nn.functional.normalize(torch.as_tensor(vectors).detach(), dim=-1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T.double()))
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


# The path through the layers --------------------------------------------------------------


def path_and_chord(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of the path of states, as the sum of its turns, and the angle between its ends.

    Parameters
    ----------
    grams : numpy.ndarray
        ``(inputs, writes + 1, writes + 1)``, of ``[h_0, Δ_1, …]``, as
        :meth:`depthutil.trajectory.Trajectory.grams` returns them.

    Returns
    -------
    tuple of numpy.ndarray
        Path and chord of each input, in radians, ``(inputs,)``. On a straight path they are
        equal; a path of many orthogonal steps is longer by the root of their number.

    Examples
    --------
    >>> from depthutil.gram import of_states
    >>> path, chord = path_and_chord(of_states([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]]))
    >>> path.round(4).tolist(), chord.round(4).tolist()
    ([1.5708], [1.5708])
    """
    h = np.asarray(grams).cumsum(1).cumsum(2)  # of the states, which are sums of writes
    size = np.sqrt(np.einsum("nii->ni", h))
    angle = np.arccos(np.clip(h / (size[:, :, None] * size[:, None, :]), -1, 1))
    return np.diagonal(angle, 1, 1, 2).sum(1), angle[:, 0, -1]


def progress(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the way from the start has come after each write, and how straight it is.

    Parameters
    ----------
    grams : numpy.ndarray
        As for :func:`path_and_chord`.

    Returns
    -------
    tuple of numpy.ndarray
        Projection of ``h_l − h_0`` on the whole way, in its units, from 0 to 1,
        ``(writes + 1, inputs)``; and the cosine of the two, ``(writes, inputs)``. The
        projection is even for a random walk of equal steps, too; the cosine then is ``√(l/ℓ)``.

    Examples
    --------
    >>> from depthutil.gram import of_states
    >>> projection, cosine = progress(of_states([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]]))
    >>> projection[:, 0].round(2).tolist(), cosine[:, 0].round(2).tolist()
    ([0.0, 0.5, 1.0], [0.71, 1.0])
    """
    grams = np.asarray(grams)
    so_far = np.tri(grams.shape[1] - 1)  # row l: which updates the way to layer l has
    way = so_far @ grams[:, 1:, 1:] @ so_far.T  # inner products of h_l − h_0
    squares = np.diagonal(way, axis1=1, axis2=2)
    projection = (way[:, :, -1] / squares[:, -1:]).T
    cosine = way[:, :, -1] / np.sqrt(squares * squares[:, -1:])
    return np.concatenate([0 * projection[:1], projection]), cosine.T


def with_cosine(grams: np.ndarray, cosine: float) -> np.ndarray:
    """The same updates' lengths, with this cosine between any two: a reference without order.

    Parameters
    ----------
    grams : numpy.ndarray
        As for :func:`path_and_chord`; the start is taken as zero.
    cosine : float
        1 for a straight path, 0 for a random walk.

    Examples
    --------
    >>> with_cosine(np.diag([5.0, 4.0, 9.0])[None], 0.5).tolist()
    [[[0.0, 0.0, 0.0], [0.0, 4.0, 3.0], [0.0, 3.0, 9.0]]]
    """
    grams = np.asarray(grams)
    size = grams.shape[1]
    lengths = np.sqrt(np.diagonal(grams, axis1=1, axis2=2)) * (np.arange(size) > 0)
    table = cosine + (1 - cosine) * np.eye(size)
    return lengths[:, :, None] * lengths[:, None, :] * table
