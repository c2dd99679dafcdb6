"""Means over tokens, with errors whose independent units are documents.

Tokens of one document resemble each other, so the error of a mean over tokens is not their
spread divided by the root of their number. Documents are drawn independently. With counts
``n_i`` and totals ``s_i`` of ``D`` documents the mean is ``m = Σ s_i / Σ n_i``, and its squared
error, linearised, is ``D / (D − 1) · Σ (s_i − m n_i)² / (Σ n_i)²`` (the ratio estimator of
survey statistics; Cochran, Sampling Techniques, section 2.11).

:func:`over_documents` has all values at hand, :func:`of_totals` each document's count and
total, and :class:`Moments` sees a corpus go by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def of_totals(totals: Any, counts: Any) -> tuple[float, float]:
    """Mean over everything that was counted, and its standard error over documents.

    Parameters
    ----------
    totals, counts : array
        Of each document, the sum of its values and how many there are, ``(documents,)``.
        Documents that count nothing are passed over.

    Returns
    -------
    tuple of float
        The mean, and its standard error; the latter is not a number with one document.

    Raises
    ------
    ValueError
        If shapes differ, a count is negative, or nothing is counted.

    Examples
    --------
    >>> of_totals([2.0, 6.0], [2, 2])
    (2.0, 1.0)
    """
    totals, counts = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    if totals.shape != counts.shape or totals.ndim != 1:
        raise ValueError(
            f"totals and counts have one entry a document, not {totals.shape} and {counts.shape}"
        )
    if not (counts >= 0).all() or not counts.any():
        raise ValueError("counts are not negative, and one at least is positive")
    totals, counts = totals[counts > 0], counts[counts > 0]
    mean = totals.sum() / counts.sum()
    documents = len(totals)
    if documents < 2:
        return float(mean), math.nan
    rest = np.sum((totals - mean * counts) ** 2)
    spread = math.sqrt(documents / (documents - 1) * rest)
    return float(mean), float(spread / counts.sum())


def over_documents(values: Any, documents: Any) -> tuple[float, float]:
    """Mean of one number a token, and its standard error over documents.

    Parameters
    ----------
    values : array
        ``(tokens,)``; numbers that are not defined (nan) are left out.
    documents : array of int
        The document of each token, ``(tokens,)``, such as ``trajectory.per_token["document"]``.

    Returns
    -------
    tuple of float
        As :func:`of_totals`.

    Examples
    --------
    >>> over_documents([0.0, 2.0, 3.0, 3.0, np.nan], [0, 0, 7, 7, 7])
    (2.0, 1.0)
    """
    values, documents = np.asarray(values, dtype=float), np.asarray(documents)
    if values.shape != documents.shape or values.ndim != 1:
        raise ValueError(
            f"values and documents have one entry a token, not {values.shape} and {documents.shape}"
        )
    there = ~np.isnan(values)
    _, number = np.unique(documents[there], return_inverse=True)
    return of_totals(np.bincount(number, weights=values[there]), np.bincount(number))


class Moments:
    """Sums over a corpus from which come means over tokens and their errors over documents.

    The error of a mean over tokens needs, of each document, only its count ``n`` and its
    total ``s``, summed as ``n nᵀ``, ``n sᵀ`` and ``s sᵀ``. Size does not depend on the number
    of tokens.

    Parameters
    ----------
    size : int
        How many numbers a token has.
    joint : bool
        Keep the sums as matrices over all numbers, which :meth:`stderr_of_average` needs.

    Attributes
    ----------
    shift : numpy.ndarray
        What the caller has subtracted from every value, ``(size,)``; near the mean, so that the
        sums of squares keep their digits.

    Examples
    --------
    >>> moments = Moments(1, joint=False)
    >>> n, s = np.array([[2.0], [2.0]]), np.array([[2.0], [6.0]])  # [0, 2] and [3, 3]
    >>> moments.add(n, s, squares=np.array([22.0]))
    >>> moments.mean().item(), moments.stderr().item(), round(moments.std().item(), 4)
    (2.0, 1.0, 1.4142)
    """

    names = ("documents", "n", "s", "squares", "shift", "nn", "ns", "ss")

    def __init__(self, size: int, joint: bool):
        self.joint = joint
        self.documents, self.n, self.s, self.squares, self.shift = np.zeros((5, size))
        shape = (size, size) if joint else (size,)
        self.nn, self.ns, self.ss = (np.zeros(shape) for _ in range(3))

    def add(self, n: np.ndarray, s: np.ndarray, squares: np.ndarray) -> None:
        """Add documents: counts and totals ``(documents, size)``, sums of squares ``(size,)``."""
        self.documents += (n > 0).sum(0)
        self.n += n.sum(0)
        self.s += s.sum(0)
        self.squares += squares
        if self.joint:
            self.nn += n.T @ n
            self.ns += n.T @ s
            self.ss += s.T @ s
        else:
            self.nn += (n * n).sum(0)
            self.ns += (n * s).sum(0)
            self.ss += (s * s).sum(0)

    def _relative(self) -> np.ndarray:
        return np.divide(self.s, self.n, out=np.full_like(self.s, np.nan), where=self.n > 0)

    def mean(self) -> np.ndarray:
        """Means over tokens, ``(size,)``."""
        return self._relative() + self.shift

    def std(self) -> np.ndarray:
        """Standard deviation over tokens."""
        spread = self.squares - self.n * self._relative() ** 2
        out = np.full_like(spread, np.nan)
        np.divide(np.maximum(spread, 0), self.n - 1, out=out, where=self.n > 1)
        return np.sqrt(out)

    def stderr(self) -> np.ndarray:
        """Standard errors of the means; not a number with a single document."""
        m = self._relative()
        nn, ns, ss = (np.diag(a) if self.joint else a for a in (self.nn, self.ns, self.ss))
        rest = np.maximum(ss - 2 * m * ns + m * m * nn, 0) * self.documents
        below = self.n**2 * (self.documents - 1)
        out = np.full_like(rest, np.nan)
        return np.sqrt(np.divide(rest, below, out=out, where=below > 0))

    def stderr_of_average(self, entries: np.ndarray) -> float:
        """Standard error of the mean over some entries, which vary together."""
        documents = self.documents[entries].min()
        if documents < 2:
            return math.nan
        at, m, n = np.ix_(entries, entries), self._relative()[entries], self.n[entries]
        ns = m[:, None] * self.ns[at]  # m_i n_i s_j, summed over documents
        rest = self.ss[at] - ns - ns.T + np.outer(m, m) * self.nn[at]
        mean = (rest / np.outer(n, n)).sum() / len(entries) ** 2
        return math.sqrt(max(mean, 0) * documents / (documents - 1))


def tally(values: Tensor, inside: Tensor) -> list[Tensor]:
    """What :meth:`Moments.add` takes, of one batch, passing over values that are nan.

    Parameters
    ----------
    values : torch.Tensor
        ``(tokens, entries)``.
    inside : torch.Tensor
        1 where a token belongs to a document, 0 elsewhere, ``(documents, tokens)``.

    Returns
    -------
    list of torch.Tensor
        Counts and totals ``(documents, entries)``, and sums of squares ``(entries,)``.

    Examples
    --------
    >>> values = torch.tensor([[0.0], [2.0], [3.0], [3.0]])
    >>> [t.tolist() for t in tally(values, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))]
    [[[2.0], [2.0]], [[2.0], [6.0]], [22.0]]
    """
    total = inside @ values
    if torch.isfinite(total).all():
        count = inside.sum(1, keepdim=True).expand_as(total)
    else:
        there = torch.isfinite(values)
        values = torch.where(there, values, 0)
        count, total = inside @ there.to(values.dtype), inside @ values
    return [count, total, (values * values).sum(0)]
